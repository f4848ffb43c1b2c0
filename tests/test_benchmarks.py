"""The benchmark framework itself, and pytest-benchmark entries that watch for regressions.

Timings are off by default (each entry runs once); ``pytest tests/test_benchmarks.py --benchmark-enable`` times them.
"""

import os
import subprocess
import sys

import pytest
import torch
from benchmark_cases import CPU, FOLDER, GOOD, MACHINE, provider, rows_of

from benchmarks import common, measure, memory, report, run


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]  # should be twice that


@pytest.mark.parametrize(
    ("function", "where"),
    [
        (lambda x: x * x + 1e-2, "out"),
        (WrongGradient.apply, "grad x"),
        (lambda x: x * x / (x.detach() != x.detach()[5]), "out"),
    ],
    ids=["value", "gradient", "nan"],
)
def test_wrong_provider_is_flagged(function, where):
    rows = rows_of([GOOD, provider("wrong", function)])
    assert rows["good", "cold"]["status"] == "ok"
    assert rows["good", "cold"]["max_error"] < 1e-6
    wrong = rows["wrong", "cold"]
    assert wrong["status"] == "wrong"
    assert wrong["max_error"] > 1e-4
    assert where in wrong["note"]
    assert "WRONG" in report.table(list(rows.values()))


def test_wrong_shape_is_an_infinite_error():
    error, note = common.relative_errors({"out": torch.zeros(2, 3)}, {"out": torch.zeros(3, 2)})
    assert error == float("inf")
    assert "(2, 3) instead of (3, 2)" in note


def test_skipped_and_failed_providers_are_named():
    def raises(x):
        raise RuntimeError("no such luck\nsecond line")

    def inapplicable(case):
        raise common.Skip("only on Tuesdays")

    rows = rows_of(
        [
            GOOD,
            provider("absent peer", lambda x: x, needs="a_package_that_does_not_exist"),
            common.Provider("inapplicable", inapplicable),
            provider("gpu only", lambda x: x, on=("cuda",)),
            provider("raises", raises),
        ]
    )
    text = report.table(list(rows.values()))
    for name, status, reason in (
        ("absent peer", "skipped", "not installed (no module 'a_package_that_does_not_exist')"),
        ("inapplicable", "skipped", "only on Tuesdays"),
        ("gpu only", "skipped", "only for cuda"),
        ("raises", "failed", "RuntimeError: no such luck"),
    ):
        row = rows[name, ""]
        assert (row["status"], row["note"], row["fwd_ms"]) == (status, reason, "")
        assert f"{status.upper()}: {reason}" in text


def test_provider_that_fails_while_timed_keeps_the_others():
    calls = []

    def flaky(x):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of luck")
        return x * x

    rows = rows_of([GOOD, provider("flaky", flaky)])
    assert rows["flaky", "cold"]["status"] == "failed"
    assert rows["good", "cold"]["repeats"] == 3


def test_forward_and_backward_are_timed_separately():
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            measure.time.sleep(0.01)
            return x * x

        @staticmethod
        def backward(ctx, gradient):
            measure.time.sleep(0.03)
            return 2 * gradient * ctx.saved_tensors[0]

    for cache in ("hot", "cold"):
        rows = rows_of([GOOD, provider("slow", Slow.apply)], caches=(cache,))
        slow, good = rows["slow", cache], rows["good", cache]
        assert 10 <= slow["fwd_ms"] < 25
        assert 30 <= slow["bwd_ms"] < 45
        assert slow["fwd_p20"] <= slow["fwd_ms"] <= slow["fwd_p80"]
        total = slow["fwd_ms"] + slow["bwd_ms"]
        assert slow["speedup"] == pytest.approx((good["fwd_ms"] + good["bwd_ms"]) / total)
        # 1e9 FLOP/s and 1e9 bytes/s: 8,000 bytes forward and 12,000 backward bound it to 0.02 ms.
        assert slow["limit_ms"] == pytest.approx(0.02)
        assert slow["pct_of_limit"] == pytest.approx(100 * 0.02 / total)


def test_limit_is_that_of_the_whole_group(monkeypatch):
    """A machine that was busy when a group began and free when it ended would else have rows above 100 %."""
    again = iter((1.0, 4.0))

    def measure_again(self, work):
        self.bandwidth *= next(again)

    monkeypatch.setattr(type(MACHINE), "measure_again", measure_again)
    before = MACHINE.bandwidth
    try:
        row = rows_of([GOOD])["good", "cold"]
    finally:
        MACHINE.bandwidth = before
    assert row["ceiling_gb_per_s"] == pytest.approx(4 * before / 1e9)
    assert next(again, None) is None


def test_budget_limits_repeats():
    budget = measure.Budget(seconds=1.0, at_least=3, at_most=10)
    assert budget.wants_more(measure.Times([900.0, 900.0]))
    assert not budget.wants_more(measure.Times([900.0, 900.0, 900.0]))
    assert not budget.wants_more(measure.Times([0.1] * 10))
    assert measure.Budget(repeats=1).wants_more(measure.Times())
    assert not measure.Budget(repeats=1).wants_more(measure.Times([0.1]))


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.2, 1.8), (0.5, 3.0), (1.0, 5.0)])
def test_quantile_interpolates(share, expected):
    assert measure.quantile([5.0, 1.0, 2.0, 4.0, 3.0], share) == pytest.approx(expected)


def test_csv_round_trip(tmp_path):
    rows = list(rows_of([GOOD, provider("absent, peer", lambda x: x, needs="nowhere_to_be_found")]).values())
    path = tmp_path / "new folder" / "rows.csv"
    report.append_csv(path, rows)
    report.append_csv(path, rows[:1])
    back = report.read_csv(path)
    assert [row["provider"] for row in back] == ["good", "absent, peer", "good"]
    for name in common.FIELDS:
        expected = rows[0][name]
        assert back[0][name] == (pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else expected), name
    newest = report.latest(back)
    assert [row["provider"] for row in newest] == ["absent, peer", "good"]
    text = report.markdown(back)
    assert "`square` 1000 float32" in text
    assert "absent, peer (square): not installed" in text


def test_csv_of_another_version_is_refused(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("op,shape,milliseconds\n")
    with pytest.raises(ValueError, match="expected the columns"):
        report.read_csv(path)
    with pytest.raises(ValueError, match="milliseconds"):
        report.append_csv(path, [])
    assert path.read_text() == "op,shape,milliseconds\n"


def test_plot_is_drawn(tmp_path):
    plots = pytest.importorskip("benchmarks.plots")
    rows = list(
        rows_of([GOOD, provider("wrong", lambda x: x * x + 1), provider("no", lambda x: x, needs="no_")]).values()
    )
    rows[0]["peak_mb"], rows[1]["peak_mb"] = 3.5, 100.0
    (image,) = plots.draw(rows, tmp_path / "name")
    assert image == tmp_path / "name_square.png"
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(memory.obstacle() is not None, reason=str(memory.obstacle()))
@pytest.mark.parametrize(("forward", "backward"), [(3, 0), (1, 3)])
@pytest.mark.parametrize("megabytes", [8, 64])
def test_peak_memory_of_known_allocation(megabytes, forward, backward):
    """In a process of its own, as the benchmark does, so that this process keeps its allocator's defaults."""
    program = f"""
import torch
from benchmarks import common, memory

class Hidden(torch.autograd.Function):
    # Allocates multiples of x and frees them before it returns: only a high-water mark can see them.
    @staticmethod
    def forward(ctx, x):
        return x.sum() + torch.ones({forward} * x.numel())[0]

    @staticmethod
    def backward(ctx, gradient):
        gradients = gradient.expand({megabytes} * 250_000).contiguous()
        return gradients + torch.ones({backward} * gradients.numel() + 1)[0] * 0 if {backward} else gradients

memory.return_freed_memory()
x = torch.ones({megabytes} * 250_000, requires_grad=True)
case = common.Case(op="", shape="", dtype=x.dtype, device=x.device, inputs={{"x": x}}, differentiable=("x",),
                   work=common.Work(0, 0), backward_work=common.Work(0, 0), gold=None)
call = lambda: Hidden.apply(x)
memory.evaluate(case, call)
print(memory.peak_bytes(case, call))
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    # x long: its gradient, which must be held in the end, makes room that the forward may use before.
    assert int(result.stdout) == pytest.approx(max(forward - 1, backward) * 1e6 * megabytes, rel=0.1, abs=5e5)


@pytest.mark.skipif(memory.obstacle() is not None, reason=str(memory.obstacle()))
def test_memory_worker_answers_skips_fails_and_survives():
    from benchmarks.ops import quantize

    case = quantize.make_case("4096x64->16x4096", torch.float32, CPU)
    bad = quantize.make_case("8x8->8x8", torch.float32, CPU)
    bad.shape = "8 by 8"
    by_name = {provider.name: provider for provider in quantize.PROVIDERS}
    worker = memory.Worker(threads=1)
    try:
        scores = worker.peak_bytes("quantize", case, by_name["published eager"])
        assert scores == pytest.approx(4096 * 4096 * 4, rel=0.1)
        assert worker.peak_bytes("quantize", case, by_name["eager in row blocks"]) < 0.5 * scores
        with pytest.raises(common.Skip, match="cuda"):
            worker.peak_bytes("quantize", case, by_name["bestrq2[cuda]"])
        with pytest.raises(memory.Failed, match="a shape reads like"):
            worker.peak_bytes("quantize", bad, by_name["bestrq2"])
        worker.process.kill()
        with pytest.raises(memory.Failed, match="out of memory"):
            worker.peak_bytes("quantize", case, by_name["bestrq2"])
        assert worker.peak_bytes("quantize", case, by_name["published eager"]) == pytest.approx(scores, rel=0.1)
    finally:
        worker.close()


def test_quantize_case_counts_wrong_codes():
    from benchmarks.ops import quantize

    case = quantize.make_case("500x32->8x256x3", torch.float32, CPU)
    gold = case.gold_results
    codes = torch.stack([(rows @ book.T).argmax(-1) for rows, book in zip(gold["directions"], gold["codebook"])], -1)
    assert case.errors({"out": codes}) == (0.0, "0 of 1500 codes wrong")
    codes[7, 1] = (codes[7, 1] + 1) % 256
    codes[9, 2] = -1
    assert case.errors({"out": codes}) == (2 / 1500, "2 of 1500 codes wrong")


@pytest.mark.parametrize("shape", ["300x32->8x256", "300x32->8x256x3"])
def test_every_installed_quantize_provider_is_exact_in_fp32(shape):
    from benchmarks.ops import quantize

    case = quantize.make_case(shape, torch.float32, CPU)
    ran = []
    for candidate in quantize.PROVIDERS:
        if candidate.name.startswith("torch.compile"):
            continue  # compiling takes seconds; run.py checks it at every shape
        try:
            call = candidate.prepare(case)
            results = common.evaluate(case, call)
        except common.Skip:
            continue
        assert case.errors(results)[0] == 0.0, candidate.name
        ran.append(candidate.name)
    assert {"bestrq2", "reference", "published eager", "SpeechBrain formula"} <= set(ran)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["B3H2N21d24", "B5H2N21d24-ragged"])
def test_attention_providers_of_cpus_agree(shape, dtype):
    """Ours, PyTorch's kernels and stored scores, output and the gradient of qkv; padding counts as zero for all."""
    module = common.load_operation("short_attention")
    case = module.make_case(shape, getattr(torch, dtype), CPU)
    right = set()
    for peer in module.PROVIDERS:
        if peer.name == "torch.compile" or "cpu" not in peer.on:
            continue
        try:
            error, where = case.errors(common.evaluate(case, peer.prepare(case)))
        except common.Skip:
            continue
        assert error <= (2e-6 if dtype == "float32" else 2e-2), f"{peer.name}: {error} {where}"
        right.add(peer.name)
    assert right >= {"bestrq2", "SDPA", "stored scores"}


def test_limit_is_the_slowest_resource():
    assert MACHINE.limit_ms(common.Work(flops=3e6, bytes=1e6)) == pytest.approx(3.0)
    assert MACHINE.limit_ms(common.Work(flops=3e6, bytes=1e6, arithmetic="bfloat16")) == pytest.approx(1.5)
    assert MACHINE.limit_ms(common.Work(flops=3e6, bytes=7e6)) == pytest.approx(7.0)
    assert MACHINE.limit_ms(common.Work({"float32": 3e6, "bfloat16": 3e6}, bytes=1e6)) == pytest.approx(4.5)
    assert MACHINE.limit_ms(common.Work(3e6, 1e6), common.Work(1e6, 2e6), None) == pytest.approx(5.0)


def test_command_line_runs_saves_and_makes_the_readme_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "describe_machine", lambda device: MACHINE)
    path = tmp_path / "rows.csv"
    arguments = ["--ops", "quantize", "--shapes", "64x32->8x128", "--device", "cpu", "--repeats", "2", "--no-memory"]
    arguments += ["--providers", "bestrq2", "published", "faiss", "--save", str(path)]
    assert run.main(arguments) == 0
    assert "64x32->8x128" in capsys.readouterr().out
    rows = report.read_csv(path)
    assert {"bestrq2", "bestrq2[triton]", "published eager", "faiss IndexFlatIP"} <= {row["provider"] for row in rows}
    assert all(row["repeats"] == 2 for row in rows if row["status"] == "ok")
    assert "benchmarks/run.py --ops quantize" in rows[0]["command"]
    assert run.main(["--readme-table", str(path)]) == 0
    assert "| `quantize` 64x32->8x128 float32 | bestrq2 |" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--shapes", "8x8->8x8"], ["--ops", "nothing"]])
def test_command_line_refuses_nonsense(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


REGRESSIONS = [
    (op, shape, provider.name)
    for op in run.available_ops()
    for shape in common.load_operation(op).QUICK_SHAPES[-1:]
    for provider in common.load_operation(op).PROVIDERS
    if provider.name in ("bestrq2", "reference")
]


@pytest.mark.parametrize(("op", "shape", "name"), REGRESSIONS, ids=["-".join(entry) for entry in REGRESSIONS])
def test_speed(benchmark, op, shape, name):
    """Forward and backward of our operation and of the reference at the smallest quick shape."""
    module = common.load_operation(op)
    case = module.make_case(shape, getattr(torch, module.DTYPES["cpu"][0]), CPU)
    call = next(provider for provider in module.PROVIDERS if provider.name == name).prepare(case)
    benchmark.group = f"{op} {shape}"
    results = benchmark(common.evaluate, case, call)
    assert case.errors(results)[0] <= case.tolerance
