"""Products under bf16 autocast on a processor with and without instructions for bf16."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bestrq2.layers.block_rows import linear
from bestrq2.ops.common import native


class Products(TorchDispatchMode):
    """Collects the types of the operands of every matrix product."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.types.update(x.dtype for x in args)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(native.extension_obstacle() is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize(("most", "products"), [("none", torch.float32), ("amx", torch.bfloat16)])
def test_products_have_the_type_that_is_multiplied(most, products):
    """PyTorch imitates bf16 products a hundred times slower than those of fp32, and autocast asks for them."""
    if most != "none" and native.extension().bf16_dot() == "none":
        pytest.skip("no bf16 instructions here")
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40), torch.randn(50, 24, requires_grad=True)
    native.extension().limit_bf16_dot(most)
    try:
        with Products() as found:
            with torch.autocast("cpu", torch.bfloat16):
                out = linear(layer, x)
            grads = torch.autograd.grad(out.float().square().sum(), (x, layer.weight, layer.bias))
    finally:
        native.extension().limit_bf16_dot("amx")
    assert found.types == {products}
    assert out.dtype == torch.bfloat16
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in (x, layer.weight)]
    gold = rounded[0] @ rounded[1].T + layer.bias.detach().double()
    golden = torch.autograd.grad(gold.square().sum(), rounded)
    for one, other in ((out, gold), *zip(grads, golden)):
        assert float((one.detach().double() - other.detach()).norm() / other.detach().norm()) < 2**-7
