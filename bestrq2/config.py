"""The configuration of a run: typed sections, YAML recipes, ``key=value`` overrides, and the model they describe.

Unknown keys, wrong types and impossible values are errors that name the key. The resolved configuration is saved in the
run folder and in every checkpoint; :func:`build_model` rebuilds the model from it alone.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from importlib import resources
from math import isfinite
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what was expected."""


@dataclass
class FrontEndConfig:
    sampling_rate: int = 16000
    n_fft: int = 2048
    win_length: int = 2048
    hop_length: int = 625
    num_mels: int = 128
    f_min: float = 0.0
    f_max: float | None = None
    normalize: str = "none"  # none (published) | global: (dB - mean) / std
    mean: float | None = None  # of "global"; None: measured on the first clips of the training data
    std: float | None = None


@dataclass
class TransformerConfig:
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int | None = None
    norm: str = "layer_norm"
    feed_forward: str = "gelu"
    bias: bool = True
    qk_norm: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0


@dataclass
class ConformerConfig:
    """Of ``encoder.kind: conformer``; width, depth, heads, hidden, bias, dropout and drop_path are the encoder's."""

    channels: list[int] = field(default_factory=lambda: [64, 32])  # of the subsampling: 2 stages for 4x, 3 for 8x
    kernel_size: int = 31
    conv_mode: str = "full"  # full | causal | chunk (the last two can stream)
    conv_norm: str = "layer_norm"  # layer_norm | batch_norm
    activation: str = "silu"  # silu | gelu
    chunk_size: int | None = None  # frames per chunk of attention; None: the whole sequence
    left_context: int | None = None  # frames before the chunk; None: all
    chunk_training: str = "none"  # none: the window above | speechbrain | wenet: a random window per step


@dataclass
class EncoderConfig(TransformerConfig):
    kind: str = "vit"  # vit | conformer
    patch_height: int = 16
    patch_width: int = 16
    position: str = "sincos"  # sincos | rope
    drop_path: float = 0.1
    activation_checkpointing: bool = False
    conformer: ConformerConfig = field(default_factory=ConformerConfig)

    @property
    def frames_per_token(self) -> int:
        return 2 ** len(self.conformer.channels) if self.kind == "conformer" else self.patch_width


@dataclass
class PredictorConfig(TransformerConfig):
    depth: int = 4


@dataclass
class TargetsConfig:
    codebook_size: int = 8192
    codebook_dim: int = 16
    num_codebooks: int = 1
    normalize: str = "none"  # none (published) | global | patch | utterance
    mean: float | None = None  # of "global"; None: measured on the first clips of the training data
    std: float | None = None
    seed: int = 21072023


@dataclass
class MaskingConfig:
    ratio: list[float] = field(default_factory=lambda: [0.4, 0.6])
    shared_per_batch: bool = False
    span_length: int = 1  # tokens per masked span
    noise_std: float = 0.1  # of the noise that hides masked frames from a one-stage Conformer


@dataclass
class ModelConfig:
    name: str = "best_rq2"  # best_rq2: two-step | best_rq: one-stage
    front_end: FrontEndConfig = field(default_factory=FrontEndConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)


@dataclass
class DataConfig:
    # Folder, CSV/JSONL manifest, tar shards (a pattern such as shards-{000000..000009}.tar), .h5, .parquet or a saved
    # Hugging Face dataset, or a list of these; None: the 24 clips inside the package.
    source: Any = None
    crop_seconds: float = 10.0
    min_seconds: float | None = None  # None: one patch
    join_short: bool = False  # fill a crop with following clips of the same folder
    batching: str = "crops"  # crops: batch_size crops per step | buckets: clips of similar length, taken whole
    batch_seconds: float | None = None  # of "buckets": padded seconds per step; None: batch_size * crop_seconds
    domain_weights: dict[str, float] = field(default_factory=dict)  # draw domains by share; empty: by their hours
    workers: int = 2


@dataclass
class OptimizerConfig:
    learning_rate: float = 1e-4
    schedule: str = "cosine"  # after the warm-up: cosine | linear | constant | stable (at the peak until the cooldown)
    final_ratio: float = 0.001  # learning rate at the last step, as a share of the peak
    cooldown: float = 0.2  # of "stable": the last share of all steps, in which the rate falls
    warmup: float = 0.05  # share of all steps
    weight_decay: float = 0.05
    final_weight_decay: float | None = None  # moved to by a cosine; None: constant
    decay_all: bool = True  # published: on every parameter; false: not on norms, biases and tokens
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    epsilon: float = 1e-8
    max_grad_norm: float | None = None  # published: no clipping


@dataclass
class TrainConfig:
    steps: int = 200000
    batch_size: int = 256  # clips per update, over all ranks and micro-batches
    accumulate: int = 1  # micro-batches per update and rank: less memory, same update
    strategy: str = "auto"  # several ranks: auto = ddp | fsdp (shard the model)
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    precision: str = "auto"  # auto: bf16 autocast where the hardware has it | fp32 | bf16 | fp16
    ema_decay: float = 0.0  # of a moving average of the weights, e.g. 0.999; 0: none
    compile: bool = False  # torch.compile of the encoder and predictor blocks
    log_every: int = 50
    save_every: int = 5000
    save_minutes: float = 30.0  # also save when this long has passed since the last time; 0: never
    async_save: bool = True  # write checkpoints beside training (their tensors are copied first)
    keep_last: int = 3
    keep_best: int = 0  # also keep this many of lowest validation loss (else mean training loss since the last save)
    max_bad_steps: int = 20  # consecutive non-finite steps before giving up
    pictures_every: int = 2000  # steps between pictures of mask and predictions; 0: none
    wandb: str | None = None  # also log to this Weights & Biases project


@dataclass
class ValidationConfig:
    source: str | None = None  # audio that is not trained on, as data.source; None: no validation
    every: int = 1000  # steps
    clips: int = 256  # the same ones every time, with the same masks


@dataclass
class FrozenConfig:
    source: str | None = None  # train only a head on the embeddings of this encoder; None: pretrain
    trust_remote_code: bool = False  # run Python code that a transformers folder brings along
    every_frame: bool = False  # predict the code of every frame, without masking
    cache: str | None = None  # folder of cached embeddings; None: inside the run folder


@dataclass
class Config:
    recipe: str = "custom"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    frozen: FrozenConfig = field(default_factory=FrozenConfig)


def recipe_names() -> list[str]:
    """Names of the recipes in the package, for ``--config``."""
    return sorted(p.name[:-5] for p in resources.files("bestrq2.recipes").iterdir() if p.name.endswith(".yaml"))


_FREE_KEYS = ("data.domain_weights.",)  # below these, the keys are the user's own names


def _known_keys(schema: Any, prefix: str = "") -> list[str]:
    keys = []
    for entry in fields(schema):
        value = getattr(schema, entry.name)
        name = prefix + entry.name
        keys += [name, *_known_keys(value, name + ".")] if is_dataclass(value) else [name]
    return keys


def _leaves(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, DictConfig):
        return [prefix.rstrip(".")]
    return [leaf for key in node for leaf in _leaves(node._get_node(key), f"{prefix}{key!s}.")] or [prefix.rstrip(".")]


def _merge(base: DictConfig, layer: DictConfig, origin: str) -> DictConfig:
    known = _known_keys(Config())
    for key in _leaves(layer):
        if key and key not in known and not key.startswith(_FREE_KEYS):
            close = get_close_matches(key, known, n=1) or [k for k in known if k.endswith("." + key.split(".")[-1])][:1]
            hint = f"; did you mean {close[0]!r}?" if close else f"; known sections: {', '.join(_sections())}"
            raise ConfigError(f"{origin}: unknown configuration key {key!r}{hint}")
    try:
        return OmegaConf.merge(base, layer)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}: {getattr(error, 'full_key', '')}: {str(error).splitlines()[0]}") from error


def _sections() -> list[str]:
    return [entry.name for entry in fields(Config) if is_dataclass(getattr(Config(), entry.name))]


def _read_recipe(name: str) -> tuple[DictConfig, str]:
    """A recipe of the package by name, or a YAML file by path."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"--config {name}: no such file")
        text, label = path.read_text(), path.stem
    else:
        if name not in recipe_names():
            raise ConfigError(f"--config {name!r}: expected a YAML file or one of {', '.join(recipe_names())}")
        text, label = resources.files("bestrq2.recipes").joinpath(f"{name}.yaml").read_text(), name
    try:
        loaded = OmegaConf.create(text)
    except Exception as error:
        raise ConfigError(f"--config {name}: not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"--config {name}: expected sections such as {', '.join(_sections())}, got a list")
    return loaded, label


def load_config(recipe: str, overrides: list[str] | None = None) -> Config:
    """Defaults, then the recipe (and the recipe it is ``based_on``), then ``key=value`` overrides.

    Raises:
        ConfigError: for an unknown recipe or key, a malformed override, a wrong type, or an impossible value.
    """
    layers: list[tuple[DictConfig, str]] = []
    name: str | None = recipe
    label = None
    while name:
        layer, own = _read_recipe(name)
        label = label or own
        if len(layers) > 8:
            raise ConfigError(f"--config {recipe}: based_on refers to itself")
        name = layer.pop("based_on", None)
        layers.append((layer, f"recipe {own}"))
    merged = OmegaConf.structured(Config)
    for layer, origin in reversed(layers):
        merged = _merge(merged, layer, origin)
    merged.recipe = label
    return _with_overrides(merged, overrides or [])


def with_overrides(config: Config, overrides: list[str]) -> Config:
    """A configuration with ``key=value`` overrides applied.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    return _with_overrides(OmegaConf.structured(config), overrides)


def _with_overrides(merged: DictConfig, overrides: list[str]) -> Config:
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ConfigError(f"expected overrides as key=value, got {override!r}")
        try:
            layer = OmegaConf.from_dotlist([override])
        except Exception as error:
            raise ConfigError(f"override {override!r}: {error}") from error
        merged = _merge(merged, layer, f"override {override!r}")
    return _validated(merged)


def config_from_dict(values: dict[str, Any]) -> Config:
    """Rebuild a saved configuration.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    return _validated(_merge(OmegaConf.structured(Config), OmegaConf.create(values), "saved configuration"))


def config_to_dict(config: Config) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def config_to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _validated(merged: DictConfig) -> Config:
    config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    c, d = config, config.data
    sources = d.source if isinstance(d.source, list) and d.source else [d.source or ""]
    buckets, weights = d.batching == "buckets", d.domain_weights.values()
    encoder, chunks = c.model.encoder, c.model.encoder.conformer
    plain, unused = EncoderConfig(), ("norm", "feed_forward", "qk_norm", "position", "patch_height", "patch_width")
    foreign = [name for name in unused if getattr(encoder, name) != getattr(plain, name)]
    expectations = [
        ("model.encoder.kind", encoder.kind in ("vit", "conformer"), encoder.kind, "vit or conformer"),
        (
            f"model.encoder.{(*foreign, 'norm')[0]}",
            encoder.kind != "conformer" or not foreign,
            getattr(encoder, (*foreign, "norm")[0]),
            "the default: a Conformer has no such choice",
        ),
        (
            "model.encoder.conformer.chunk_training",
            chunks.chunk_training in ("none", "speechbrain", "wenet"),
            chunks.chunk_training,
            "none, speechbrain or wenet",
        ),
        ("model.name", c.model.name in ("best_rq2", "best_rq"), c.model.name, "best_rq2 or best_rq"),
        (
            "model.front_end.normalize",
            c.model.front_end.normalize in ("none", "global"),
            c.model.front_end.normalize,
            "none or global",
        ),
        ("model.masking.ratio", len(c.model.masking.ratio) == 2, c.model.masking.ratio, "two numbers [low, high]"),
        ("data.crop_seconds", c.data.crop_seconds > 0, c.data.crop_seconds, "a positive number of seconds"),
        ("data.source", all(isinstance(name, str) for name in sources), d.source, "a name or a list of names"),
        ("data.batching", d.batching in ("crops", "buckets"), d.batching, "crops or buckets"),
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
            not c.frozen.source or not (weights or buckets),
            c.frozen.source,
            "null with data.domain_weights or data.batching=buckets, which do not apply to cached embeddings",
        ),
        ("data.workers", c.data.workers >= 0, c.data.workers, "0 or more"),
        ("optimizer.learning_rate", c.optimizer.learning_rate > 0, c.optimizer.learning_rate, "a positive number"),
        ("optimizer.warmup", 0 <= c.optimizer.warmup < 1, c.optimizer.warmup, "a share in [0, 1)"),
        ("optimizer.betas", len(c.optimizer.betas) == 2, c.optimizer.betas, "two numbers"),
        ("train.steps", c.train.steps >= 1, c.train.steps, "at least 1"),
        ("train.batch_size", c.train.batch_size >= 1, c.train.batch_size, "at least 1"),
        ("train.accumulate", c.train.accumulate >= 1, c.train.accumulate, "at least 1"),
        ("train.strategy", c.train.strategy in ("auto", "ddp", "fsdp"), c.train.strategy, "auto, ddp or fsdp"),
        ("train.ema_decay", 0 <= c.train.ema_decay < 1, c.train.ema_decay, "a number in [0, 1)"),
        ("train.save_minutes", c.train.save_minutes >= 0, c.train.save_minutes, "0 or more minutes"),
        ("train.keep_best", c.train.keep_best >= 0, c.train.keep_best, "0 or more"),
        ("validation.every", c.validation.every >= 1, c.validation.every, "at least 1"),
        ("validation.clips", c.validation.clips >= 1, c.validation.clips, "at least 1"),
        (
            "optimizer.schedule",
            c.optimizer.schedule in ("cosine", "linear", "constant", "stable"),
            c.optimizer.schedule,
            "cosine, linear, constant or stable",
        ),
        ("optimizer.cooldown", 0 < c.optimizer.cooldown <= 1, c.optimizer.cooldown, "a share in (0, 1]"),
        ("train.log_every", c.train.log_every >= 1, c.train.log_every, "at least 1"),
        ("train.save_every", c.train.save_every >= 1, c.train.save_every, "at least 1"),
        ("train.keep_last", c.train.keep_last >= 1, c.train.keep_last, "at least 1"),
        ("train.pictures_every", c.train.pictures_every >= 0, c.train.pictures_every, "0 (none) or more"),
        (
            "train.precision",
            c.train.precision in ("auto", "fp32", "bf16", "fp16"),
            c.train.precision,
            "auto, fp32, bf16 or fp16",
        ),
    ]
    for key, fine, value, expected in expectations:
        if not fine:
            raise ConfigError(f"{key}: expected {expected}, got {value!r}")
    return config
