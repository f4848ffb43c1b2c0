"""Features of audio files from a trained encoder.

    python -m bestrq2.embed runs/best_rq2_tiny-001 recording.wav --out features
    python -m bestrq2.embed runs/best_rq2_tiny-001 FOLDER other.flac --out features --format parquet

``--format npy`` writes ``features/<name>.npy`` (frames, width) for every file, ``clips.npy`` (files, width) with the
mean over the frames of each file, and ``index.csv``. ``--format parquet`` writes one ``features.parquet`` with a row
per file. Files of any length are processed in windows; a file gives the same features alone and in any batch.
"""

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from bestrq2.checkpoint import CheckpointError
from bestrq2.config import ConfigError
from bestrq2.data import AudioError, AudioFile, DataError, ManifestError, Skip, collect, iterate_clips
from bestrq2.interchange import load
from bestrq2.models import ConformerEncoder, ViTEncoder
from bestrq2.training.hardware import choose_device


class Writer(Protocol):
    def add(self, record: dict[str, Any], features: np.ndarray, clip: np.ndarray) -> None: ...

    def close(self) -> list[Path]: ...


class NpyWriter:
    """One array file per audio file, and an index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.clips: list[np.ndarray] = []

    def add(self, record: dict[str, Any], features: np.ndarray, clip: np.ndarray) -> None:
        path = self.folder / "features" / f"{record['name']}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_array(path, features)
        self.rows.append({**record, "features": str(path.relative_to(self.folder))})
        self.clips.append(clip)

    def close(self) -> list[Path]:
        _write_array(self.folder / "clips.npy", np.stack(self.clips))
        partial = self.folder / ".index.csv.partial"
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        partial.replace(self.folder / "index.csv")
        return [self.folder / "features", self.folder / "clips.npy", self.folder / "index.csv"]


class ParquetWriter:
    """One row per file; ``features`` is the flattened (frames, width) array."""

    def __init__(self, folder: Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigError("--format parquet needs pyarrow: pip install 'bestrq2[parquet]'") from error
        self.arrow, self.parquet = pyarrow, pyarrow.parquet
        self.path = folder / "features.parquet"
        self.partial = folder / ".features.parquet.partial"
        self.writer: Any = None

    def add(self, record: dict[str, Any], features: np.ndarray, clip: np.ndarray) -> None:
        vector = self.arrow.list_(self.arrow.float32())
        columns = {name: self.arrow.array([value]) for name, value in record.items()}
        columns["clip"] = self.arrow.array([clip], vector)
        columns["features"] = self.arrow.array([features.reshape(-1)], vector)
        table = self.arrow.table(columns)
        if self.writer is None:
            self.writer = self.parquet.ParquetWriter(self.partial, table.schema)
        self.writer.write_table(table)

    def close(self) -> list[Path]:
        self.writer.close()
        self.partial.replace(self.path)
        return [self.path]


def _write_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file that is either complete or absent."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            np.save(file, array)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def find_files(inputs: Sequence[str]) -> tuple[list[tuple[str, AudioFile]], list[str]]:
    """Audio files of folders, manifests and single files, each with a unique output name, and messages on skips.

    Raises:
        DataError, ManifestError, AudioError: if an input has no usable audio.
    """
    named: list[tuple[str, AudioFile]] = []
    messages: list[str] = []
    used: set[str] = set()
    for source in inputs:
        files, report = collect(source)
        if report.skips:
            messages += [f"{source}: {report}", *(f"  {line}" for line in report.examples())]
        for file in files:
            base = Path(source) if Path(source).is_dir() else Path(file.path).parent
            relative = os.path.relpath(file.path, base)
            name = relative if not relative.startswith("..") else Path(file.path).name
            unique, number = name, 2
            while unique in used:
                unique, number = f"{name}-{number}", number + 1
            used.add(unique)
            named.append((unique, file))
    return named, messages


@torch.inference_mode()
def embed(
    encoder: ViTEncoder | ConformerEncoder, files: list[AudioFile], *, batch_size: int = 8, layer: int | None = None
) -> Iterator[tuple[AudioFile, np.ndarray, float] | Skip]:
    """Encode files in order, ``batch_size`` at a time.

    Yields:
        (file, features (frames, width) float32, seconds), or a Skip for a file that cannot be read.
    """
    device = next(encoder.parameters()).device
    waiting: list[tuple[AudioFile, np.ndarray] | Skip] = []

    def flush() -> Iterator[tuple[AudioFile, np.ndarray, float] | Skip]:
        clips = [item for item in waiting if not isinstance(item, Skip)]
        encoded: Iterator[np.ndarray] = iter(())
        if clips:
            lengths = torch.tensor([len(waveform) for _, waveform in clips])
            padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(w) for _, w in clips], batch_first=True)
            features, frames = encoder.encode(padded.to(device), lengths, layer)
            encoded = iter([f[: int(n)].cpu().numpy() for f, n in zip(features, frames)])
        for item in waiting:
            if isinstance(item, Skip):
                yield item
            else:
                yield item[0], next(encoded), len(item[1]) / encoder.sampling_rate
        waiting.clear()

    for item in iterate_clips(files, encoder.sampling_rate):
        waiting.append(item)
        if len(waiting) == batch_size:
            yield from flush()
    yield from flush()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bestrq2.embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="run folder or step-* folder")
    parser.add_argument("inputs", nargs="+", help="audio files, folders (recursive) or CSV/JSONL manifests")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--format", choices=("npy", "parquet"), default="npy")
    parser.add_argument("--layer", type=int, help="output of this block (0 is the first) instead of the final one")
    parser.add_argument("--batch-size", type=int, default=8, help="files encoded together (default: 8)")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    try:
        if options.batch_size < 1:
            raise ConfigError(f"--batch-size: expected at least 1, got {options.batch_size}")
        encoder = load(options.checkpoint, device=choose_device(options.device))
        depth = encoder.depth
        if options.layer is not None and not 0 <= options.layer < depth:
            raise ConfigError(f"--layer: expected 0..{depth - 1}, got {options.layer}")
        named, messages = find_files(options.inputs)
        for message in messages:
            print(f"warning: {message}", file=sys.stderr)
        options.out.mkdir(parents=True, exist_ok=True)
        writer: Writer = ParquetWriter(options.out) if options.format == "parquet" else NpyWriter(options.out)
        return run(encoder, named, writer, options.batch_size, options.layer)
    except (CheckpointError, ConfigError, DataError, ManifestError, AudioError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write to {options.out}: {error}", file=sys.stderr)
        return 2


def run(
    encoder: ViTEncoder | ConformerEncoder,
    named: list[tuple[str, AudioFile]],
    writer: Writer,
    batch_size: int,
    layer: int | None,
) -> int:
    files = [file for _, file in named]
    written, skips = 0, []
    with tqdm(total=len(files), desc="embedding", unit="file") as bar:
        for (name, file), result in zip(named, embed(encoder, files, batch_size=batch_size, layer=layer)):
            bar.update()
            if isinstance(result, Skip):
                skips.append(result)
                continue
            _, features, seconds = result
            record = {
                "name": name,
                "path": str(file.path),
                "seconds": seconds,
                "frames": len(features),
                "width": features.shape[1],
                "hop_ms": encoder.hop_size_in_ms,
            }
            writer.add(record, features, features.mean(0))
            written += 1
    for skip in skips:
        print(f"warning: skipped {skip}", file=sys.stderr)
    if not written:
        print(f"error: none of {len(files)} files could be embedded", file=sys.stderr)
        return 2
    paths = ", ".join(str(path) for path in writer.close())
    print(f"{written} files embedded, {len(skips)} skipped: {paths}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
