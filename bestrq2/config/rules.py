"""Relations between keys and ranges of numbers; choices among words are types of the sections."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from math import isfinite, isnan
from operator import attrgetter
from typing import Any

from bestrq2.errors import ConfigError

from .sections import Config, EncoderConfig

# Infinity means: never.
_MAY_BE_INFINITE = ("optimizer.max_grad_norm", "train.save_minutes")
_OF_A_HEAD = ("model.encoder.kind", "model.encoder.patch_height", "model.encoder.patch_width")  # of its targets


def check_values(c: Config) -> None:
    """Raise a :class:`ConfigError` for the first value that is impossible, naming its key and what was expected."""
    d = c.data
    sources = d.source if isinstance(d.source, list) and d.source else [d.source or ""]
    buckets, weights = d.batching == "buckets", d.domain_weights.values()
    targets, mixing, masking = c.model.targets, c.model.mixing, c.model.masking
    departures = [
        key
        for key, used in (
            ("model.targets.projection", targets.projection != "random"),
            ("model.targets.centroid_steps", targets.centroid_steps > 0),
            ("model.targets.encoder", targets.encoder is not None),
            ("model.targets.seed_candidates", targets.seed_candidates > 1),
            ("model.mixing.share", mixing.share > 0),
            ("model.clip_weight", c.model.clip_weight > 0),
            ("model.masking.dispersion", masking.dispersion > 0),
            ("model.masking.shared_per_batch", masking.shared_per_batch),
            ("model.predictor.attention", c.model.predictor.attention != "full"),
            ("model.predictor.share", c.model.predictor.share != 1),
        )
        if used
    ]
    encoder, optimizer, final_decay = c.model.encoder, c.optimizer, c.optimizer.final_weight_decay
    plain, unused = (
        EncoderConfig(),
        ("norm", "feed_forward", "qk_norm", "position", "patch_height", "patch_width", "join_rows"),
    )
    foreign = [name for name in unused if getattr(encoder, name) != getattr(plain, name)]
    expectations = [
        (
            f"model.encoder.{(*foreign, 'norm')[0]}",
            encoder.kind != "conformer" or not foreign,
            getattr(encoder, (*foreign, "norm")[0]),
            "the default: a Conformer has no such choice",
        ),
        *(
            (key, len(pair) == 2, pair, "two numbers [low, high]")
            for key, pair in (
                ("model.masking.ratio", masking.ratio),
                ("model.mixing.level_db", mixing.level_db),
                ("model.mixing.span", mixing.span),
            )
        ),
        *(
            item
            for name, own in (("front_end", c.model.front_end), ("targets", targets))
            if own.normalize == "global"
            for item in (
                (f"model.{name}.std", own.std is None or own.std > 0, own.std, "a positive number of dB"),
                (
                    f"model.{name}.mean",
                    (own.mean is None) == (own.std is None),
                    own.mean,
                    f"a number with model.{name}.std, and null without: they are measured together",
                ),
            )
        ),
        ("model.masking.noise_std", masking.noise_std >= 0, masking.noise_std, "0 or more"),
        (
            "model.targets.layer",
            targets.layer is None or targets.encoder is not None,
            targets.layer,
            "null without model.targets.encoder",
        ),
        (
            "model.targets.normalize",
            targets.encoder is None or targets.normalize != "global" or targets.mean is not None,
            targets.normalize,
            "none, patch or utterance with model.targets.encoder, or its mean and std: what is measured is log-mel",
        ),
        ("model.targets.codebook_size", targets.codebook_size >= 2, targets.codebook_size, "at least 2 codes"),
        ("model.targets.seed_candidates", targets.seed_candidates >= 1, targets.seed_candidates, "at least 1"),
        ("model.targets.fit_clips", targets.fit_clips >= 1, targets.fit_clips, "at least 1"),
        ("model.mixing.share", 0 <= mixing.share <= 1, mixing.share, "a share in [0, 1]"),
        ("model.mixing.share", not (mixing.share and buckets), mixing.share, "0 with data.batching=buckets"),
        (
            "train.batch_size",
            not mixing.share or c.train.batch_size % (2 * max(1, c.train.accumulate)) == 0,
            c.train.batch_size,
            f"pairs of clips in each of {c.train.accumulate} micro-batches, for model.mixing.share",
        ),
        (
            "frozen.source",
            not c.frozen.source or not departures,
            c.frozen.source,
            f"null with {(*departures, '')[0]}, which needs pretraining",
        ),
        (
            "train.init_from",
            not (c.train.init_from and c.frozen.source),
            c.train.init_from,
            "null with frozen.source, which trains a head alone",
        ),
        ("train.health_every", c.train.health_every >= 0, c.train.health_every, "0 (none) or more"),
        ("data.crop_seconds", c.data.crop_seconds > 0, c.data.crop_seconds, "a positive number of seconds"),
        ("data.source", d.source != [], d.source, "a name or a list of names; null: the packaged clips"),
        ("data.source", all(isinstance(name, str) for name in sources), d.source, "a name or a list of names"),
        ("data.join_short", not (d.join_short and buckets), d.join_short, "false with data.batching=buckets"),
        ("data.batch_seconds", d.batch_seconds is None or buckets, d.batch_seconds, "null with data.batching=crops"),
        (
            "data.batch_seconds",
            d.batch_seconds is None or d.batch_seconds >= d.crop_seconds,
            d.batch_seconds,
            f"at least data.crop_seconds = {d.crop_seconds:g}",
        ),
        ("data.domain_weights", all(isfinite(w) and w >= 0 for w in weights), d.domain_weights, "numbers >= 0"),
        ("data.domain_weights", not weights or any(weights), d.domain_weights, "a positive weight for some domain"),
        (
            "frozen.source",
            not c.frozen.source or not (weights or buckets or d.join_short),
            c.frozen.source,
            "null with data.domain_weights, data.join_short or data.batching=buckets, which do not apply to cached "
            "embeddings",
        ),
        (
            "frozen.source",
            not c.frozen.source or not (c.validation.source or c.probe.every),
            c.frozen.source,
            "null with validation.source or probe.every, which measure an encoder in training",
        ),
        ("data.min_seconds", d.min_seconds is None or d.min_seconds >= 0, d.min_seconds, "0 or more seconds"),
        ("data.workers", c.data.workers >= 0, c.data.workers, "0 or more"),
        ("optimizer.learning_rate", optimizer.learning_rate > 0, optimizer.learning_rate, "a positive number"),
        ("optimizer.warmup", 0 <= optimizer.warmup < 1, optimizer.warmup, "a share in [0, 1)"),
        ("optimizer.betas", len(optimizer.betas) == 2, optimizer.betas, "two numbers"),
        ("optimizer.final_ratio", optimizer.final_ratio >= 0, optimizer.final_ratio, "0 or more"),
        ("optimizer.weight_decay", optimizer.weight_decay >= 0, optimizer.weight_decay, "0 or more"),
        ("optimizer.final_weight_decay", final_decay is None or final_decay >= 0, final_decay, "0 or more, or null"),
        ("optimizer.epsilon", optimizer.epsilon >= 0, optimizer.epsilon, "0 or more"),
        (
            "optimizer.max_grad_norm",
            optimizer.max_grad_norm is None or optimizer.max_grad_norm > 0,
            optimizer.max_grad_norm,
            "a positive number, or null for no clipping",
        ),
        ("train.max_bad_steps", c.train.max_bad_steps >= 1, c.train.max_bad_steps, "at least 1"),
        ("train.steps", c.train.steps >= 1, c.train.steps, "at least 1"),
        ("train.batch_size", c.train.batch_size >= 1, c.train.batch_size, "at least 1"),
        ("train.accumulate", c.train.accumulate >= 1, c.train.accumulate, "at least 1"),
        ("train.ema_decay", 0 <= c.train.ema_decay < 1, c.train.ema_decay, "a number in [0, 1)"),
        ("train.save_minutes", c.train.save_minutes >= 0, c.train.save_minutes, "0 or more minutes"),
        ("train.keep_best", c.train.keep_best >= 0, c.train.keep_best, "0 or more"),
        ("probe.every", c.probe.every >= 0, c.probe.every, "0 (no probe) or more steps"),
        ("validation.every", c.validation.every >= 1, c.validation.every, "at least 1"),
        ("validation.clips", c.validation.clips >= 1, c.validation.clips, "at least 1"),
        ("optimizer.cooldown", 0 < optimizer.cooldown <= 1, optimizer.cooldown, "a share in (0, 1]"),
        ("train.log_every", c.train.log_every >= 1, c.train.log_every, "at least 1"),
        ("train.save_every", c.train.save_every >= 1, c.train.save_every, "at least 1"),
        ("train.keep_last", c.train.keep_last >= 1, c.train.keep_last, "at least 1"),
        ("train.pictures_every", c.train.pictures_every >= 0, c.train.pictures_every, "0 (none) or more"),
    ]
    for key, fine, value, expected in expectations:
        if not fine:
            raise ConfigError(f"{key}: expected {expected}, got {value!r}")
    # Behind the rules above, which name what they expect. A NaN passes most comparisons that refuse a number.
    for key, number in _numbers(asdict(c), ""):
        if isnan(number) or not (isfinite(number) or key in _MAY_BE_INFINITE):
            raise ConfigError(f"{key}: expected a finite number, got {number!r}")


def unused_values(c: Config, set_keys: Iterable[str] = ()) -> list[str]:
    """Sentences on values that were chosen and change nothing, because what they are for is switched off.

    Args:
        set_keys: what the user set, see :func:`~bestrq2.config.loading.chosen_keys`. Told of parts that models have or
            have not, where recipes of the package share values.
    """
    usual = Config()
    chosen = [
        (f"{section}.{key}", f"{section}.{switch}")
        for section, switch in (("probe", "every"), ("validation", "source"), ("frozen", "source"))
        for key, value in vars(getattr(c, section)).items()
        if not getattr(getattr(c, section), switch) and value != getattr(getattr(usual, section), key)
    ]
    if c.model.encoder.kind != "conformer":
        chosen += [
            (f"model.encoder.conformer.{key}", "model.encoder.kind=conformer")
            for key, value in vars(c.model.encoder.conformer).items()
            if value != getattr(usual.model.encoder.conformer, key)
        ]
    for name, part in (("front_end", c.model.front_end), ("targets", c.model.targets)):
        if part.normalize != "global" and part.mean is not None:
            chosen.append((f"model.{name}.mean", f"model.{name}.normalize=global"))
    targets, fitted = c.model.targets, "model.targets.projection, centroid_steps or seed_candidates"
    fits = targets.projection != "random" or targets.centroid_steps or targets.seed_candidates > 1
    one_stage = c.model.name == "best_rq" and c.model.encoder.kind == "conformer"
    for key, used, switch in (
        ("optimizer.cooldown", c.optimizer.schedule == "stable", "optimizer.schedule=stable"),
        ("optimizer.final_ratio", c.optimizer.schedule != "constant", "a schedule in which the rate falls"),
        ("model.mixing.level_db", c.model.mixing.share, "model.mixing.share"),
        ("model.mixing.span", c.model.mixing.share, "model.mixing.share"),
        ("model.masking.noise_std", one_stage, "model.name=best_rq and model.encoder.kind=conformer"),
        ("model.targets.fit_clips", fits, fitted),
    ):
        if not used and attrgetter(key)(c) != attrgetter(key)(usual):
            chosen.append((key, switch))
    told = [f"{key} is not used without {switch}" for key, switch in chosen]
    for key in set_keys:
        if key.startswith("model.predictor.") and c.model.name == "best_rq" and not c.frozen.source:
            told.append(f"{key} is not used with model.name=best_rq, which has no predictor")
        of_frozen = ("model.encoder.", "model.name", "train.pictures_every", "train.health_every")
        if c.frozen.source and key.startswith(of_frozen) and key not in _OF_A_HEAD:
            told.append(f"{key} is not used with frozen.source, whose encoder is what it is")
        if c.frozen.source and c.frozen.every_frame and key.startswith("model.masking."):
            told.append(f"{key} is not used with frozen.every_frame=true, which masks nothing")
    return told


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Every floating number with the key of its setting."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict):
        for name, inside in value.items():
            yield from _numbers(inside, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inside in value:
            yield from _numbers(inside, key)
