"""quantize: meaning on every backend that runs here, against an independent float64 brute force."""

import pytest
import torch
from quantize_cases import backends, count_wrong, forced, near_ties, problem, rows_of_extreme_size
from torch.nn.functional import normalize as unit

from bestrq2 import ops
from bestrq2.ops.common import native
from bestrq2.ops.quantize.cuda import run_kernel

DIMENSIONS = [80, 128, 256, 320, 512, 768, 1024, 1280, 1, 7, 250]


@pytest.fixture(params=backends())
def backend(request):
    with forced(request.param) as name:
        yield name


@pytest.mark.parametrize("features", DIMENSIONS, ids=lambda n: f"D{n}")
def test_matches_brute_force(backend, features):
    x, projection, codebook = problem(700, features, 16, 1000)
    codes = ops.quantize(x, projection, codebook, backend=backend)
    assert codes.dtype == torch.int64
    assert codes.shape == (700,)
    assert count_wrong(codes, x, projection, codebook)[0] == 0


@pytest.mark.parametrize("dims", [1, 2, 3, 8, 13, 16, 20, 32, 64, 65, 130], ids=lambda n: f"d{n}")
def test_odd_shapes(backend, dims):
    for codes in (1, 2, 31, 257, 1031):
        x, projection, codebook = problem(601, 40, dims, codes)
        assert count_wrong(ops.quantize(x, projection, codebook, backend=backend), x, projection, codebook)[0] == 0


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 9, 191, 193, 1025])
def test_row_counts(backend, rows):
    x, projection, codebook = problem(rows)
    codes = ops.quantize(x, projection, codebook, backend=backend)
    assert codes.shape == (rows,)
    assert count_wrong(codes, x, projection, codebook)[0] == 0


@pytest.mark.slow
def test_50_000_rows_of_real_size():
    """Gaussian rows and rows like raw decibels (mean -50, deviation 15), whose projection cancels."""
    for offset, scale in ((0.0, 1.0), (-50.0, 15.0)):
        x, projection, codebook = problem(25_000, 256, 16, 8192, offset=offset, scale=scale)
        wrong, near = count_wrong(ops.quantize(x, projection, codebook), x, projection, codebook)
        print(f"offset {offset}: {wrong} codes wrong, {near} different inside the tie band")
        assert wrong == 0
        assert near == 0


@pytest.mark.parametrize("features", [256, 1280])
def test_decibels(backend, features):
    x, projection, codebook = problem(2000, features, 16, 2048, offset=-50.0, scale=15.0)
    assert count_wrong(ops.quantize(x, projection, codebook, backend=backend), x, projection, codebook)[0] == 0


def test_layer_norm(backend):
    x, projection, codebook = problem(800, 256, 16, 2048, offset=-50.0, scale=15.0)
    codes = ops.quantize(x, projection, codebook, normalize="layer_norm", backend=backend)
    assert count_wrong(codes, x, projection, codebook, layer_norm=True)[0] == 0
    plain = ops.quantize(x, projection, codebook, backend=backend)
    changed = (codes != plain).float().mean().item()
    print(f"layer norm changes {changed:.0%} of the codes")
    assert changed > 0.5


@pytest.mark.parametrize("books", [1, 3, 16], ids=lambda n: f"G{n}")
def test_several_codebooks(backend, books):
    x, projection, codebook = problem(600, 80, 16, 300, books)
    codes = ops.quantize(x.view(20, 30, 80), projection, codebook, backend=backend)
    assert codes.shape == (20, 30, books)
    for book in range(books):
        assert count_wrong(codes[..., book].flatten(), x, projection[book], codebook[book])[0] == 0
    shared = ops.quantize(x, projection[0], codebook, backend=backend)
    assert torch.equal(shared[:, 0], codes.view(600, books)[:, 0])
    assert count_wrong(shared[:, -1], x, projection[0], codebook[-1])[0] == 0
    one_codebook = ops.quantize(x, projection, codebook[0], backend=backend)
    assert count_wrong(one_codebook[:, -1], x, projection[-1], codebook[0])[0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_input_dtypes(backend, dtype):
    x, projection, codebook = problem(700, 96)
    x = x.to(dtype)
    assert count_wrong(ops.quantize(x, projection, codebook, backend=backend), x, projection, codebook)[0] == 0
    projection, codebook = projection.to(dtype), codebook.to(dtype)
    assert count_wrong(ops.quantize(x, projection, codebook, backend=backend), x, projection, codebook)[0] == 0


def test_every_half_and_bfloat16_value_is_read_exactly(backend):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype)
        x = x[torch.isfinite(x)]
        rows = torch.stack([x, torch.full_like(x, 0.5)], 1)
        projection = torch.eye(2)
        codebook = unit(
            torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [0.0, 1.0], [1.0, 0.2], [-1.0, 0.2]]), dim=1
        )
        codes = ops.quantize(rows, projection, codebook, backend=backend)
        assert count_wrong(codes, rows, projection, codebook)[0] == 0


def test_ties_go_to_the_lowest_index(backend):
    x, projection, codebook = problem(900, 40, 16, 97)
    repeated = codebook.repeat(9, 1)  # every code nine times, 97 apart
    codes = ops.quantize(x, projection, repeated, backend=backend)
    assert codes.max() < 97
    assert torch.equal(codes, ops.quantize(x, projection, codebook, backend=backend))
    same = codebook[:1].expand(1000, -1)
    assert (ops.quantize(x, projection, same, backend=backend) == 0).all()


def test_zero_rows_get_code_zero(backend):
    x, projection, codebook = problem(700)
    x[3], x[699] = 0.0, 0.0
    codes = ops.quantize(x, projection, codebook, backend=backend)
    assert codes[3] == codes[699] == 0
    x[:] = -61.7
    assert (ops.quantize(x, projection, codebook, normalize="layer_norm", backend=backend) == 0).all()


def test_scale_of_a_row_does_not_matter(backend):
    x, projection, codebook = problem(600)
    codes = ops.quantize(x, projection, codebook, backend=backend)
    for power in (2.0**-130, 2.0**120):
        assert torch.equal(ops.quantize(x.double() * power, projection, codebook, backend=backend), codes)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_rows_at_the_ends_of_the_range(backend, normalize):
    _, projection, codebook = problem(1)
    for x, ordinary in rows_of_extreme_size(600):
        codes = ops.quantize(x, projection, codebook, normalize=normalize, backend=backend)
        assert count_wrong(codes, ordinary, projection, codebook, normalize == "layer_norm")[0] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_not_finite_rows_are_named(backend, value, dtype):
    x, projection, codebook = problem(800)
    x = x.to(dtype).view(8, 100, -1)
    x[6, 17, 5], x[7, 99, 0] = value, value
    with pytest.raises(ValueError, match=r"x\[6, 17\] contains NaN or inf"):
        ops.quantize(x, projection, codebook, backend=backend)
    mask = torch.ones(8, 100, dtype=torch.bool)
    mask[6, 17] = mask[7, 99] = False
    codes = ops.quantize(x, projection, codebook, mask=mask, backend=backend)
    assert (codes < 0).sum() == 2
    ops.check_codes(codes, mask)
    with pytest.raises(ValueError, match=r"no code at \(6, 17\)"):
        ops.check_codes(codes)
    with pytest.raises(ValueError, match=r"quantize: x contains NaN or inf \(x has shape \(64,\)\)"):
        ops.quantize(x[6, 17], projection, codebook, backend=backend)
    with pytest.raises(ValueError, match=r"gave no code \(1 of 1\)"):
        ops.check_codes(torch.tensor(-1))


def test_projection_and_codebook_must_be_finite(backend):
    x, projection, codebook = problem(10)
    with pytest.raises(ValueError, match="finite"):
        ops.quantize(x, projection * float("inf"), codebook, backend=backend)
    codebook[-1, -1] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        ops.quantize(x, projection, codebook, backend=backend)


@pytest.mark.parametrize("books", [None, 3], ids=lambda n: f"G{n}")
def test_mask_selects_rows(backend, books):
    x, projection, codebook = problem(1500, books=books)
    whole = ops.quantize(x, projection, codebook, backend=backend)
    for share in (0.0, 0.4, 1.0):
        mask = torch.rand(1500, generator=torch.Generator().manual_seed(1)) < share
        codes = ops.quantize(x, projection, codebook, mask=mask, backend=backend)
        assert torch.equal(codes[mask], whole[mask])
        assert (codes[~mask] == -1).all()


def test_not_contiguous(backend):
    x, projection, codebook = problem(640, 64)
    expected = ops.quantize(x, projection, codebook, backend=backend)
    assert torch.equal(ops.quantize(x.T.contiguous().T, projection, codebook, backend=backend), expected)
    wide = torch.full((640, 130), float("nan"))
    wide[:, 1:129:2] = x
    assert torch.equal(ops.quantize(wide[:, 1:129:2], projection, codebook, backend=backend), expected)
    cube = x.view(8, 80, 64).permute(1, 0, 2)
    assert torch.equal(ops.quantize(cube, projection, codebook, backend=backend), expected.view(8, 80).T)
    same = x[:1].expand(700, -1)
    assert (ops.quantize(same, projection, codebook, backend=backend) == expected[0]).all()
    turned = projection.T.contiguous().T, codebook.T.contiguous().T
    assert torch.equal(ops.quantize(x, *turned, backend=backend), expected)


def test_rows_do_not_depend_on_the_batch(backend):
    """On data full of near ties: few distinct directions, so a different rounding would show."""
    x, projection, codebook = problem(1200, 256, 16, 1000, offset=-50.0, scale=15.0)
    codebook = unit(codebook[:1] + 2e-7 * codebook, dim=1)
    whole = ops.quantize(x, projection, codebook, backend=backend)
    for size, rows in ((1, 20), (7, 70), (100, 700), (601, 1200)):
        part = torch.cat([ops.quantize(some, projection, codebook, backend=backend) for some in x[:rows].split(size)])
        assert torch.equal(part, whole[:rows])
    assert torch.equal(ops.quantize(x.flip(0), projection, codebook, backend=backend).flip(0), whole)


def test_instruction_sets_agree():
    """The three sets with fused multiply-add give the same code even between codes that differ by one rounding."""
    if "cpu" not in ops.available_backends():
        pytest.skip("the C++ extension is not built")
    extension = native.extension()
    best = extension.isa()
    x, projection, codebook = problem(1000, 256, 16, 999)
    codebook = unit(codebook[:1] + 2e-7 * codebook, dim=1)
    results = {}
    for isa in ("avx2", "avx512", "avx512_vnni"):
        if extension.force_isa(isa):
            results[isa] = ops.quantize(x, projection, codebook, backend="cpu")
    extension.force_isa(best)
    for codes in results.values():
        assert torch.equal(codes, next(iter(results.values())))


NEAR_TIES = ((64, 16, 512, 0), (40, 13, 300, 3000), (32, 32, 256, -50), (24, 100, 200, 5))


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_near_ties_are_settled_exactly(backend, spread, normalize):
    """Equal to the float64 codes, not only within the contract's band: rivals closer than the rounding of fp32."""
    for seed, (features, dims, codes, offset) in enumerate(NEAR_TIES):
        x, projection, codebook = near_ties(600, features, dims, codes, spread, offset, seed)
        gold = ops.quantize(x, projection, codebook, normalize=normalize, backend="reference")
        assert torch.equal(ops.quantize(x, projection, codebook, normalize=normalize, backend=backend), gold)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_near_ties_in_the_arithmetic_of_the_cuda_kernel(normalize):
    if "cpu" not in ops.available_backends():
        pytest.skip("the C++ extension is not built")
    for seed, (features, dims, codes, offset) in enumerate(NEAR_TIES[:3]):
        for spread in (1e-4, 1e-6, 1e-8):
            x, projection, codebook = near_ties(150, features, dims, codes, spread, offset, seed)
            gold = ops.quantize(x, projection, codebook, normalize=normalize, backend="reference")
            emulated = native.extension().quantize_cuda_emulated
            assert torch.equal(run_kernel(emulated, x, projection, codebook, None, normalize, 0), gold)


def test_duplicated_codes_and_silence():
    """Every row has a tie: the lower code of two equal ones, and code 0 for rows that are projected to zero."""
    if "cpu" not in ops.available_backends():
        pytest.skip("the C++ extension is not built")
    x, projection, codebook = problem(520, 24, 16, 100)
    x[5:9] = 0.0
    gold = ops.quantize(x, projection, codebook, backend="reference")
    twice = torch.cat([codebook, codebook])
    assert torch.equal(
        run_kernel(native.extension().quantize_cuda_emulated, x, projection, twice, None, "none", 0), gold
    )
    for choice in backends():
        with forced(choice) as name:
            assert torch.equal(ops.quantize(x, projection, twice, backend=name), gold)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_of_the_cuda_kernel(dtype, normalize):
    """The arithmetic of one CUDA thread, run on the CPU; only the launch and the shared memory need a GPU."""
    if "cpu" not in ops.available_backends():
        pytest.skip("the C++ extension is not built")
    emulated = native.extension().quantize_cuda_emulated
    cases = ((256, 16, 0, 1), (256, 16, -50, 15), (1280, 16, -50, 15), (37, 13, 0, 1))
    for features, dims, offset, scale in cases:
        x, projection, codebook = problem(500, features, dims, 700, offset=offset, scale=scale)
        x = x.to(dtype)
        codes = run_kernel(emulated, x, projection, codebook, None, normalize, 0)
        assert count_wrong(codes, x, projection, codebook, normalize == "layer_norm")[0] == 0
    assert torch.equal(run_kernel(emulated, x, projection, codebook.repeat(3, 1), None, normalize, 0), codes)
    for extreme, ordinary in rows_of_extreme_size(40, features):
        if extreme.dtype != torch.float64:
            some = run_kernel(emulated, extreme, projection, codebook, None, normalize, 0)
            assert count_wrong(some, ordinary, projection, codebook, normalize == "layer_norm")[0] == 0
    mask = torch.rand(500) < 0.5
    x[3], x[4, 5], x[5, 6], mask[3:6] = 0.0, float("nan"), float("inf"), True
    some = run_kernel(emulated, x, projection.expand(2, -1, -1), codebook, mask, normalize, 0)
    codes[3], codes[4], codes[5], codes[~mask] = 0, -1, -1, -1
    assert torch.equal(some, codes[:, None].expand(-1, 2))


def test_codes_of_very_different_length(backend):
    """Screening bounds come from the longest code; a codebook that is not unit still gives the largest product."""
    x, projection, codebook = problem(700, 64, 16, 700)
    codebook = codebook * torch.logspace(-3, 1, 700)[:, None]
    codes = ops.quantize(x, projection, codebook, backend=backend)
    scores = (x.double() @ projection.double()) @ codebook.double().T
    gap = scores.max(1).values - scores.gather(1, codes[:, None]).squeeze(1)
    assert (gap < 1e-5 * scores.abs().amax(1)).all()


def test_every_term_matters(backend):
    """Dropping the projection, the last code, or the last feature changes codes: the checks above can fail."""
    x, projection, codebook = problem(900, 16, 16, 64)
    codes = ops.quantize(x, projection, codebook, backend=backend)
    for changed in (
        ops.quantize(x, torch.eye(16), codebook, backend=backend),
        ops.quantize(x[:, :-1], projection[:-1], codebook, backend=backend),
        ops.quantize(x, projection, codebook.flip(0), backend=backend),
    ):
        assert (changed != codes).float().mean() > 0.05
    assert (codes == 63).any()
    assert not (ops.quantize(x, projection, codebook[:63], backend=backend) == 63).any()
