"""An encoder as a graph in a file: torch.export's .pt2 and ONNX, front end included, with any batch size and length.

Inputs ``waveform (batch, samples)`` float32 and ``lengths (batch,)`` int64, outputs ``features (batch, frames, width)``
float32 and ``feature_lengths (batch,)`` int64; see :class:`~bestrq2.interchange.exportable.ExportableEncoder`.
"""

import io
import json
import logging
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bestrq2.config import Config, ConfigError, config_to_dict
from bestrq2.durability import named_in_errors
from bestrq2.errors import printable
from bestrq2.layers.padding import length_mask
from bestrq2.models import ConformerEncoder, ViTEncoder
from bestrq2.version import __version__

from .exportable import exportable
from .staging import Check, staged
from .tensors import CONFIG_ENTRY

Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
INPUTS, OUTPUTS = ["waveform", "lengths"], ["features", "feature_lengths"]
TOLERANCE = 1e-4
ONNX_LIMIT = 2_000_000_000  # bytes of one file, a limit of the format


def trace(encoder: ViTEncoder | ConformerEncoder) -> torch.export.ExportedProgram:
    """The encoder as a graph with symbols for batch size and length; made on the CPU, in fp32."""
    example = (
        torch.zeros(2, 3 * encoder.sampling_rate, dtype=torch.float32, device="cpu"),
        torch.tensor([3, 2], device="cpu") * encoder.sampling_rate,
    )
    batch, samples = torch.export.Dim("batch"), torch.export.Dim("samples", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(
            exportable(encoder), example, dynamic_shapes=({0: batch, 1: samples}, {0: batch}), strict=False
        )


def describe(encoder: ViTEncoder | ConformerEncoder, config: Config) -> dict[str, str]:
    """Metadata of the file: inputs, outputs, sampling rate and frame rate."""
    values: dict[str, Any] = {
        "bestrq2_version": __version__,
        "sampling_rate": encoder.sampling_rate,
        "hop_size_in_ms": encoder.hop_size_in_ms,
        "output_dim": encoder.output_dim,
        "waveform": "float32 (batch, samples), mono, zeros behind a clip's end",
        "lengths": "int64 (batch,), samples of each clip, at least 1, at most those of waveform",
        "features": "float32 (batch, frames, width), zeros behind a clip's end; NaN if its length is out of range",
        "feature_lengths": "int64 (batch,), frames of each clip",
    }
    return {
        **{name: str(value) for name, value in values.items()},
        CONFIG_ENTRY: json.dumps(config_to_dict(config)),
    }


def largest_error(encoder: ViTEncoder | ConformerEncoder, run: Run) -> float:
    """Largest difference between ``run`` and ``encoder.encode``, in units of the root mean square of the features.

    Batches of 1 to 3 clips: shorter than a frame, ragged, and longer than the encoder's window.

    Raises:
        ConfigError: for other frame counts, values that are not finite, or anything behind a clip's end.
    """
    rate = encoder.sampling_rate
    seconds = 4.0
    if isinstance(encoder, ViTEncoder):
        seconds = 1.4 * encoder.window_columns * encoder.hop_size_in_ms / 1000
    cases = [[1.0], [2.3, 0.001, 1.1], [seconds, 0.9 * seconds], [0.01, 0.001]]
    generator, worst = torch.Generator("cpu").manual_seed(0), 0.0
    for case in cases:
        lengths = torch.tensor([max(1, round(part * rate)) for part in case], device="cpu")
        waveform = 0.1 * torch.randn(
            len(case), int(lengths.max()) + 3, generator=generator, dtype=torch.float32, device="cpu"
        )
        waveform[~length_mask(lengths, waveform.shape[1], waveform.device)] = torch.nan  # any padding is none
        with torch.no_grad():
            expected, counts = encoder.encode(waveform, lengths)
            features, found = run(waveform, lengths)
        frames = expected.shape[1]
        if not torch.equal(found, counts) or features.shape[1] != frames:
            raise ConfigError(f"frames {found.tolist()} of {features.shape[1]}, expected {counts.tolist()} of {frames}")
        behind = ~length_mask(counts, features.shape[1], counts.device)
        if not features.isfinite().all() or features[behind].any():
            raise ConfigError("features are not finite, or not zero behind a clip's end")
        scale = expected[~behind[:, :frames]].square().mean().sqrt()
        worst = max(worst, float((features[:, :frames] - expected).abs().max() / scale))
    return worst


def _checked(path: Path, encoder: ViTEncoder | ConformerEncoder, start: Callable[[], Run], by: str) -> str:
    try:
        error = largest_error(encoder, start())
    except Exception as problem:  # whatever a runtime may raise is the finding
        raise ConfigError(f"{path}: not written, it fails its check by {by}: {problem}") from problem
    if not error < TOLERANCE:
        raise ConfigError(f"{path}: not written: by {by} features differ by {error:.1e}, expected below {TOLERANCE}")
    return f"{path}: checked by {by}, largest error {error:.1e} of the features' root mean square"


def check_writers(onnx: Path | None, torch_export: Path | None) -> None:
    """Refuse what the writers would refuse, before a graph is traced for them.

    Raises:
        ConfigError: if a name has another ending, or a package that ONNX needs is missing.
    """
    if torch_export is not None:
        _check_name(torch_export, ".pt2", "--torch-export")
    if onnx is None:
        return
    _check_name(onnx, ".onnx", "--onnx")
    for package in ("onnx", "onnxscript"):  # torch.onnx imports them itself, with a less helpful message
        try:
            import_module(package)
        except ImportError as error:
            raise ConfigError("--onnx needs onnx and onnxscript: pip install 'bestrq2[onnx]'") from error


def write_torch_export(
    path: Path,
    program: torch.export.ExportedProgram,
    encoder: ViTEncoder | ConformerEncoder,
    config: Config,
    look_again: Check | None = None,
) -> str:
    """Write a .pt2 file, once it was read again and compared; ``torch.export.load(path).module()`` needs no bestrq2.

    Returns:
        what was checked.

    Raises:
        ConfigError: for a name that does not end in .pt2, or a graph that differs.
        OSError: if the file cannot be written.
    """
    check_writers(None, path)
    extra = {"bestrq2.json": json.dumps(describe(encoder, config))}
    with staged(path.parent, [path.name], look_again) as stage, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # In memory first: where a disk is full, torch's own writer of files ends the process.
        content = io.BytesIO()
        torch.export.save(program, content, extra_files=extra)
        made = stage / path.name
        with named_in_errors(made):
            made.write_bytes(content.getbuffer())
        return _checked(path, encoder, lambda: torch.export.load(made).module(), "torch.export.load")


def write_onnx(
    path: Path,
    program: torch.export.ExportedProgram,
    encoder: ViTEncoder | ConformerEncoder,
    config: Config,
    look_again: Check | None = None,
) -> str:
    """Write one ONNX file, once what it gives was compared, where onnxruntime is installed. ``program`` is used up.

    Returns:
        what was checked.

    Raises:
        ConfigError: if onnx or onnxscript is missing, the name does not end in .onnx, the model is larger than the
            format's 2 GB, or the graph differs.
        OSError: if the file cannot be written.
    """
    check_writers(path, None)
    size = sum(t.numel() * t.element_size() for t in [*program.state_dict.values(), *program.constants.values()])
    if size > ONNX_LIMIT:
        raise ConfigError(f"--onnx: {size / 1e9:.1f} GB of weights, expected at most 2 GB in one ONNX file")
    with staged(path.parent, [path.name], look_again) as stage:
        made = stage / path.name
        with named_in_errors(made):
            _save_onnx(made, program, describe(encoder, config))
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # nor its complaint where the home cannot be written
        try:
            import onnxruntime
        except ImportError:
            return f"{path}: NOT checked, because onnxruntime is not installed: pip install 'bestrq2[onnx]'"

        def start() -> Run:
            name = os.fsencode(made).decode("utf-8")  # as onnxruntime encodes it, whatever the locale is
            session = onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"])

            def run(waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
                features, counts = session.run(OUTPUTS, {"waveform": waveform.numpy(), "lengths": lengths.numpy()})
                return torch.from_numpy(features), torch.from_numpy(counts)

            return run

        return _checked(path, encoder, start, f"onnxruntime {onnxruntime.__version__}")


def _save_onnx(path: Path, program: torch.export.ExportedProgram, description: dict[str, str]) -> None:
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)  # it warns that torchvision is missing
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                program, (), dynamo=True, input_names=INPUTS, output_names=OUTPUTS, verbose=False, external_data=False
            )
        assert made is not None
        made.model.metadata_props.update(description)
        made.save(path, external_data=False)
    finally:
        log.setLevel(level)


def _check_name(path: Path, suffix: str, option: str) -> None:
    if path.suffix != suffix:
        raise ConfigError(f"{option}: expected a file name ending in {suffix}, got {printable(str(path))}")
