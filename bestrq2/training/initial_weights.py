"""A new run that begins with the weights of an earlier one or of an encoder file (``train.init_from``)."""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from bestrq2.config import Config, ConfigError
from bestrq2.config.describing import shown
from bestrq2.errors import CheckpointError
from bestrq2.interchange.opening import OpenedModel, open_source
from bestrq2.interchange.tensors import encoder_weights
from bestrq2.models import BestRQ, BestRQ2
from bestrq2.models.build import check_finite, load_weights
from bestrq2.runs.changes import FREE_IN_MODEL, changed_keys

__all__ = ["load_initial", "settle_initial"]

logger = logging.getLogger(__name__)

_FREE = (*FREE_IN_MODEL, "mean", "std", "join_rows")  # whatever they are, the weights mean the same
# What is quantized; the quantizer itself is compared by its tensors, a teacher by its digest.
_INPUT_OF_TARGETS = ("model.targets.", "model.front_end.mean", "model.front_end.std")
_FREE_IN_TARGETS = ("seed", "seed_candidates", "fit_clips", "encoder")


def settle_initial(config: Config) -> Config:
    """Check ``train.init_from`` before data are read, and take the statistics of the input that its encoder knows.

    Returns:
        the configuration, with the mean and deviation of the spectrogram of the source where it leaves them open.

    Raises:
        ConfigError: if the encoder of the source is another than the one of ``config``, by its keys, or is none.
        CheckpointError: for a missing or damaged file.
    """
    if config.train.init_from is None:
        return config
    source = _open(config)
    if differing := _differing(source.config, config, ("model.encoder.", "model.front_end.")):
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ConfigError(
            f"train.init_from={config.train.init_from}: its encoder has {', '.join(differing[:4])}{more}. Give this "
            "run the same values, as by the same recipe (--config)"
        )
    front, known = config.model.front_end, source.config.model.front_end
    if front.normalize == "global" and front.mean is None and known.mean is not None:
        front = replace(front, mean=known.mean, std=known.std)
        config = replace(config, model=replace(config.model, front_end=front))
    return config


def load_initial(model: BestRQ2 | BestRQ, config: Config) -> str:
    """Put the weights of ``train.init_from`` into a new model, whose quantizer is fitted already.

    Of a whole run, the predictor is taken too if it has the same settings, and heads if the targets are the same.

    Returns:
        a sentence about what was taken.

    Raises:
        ConfigError: for tensors that do not fit or are not finite.
        CheckpointError: for a missing or damaged file.
    """
    source = _open(config)
    own = model.state_dict()
    front_end = {name: tensor for name, tensor in model.encoder.state_dict().items() if name.startswith("front_end.")}
    load_weights(model.encoder, {**encoder_weights(source.weights), **front_end}, source.origin)
    taken, left = ["encoder"], []
    codes = _part(own, "quantizer")
    same_codes = not _differing(source.config, config, _INPUT_OF_TARGETS, free=_FREE_IN_TARGETS) and all(
        name in source.weights and torch.equal(source.weights[name].float(), tensor.cpu().float())
        for name, tensor in codes.items()
    )
    same_predictor = not _differing(source.config, config, ("model.name", "model.predictor."))
    for part, fits in (
        ("predictor", same_predictor),
        ("mask_token", same_predictor),
        ("head", same_codes and same_predictor),
        ("clip_head", same_codes),
    ):
        tensors, mine = _part(source.weights, part), _part(own, part)
        if not mine:
            continue
        if fits and _shapes(tensors) == _shapes(mine):
            check_finite(tensors, source.origin)
            model.load_state_dict(tensors, strict=False)
            taken.append(part)
        else:
            left.append(part)
    begin = f"Weights of {config.train.init_from} (step {source.step}): {', '.join(taken)}"
    return begin + (f"; drawn anew: {', '.join(left)}" if left else "")


def _open(config: Config) -> OpenedModel:
    try:
        return open_source(config.train.init_from or "")
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"train.init_from: {error}") from error


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] == part}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _differing(before: Config, after: Config, sections: tuple[str, ...], free: tuple[str, ...] = _FREE) -> list[str]:
    return [
        f"{key}={shown(old)} (here {shown(new)})"
        for key, (old, new) in changed_keys(before, after).items()
        if key.startswith(sections) and key.rpartition(".")[2] not in free
    ]
