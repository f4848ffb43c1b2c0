"""Changes of a resumed run: refused if the checkpoint cannot continue with them, else listed."""

from dataclasses import asdict
from typing import Any

from bestrq2.config import Config
from bestrq2.config.describing import shown
from bestrq2.errors import ConfigError

__all__ = ["FREE_IN_MODEL", "changed_keys", "check_resume"]

# What may change in the model while the rest of it stays: regularisation, the memory it takes, the window of attention.
FREE_IN_MODEL = (
    "dropout",
    "drop_path",
    "activation_checkpointing",
    "chunk_size",
    "left_context",
    "chunk_training",
    "ratio",
    "shared_per_batch",
    "span_length",
    "noise_std",
)
# The place of a teacher may change: its weights are compared by their digest.
_FREE = ("model.targets.encoder",)
_FIXED = ("model.", "train.seed", "train.init_from", "frozen.every_frame")
_REASONS = {
    "train.batch_size": "from this step on, other clips make up a step",
    "train.strategy": "the checkpoint fits both",
}


def changed_keys(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value before, value after) of every value that differs."""
    return dict(_differences(asdict(before), asdict(after), ""))


def _differences(before: Any, after: Any, key: str) -> list[tuple[str, tuple[Any, Any]]]:
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        prefix = f"{key}." if key else ""
        return [found for name in before for found in _differences(before[name], after[name], prefix + name)]
    return [] if before == after else [(key, (before, after))]


def check_resume(before: Config, after: Config, done: int) -> list[str]:
    """Compare the configuration of a checkpoint after ``done`` steps with the one to go on with.

    Returns:
        a line for every value that changes.

    Raises:
        ConfigError: for a value that cannot change, by its key, or if the run has more steps already.
    """
    changed = changed_keys(before, after)
    for key, (old, new) in changed.items():
        if _is_fixed(key):
            raise ConfigError(
                f"{key}: expected {shown(old)}, with which this run began, got {shown(new)}: it cannot change on "
                "resume; start a new run for it"
            )
    if bool(before.frozen.source) != bool(after.frozen.source):
        raise ConfigError(
            f"frozen.source: expected {shown(before.frozen.source)}, got {shown(after.frozen.source)}: a run "
            "that pretrains and one that trains a head on a frozen encoder cannot become each other; start a new run"
        )
    if after.train.steps < done:
        raise ConfigError(f"train.steps: expected at least {done}, which this run has done, got {after.train.steps}")
    reasons = _REASONS
    if not (before.train.ema_decay and after.train.ema_decay):
        average = "begins with the present weights" if after.train.ema_decay else "is not kept any more"
        reasons = {**_REASONS, "train.ema_decay": f"the average {average}"}
    return [
        f"{key}: {shown(old)} -> {shown(new)}" + (f" ({reasons[key]})" if key in reasons else "")
        for key, (old, new) in changed.items()
        if key != "recipe"
    ]


def _is_fixed(key: str) -> bool:
    if key in _FREE:
        return False
    if key.startswith("model.") and key.rpartition(".")[2] in FREE_IN_MODEL:
        return False
    return key.startswith(_FIXED)
