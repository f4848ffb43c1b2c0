"""Groups of rows in processes of their own: a provider that dies, and deadlines of processes."""

import sys
import time
from pathlib import Path

import pytest
from benchmark_cases import FACTS, FOLDER, MACHINE

from benchmarks import groups, measure, processes, report, run
from benchmarks.gpu.rows import group_seconds

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
                backward_work=Work(1, 1), gold=lambda case: gold_of(case, lambda x: x ** 2))

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
    monkeypatch.setattr(groups, "child_environment", lambda: environment)


def plan(**changes):
    options = {"device": "cpu", "machine": MACHINE, "facts": FACTS, "caches": ("cold",), "memory": False}
    return groups.Plan(**options | {"budget": measure.Budget(repeats=2), "group_seconds": 120.0} | changes)


@pytest.mark.slow
def test_a_provider_that_dies_costs_only_its_own_row(square):
    rows = {row["provider"]: row for row in groups.run_isolated(groups.Group("square", "10", "float32"), plan())}
    assert {name: row["status"] for name, row in rows.items()} == {
        "eager": "ok",
        "good": "ok",
        "crashes": "failed",
    }
    assert "SIGABRT" in rows["crashes"]["note"]
    assert report.table(list(rows.values()))


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


def test_attempts_share_the_time_of_a_group(monkeypatch):
    """A group whose processes all hang takes its own time, not that time for every attempt."""
    given = []

    def hangs(command, log, seconds, environment):
        given.append(seconds)
        (Path(command[-1]) / "at.txt").write_text(f"peer {len(given)}")
        log.write_text("")
        clock[0] += seconds
        return processes.Ended(-15, True, seconds)

    clock = [0.0]
    monkeypatch.setattr(groups.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(groups, "run_process", hangs)
    rows = groups.run_isolated(groups.Group("quantize", "8x8->8x8", "float32"), plan(group_seconds=100.0))
    assert [row["provider"] for row in rows] == ["peer 1", "peer 2", "peer 3"]
    assert given == pytest.approx([60.0, 24.0, 16.0])


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
