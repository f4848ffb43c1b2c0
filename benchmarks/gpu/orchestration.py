"""Run the stages one after the other, whatever becomes of them, and keep the summary up to date."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.plan import INTERPRETED, PACK_SECONDS, ROOT, STAGES, Request, RunOptions, Stage, read_notes
from benchmarks.gpu.summary import MOST_BYTES, fits, write_summary
from benchmarks.groups import child_environment
from benchmarks.processes import Ended, Running

MOST_STRETCH = 2.0  # how far unused time may lengthen a stage


@dataclass
class Outcome:
    """End of one stage; ``ended`` is None while a background stage runs and for stages that were left out."""

    stage: str
    ended: Ended | None
    reason: str = ""


Command = Callable[[Stage, Path], Sequence[str]]


def module_command(stage: Stage, request: Path) -> Sequence[str]:
    return [sys.executable, "-m", f"benchmarks.gpu.{stage.module}", str(request)]


def run_stages(options: RunOptions, stages: Sequence[Stage] = STAGES, command: Command = module_command) -> int:
    """Run the stages; the summary is printed last. Returns 0 if every stage that ran ended well."""
    end = time.monotonic() + options.seconds
    if not options.rehearse and not _gpu():
        print("gpu_run.py needs a CUDA GPU and torch finds none here; --rehearse runs every stage without", flush=True)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="bestrq2-gpu-"))
    outcomes: list[Outcome] = []
    behind: list[tuple[Stage, Running]] = []
    try:
        environment = stage_environment(options, work)
        for place, stage in enumerate(stages):
            left = end - time.monotonic() - PACK_SECONDS
            outcome = Outcome(stage.name, None)
            outcomes.append(outcome)
            if left <= 1:
                outcome.reason = "no time was left"
            else:
                seconds = left if options.rehearse else stage_seconds(stages[place:], left)
                print(
                    f"[{options.seconds - (end - time.monotonic()):5.0f} s] {stage.name}: up to {seconds:.0f} s",
                    flush=True,
                )
                try:
                    running = _start(stage, options, work, seconds, environment, command)
                except OSError as error:
                    outcome.reason = f"did not start: {error}"
                else:
                    if stage.background:
                        behind.append((stage, running))
                    else:
                        outcome.ended = running.wait(seconds)
            _collect(behind, outcomes, 0.0)
            _keep(options, work, outcomes)
        _collect(behind, outcomes, max(end - time.monotonic() - PACK_SECONDS, 0.0), last=True)
        _keep(options, work, outcomes)
    finally:
        for _, running in behind:
            running.wait(0.0)
        text = _keep(options, work, outcomes)
        print(text, flush=True)
        shutil.rmtree(work, ignore_errors=True)
    return 0 if all(o.ended is not None and o.ended.good for o in outcomes) else 1


def _collect(
    behind: list[tuple[Stage, Running]], outcomes: Sequence[Outcome], seconds: float, last: bool = False
) -> None:
    """Note background stages that have ended; with ``last`` give the others ``seconds`` more, then end them."""
    for stage, running in list(behind):
        if last or running.process.poll() is not None:
            next(o for o in outcomes if o.stage == stage.name).ended = running.wait(seconds)
            behind.remove((stage, running))


def stage_seconds(ahead: Sequence[Stage], left: float) -> float:
    """Deadline of the first of the stages ahead: its share, longer where earlier stages left time, never beyond."""
    stage = ahead[0]
    if stage.background:
        return left
    if stage.fixed:
        return min(left, stage.seconds)
    shares = sum(other.seconds for other in ahead if not other.background)
    return min(left, stage.seconds * min(max(1.0, left / shares), MOST_STRETCH))


def stage_environment(options: RunOptions, work: Path) -> dict[str, str]:
    """The checkout and the wheels on the path; caches of compiled kernels for all stages, the caller's own if set."""
    environment = child_environment()
    site = work / "site"
    if options.wheels:
        for wheel in sorted(options.wheels.glob("*.whl")):
            with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
    path = [environment["PYTHONPATH"], *([str(site)] if site.exists() else [])]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "OMP_WAIT_POLICY": "passive"}
    environment.setdefault("TRITON_CACHE_DIR", str(work / "triton"))
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work / "inductor"))
    if options.commit:
        environment["BESTRQ2_COMMIT"] = options.commit
    if options.rehearse:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return environment


def _gpu() -> bool:
    """Asked in a process of its own: this one holds no context on the device."""
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def _start(
    stage: Stage, options: RunOptions, work: Path, seconds: float, environment: dict[str, str], command: Command
) -> Running:
    request = work / f"{stage.name}.request.json"
    device = "cpu" if options.rehearse else "cuda"
    notes = read_notes(work)
    Request(stage.name, options.out, work, seconds, options.rehearse, options.commit, device, notes).write(request)
    if options.rehearse and stage.name in INTERPRETED:
        environment = environment | {"TRITON_INTERPRET": "1"}
    return Running(command(stage, request), work / f"{stage.name}.log", environment, ROOT)


def _keep(options: RunOptions, work: Path, outcomes: Sequence[Outcome]) -> str:
    """Rewrite summary and archive; a disk that is full costs them, not the run. Returns the summary."""
    text = write_summary(options, work, [(o.stage, o.ended, o.reason) for o in outcomes])
    with suppress(OSError):
        _pack(work, options.out / "logs.tar.gz")
    for path in options.out.iterdir():
        fits(path)
    return text


def _pack(work: Path, target: Path) -> None:
    temporary = target.with_suffix(".new")
    try:
        with tarfile.open(temporary, "w:gz") as archive:
            for log in sorted([*work.glob("*.log"), *work.glob("*.note.json")]):
                if log.stat().st_size > MOST_BYTES:  # the end of an endless log
                    with log.open("rb+") as file:
                        file.seek(-MOST_BYTES // 4, os.SEEK_END)
                        tail = file.read()
                        file.seek(0)
                        file.write(tail)
                        file.truncate()
                archive.add(log, log.name)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
