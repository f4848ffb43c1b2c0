"""A process that has imported everything and forks a child for every line it reads: a training run, or any code.

Killing a child costs a test no new interpreter. It runs no torch operation itself, because OpenMP does not survive a
fork. A line is JSON: ``code`` (run first, to build a fault in), ``arguments`` of ``bestrq2.train`` or null, ``log`` (a
file for what the child prints). The answer is a line with the exit code, negative for a signal.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path


class Nursery:
    """The parent's side. Close it, or use it in a ``with``."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, folder: Path, arguments: list[str] | None = None, code: str = "") -> tuple[int, str]:
        """Exit code (negative: killed by that signal) and output of a child with ``code`` and then a training run."""
        log = folder / "child.log"
        order = {"code": code, "arguments": arguments, "log": str(log)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), log.read_text()

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401

    import bestrq2.train

    gc.freeze()  # or a collection in every child would copy all the memory
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            exec(order["code"], {})
            # As a process of its own would end: exit handlers run, SystemExit gives the code.
            sys.exit(0 if order["arguments"] is None else bestrq2.train.main(order["arguments"]))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    serve()
