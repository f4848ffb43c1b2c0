"""The sections of a configuration, with their defaults. Sections of the model are the settings of its layers."""

from dataclasses import dataclass, field
from typing import Any, Literal

from bestrq2.layers.conformer import Activation
from bestrq2.layers.conformer_convolution import ConvMode, ConvNorm
from bestrq2.layers.cross_attention import PredictorSettings
from bestrq2.layers.positions import PositionKind
from bestrq2.layers.quantizer import Normalize, Projection
from bestrq2.layers.transformer import TransformerSettings


@dataclass
class FrontEndConfig:
    sampling_rate: int = 16000  # Hz; other audio is resampled
    n_fft: int = 2048  # samples per Fourier transform
    win_length: int = 2048  # samples per analysis window (Hann)
    hop_length: int = 625  # samples from frame to frame
    num_mels: int = 128  # mel filters, the height of the spectrogram
    f_min: float = 0.0  # Hz, lower edge of the filters
    f_max: float | None = None  # Hz, upper edge; null: half the sampling rate
    floor_db: float = -100.0  # dB, quieter cells take this level (published: -100)
    normalize: Literal["none", "global"] = "none"  # none (published) | global: (dB - mean) / std
    mean: float | None = None  # of "global"; null: measured on the first clips of the training data
    std: float | None = None  # as mean


@dataclass(frozen=True)
class ConformerConfig:
    """Of ``encoder.kind: conformer``; width, depth, heads, hidden, bias, dropout and drop_path are the encoder's."""

    channels: list[int] = field(default_factory=lambda: [64, 32])  # of the subsampling: 2 stages for 4x, 3 for 8x
    kernel_size: int = 31  # frames that the depthwise convolution sees, odd
    conv_mode: ConvMode = "full"  # full | causal | chunk (the last two can stream)
    conv_norm: ConvNorm = "layer_norm"  # layer_norm | batch_norm
    activation: Activation = "silu"  # silu | gelu
    chunk_size: int | None = None  # frames per chunk of attention; null: the whole sequence
    left_context: int | None = None  # frames before the chunk; null: all
    chunk_training: Literal["none", "speechbrain", "wenet"] = (
        "none"  # none: the window above | speechbrain | wenet: a random window per step
    )


@dataclass(frozen=True)
class EncoderConfig(TransformerSettings):
    kind: Literal["vit", "conformer"] = "vit"  # vit | conformer
    patch_height: int = 16  # mel bands per patch of a vit
    patch_width: int = 16  # frames per patch of a vit
    position: PositionKind = "sincos"  # sincos | rope
    drop_path: float = 0.1
    join_rows: Literal["average", "concatenate"] = (
        "average"  # patches of a time step in features: average (published) | concatenate
    )
    activation_checkpointing: bool = False  # compute blocks again in the backward pass: less memory, slower
    conformer: ConformerConfig = field(default_factory=ConformerConfig)

    @property
    def frames_per_token(self) -> int:
        return 2 ** len(self.conformer.channels) if self.kind == "conformer" else self.patch_width


@dataclass(frozen=True)
class PredictorConfig(PredictorSettings):
    depth: int = 4  # number of blocks

    def __post_init__(self) -> None:
        """Accept anything: a one-stage model does not use its section. A two-step model is checked when it is built."""


@dataclass
class TargetsConfig:
    codebook_size: int = 8192  # codes per codebook, the classes to predict
    codebook_dim: int = 16  # numbers that a patch is projected to
    num_codebooks: int = 1  # codebooks, each with its own projection and head
    normalize: Normalize = "none"  # none (published) | global | patch | utterance
    mean: float | None = None  # of "global"; null: measured on the first clips of the training data
    std: float | None = None  # as mean
    seed: int = 21072023  # of projections and codebooks
    seed_candidates: int = 1  # more: of so many seeds, the one whose codes are used most evenly
    projection: Projection = "random"  # random (published) | pca | whitened_pca: fitted to the first clips
    plain_codebooks: int = 0  # of whitened_pca: so many codebooks take the axes at their own scale
    centroid_steps: int = 0  # steps of k-means that move the codes to what falls on them; 0 (published): none
    fit_clips: int = 256  # of the training data, for seed_candidates, projection and centroid_steps
    encoder: str | None = None  # quantize features of this earlier run; null (published): log-mel patches
    layer: int | None = None  # its block, from 0; null: its final output
    digest: str | None = None  # of its weights: filled in when a run begins, which then goes on with no other


@dataclass
class MaskingConfig:
    ratio: list[float] = field(default_factory=lambda: [0.4, 0.6])  # [low, high] masked share, drawn for every step
    shared_per_batch: bool = False  # one mask for all clips of a batch
    span_length: int = 1  # tokens per masked span
    block_rows: int | None = 1  # frequency rows of a block; null: all of them (spans in time)
    block_columns: int = 1  # time columns of a block
    kept: bool = False  # true: spans or blocks are what the encoder sees
    dispersion: float = 0.0  # above 0: the odds to be masked grow with a patch's mean absolute deviation to this power
    noise_std: float = 0.1  # of the noise that hides masked frames from a one-stage Conformer


@dataclass
class MixingConfig:
    share: float = 0.0  # of the clips to which a part of their neighbour is added; 0 (published): none
    level_db: list[float] = field(default_factory=lambda: [-5.0, 5.0])  # of the added clip against the clip
    span: list[float] = field(default_factory=lambda: [0.3, 1.0])  # how much of the clip's time is mixed


@dataclass
class ModelConfig:
    name: Literal["best_rq2", "best_rq"] = "best_rq2"  # best_rq2: two-step | best_rq: one-stage
    front_end: FrontEndConfig = field(default_factory=FrontEndConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    clip_weight: float = 0.0  # of a loss for whole clips, from the mean of the context; 0 (published): none


@dataclass
class DataConfig:
    # Folder, CSV/JSONL manifest, tar shards (a pattern such as shards-{000000..000009}.tar), .h5, .parquet or a saved
    # Hugging Face dataset, or a list of these; null: the 24 clips inside the package.
    source: Any = None
    crop_seconds: float = 10.0  # seconds of the random crops
    min_seconds: float | None = None  # null: one patch
    join_short: bool = False  # fill a crop with following clips of the same folder
    batching: Literal["crops", "buckets"] = (
        "crops"  # crops: batch_size crops per step | buckets: clips of similar length, taken whole
    )
    batch_seconds: float | None = None  # of "buckets": padded seconds per step; null: batch_size * crop_seconds
    domain_weights: dict[str, float] = field(default_factory=dict)  # draw domains by share; empty: by their hours
    cache: str | None = None  # folder for decoded 16-bit samples, filled at the start, read instead of the files
    workers: int = 2  # processes that decode audio, per rank; 0: none


@dataclass
class OptimizerConfig:
    learning_rate: float = 1e-4  # peak of the schedule
    schedule: Literal["cosine", "linear", "constant", "stable"] = (
        "cosine"  # after the warm-up: cosine | linear | constant | stable (at the peak until the cooldown)
    )
    final_ratio: float = 0.001  # learning rate at the last step, as a share of the peak
    cooldown: float = 0.2  # of "stable": the last share of all steps, in which the rate falls
    warmup: float = 0.05  # share of all steps
    weight_decay: float = 0.05  # of AdamW
    final_weight_decay: float | None = None  # moved to by a cosine; null: constant
    decay_all: bool = True  # published: on every parameter; false: not on norms, biases and tokens
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of AdamW
    epsilon: float = 1e-8  # of AdamW
    max_grad_norm: float | None = None  # published: no clipping


@dataclass
class TrainConfig:
    steps: int = 200000  # updates of the weights
    batch_size: int = 256  # clips per update, over all ranks and micro-batches
    accumulate: int = 1  # micro-batches per update and rank: less memory, same update
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"  # several ranks: auto = ddp | fsdp (shard the model)
    seed: int = 0  # of weights, crops, masks and dropout
    init_from: str | None = None  # begin with the weights of this run or encoder file; null: random weights
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = (
        "auto"  # auto: bf16 autocast where the hardware has it | fp32 | bf16 | fp16
    )
    ema_decay: float = 0.0  # of a moving average of the weights, e.g. 0.999; 0: none
    compile: bool | None = None  # torch.compile of encoder and predictor blocks; null: on CUDA devices
    log_every: int = 50  # steps between rows of metrics.csv
    save_every: int = 5000  # steps between checkpoints
    save_minutes: float = 30.0  # also save when this long has passed since the last time; 0: never
    async_save: bool = True  # write checkpoints beside training (their tensors are copied first)
    keep_last: int = 3  # newest checkpoints that are kept
    keep_best: int = 0  # also keep this many of lowest validation loss (else mean training loss, not of a few steps)
    max_bad_steps: int = 20  # consecutive non-finite steps before giving up
    pictures_every: int = 2000  # steps between pictures of mask and predictions; 0: none
    health_every: int = 1000  # steps between measurements of the encoder's outputs (RMS, effective rank); 0: none
    wandb: str | None = None  # also log to this Weights & Biases project


@dataclass
class ValidationConfig:
    source: str | None = None  # audio that is not trained on, as data.source; null: no validation
    every: int = 1000  # steps
    clips: int = 256  # the same ones every time, with the same masks


@dataclass
class ProbeConfig:
    """A probe during training, on the encoder as it is; the fields are those of :class:`bestrq2.probing.ProbeTask`."""

    every: int = 0  # steps; 0: no probe
    manifest: str | None = None  # labelled clips; null: the 24 clips inside the package, by domain
    kind: str = "classification"  # classification | multilabel | events | retrieval | regression
    label: str = "label"  # column of the manifest
    events: str | None = None  # of kind "events": table of onsets and offsets
    group: str | None = None  # column whose clips are never split between training and test
    split: str | None = None  # column that says which clips train and which test
    head: str = "linear"  # linear | ridge | mlp | knn
    layers: str = "final"  # final | middle | all, or numbers of blocks and "final" separated by commas
    combine: str = "average"  # of several layers: average | concatenate | weighted (learned by the linear head)
    rows: str | None = None  # of 2-D patches: average | concatenate; null: as model.encoder.join_rows
    pooling: str = "mean+std"  # of frames to a clip: mean | max | mean+std


@dataclass
class FrozenConfig:
    source: str | None = None  # train only a head on the embeddings of this encoder; null: pretrain
    trust_remote_code: bool = False  # run the Python code of a transformers folder
    every_frame: bool = False  # predict the code of every frame, without masking
    cache: str | None = None  # folder of cached embeddings; null: inside the run folder


@dataclass
class Config:
    recipe: str = "custom"  # name, part of the names of run folders
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
