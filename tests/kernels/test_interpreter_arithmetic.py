"""The arithmetic that replaces the interpreter's: rounding of bf16 and products that do not depend on the place."""

import interpreter_arithmetic as arithmetic
import numpy as np
import torch


def test_bf16_is_rounded_as_torch_rounds_it():
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-40, 3e38, 3.4e38, float("inf"), 2.0**-133])])
    expected = values.to(torch.bfloat16)
    bits = arithmetic.encode_bf16(values.numpy())
    assert np.array_equal(bits, expected.view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(arithmetic.decode_bf16(bits), expected.float().numpy())
    assert np.isnan(arithmetic.decode_bf16(arithmetic.encode_bf16(np.float32([np.nan])))).all()


def test_a_product_does_not_depend_on_the_place():
    """A column alone, among others and at another place has the same bits; BLAS rounds by the place."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((5, 77)), generator.standard_normal((77, 40))
    a, b, total = a.astype(np.float32), b.astype(np.float32), np.zeros((5, 40), np.float32)
    whole = arithmetic.product(a, b, total)
    np.testing.assert_allclose(whole, a.astype(np.float64) @ b, rtol=1e-6, atol=1e-6)
    turned = arithmetic.product(a, np.roll(b, 13, axis=1), total)
    assert np.array_equal(np.roll(turned, -13, axis=1), whole)
    assert np.array_equal(arithmetic.product(a[2:3], b[:, 7:8], total[:1, :1]), whole[2:3, 7:8])
