"""Checkpoints of the published BEST-RQ-2 family: two-step, one-stage ViT and 2.1, read and written.

Their names are those of the authors' modules (``patch_embed.patch_embed.proj``, ``encoder.blocks.0.attn.qkv``,
``predictor.*``, ``quantizer.P``, ``rq_proj`` or, one-stage, ``output_proj``), with or without a common prefix; exports
for transformers keep only the encoder. What a file does not say is taken from :data:`UNWRITTEN` or asked for.

Same numbers, other form: their patch embedding is a convolution with stride (ours a product with the flattened kernel),
their tokens run along time first (ours along frequency; attention does not care), their sin-cos positions are a stored
table (ours are computed; the table is checked), and their two-dimensional rotary positions turn channel pairs inside
each half of a head (ours across halves: queries and keys are permuted alike).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bestrq2.config import Config, EncoderConfig, PredictorConfig
from bestrq2.errors import ConfigError
from bestrq2.layers import TransformerSettings
from bestrq2.layers.log_mel import FLOOR_DB
from bestrq2.layers.log_mel_tables import mel_filters
from bestrq2.layers.positions import sincos_2d

from .published_blocks import read_transformer, write_transformer
from .published_keys import Keys, unknown_layout

FILTERS = "spectrogram.mel_spec.mel_scale.fb"
WINDOW = "spectrogram.mel_spec.spectrogram.window"
ANCHOR = re.compile(r"^(|.*\.)encoder\.blocks\.0\.attn\.qkv\.weight$")
SAMPLING_RATE = 16000
HEAD_DIM = 64
# (n_fft, win_length, patch height, patch width) -> hop in samples, of published models whose hop is known.
UNWRITTEN = {(2048, 2048, 16, 16): 625}
WINDOW_SECONDS = 10.0


@dataclass
class Published:
    """A published checkpoint in our names.

    Attributes:
        config: what it says about the model; training sections keep their defaults.
        weights: named as in a run's ``model.safetensors``.
        complete: whether predictor (two-step), quantizer and head are there too, so that pretraining can go on.
    """

    config: Config
    weights: dict[str, Tensor]
    complete: bool


def without_prefix(tensors: Mapping[str, Tensor], origin: Path | str) -> dict[str, Tensor]:
    """Names as the authors' modules have them: marks of torch.compile and a common prefix removed.

    Raises:
        UnknownLayoutError: if there is no Transformer called ``encoder``, or several.
    """
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    roots = [match[1] for match in map(ANCHOR.match, plain) if match]
    if len(roots) != 1:
        found = "no" if not roots else f"{len(roots)} times"
        raise unknown_layout(origin, f"{found} 'encoder.blocks.0.attn.qkv.weight'", list(tensors))
    stranger = [name for name in plain if not name.startswith(roots[0])]
    if stranger:
        raise unknown_layout(origin, f"keys outside the prefix {roots[0]!r} of the encoder", stranger)
    return {name[len(roots[0]) :]: tensor for name, tensor in plain.items()}


def from_published(
    tensors: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    predictor_heads: int | None = None,
    hop_length: int | None = None,
    window_seconds: float | None = None,
    origin: Path | str = "published checkpoint",
) -> Published:
    """Translate the tensors of a published checkpoint.

    Args:
        tensors: as in its safetensors file.
        heads, predictor_heads: attention heads, which no shape shows. None: by the width of the query norm, the rotary
            frequencies, or 64 channels a head.
        hop_length: samples between frames, written in no tensor. None: that of the published model with this front end.
        window_seconds: longest clip processed in one piece. None: the length of the position table, else 10 s.
        origin: named in errors.

    Raises:
        UnknownLayoutError: for missing or extra tensors, listing keys.
        ConfigError: for tensors whose values or shapes we cannot reproduce, or an unknown hop.
    """
    numbers = {"heads": heads, "predictor_heads": predictor_heads, "hop_length": hop_length}
    for name, number in {**numbers, "window_seconds": window_seconds}.items():
        if number is not None and not 0 < number < math.inf:
            raise ConfigError(f"{origin}: {name}: expected a positive number, got {number}")
    keys = Keys(without_prefix(tensors, origin), origin)
    config = Config(recipe="published")
    weights: dict[str, Tensor] = {}

    stem = "patch_embed.patch_embed." if keys.below("patch_embed.patch_embed.") else "patch_embed."
    kernel = keys.need(stem + "proj.weight")
    if kernel.dim() != 4 or kernel.shape[1] != 1:
        raise ConfigError(f"{origin}: expected a patch kernel [D, 1, bands, frames], got {list(kernel.shape)}")
    width, _, height, frames = kernel.shape
    bias = keys.get(stem + "proj.bias")
    weights["encoder.patch_embed.proj.weight"] = kernel.flatten(1)
    weights["encoder.patch_embed.proj.bias"] = (
        torch.zeros(width, dtype=torch.float32, device="cpu") if bias is None else bias
    )

    front = config.model.front_end
    filters, window = keys.get(FILTERS, dims=2), keys.get(WINDOW, dims=1)
    if filters is not None:
        front.n_fft, front.num_mels = 2 * (filters.shape[0] - 1), filters.shape[1]
    front.win_length = front.n_fft if window is None else len(window)
    if front.n_fft < front.win_length or front.num_mels < height:
        raise ConfigError(
            f"{origin}: a window of {front.win_length} samples and patches of {height} bands do not fit a spectrogram "
            f"of {front.n_fft}-point frames with {front.num_mels} bands"
        )
    known_hop = UNWRITTEN.get((front.n_fft, front.win_length, height, frames))
    if hop_length is None and known_hop is None:
        raise ConfigError(
            f"{origin}: the hop of its spectrogram is written in no tensor and unknown for {front.n_fft}-point frames "
            f"with patches of {height} x {frames}: give hop_length (samples at {SAMPLING_RATE} Hz; --hop-length)"
        )
    front.hop_length, front.f_max = hop_length or known_hop or 0, SAMPLING_RATE / 2
    expected_filters = mel_filters(front.n_fft, front.num_mels, SAMPLING_RATE, 0.0, SAMPLING_RATE / 2)
    _check_buffer(keys, FILTERS, filters, expected_filters, "HTK filters from 0 to 8000 Hz")
    expected_window = torch.hann_window(front.win_length, device="cpu", dtype=torch.float32)
    _check_buffer(keys, WINDOW, window, expected_window, "a Hann window")
    weights["encoder.front_end.mean"] = torch.zeros(front.num_mels, dtype=torch.float32, device="cpu")
    weights["encoder.front_end.std"] = torch.ones(front.num_mels, dtype=torch.float32, device="cpu")

    rows = front.num_mels // height
    settings, blocks, position = read_transformer(keys, "encoder.", rows, heads, HEAD_DIM)
    shape = asdict(settings) | {"drop_path": 0.1}
    config.model.encoder = EncoderConfig(**shape, patch_height=height, patch_width=frames, position=position)
    weights |= {f"encoder.encoder.{name}": tensor for name, tensor in blocks.items()}
    seconds = window_seconds or WINDOW_SECONDS
    columns = _check_table(keys, "encoder.pos_embed", rows)
    if columns is not None:
        seconds = window_seconds or columns * frames * front.hop_length / SAMPLING_RATE
    config.data.crop_seconds = seconds

    complete = _read_pretraining(keys, config, weights, rows, settings, predictor_heads)
    if keys.rest():
        raise unknown_layout(origin, "tensors that no published model has", keys.rest())
    return Published(config, weights, complete)


def _read_pretraining(
    keys: Keys,
    config: Config,
    weights: dict[str, Tensor],
    rows: int,
    encoder: TransformerSettings,
    predictor_heads: int | None,
) -> bool:
    """Predictor, mask token, quantizer and head, as far as they are there; whether all are."""
    one_stage = "output_proj.weight" in keys.tensors
    config.model.name = "best_rq" if one_stage else "best_rq2"
    parts = []
    if not one_stage and keys.below("predictor."):
        head_dim = encoder.width // encoder.heads
        settings, blocks, _ = read_transformer(keys, "predictor.", rows, predictor_heads, head_dim)
        config.model.predictor = PredictorConfig(**asdict(settings))
        weights |= {f"predictor.transformer.{name}": tensor for name, tensor in blocks.items()}
        _check_table(keys, "predictor.pos_embed", rows)
        for name in ("weight", "bias"):
            weights[f"predictor.input_proj.{name}"] = keys.need(f"predictor_input_proj.{name}")
        parts.append("predictor")
    mask_token = keys.get("mask_token")
    if mask_token is not None:
        weights["mask_token" if one_stage else "predictor.mask_token"] = mask_token
        parts.append("mask_token")
    head = "output_proj" if one_stage else "rq_proj"
    if keys.below(head + "."):
        weights["head.weight"] = keys.need(head + ".weight")[None]
        weights["head.bias"] = keys.need(head + ".bias")[None]
        parts.append("head")
    if keys.below("quantizer."):
        projection, codebook = keys.need("quantizer.P", dims=2), keys.need("quantizer.CB", dims=2)
        # Any length of a code gives other codes than unit length: theirs are stored normalised.
        weights["quantizer.projection"], weights["quantizer.codebook"] = projection[None], codebook[None]
        weights["quantizer.mean"], weights["quantizer.std"] = (
            torch.tensor(0.0, dtype=torch.float32, device="cpu"),
            torch.tensor(1.0, dtype=torch.float32, device="cpu"),
        )
        targets = config.model.targets
        targets.codebook_size, targets.codebook_dim = codebook.shape
        parts.append("quantizer")
    return set(parts) >= {"mask_token", "head", "quantizer", *([] if one_stage else ["predictor"])}


def _check_buffer(keys: Keys, name: str, found: Tensor | None, expected: Tensor, what: str) -> None:
    if found is None:
        return
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=keys.tolerance(name)):
        raise ConfigError(
            f"{keys.origin}: {name} {list(found.shape)} is not {what}, the only front end that is published"
        )


def _grid(rows: int, columns: int) -> Tensor:
    """Positions in the published order: along time first."""
    token = torch.arange(rows * columns, device="cpu")
    return torch.stack((token // columns, token % columns), dim=-1)


def _check_table(keys: Keys, name: str, rows: int) -> int | None:
    """Time columns of a sin-cos table, whose values must be those that we compute; None without one."""
    table = keys.get(name, dims=3)
    if table is None:
        return None
    count, tokens, width = table.shape
    columns = tokens // rows
    same = count == 1 and tokens == rows * columns and width % 4 == 0
    if not same or not torch.allclose(table[0], sincos_2d(_grid(rows, columns), width), atol=keys.tolerance(name)):
        raise ConfigError(
            f"{keys.origin}: {name} {list(table.shape)} is not the sin-cos table of a grid with {rows} frequency rows; "
            "learned positions are not supported"
        )
    return columns


def to_published(config: Config, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Translate a model of ours into the published names.

    A standardising front end (``normalize: global``) is folded into the patch embedding, because published ones have
    none. Predictor, quantizer and head are included where the published model has the same ones: raw patches as targets
    and one codebook.

    Args:
        config, weights: of a run (all weights, or the encoder's alone).

    Returns:
        tensors, safetensors metadata with what no tensor says (heads, hop, window), and notes on what was left out.

    Raises:
        ConfigError: for a model that has no published form.
    """
    model, encoder, front = config.model, config.model.encoder, config.model.front_end
    if encoder.kind != "vit":
        raise ConfigError("--published: only ViT encoders have a published layout; use --hf for this one")
    if front.sampling_rate != SAMPLING_RATE or front.f_min != 0 or front.f_max not in (None, SAMPLING_RATE / 2):
        raise ConfigError("--published: the published front end takes 16 kHz audio and bands from 0 to 8000 Hz")
    if front.floor_db != FLOOR_DB:
        raise ConfigError(f"--published: the published front end has a floor of {FLOOR_DB:g} dB, got {front.floor_db}")
    if front.n_fft % 2:
        raise ConfigError(f"--published: expected an even model.front_end.n_fft, got {front.n_fft}")
    if front.num_mels % encoder.patch_height:
        raise ConfigError(
            f"--published: {front.num_mels} bands are no multiple of the patch height {encoder.patch_height}"
        )
    rows = front.num_mels // encoder.patch_height
    samples = round(config.data.crop_seconds * SAMPLING_RATE)
    columns = max(1, (1 + samples // front.hop_length) // encoder.patch_width)
    swapped = encoder.position == "rope" and rows > 1
    metadata = {
        "heads": str(encoder.heads),
        "hop_length": str(front.hop_length),
        "window_seconds": repr(config.data.crop_seconds),
    }
    out = {
        WINDOW: torch.hann_window(front.win_length, dtype=torch.float64, device="cpu").float(),
        FILTERS: mel_filters(front.n_fft, front.num_mels, SAMPLING_RATE, 0.0, SAMPLING_RATE / 2),
    }
    kernel, bias, standardised = _fold_standardisation(weights, rows, encoder.patch_width)
    out["patch_embed.patch_embed.proj.weight"] = kernel.view(-1, 1, encoder.patch_height, encoder.patch_width)
    out["patch_embed.patch_embed.proj.bias"] = bias
    out |= write_transformer(weights, "encoder.encoder.", "encoder.", encoder.heads, swapped)
    if encoder.position == "sincos":
        out["encoder.pos_embed"] = sincos_2d(_grid(rows, columns), encoder.width)[None]
    notes = ["front end's mean and deviation folded into the patch embedding"] if standardised else []
    if encoder.join_rows == "concatenate" and rows > 1:
        notes.append(
            f"model.encoder.join_rows left out: published encoders average the {rows} rows of a time step, which gives "
            f'other features than this model; rows="concatenate" (--rows concatenate) joins them there, too'
        )
    if "clip_head.weight" in weights:
        notes.append("the head of model.clip_weight left out: published models have none")
    if "head.weight" not in weights:
        return out, metadata, notes
    targets = model.targets
    cross = model.name == "best_rq2" and model.predictor.attention == "cross"
    other = targets.normalize != "none" or targets.num_codebooks != 1 or targets.encoder is not None
    # Codes moved to centroids are still a projection and a codebook; a mean to subtract has no place there.
    if standardised or other or targets.projection != "random" or cross:
        notes.append(
            "predictor, quantizer and head left out: published targets are one codebook of raw patches and "
            "published predictors attend to all tokens, this model's do not"
        )
        return out, metadata, notes
    head = "output_proj" if model.name == "best_rq" else "rq_proj"
    out[f"{head}.weight"], out[f"{head}.bias"] = weights["head.weight"][0], weights["head.bias"][0]
    out["quantizer.P"], out["quantizer.CB"] = weights["quantizer.projection"][0], weights["quantizer.codebook"][0]
    if model.name == "best_rq":
        out["mask_token"] = weights["mask_token"]
        return out, metadata, notes
    metadata["predictor_heads"] = str(model.predictor.heads)
    out["mask_token"] = weights["predictor.mask_token"]
    out |= write_transformer(weights, "predictor.transformer.", "predictor.", model.predictor.heads, swapped)
    for name in ("weight", "bias"):
        out[f"predictor_input_proj.{name}"] = weights[f"predictor.input_proj.{name}"]
    if encoder.position == "sincos":
        out["predictor.pos_embed"] = sincos_2d(_grid(rows, columns), model.predictor.width)[None]
    return out, metadata, notes


def _fold_standardisation(weights: Mapping[str, Tensor], rows: int, frames: int) -> tuple[Tensor, Tensor, bool]:
    """Patch kernel (D, P) and bias (D,) for raw dB: ``W (x - m) / s + b = (W / s) x + (b - W m / s)``.

    One kernel serves every frequency row, so the statistics must repeat with the rows (one number, or strips).
    """
    kernel, bias = weights["encoder.patch_embed.proj.weight"], weights["encoder.patch_embed.proj.bias"]
    mean, std = (weights[f"encoder.front_end.{name}"].double().view(rows, -1) for name in ("mean", "std"))
    if not (mean == mean[:1]).all() or not (std == std[:1]).all():
        raise ConfigError("--published: statistics that differ between frequency rows cannot be folded into one kernel")
    if not mean.any() and bool((std == 1).all()):
        return kernel, bias, False
    mean, std = (values[0].repeat_interleave(frames) for values in (mean, std))
    folded = kernel.double() / std
    return folded.float(), (bias.double() - folded @ mean).float(), True
