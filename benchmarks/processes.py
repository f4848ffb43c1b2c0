"""Processes with a deadline: each in a group of its own, SIGTERM at the deadline, SIGKILL a moment later."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 3.0


@dataclass(frozen=True)
class Ended:
    """End of a process: exit status (negative: signal), whether its deadline ended it, how long it ran."""

    status: int
    late: bool
    seconds: float

    @property
    def good(self) -> bool:
        return self.status == 0 and not self.late

    @property
    def text(self) -> str:
        if self.late:
            return f"stopped at its deadline of {self.seconds:.0f} s"
        if self.status < 0:
            return f"died of {signal.Signals(-self.status).name}"
        return f"exit status {self.status}"


class Running:
    """A process group that writes what it prints to a file."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        self.started = time.monotonic()
        try:
            log.touch()
        except OSError:  # a full disk may not keep the process from running
            log = Path(os.devnull)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
                cwd=cwd, start_new_session=True,
            )  # fmt: skip

    def wait(self, seconds: float, grace: float = GRACE_SECONDS) -> Ended:
        """Wait until it ends or ``seconds`` have passed, then end the whole group."""
        late = False
        try:
            self.process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            late = True
            self._signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        self._signal(signal.SIGKILL)  # whatever of the group is left, also after a good end
        status = self.process.wait()
        return Ended(status, late, time.monotonic() - self.started)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def run_process(
    command: Sequence[str],
    log: Path,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Ended:
    """Run a command to its end or its deadline."""
    return Running(command, log, environment, cwd).wait(seconds)
