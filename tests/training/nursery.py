"""A process that has imported everything and forks a child for every line it reads: a training run, or any code.

Killing a child costs a test no new interpreter. It runs no torch operation itself, because OpenMP does not survive a
fork. A line is JSON: ``code`` (run first, to build a fault in), ``arguments`` of ``bestrq2.train`` or null, ``log`` (a
file for what the child prints), ``ranks`` (an environment for each rank of the run, each a child of its own). The
answer is a line with the exit code, negative for a signal; of several ranks that of the first to fail, which ends the
others.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


class Nursery:
    """The parent's side. Close it, or use it in a ``with``."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, folder: Path, arguments: list[str] | None = None, code: str = "", ranks: int = 1) -> tuple[int, str]:
        """Exit code (negative: killed by that signal) and output of a child with ``code`` and then a training run.

        Several ``ranks`` have the environment that torchrun gives them.
        """
        log = folder / "child.log"
        order = {"code": code, "arguments": arguments, "log": str(log), "ranks": environments(ranks)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), log.read_text()

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()


def environments(ranks: int) -> list[dict[str, str]]:
    if ranks == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as free:
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(ranks)]


def fork(order: dict[str, Any], environment: dict[str, str]) -> int:
    """The child's number; in the child it does not return."""
    import bestrq2.train

    child = os.fork()
    if child:
        return child
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(environment)
    exec(order["code"], {})
    # As a process of its own would end: exit handlers run, SystemExit gives the code.
    sys.exit(0 if order["arguments"] is None else bestrq2.train.main(order["arguments"]))


def serve() -> None:
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401

    import bestrq2.train  # noqa: F401

    gc.freeze()  # or a collection in every child would copy all the memory
    for line in sys.stdin:
        order = json.loads(line)
        open(order["log"], "w").close()
        children = {fork(order, environment) for environment in order["ranks"]}
        failed = 0
        while children:
            child, status = os.wait()
            children.discard(child)
            code = os.waitstatus_to_exitcode(status)
            if code and not failed:
                failed = code
                for other in children:
                    os.kill(other, signal.SIGKILL)
        print(failed, flush=True)


if __name__ == "__main__":
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    serve()
