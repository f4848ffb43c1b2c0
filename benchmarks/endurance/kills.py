"""Kill -9 at random moments: the resumed run must end like an undisturbed one, bit for bit.

The run is a sequence of processes, each from start-up until it is killed or done. The kill time is drawn uniformly over
the wall time of start-up and some training. A share of the processes is killed during a save instead, some milliseconds
after the hidden folder of a half-written checkpoint appeared. Every process has another number of data workers. A
finished run is compared and a new one begins, until there were enough kills.
"""

from __future__ import annotations

import atexit
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch._dynamo  # what the first optimizer imports: the forked runs need not

from bestrq2 import train
from bestrq2.runs.checkpoint import DISCARDED, WRITING, list_checkpoints, newest_intact, read_checkpoint
from bestrq2.runs.metrics import read_metrics

Figures = dict[str, float]

MARK = "BESTRQ2_SOAK"  # in the environment of every process of a life: finds the ones that were left behind
PATIENCE = 600.0  # seconds for one life
STEPS, SAVE_EVERY = 40, 4
SETTINGS = [
    "model.front_end.mean=-47.5",
    "model.front_end.std=31.8",
    f"train.steps={STEPS}",
    f"train.save_every={SAVE_EVERY}",
    "train.batch_size=4",
    "train.accumulate=2",
    "train.precision=bf16",
    "train.ema_decay=0.99",
    "train.async_save=true",
    "train.keep_last=2",
    "train.keep_best=2",
    "optimizer.max_grad_norm=1.0",
    "model.encoder.width=64",
    "model.encoder.hidden=96",
    "model.encoder.depth=2",
    "model.encoder.dropout=0.1",
    "model.encoder.drop_path=0.2",
    "model.predictor.width=64",
    "model.predictor.hidden=96",
    "model.predictor.depth=1",
]
# Not the same twice: times and memory, and what is averaged since the process last wrote a row.
OF_THE_MACHINE = {"audio_seconds_per_second", "data_wait", "mfu", "memory_gib", "elapsed_seconds", "padding_share"}


class Forked:
    """A training run in a child of this process, which has everything imported: it starts in no time.

    The interface is that of Popen. The child is the same program as ``python -m bestrq2.train`` from ``main`` on.
    """

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                torch.set_num_threads(1)
                sys.modules["__main__"] = train  # what the data workers import
                code = train.main(arguments)
                atexit._run_exitfuncs()
                os._exit(code)
            finally:
                os._exit(99)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} does not end")
            time.sleep(0.002)
        return code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Life:
    """One process of a training run and its children.

    Args:
        module, arguments: of ``python -m``.
        log: file that collects what it prints.
        forked: fork this process instead of starting an interpreter; only for ``bestrq2.train``.
    """

    def __init__(self, module: str, arguments: list[str], log: Path, forked: bool = False) -> None:
        self.mark = uuid.uuid4().hex
        self.started = time.monotonic()
        self.process: Forked | subprocess.Popen
        if forked:
            self.process = Forked(arguments, log)
            return
        environment = {**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        command = [sys.executable, "-m", module, *arguments]
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    @property
    def age(self) -> float:
        return time.monotonic() - self.started

    def wait(self, until: Callable[[], bool], seconds: float = PATIENCE, pause: float = 0.001) -> bool:
        """Wait for a condition; False if the process ended first.

        Raises:
            TimeoutError: neither came.
        """
        deadline = time.monotonic() + seconds
        while not until():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened for {seconds:.0f} s in process {self.process.pid}")
            time.sleep(pause)
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def members(self) -> dict[int, dict[str, str]]:
        """Environment of every living process of this life, by process id."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                if not folder.name.isdecimal():
                    continue
                state, _, _, session = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:4]
                if state == "Z":
                    continue
                lines = (folder / "environ").read_bytes().split(b"\0")
            except OSError:  # gone, or another user's
                continue
            values = dict(os.fsdecode(line).split("=", 1) for line in lines if b"=" in line)
            if values.get(MARK) == self.mark or int(session) == self.process.pid:
                found[int(folder.name)] = values
        return found

    def orphans(self, patience: float = 15.0) -> int:
        """Processes that are still there some time after the main one ended. They are killed."""
        deadline = time.monotonic() + patience
        while (left := self.members()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for number in left:
            os.kill(number, signal.SIGKILL)
        return len(left)


def half_saved(run: Path) -> bool:
    """Return True if a checkpoint of the run is being written or deleted, or was when it was killed."""
    try:
        return any(name.startswith((WRITING, DISCARDED)) for name in os.listdir(run / "checkpoints"))
    except OSError:
        return False


def last_row(run: Path) -> int:
    rows = read_metrics(run)
    return int(rows[-1]["step"]) if rows else -1


def differences(run: Path, reference: Path) -> Iterator[str]:
    """Differences of a finished run from the reference, bit for bit: curve, checkpoints, leftovers."""
    curves = [
        [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in read_metrics(p)] for p in (run, reference)
    ]
    if curves[0] != curves[1]:
        at = next((i for i, (a, b) in enumerate(zip(*curves)) if a != b), min(map(len, curves)))
        yield f"{run.name}: metrics.csv differs from row {at} on ({len(curves[0])} rows, expected {len(curves[1])})"
    own, expected = (list_checkpoints(p / "checkpoints") for p in (run, reference))
    # More only by a kill between the last checkpoint and the deletion of an old one.
    if not {p.name for p in expected} <= {p.name for p in own} or len(own) > len(expected) + 1:
        yield f"{run.name}: kept {[p.name for p in own]}, expected {[p.name for p in expected]}"
    for folder in own:
        twin = reference / "checkpoints" / folder.name
        if twin.is_dir():
            first, second = read_checkpoint(folder), read_checkpoint(twin)
            for name in ("weights", "averaged_weights", "training_state"):
                a, b = getattr(first, name)(), getattr(second, name)()
                if a.keys() != b.keys():
                    yield f"{folder}: {name} has other tensors"
                other = [
                    k
                    for k in a
                    if k in b and (a[k].dtype, a[k].numpy().tobytes()) != (b[k].dtype, b[k].numpy().tobytes())
                ]
                if other:
                    yield f"{folder}: {name} differs in {len(other)} of {len(a)} tensors, first {other[0]}"
            extras = [{k: v for k, v in c.extra.items() if k != "elapsed_seconds"} for c in (first, second)]
            if extras[0] != extras[1]:
                yield f"{folder}: counters {extras[0]}, expected {extras[1]}"
    best = [(p / "checkpoints" / "best.json").read_text() for p in (run, reference)]
    if best[0] != best[1]:
        yield f"{run.name}: best.json {best[0]}, expected {best[1]}"
    if half_saved(run):
        yield f"{run.name}: half-written folders were left behind"


def reach_moment(life: Life, run: Path, window: float, chance: random.Random) -> bool:
    """Wait until this life shall end; False if it ended by itself before."""
    if chance.random() < 0.6:
        moment = chance.uniform(0, window)
        return life.wait(lambda: life.age >= moment)
    for _ in range(chance.randrange(1, 3)):  # during one of the next saves
        if not (life.wait(lambda: not half_saved(run)) and life.wait(lambda: half_saved(run))):
            return False
    time.sleep(chance.uniform(0, 0.04))
    return life.process.poll() is None


def kill_run(folder: Path, kills: int, seed: int) -> Figures:
    """``kills`` lives of one-process runs with workers, accumulation, EMA, bf16, asynchronous saves and keep_best."""
    chance = random.Random(seed)
    runs, log = folder / "runs", folder / "log.txt"

    def begin(name: str, fresh: bool, workers: int) -> Life:
        if (runs / name / "config.yaml").exists() and chance.random() < 0.5:
            arguments = ["--resume", str(runs / name)]
        else:
            arguments = ["--runs", str(runs), "--name", name, "--resume", *SETTINGS]
        return Life("bestrq2.train", [*arguments, f"data.workers={workers}"], log, forked=not fresh)

    reference = runs / "reference"
    life = begin("reference", fresh=False, workers=1)
    life.wait(lambda: last_row(reference) >= 0, pause=0.02)
    start_up = life.age
    if life.process.wait(PATIENCE) != 0:
        raise RuntimeError(f"the undisturbed run failed; see {log}")
    whole = life.age
    print(f"undisturbed: {whole:.1f} s, of which start-up {start_up:.1f} s", flush=True)
    window = start_up + 0.5 * (whole - start_up)
    counts = dict.fromkeys(("in start-up", "in training", "in a save"), 0)
    done = completed = repeated = orphans = losses = number = interpreters = 0
    newest = 0  # step of the newest checkpoint that was ever seen in this run
    unfinished = True
    while done < kills or unfinished:
        unfinished = True
        run = runs / f"killed-{number}"
        fresh = chance.random() < 0.2
        life = begin(run.name, fresh, workers=chance.randrange(3))
        alive = done < kills and reach_moment(life, run, window, chance)
        if done >= kills:
            life.process.wait(PATIENCE)  # only finish what was begun
        if alive:
            life.kill()
        orphans += life.orphans()
        checkpoint, problems = newest_intact(run / "checkpoints")
        step = 0 if checkpoint is None else checkpoint.step
        if step < newest or problems:
            losses += 1
            print(f"LOSS: {run.name} had step {newest}, now {step}: {problems}", flush=True)
        newest = step
        if life.process.returncode == -signal.SIGKILL:
            done += 1
            first = last_row(run) < 0 or life.age < start_up
            where = "in a save" if half_saved(run) else "in start-up" if first else "in training"
            counts[where] += 1
            interpreters += fresh
            repeated += max(0, last_row(run) - step)
            print(f"kill {done}: {where} after {life.age:.1f} s, checkpoint {step}, logged {last_row(run)}", flush=True)
            continue
        if life.process.returncode != 0:
            raise RuntimeError(
                f"{run.name} ended with {life.process.returncode}; see {log}:\n{log.read_text()[-2000:]}"
            )
        completed, number, newest, unfinished = completed + 1, number + 1, 0, False
        for message in differences(run, reference):
            losses += 1
            print(f"LOSS: {message}", flush=True)
    return {
        "kills survived": done,
        **{f"kills {name}": count for name, count in counts.items()},
        "kills of a fresh interpreter, the others forked": interpreters,
        "runs completed and compared": completed,
        "steps of each run": STEPS,
        "steps repeated after kills": repeated,
        "processes left behind": orphans,
        "losses": losses + orphans,
    }


def kill_rank(life: Life, run: Path, goal: int, rank: str) -> bool:
    """Kill one rank once ``goal`` steps are logged, and wait until the restarted ranks have cut the log back."""
    if not life.wait(lambda: last_row(run) >= goal, pause=0.02):
        return False
    # The rank itself, not its data workers and not torchrun: the lowest process id with its number.
    os.kill(min(number for number, values in life.members().items() if values.get("RANK") == rank), signal.SIGKILL)
    rows = len(read_metrics(run))
    print(f"killed rank {rank} after step {last_row(run)}", flush=True)
    life.wait(lambda: len(read_metrics(run)) < rows or last_row(run) == STEPS, pause=0.02)
    return True


def ranks_run(folder: Path, kills: int, seed: int) -> Figures:
    """Two ranks (DDP over gloo) under ``torchrun --max-restarts``; one of them is killed, torchrun restarts both."""
    chance = random.Random(seed)
    runs, log = folder / "runs", folder / "log.txt"

    def begin(name: str) -> Life:
        torchrun = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(kills)]
        command = ["-m", "bestrq2.train", "--runs", str(runs), "--name", name, "--resume"]
        return Life("torch.distributed.run", [*torchrun, *command, *SETTINGS, "data.workers=1"], log)

    reference, run = runs / "reference", runs / "killed"
    if begin("reference").process.wait(PATIENCE) != 0:
        raise RuntimeError(f"the undisturbed run failed; see {log}")
    life = begin("killed")
    done = losses = 0
    for turn in range(kills):
        goal = chance.randrange(STEPS * turn // kills + 2, STEPS * (turn + 1) // kills - 2)
        done += kill_rank(life, run, goal, str(turn % 2))
    code = life.process.wait(PATIENCE)
    orphans = life.orphans()
    messages = [f"torchrun ended with {code}"] if code else list(differences(run, reference))
    for message in [*messages, *([] if done == kills else [f"only {done} of {kills} kills"])]:
        losses += 1
        print(f"LOSS: {message}", flush=True)
    return {
        "ranks": 2,
        "ranks killed, run restarted": done,
        "steps of the run": STEPS,
        "processes left behind": orphans,
        "losses": losses + orphans,
    }
