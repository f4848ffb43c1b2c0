"""Short training runs: a small model, without what takes two thirds of the time and is tested by itself."""

from collections.abc import Iterator

import pytest

SMALL_MODEL = [
    "model.encoder.width=32",
    "model.encoder.hidden=48",
    "model.encoder.depth=2",
    "model.predictor.width=32",
    "model.predictor.hidden=48",
    "model.predictor.depth=1",
]


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
