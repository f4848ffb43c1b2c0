"""Features of audio files from a trained encoder.

    bestrq2 embed runs/best_rq2_tiny-001 recording.wav --out features
    bestrq2 embed runs/best_rq2_tiny-001 FOLDER other.flac --out features --format parquet
    bestrq2 embed WAV2VEC2_FOLDER FOLDER --out features --layers all --pooling mean+std

ENCODER is a run or anything else that ``bestrq2.load`` opens, a local folder of a transformers audio model, an X-ARES
encoder file, or FILE.py:NAME or PACKAGE.MODULE:NAME of a module with our ``encode``.

``--format npy`` writes into OUT: ``features/<name>.npy`` (frames, width) for every file, ``clips.npy`` (files, width)
with the frames of each file pooled over time, and ``index.csv`` with a row per file in the order of ``clips.npy``. Of a
manifest with parts of files it has their ``start`` and ``end``, of one with labels the ``label``. ``--format parquet``
writes one ``features.parquet`` with a row per file. ``--layers`` takes block numbers and ``final``, or ``all`` (every
block and then the final output) or ``middle`` (the two blocks in the middle). ``--combine each`` gives features
(layers, frames, width) and clips (files, layers, width), in the order given; ``average`` and ``concatenate`` join the
layers of a frame. ``--rows concatenate`` keeps the frequency axis of 2-D patches; the recipe decides what is done
without it. Pooling: ``mean+std`` (mean and deviation over time, twice as wide), ``mean`` or ``max``.
Files of any length are processed in windows; a file gives the same features alone and in any batch.
"""

import argparse
import errno
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bestrq2.command import command, leave
from bestrq2.console import progress_bar

# isort: split
import numpy as np
import torch

from bestrq2.config import ConfigError
from bestrq2.data import AudioFile, Skip, collect, iterate_clips
from bestrq2.data.parts import shown_places
from bestrq2.errors import counted, printable, tabular
from bestrq2.feature_files import NPY_RESULTS, PARQUET_RESULTS, NpyWriter, ParquetWriter, Writer
from bestrq2.hardware import choose_device, device_of
from bestrq2.interchange import AudioEncoder, open_encoder
from bestrq2.interchange.refusals import Clip, check_some_taken, check_usable, encode_or_skip
from bestrq2.models.readout import COMBINATIONS, POOLINGS, ROW_JOINS, averaged_rows, parse_layers, pool_frames
from bestrq2.outputs import add_overwrite, alone_in, busy, check_new

_LONGEST_NAME = 200  # bytes
_BATCH_SECONDS = 60.0  # on average, of the clips encoded together


def _fitting(name: str) -> str:
    """A name with every part short enough for a file system, with ``.npy`` and what a file is called while it is
    written; a part that is cut ends with a hash of the whole."""
    parts = []
    for part in name.split(os.sep):
        encoded = part.encode("utf-8")
        if len(encoded) > _LONGEST_NAME:
            digest = hashlib.sha256(encoded).hexdigest()[:12]
            part = f"{encoded[: _LONGEST_NAME - 13].decode('utf-8', 'ignore')}-{digest}"
        parts.append(part)
    return os.sep.join(parts)


def find_files(inputs: Sequence[str]) -> tuple[list[tuple[str, AudioFile]], list[Skip], list[str]]:
    """Audio files of folders, manifests and single files, each with a unique output name, skips, and messages on them.

    Raises:
        DataError, ManifestError, AudioError: if an input has no usable audio.
    """
    named: list[tuple[str, AudioFile]] = []
    skips: list[Skip] = []
    messages: list[str] = []
    used: set[str] = set()
    repeats: Counter[str] = Counter()
    for source in inputs:
        files, report = collect(source, split=None)
        messages += report.notes
        skips += report.skips
        if report.skips:
            messages += [f"{source}: {report}", *(f"  {line}" for line in report.examples())]
        for file, place in zip(files, shown_places(files)):
            base = Path(source) if Path(source).is_dir() else Path(file.path).parent
            relative = os.path.relpath(file.path, base)
            name = relative if not relative.startswith("..") else Path(file.path).name
            name = printable(name + place[len(file.path) :])
            system = sys.getfilesystemencoding()  # of a C or Latin-1 locale: not every name can be written
            name = _fitting(name.encode(system, "backslashreplace").decode(system))
            unique = name
            while unique in used:
                repeats[name] += 1
                unique = f"{name}-{repeats[name] + 1}"
            used.add(unique)
            named.append((unique, file))
    return named, skips, messages


@torch.inference_mode()
def embed(
    encoder: AudioEncoder,
    files: list[AudioFile],
    *,
    batch_size: int = 8,
    layer: int | None = None,
    layers: str | Sequence[int | None] | None = None,
    combine: str = "each",
    rows: str | None = None,
    pooling: str = "mean+std",
) -> Iterator[tuple[AudioFile, np.ndarray, np.ndarray, float] | Skip]:
    """Encode files in order, ``batch_size`` at a time.

    Args:
        encoder: from :func:`bestrq2.load` or :func:`bestrq2.interchange.open_encoder`.
        files: what to encode.
        batch_size: files at a time, at most; fewer where they are long (a minute on average).
        layer: block whose output is taken; None: the final output.
        layers: several of them at once, instead of ``layer``: a list, or a text such as "2,3,final".
        combine, rows, pooling: see :class:`~bestrq2.models.readout.ReadoutMixin`.

    Yields:
        (file, features (frames, width) float32, or (layers, frames, width) with ``layers`` and "each", the same pooled
        over time, seconds), or a Skip for a file that cannot be read or that an encoder of others refuses.

    Raises:
        ConfigError: at the end, if the encoder refused every file.
        FeatureError: if an encoder of ours gives features that are not finite.
    """
    device = device_of(encoder)  # type: ignore[arg-type]
    wanted = [layer] if layers is None else layers
    joined = "average" if layers is None else combine
    limit = batch_size * _BATCH_SECONDS * encoder.sampling_rate
    waiting: list[Clip | Skip] = []
    refused: list[Skip] = []
    taken = 0

    def encode(clips_of: Sequence[Clip]) -> list[tuple[np.ndarray, np.ndarray]]:
        lengths = torch.tensor([len(waveform) for _, waveform in clips_of])
        rows_of = [torch.from_numpy(waveform) for _, waveform in clips_of]
        alone = len(rows_of) == 1  # then without a copy, which may be large
        padded = rows_of[0][None] if alone else torch.nn.utils.rnn.pad_sequence(rows_of, batch_first=True)
        features, frames = encoder.encode(padded.to(device), lengths, layers=wanted, combine=joined, rows=rows)
        check_usable(clips_of, features, frames)
        clips = pool_frames(features, frames, pooling).cpu().numpy()
        counts = enumerate(frames.tolist())
        return [(features[..., row, :count, :].cpu().numpy(), clips[..., row, :]) for row, count in counts]

    def flush() -> Iterator[tuple[AudioFile, np.ndarray, np.ndarray, float] | Skip]:
        nonlocal taken
        readable = [item for item in waiting if not isinstance(item, Skip)]
        encoded = iter(encode_or_skip(encoder, readable, encode) if readable else ())
        for item in waiting:
            if isinstance(item, Skip):
                yield item
            elif isinstance(result := next(encoded), Skip):
                refused.append(result)
                yield result
            else:
                taken += 1
                yield item[0], *result, len(item[1]) / encoder.sampling_rate
        waiting.clear()

    for item in iterate_clips(files, encoder.sampling_rate):
        size = 0 if isinstance(item, Skip) else len(item[1])
        longest = max([size, *(len(kept[1]) for kept in waiting if not isinstance(kept, Skip))])
        if waiting and longest * (len(waiting) + 1) > limit:  # padded: a long file is encoded alone
            yield from flush()
        waiting.append(item)
        if len(waiting) == batch_size:
            yield from flush()
    yield from flush()
    check_some_taken(refused, taken)


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bestrq2 embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "encoder", metavar="ENCODER", help="run, exported or published encoder, transformers folder, ..."
    )
    parser.add_argument("inputs", nargs="+", help="audio files, folders, manifests, tar shards, .h5 or saved datasets")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--format", choices=("npy", "parquet"), default="npy")
    parser.add_argument("--layer", type=int, help="output of this block (0 is the first) instead of the final one")
    parser.add_argument("--layers", metavar="LIST", help="several layers: all, middle, or for example 0,3,final")
    parser.add_argument("--combine", choices=COMBINATIONS, default="each", help="of several layers (default: each)")
    parser.add_argument("--rows", choices=ROW_JOINS, help="of 2-D patches (default: as the encoder does)")
    parser.add_argument(
        "--pooling", choices=POOLINGS, default="mean+std", help="frames to clip features (default: mean+std)"
    )
    parser.add_argument("--pool", dest="pooling", choices=POOLINGS, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, default=8, help="files encoded together (default: 8)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python code of a transformers folder")
    add_overwrite(parser)
    options = parser.parse_args(arguments)
    check_results(options)
    if (options.out / "checkpoints").is_dir():
        raise ConfigError(f"--out: {options.out} is a run folder; name a folder for features")
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size: expected at least 1, got {options.batch_size}")
    if options.layer is not None and options.layers is not None:
        raise ConfigError("--layer and --layers: give one of them")
    device = choose_device(options.device, option="--device")
    encoder = open_encoder(options.encoder, device, trust_remote_code=options.trust_remote_code)
    depth = encoder.depth
    if options.layer is not None and not 0 <= options.layer < depth:
        raise ConfigError(f"--layer: expected 0..{depth - 1}, got {options.layer}")
    layers = parse_layers(options.layers, depth) if options.layers is not None else None
    named, unusable, messages = find_files(options.inputs)
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)
    if (layers is None or len(layers) == 1) and options.combine != "each":
        print("note: --combine is not used: it is for several --layers", file=sys.stderr)
    if note := averaged_rows(encoder, options.rows):
        print(f"note: {note}", file=sys.stderr)
    made = not options.out.exists()
    options.out.mkdir(parents=True, exist_ok=True)
    reading = {"layer": options.layer, "layers": layers, "combine": options.combine}
    reading["rows"] = options.rows
    with alone_in(options.out, busy("--out", options.out)):
        check_results(options)  # another process may have written them meanwhile
        writer: Writer = ParquetWriter(options.out) if options.format == "parquet" else NpyWriter(options.out)
        try:
            return run(encoder, named, writer, options.batch_size, reading, options.pooling, len(unusable))
        finally:
            writer.discard()
            if made:
                with suppress(OSError):  # it holds results
                    options.out.rmdir()


def check_results(options: argparse.Namespace) -> None:
    """Refuse to replace results, unless this was asked for."""
    results = PARQUET_RESULTS if options.format == "parquet" else NPY_RESULTS
    check_new("--out", [options.out / name for name in results], options.overwrite)
    folder = options.out / "features"
    if options.format == "npy" and not options.overwrite and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"--out: {printable(str(folder))} holds files; choose another name, or add to them with --overwrite"
        )


def _is_constant(features: np.ndarray) -> bool:
    """Return True if a layer ``(..., frames, width)`` gives every frame the same vector, or its single frame one
    number."""
    frames, width = features.shape[-2:]
    first = features[..., :1, :] if frames > 1 else features[..., :1]
    return frames * width > 1 and bool((features == first).all(axis=(-2, -1)).any())


def run(
    encoder: AudioEncoder,
    named: list[tuple[str, AudioFile]],
    writer: Writer,
    batch_size: int,
    reading: dict[str, Any],
    pooling: str = "mean+std",
    unusable: int = 0,
) -> int:
    """Write the features of all files; exit code 0, or 2 if there are none.

    ``reading``: arguments of :func:`embed`; ``unusable``: files that were skipped before, for the last message.
    """
    layers = [reading["layer"]] if reading["layers"] is None else reading["layers"]
    files, rows = [file for _, file in named], getattr(encoder, "rows", 1)
    parts, labelled = any(file.is_part for file in files), any(file.label for file in files)
    written, constant, skips = 0, 0, []
    with progress_bar(total=len(files), desc="embedding", unit="file") as bar:
        results = embed(encoder, files, batch_size=batch_size, pooling=pooling, **reading)
        for result, (name, file) in zip(results, named):  # to the end of the results, where all may have been refused
            bar.update()
            if isinstance(result, Skip):
                skips.append(result)
                continue
            _, features, clip, seconds = result
            record = {
                "name": name,
                "path": tabular(file.path),
                "seconds": seconds,
                "frames": features.shape[-2],
                "width": features.shape[-1],
                "hop_ms": encoder.hop_size_in_ms,
                "layers": " ".join("final" if n is None else str(n) for n in layers),
                "combine": "" if len(layers) == 1 else reading["combine"],
                "rows": "" if rows == 1 else reading["rows"] or getattr(encoder, "join_rows", "average"),
                "pooling": pooling,
            }
            if parts:  # of the file, in seconds
                record |= {"start": file.start, "end": file.start + seconds if file.end is None else file.end}
            if labelled:
                record["label"] = file.label
            try:
                writer.add(record, features, clip)
            except OSError as error:
                if error.errno not in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ):
                    raise
                skips.append(Skip(file.path, "not readable", f"no file of its name can be written: {error.strerror}"))
                continue
            written += 1
            constant += _is_constant(features)
    for skip in skips:
        print(f"warning: skipped {skip}", file=sys.stderr)
    if not written:
        print(f"error: no file could be embedded ({counted(len(files), 'file')} tried)", file=sys.stderr)
        return 2
    if constant:
        print(
            f"warning: {constant} of {counted(written, 'file')} embedded have constant features, the same in every "
            "frame: digital silence, or an encoder that learned nothing or diverged",
            file=sys.stderr,
        )
    paths = ", ".join(str(path) for path in writer.close())
    print(f"{counted(written, 'file')} embedded, {unusable + len(skips)} skipped: {paths}")
    return 0


if __name__ == "__main__":
    leave(main())
