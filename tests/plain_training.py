"""Training runs without what takes two thirds of the time of a short one and is tested by itself."""

from collections.abc import Iterator

import pytest


def leave_out(patch: pytest.MonkeyPatch) -> None:
    """No measurement of the machine's rate, no pictures of codes and no report; in this process only."""
    from bestrq2.training import evaluation, trainer

    patch.setattr(trainer, "peak_flops", lambda *_: (1e12, "not measured"))
    patch.setattr(trainer, "save_report", lambda *_: None)
    patch.setattr(evaluation, "fixed_pictures", lambda *_: None)


@pytest.fixture(scope="module")
def plain_training() -> Iterator[pytest.MonkeyPatch]:
    """While a module is tested, see :func:`leave_out`. ``plain_training.undo()`` makes the runs whole again."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch)
        yield patch
