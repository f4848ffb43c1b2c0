"""A pytest plugin that prints each failure when it happens: a run that is stopped at its deadline has no summary."""

from __future__ import annotations

from typing import Any

LINES = 12


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        end = "\n".join(report.longreprtext.splitlines()[-LINES:])
        print(f"\nFAILED {report.nodeid} ({report.when})\n{end}", flush=True)
