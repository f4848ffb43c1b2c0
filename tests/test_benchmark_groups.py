"""Groups of rows in processes of their own: a provider that dies, and deadlines of processes."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmark_cases import FACTS, FOLDER, GOOD, MACHINE, provider, rows_of, square_case

import benchmarks
from benchmarks import groups, measure, processes, report, run
from benchmarks.gpu.rows import group_seconds

PYTHON = sys.executable
SQUARE = """
import os, torch
from benchmarks.common import Case, Provider, Work, gold_of, seeded

OP, BASELINE = "square", "eager"
SHAPES = {"cpu": ("10",), "cuda": ("10",)}
QUICK_SHAPES, DTYPES = ("10",), {"cpu": ("float32",), "cuda": ("float32",)}

def make_case(shape, dtype, device):
    x = seeded(int(shape), dtype=dtype, device=device).requires_grad_()
    return Case(op=OP, shape=shape, dtype=dtype, device=device, inputs={"x": x}, differentiable=("x",),
                upstream=seeded(int(shape), dtype=dtype, device=device, seed=1), work=Work(1, 1),
                backward_work=Work(1, 1), gold=gold)

def gold(case):
    with open(os.environ["GOLDS"], "a") as file:
        file.write("once\\n")
    return gold_of(case, lambda x: x ** 2)

def provider(name, first=lambda: None):
    return Provider(name, lambda case: lambda: (first(), case.inputs["x"] ** 2)[1])

PROVIDERS = [provider("eager"), provider("crashes", os.abort), provider("good")]
"""


@pytest.fixture
def square(tmp_path, monkeypatch):
    """An operation of which a provider crashes, beside the real ones."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").write_text(f"__path__ += [{str(FOLDER)!r}]\n")
    (package / "square.py").write_text(SQUARE)
    environment = groups.child_environment() | {"PYTHONPATH": str(tmp_path) + ":" + str(FOLDER.parent)}
    environment["GOLDS"] = str(tmp_path / "golds")
    monkeypatch.setattr(groups, "child_environment", lambda: environment)
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(package)])


def plan(**changes):
    options = {"device": "cpu", "machine": MACHINE, "facts": FACTS, "caches": ("cold",), "memory": False}
    return groups.Plan(**options | {"budget": measure.Budget(repeats=2), "group_seconds": 120.0} | changes)


@pytest.mark.slow
def test_a_provider_that_dies_costs_only_its_own_row(square, tmp_path):
    rows = {row["provider"]: row for row in groups.run_isolated(groups.Group("square", "10", "float32"), plan())}
    assert {name: row["status"] for name, row in rows.items()} == {
        "eager": "ok",
        "good": "ok",
        "crashes": "failed",
    }
    assert "SIGABRT" in rows["crashes"]["note"]
    assert report.table(list(rows.values()))
    assert rows["good"]["speedup"] > 0, "against the row of another process"
    assert (tmp_path / "golds").read_text() == "once\n"


def test_a_group_that_cannot_begin_gets_one_row_with_the_reason():
    (row,) = groups.run_isolated(groups.Group("quantize", "nonsense", "float32"), plan())
    assert (row["status"], row["provider"]) == ("failed", "all providers")
    assert "a shape reads like" in row["note"]


def test_providers_behind_the_deadline_are_skipped():
    """Those before it have their times: a slow peer at the end costs no row of others."""
    group, named = groups.Group("quantize", "8x8->8x8", "float32"), []
    options = plan(providers=("reference", "bestrq2[cpu]", "eager"))
    rows = groups.run_group(group, options, None, named.append, deadline=time.monotonic() - 1)
    assert len(rows) > 1
    assert {(row["status"], row["note"]) for row in rows} == {("skipped", "no time was left")}
    assert all(row["status"] == "ok" for row in groups.run_group(group, plan(providers=("reference",)), None, print))


def test_a_row_is_handed_over_as_soon_as_there_is_one():
    """Timed alone; where time is left, the interleaved rows are returned."""
    group, kept = groups.Group("quantize", "8x8->8x8", "float32"), []
    options = plan(providers=("reference", "published eager"), first=("published eager", "reference"))
    rows = groups.run_group(group, options, None, print, keep=kept.append)
    assert [row["provider"] for row in kept] == ["published eager", "reference"]
    assert all(row["status"] == "ok" and row["fwd_ms"] > 0 and measure.ALONE in row["note"] for row in kept)
    assert all(row["pct_of_limit"] > 0 and row["ceiling_source"] == "invented" for row in kept)
    assert [row["speedup"] for row in rows][:1] == [1.0]
    assert not any(measure.ALONE in row["note"] for row in rows)


def test_at_the_deadline_the_rows_are_those_timed_alone(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "monotonic", lambda: clock[0])

    def keep(row):
        clock[0] = 10.0

    options = plan(providers=("reference", "published eager"), first=("reference",))
    group = groups.Group("quantize", "8x8->8x8", "float32")
    first, second = groups.run_group(group, options, None, print, deadline=5.0, keep=keep)
    assert (first["provider"], first["status"], first["fwd_ms"] > 0) == ("reference", "ok", True)
    assert (second["provider"], second["note"]) == ("published eager", "no time was left")


def test_a_provider_that_is_not_ready_in_its_time_has_failed():
    slow = provider("slow", lambda x: time.sleep(30))
    begin = time.monotonic()
    rows = measure.measure(
        *("square", square_case(), [slow, GOOD], MACHINE, FACTS),
        **{"baseline": "good", "caches": ("cold",), "budget": measure.Budget(repeats=1), "worker": None},
        provider_seconds=0.3,
    )
    assert time.monotonic() - begin < 10
    assert [(row["status"], row["note"]) for row in rows] == [("failed", "not ready after 0 s"), ("ok", "worst: out")]


def test_float64_results_are_computed_once(tmp_path):
    computed = []
    gold = groups._kept(lambda case: computed.append(case) or {"out": torch.ones(3)}, tmp_path / "gold.pt")
    case = square_case()
    assert all(torch.equal(gold(case)["out"], torch.ones(3)) for _ in range(2))
    assert len(computed) == 1


def test_processes_of_a_group_go_on_where_the_last_one_ended(monkeypatch):
    """Each of these hangs at its second provider: the rows of the first stay, and the group ends with its time."""
    asked, clock, row = [], [0.0], next(iter(rows_of([GOOD]).values()))

    def hangs(folder, seconds, provider_seconds):
        excluded = json.loads((folder / "request.json").read_text())["plan"]["without"]
        left = [name for name in "abcdefg" if name not in excluded]
        asked.append((seconds, "".join(left)))
        report.append_csv(folder / "alone.csv", [{**row, "provider": left[0], "speedup": ""}])
        (folder / "at.txt").write_text(left[1])
        (folder / "log.txt").write_text("")
        clock[0] += 40.0
        return processes.Ended(-15, True, 40.0)

    monkeypatch.setattr(groups.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(groups, "run_watched", hangs)
    rows = groups.run_isolated(groups.Group("quantize", "8x8->8x8", "float32"), plan(group_seconds=100.0))
    assert asked == [(100.0, "abcdefg"), (60.0, "cdefg"), (20.0, "efg")]
    assert [(row["provider"], row["status"]) for row in rows] == [
        (name, ("ok", "failed")[place % 2]) for place, name in enumerate("abcdef")
    ]
    assert rows[1]["note"] == "stopped at its deadline of 40 s: no output"


@pytest.mark.parametrize(("group", "own", "late"), [(0.5, 60.0, True), (60.0, 0.5, True), (60.0, 60.0, False)])
def test_a_process_may_be_at_one_provider_for_its_time(tmp_path, monkeypatch, group, own, late):
    """However long the group has; without a provider (imports, interleaved timing) only the group's time counts."""
    code = "import pathlib, time; pathlib.Path({!r}).write_text({!r}); time.sleep({})"
    code = code.format(str(tmp_path / "at.txt"), "peer" if late else "", 60 if late else 0)
    monkeypatch.setattr(
        groups, "Running", lambda command, log, environment: processes.Running([PYTHON, "-c", code], log, environment)
    )
    ended = groups.run_watched(tmp_path, group, own)
    assert ended.late == late
    assert ended.seconds < 20


@pytest.mark.parametrize(
    ("left", "groups_left", "expected"), [(400, 7, 800 / 7), (110, 7, 40), (20, 7, 20), (50, 1, 50)]
)
def test_a_group_of_a_gpu_run_takes_at_most_twice_its_share(left, groups_left, expected):
    assert group_seconds(left, groups_left) == pytest.approx(expected)


def test_rows_are_saved_group_by_group(tmp_path, monkeypatch, capsys):
    """A run that is interrupted in its second group has the first on disk; the ceilings are in every row."""
    monkeypatch.setattr(run, "describe_machine", lambda device: MACHINE)
    measured = []

    def fails_later(*arguments):
        if measured:
            raise KeyboardInterrupt
        measured.append(arguments)
        return groups.run_group(*arguments)

    monkeypatch.setattr(run, "run_group", fails_later)
    path = tmp_path / "rows.csv"
    arguments = ["--ops", "quantize", "--shapes", "8x8->8x8", "9x8->8x8", "--device", "cpu", "--no-memory"]
    with pytest.raises(KeyboardInterrupt):
        run.main([*arguments, "--repeats", "1", "--providers", "reference", "--commit", "abc", "--save", str(path)])
    rows = report.read_csv(path)
    assert {row["shape"] for row in rows} == {"8x8->8x8"}
    assert {row["commit"] for row in rows} == {"abc"}
    assert rows[0]["ceiling_tflops"] == pytest.approx(MACHINE.flops["float32"] / 1e12)
    assert rows[0]["ceiling_source"] == "invented"


def test_rows_of_before_the_ceilings_are_read():
    files = sorted((FOLDER / "results").glob("*2026-11-26.csv"))
    assert files
    for path in files:
        assert all(row["ceiling_tflops"] == "" for row in report.read_csv(path))


@pytest.mark.parametrize("ignores", [False, True])
def test_a_process_group_ends_at_its_deadline(tmp_path, ignores):
    """With its children, and also where it does not listen to SIGTERM."""
    child = "import time; time.sleep(60)"
    handler = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if ignores else ""
    code = f"import signal, subprocess, sys; {handler} c = subprocess.Popen([sys.executable, '-c', {child!r}]);"
    code += "print(c.pid, flush=True); c.wait()"
    begin = time.monotonic()
    running = processes.Running([sys.executable, "-c", code], tmp_path / "log")
    ended = running.wait(1.5, grace=0.5)
    assert ended.late
    assert time.monotonic() - begin < 10
    pid = int((tmp_path / "log").read_text())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("a child of the process outlived its deadline")


def test_how_a_process_ended_is_told(tmp_path):
    for code, text in (("pass", "exit status 0"), ("import os; os.abort()", "died of SIGABRT")):
        ended = processes.run_process([sys.executable, "-c", code], tmp_path / "log", 30)
        assert ended.text == text
        assert ended.good == (code == "pass")
    assert processes.Ended(0, True, 3.2).text == "stopped at its deadline of 3 s"
