"""Runs to be disturbed."""

import shutil
from pathlib import Path

import pytest

from .nursery import Nursery
from .undisturbed import PLAIN, TINY


@pytest.fixture(scope="module", autouse=True)
def runs_without_drawings(plain_training):
    """Most runs of these tests are about something else than drawings."""


@pytest.fixture(scope="session")
def nursery():
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="session")
def whole(nursery, tmp_path_factory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = nursery.run(folder, ["--runs", str(folder), "--name", "whole", *TINY, "data.workers=1"], PLAIN)
    assert code == 0, output
    return folder / "whole"


@pytest.fixture
def half(whole, tmp_path) -> Path:
    """A copy of the undisturbed run that ended after step 6."""
    run = tmp_path / "half"
    shutil.copytree(whole, run, symlinks=True)
    shutil.rmtree(run / "checkpoints" / "step-00000009")
    return run
