"""benchmarks/gpu_run.py without a GPU: a rehearsal of all stages, and faults in stages and on the disk."""

import csv
import errno
import os
import re
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import pytest
from benchmark_cases import FACTS, FOLDER, GOOD, MACHINE, rows_of

from benchmarks import common, gpu_run, report
from benchmarks.gpu import facts, merge, orchestration, plan, rows, summary, workloads
from benchmarks.gpu.plan import PACK_SECONDS, STAGES, Request, RunOptions, Stage, read_request

FILES = {
    "summary.md",
    "rows.csv",
    "train.csv",
    "tuned.json",
    "tests.txt",
    "profile.txt",
    "sanitizer.txt",
    "logs.tar.gz",
}


@pytest.mark.slow
def test_rehearsal_of_every_stage(tmp_path):
    """A GPU run at tiny sizes: every stage ends well and leaves its file."""
    pytest.importorskip("triton")
    out = tmp_path / "out"
    command = [sys.executable, str(FOLDER / "gpu_run.py"), "--out", str(out), "--rehearse", "--seconds", "600"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    with tarfile.open(out / "logs.tar.gz") as logs:
        printed = "".join(logs.extractfile(name).read().decode(errors="replace")[-1500:] for name in logs.getnames())
    assert result.returncode == 0, result.stdout + result.stderr + printed
    assert {path.name for path in out.iterdir()} == FILES
    text = (out / "summary.md").read_text()
    assert result.stdout.endswith(text + "\n")
    assert len(text.splitlines()) < 100
    for stage in STAGES:
        assert f"| {stage.name} | ok |" in text
    found = report.read_csv(out / "rows.csv")
    assert {row["provider"] for row in found} >= {"bestrq2[triton]", "published eager"}
    assert all(row["status"] == "ok" for row in found)
    with (out / "train.csv").open(newline="") as file:
        step, run = csv.DictReader(file)
    assert float(step["ms"]) > 0
    assert "loss" in run["note"]
    assert "quantize/16/few" in (out / "tuned.json").read_text()
    assert "1 passed" in (out / "tests.txt").read_text()


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(orchestration, "_gpu", lambda: False)
    assert gpu_run.main(["--out", str(tmp_path / "out")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().out


FAULTS = {
    "hangs": "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
    "crashes": "import os; print('about to', flush=True); os.abort()",
    "silent": "pass",
    "raises": "raise RuntimeError('no such luck')",
    "good": "import pathlib, sys; pathlib.Path(sys.argv[1]).with_name('good.note.json').write_text('{}')",
}


def faulty(stage: Stage, request: Path):
    return [sys.executable, "-c", FAULTS[stage.name], str(request)]


def stages(*names, seconds=30.0):
    return [Stage(name, seconds if name != "hangs" else 1.0, name) for name in names]


def test_no_fault_of_a_stage_stops_the_next(tmp_path, capsys):
    options = RunOptions(tmp_path / "out", 90.0)
    begin = time.monotonic()
    monkeyed = orchestration._gpu
    orchestration._gpu = lambda: True
    try:
        status = orchestration.run_stages(options, stages("hangs", "crashes", "silent", "raises", "good"), faulty)
    finally:
        orchestration._gpu = monkeyed
    assert status == 1
    assert time.monotonic() - begin < 60
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "| hangs | stopped at its deadline" in text
    assert "| crashes | died of SIGABRT |" in text
    assert "about to" in text
    assert "| silent | ok |" in text
    assert "RuntimeError: no such luck" in text
    assert "| good | ok |" in text
    assert capsys.readouterr().out.endswith(text + "\n")
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as logs:
        assert "crashes.log" in logs.getnames()


def test_a_full_disk_costs_files_and_not_the_run(tmp_path, monkeypatch, capsys):
    """Nothing can be written any more from the second stage on; the others are still told, and nothing is left over."""
    write = Path.write_text
    full = []

    def write_text(self, text, *rest, **options):
        if full and "request" not in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        if "silent" in self.name and "request" in self.name:
            full.append(True)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, text, *rest, **options)

    def no_archive(*_):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(orchestration, "_gpu", lambda: True)
    monkeypatch.setattr(Path, "write_text", write_text)
    monkeypatch.setattr(orchestration, "_pack", no_archive)
    options = RunOptions(tmp_path / "out", 60.0)
    assert orchestration.run_stages(options, stages("good", "silent", "raises"), faulty) == 1
    printed = capsys.readouterr().out
    assert "| silent | did not start: [Errno 28] No space left on device |" in printed
    assert "no such luck" in printed
    assert "| good | ok |" in (tmp_path / "out" / "summary.md").read_text()
    assert not list((tmp_path / "out").glob("*.new"))


def test_time_that_is_left_over_is_given_to_later_stages():
    ahead = stages("good", "silent", seconds=10.0)
    assert orchestration.stage_seconds(ahead, 100.0) == 20.0, "at most twice its share"
    assert orchestration.stage_seconds(ahead, 30.0) == 15.0
    assert orchestration.stage_seconds(ahead, 12.0) == 10.0, "a late run keeps the first stages whole"
    assert orchestration.stage_seconds(ahead, 4.0) == 4.0
    assert sum(stage.seconds for stage in STAGES if not stage.background) + PACK_SECONDS <= 570


def test_rows_with_peers_have_their_time():
    """A group of rows took up to 40 s on an H100, ours of the training step 40 and its peers 80."""
    seconds = {stage.name: stage.seconds for stage in STAGES}
    assert seconds["rows"] >= 40 * len(workloads.GROUPS)
    assert seconds["step"] >= 120


def test_the_most_wanted_providers_exist_and_ours_is_among_them():
    for op, names in workloads.FIRST.items():
        providers = {provider.name for provider in common.load_operation(op).PROVIDERS}
        assert providers >= set(names), op
        assert "bestrq2" in names
        assert not set(names) & set(rows.WITHOUT)
    assert {op for op, *_ in (*workloads.GROUPS, *workloads.MORE)} <= set(workloads.FIRST)


def test_rows_are_written_group_by_group_within_the_time_of_the_stage(tmp_path, monkeypatch):
    """The four most wanted have rows where every group takes all of its time, and the stage ends in time."""
    clock, begun = [0.0], []
    row = next(iter(rows_of([GOOD]).values()))

    def takes_all(group, plan):
        begun.append((group.op, plan.first[0]))
        assert plan.provider_seconds == rows.PROVIDER_SECONDS
        clock[0] += plan.group_seconds
        return [{**row, "op": group.op}]

    def compile_all(request, jobs, seconds):
        assert jobs[0] == ("chunked_attention", "B8H12T6000d64-c16l128r0", "bfloat16", "bestrq2")
        clock[0] += seconds
        return 0

    monkeypatch.setattr(plan.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(rows, "run_isolated", takes_all)
    monkeypatch.setattr(rows.warm, "compile_all", compile_all)
    notes = {"facts": {"machine": asdict(MACHINE)}}
    request = Request("rows", tmp_path, tmp_path, 400.0, False, None, "cpu", notes, started=0.0)
    assert rows.main(request) == 1
    assert clock[0] <= 400.0
    wanted = ["chunked_attention", "masked_cross_entropy", "quantize", "short_attention"]
    assert [op for op, _ in begun] == wanted
    assert [row["op"] for row in report.read_csv(tmp_path / "rows.csv")] == wanted


def test_stages_in_the_order_and_with_the_times_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_run, "run_stages", lambda options, stages: asked.extend(stages) or 0)
    assert gpu_run.main(["--out", str(tmp_path), "--only", "step=90", "facts"]) == 0
    assert [(stage.name, orchestration.stage_seconds([stage], 500.0)) for stage in asked] == [
        ("step", 90.0),
        ("facts", 20.0),
    ]


@pytest.mark.parametrize("stage", ["stepp", "step=soon"])
def test_a_stage_that_does_not_exist(stage, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_run.main(["--out", str(tmp_path), "--only", stage])
    assert "expected" in capsys.readouterr().err


def test_failures_are_printed_before_the_end(tmp_path):
    """A run of tests that is stopped has told what failed."""
    test = tmp_path / "test_two.py"
    test.write_text("import os\ndef test_bad():\n    assert 1 + 1 == 3, 'no sum'\ndef test_end():\n    os.abort()\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "benchmarks.gpu.failures",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
    ]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    result = subprocess.run([*command, str(test)], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert "FAILED test_two.py::test_bad (call)" in result.stdout
    assert "no sum" in result.stdout


def test_a_stage_without_time_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(orchestration, "_gpu", lambda: True)
    assert orchestration.run_stages(RunOptions(tmp_path / "out", PACK_SECONDS), stages("good"), faulty) == 1
    assert "| good | no time was left |" in (tmp_path / "out" / "summary.md").read_text()


def test_what_triton_needs_at_run_time_is_among_the_facts(tmp_path, monkeypatch):
    for name in ("gcc", "clang"):
        monkeypatch.setattr(facts.shutil, "which", lambda wanted, there=name: there if wanted == there else None)
        monkeypatch.delenv("CC", raising=False)
        assert "gcc or clang" not in facts.missing_for_triton()
    monkeypatch.setattr(facts.shutil, "which", lambda name: None)
    monkeypatch.setattr(facts.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert facts.missing_for_triton() == ["gcc or clang", "the headers of Python"]
    (tmp_path / "Python.h").touch()
    assert facts.missing_for_triton() == ["gcc or clang"]


def test_every_peer_is_among_the_facts():
    files = (Path(common.__file__).parent).rglob("*.py")
    needed = {name for path in files for name in re.findall(r'\bneeds="(\w+)"', path.read_text(encoding="utf-8"))}
    assert needed - {"some_peer"} == set(facts.PEERS)  # the example in the documentation of a benchmark
    assert facts._version("_pytest") == metadata.version("pytest")
    assert facts._version("no_such_module") == "absent"


def test_requests_survive_the_way_to_a_stage(tmp_path):
    path = tmp_path / "r.json"
    Request("rows", tmp_path, tmp_path, 12.0, True, "abc", "cpu", {"smoke": {"broken": ["quantize"]}}).write(path)
    request = read_request(path)
    assert (request.out, request.commit, request.broken) == (tmp_path, "abc", ["quantize"])
    assert 11 < request.left() <= 12
    request.note({"line": "x"})
    assert (tmp_path / "rows.note.json").exists()


def test_results_are_cut_to_what_may_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "MOST_BYTES", 100)
    (tmp_path / "tests.txt").write_text("a" * 500 + "the end")
    summary.fits(tmp_path / "tests.txt")
    text = (tmp_path / "tests.txt").read_text()
    assert len(text) < 100
    assert text.endswith("the end")


def test_a_long_summary_stays_short(tmp_path):
    """A hundred rows that failed: fewer than a hundred lines, the stages among them."""
    out = tmp_path / "out"
    out.mkdir()
    row = next(iter(rows_of([GOOD]).values()))
    report.append_csv(out / "rows.csv", [{**row, "provider": f"peer {i}"} for i in range(200)])
    text = summary.write_summary(RunOptions(out, 1.0), tmp_path, [("facts", None, "no time was left")])
    assert len(text.splitlines()) < 100
    assert "| facts | no time was left |" in text
    assert "more in the files" in text


def test_merge_puts_rows_and_tiles_in_place(tmp_path, monkeypatch, capsys):
    from bestrq2.kernels import tuning

    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "configs")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    out = tmp_path / "out"
    assert merge.merge(out) == 2
    out.mkdir()
    (out / "summary.md").write_text("")
    report.append_csv(out / "rows.csv", rows_of([GOOD]).values())
    (out / "train.csv").write_text("name\n")
    (out / "tuned.json").write_text(
        '{"device": "NVIDIA H100 80GB HBM3", "architecture": 90, "tiles": {"square": {"forward": {"BM": 64}}, "x": {}}}'
    )
    for _ in range(2):  # a second time adds nothing
        assert gpu_run.main(["--merge", str(out)]) == 0
    read = tuning.read_file(tmp_path / "configs" / "square" / "NVIDIA_H100_80GB_HBM3.json")
    assert (read.architectures, read.configs) == ((90,), {"forward": {"BM": 64}})
    (path,) = (tmp_path / "results").glob("test_machine*_2026-01-02.csv")
    assert len(report.read_csv(path)) == 1
    assert FACTS["commit"] in report.read_csv(path)[0]["commit"]
    assert MACHINE.device in capsys.readouterr().out
