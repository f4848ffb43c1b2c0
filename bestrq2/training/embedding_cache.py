"""Embeddings of a frozen encoder and the codes of the same audio, computed once and kept on disk.

Every file is cut into consecutive windows of the crop length. A shard holds the windows of 32 files as plain tensors,
with its SHA-256 in a JSON file beside it that is written last: an interrupted cache goes on where it stopped, and a
shard that is damaged, incomplete or of files that were replaced is made again. Files that have another time are read
as a whole to tell. The folder's name depends on the encoder's weights and settings, the file with its code where that
is the user's, the targets and the list of files.
"""

import bisect
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from bestrq2.config import Config, ConfigError
from bestrq2.console import progress_bar
from bestrq2.data import AudioFile, DataError, Skip, iterate_clips
from bestrq2.data.content import content_digest, file_stamp, same_content, whole_digest
from bestrq2.data.fingerprint import file_list_digest
from bestrq2.errors import counted
from bestrq2.interchange import AudioEncoder
from bestrq2.interchange.adapters import ModuleAdapter
from bestrq2.interchange.refusals import REFUSED, Clip, check_usable, encode_or_skip
from bestrq2.interchange.tensors import module_digest, settings_digest, write_tensors
from bestrq2.layers.patches import extract_patches
from bestrq2.models import build_encoder
from bestrq2.models.build import build_quantizer

logger = logging.getLogger(__name__)

FILES_PER_SHARD = 32
WINDOWS_AT_ONCE = 8


def align(features: Tensor, hop: float, columns: int, column: float) -> Tensor:
    """Bring features to the rate of the targets: column j covers the time from ``j * column`` to ``(j + 1) * column``.

    It gets the mean of the frames whose centres ``(i + 1/2) * hop`` lie in it, or, where frames are longer than columns
    and none does, the frame in which its own centre lies (the last one behind the end).

    Shapes: ``(T, D)`` -> ``(columns, D)``; hop and column in the same unit of time.
    """
    frames = len(features)
    place = torch.floor((torch.arange(frames, dtype=torch.float64) + 0.5) * hop / column).long()
    inside = place < columns
    sums = features.new_zeros(columns, features.shape[1]).index_add_(0, place[inside], features[inside])
    counts = torch.bincount(place[inside], minlength=columns)
    centre = torch.floor((torch.arange(columns, dtype=torch.float64) + 0.5) * column / hop).long().clamp(max=frames - 1)
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], features[centre])


class Targets:
    """Codes of strips of log-mel, one column after the other.

    Raises:
        ConfigError: if the patches of the configuration do not span all bands, because an embedding has no frequency.
    """

    def __init__(self, config: Config) -> None:
        model = config.model
        if model.encoder.kind != "vit" or model.encoder.patch_height != model.front_end.num_mels:
            raise ConfigError(
                "model.encoder.patch_height: a frozen encoder needs strips over all bands as targets (best_rq2_tiny, "
                f"_small, _1_base), got {model.encoder.patch_height} of {model.front_end.num_mels} bands"
            )
        self.front_end = build_encoder(model).front_end
        self.height, self.width = model.encoder.patch_height, model.encoder.patch_width
        self.seconds = self.width * model.front_end.hop_length / model.front_end.sampling_rate
        self.quantizer = build_quantizer(config.model.targets, self.height * self.width)

    def codes(self, waveform: Tensor) -> Tensor:
        """``(S,)`` -> ``(T, G)``."""
        frames, lengths = self.front_end(waveform[None])
        patches = extract_patches(frames, lengths, self.height, self.width)
        return self.quantizer(patches.values, patches.lengths)[0]


@dataclass(frozen=True)
class Window:
    """One training example: ``context (T, D)`` float32 and ``codes (T, G)`` int64."""

    context: Tensor
    codes: Tensor


class EmbeddingCache:
    """The finished cache: ``len`` windows, any of them by number.

    Attributes:
        digest: of the weights of the encoder that made it.
        settings: digest of its settings; of a module of others, which may keep anything in its attributes, that of the
            file with its code.
        width: D.
        skips: files that could not be read, or that an encoder of others refused.
    """

    def __init__(
        self, shards: list[Path], records: list[dict[str, Any]], digest: str, settings: str, width: int
    ) -> None:
        self.digest, self.settings, self.width = digest, settings, width
        self.files = [safe_open(path, framework="pt") for path in shards]
        self.starts = [np.cumsum([0, *record["lengths"]]) for record in records]
        self.ends = np.cumsum([len(record["lengths"]) for record in records]).tolist()
        self.skips = [skip for record in records for skip in record["skips"]]
        if not len(self):
            raise DataError("no file is long enough for two target columns: there is nothing to train on")

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, number: int) -> Window:
        shard = bisect.bisect_right(self.ends, number)
        place = number - (self.ends[shard - 1] if shard else 0)
        first, last = self.starts[shard][place : place + 2].tolist()
        file = self.files[shard]
        return Window(file.get_slice("context")[first:last], file.get_slice("codes")[first:last].long())


@torch.inference_mode()
def build_cache(
    root: Path,
    config: Config,
    files: Sequence[AudioFile],
    encoder: nn.Module,
    device: torch.device,
    quiet: bool = False,
) -> EmbeddingCache:
    """Compute what is not there yet; ``quiet`` where another rank has told of it.

    Raises:
        CheckpointError: if a shard cannot be written.
        ConfigError: for targets that do not fit an encoder without a frequency axis, another sampling rate, or an
            encoder of others that refuses every file.
    """
    targets = Targets(config)
    source: AudioEncoder = encoder  # type: ignore[assignment]
    if source.sampling_rate != config.model.front_end.sampling_rate:
        raise ConfigError(
            f"model.front_end.sampling_rate: expected the frozen encoder's {source.sampling_rate} Hz, "
            f"got {config.model.front_end.sampling_rate}"
        )
    digest, settings = module_digest(encoder), settings_digest(encoder)
    crop = round(config.data.crop_seconds * source.sampling_rate)
    described = json.dumps([asdict(config.model.front_end), asdict(config.model.targets), targets.width, crop])
    parts = (digest, settings, described, file_list_digest(files))
    identity = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = root / identity
    folder.mkdir(parents=True, exist_ok=True)
    encoder.to(device)
    shards, records, made = [], [], 0
    groups = [files[start : start + FILES_PER_SHARD] for start in range(0, len(files), FILES_PER_SHARD)]
    for number, group in enumerate(progress_bar(groups, desc="embeddings", unit="shard", disable=quiet)):
        path = folder / f"shard-{number:05d}.safetensors"
        record = _verified(path, group)
        if record is None:
            record = _write_shard(path, group, source, targets, crop, device)
            made += 1
        shards.append(path)
        records.append(record)
    if not quiet:
        logger.info(f"Embeddings: {folder}, {made} of {len(groups)} shards computed, the rest found intact")
    refused = [skip for record in records for skip in record["skips"] if f": {REFUSED}" in skip]
    if refused and not any(record["lengths"] for record in records):
        raise ConfigError(
            f"the frozen encoder fails on every clip ({counted(len(refused), 'clip')} tried): {refused[0]}"
        )
    settings = encoder.code if isinstance(encoder, ModuleAdapter) else settings
    return EmbeddingCache(shards, records, digest, settings, source.output_dim)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _verified(path: Path, files: Sequence[AudioFile]) -> dict[str, Any] | None:
    """The record of a complete shard, or None if it must be made (again): also if its files have other content."""
    try:
        record = json.loads(path.with_suffix(".json").read_bytes())
        if record["sha256"] != _sha256(path):
            return None
        if "stamps" not in record:  # of an earlier version, which kept digests of three pieces of each file, or none
            before = record.get("contents")
            return record if before is None or all(map(same_content, before, map(content_digest, files))) else None
        stamps = [file_stamp(item) for item in files]
        for item, stamp, known, whole in zip(files, stamps, record["stamps"], record["whole"], strict=True):
            # What cannot be read now may have been archived; what is only newer may have been copied.
            if stamp not in ("-", known) and (whole == "-" or whole_digest(item) != whole):
                return None
        if stamps != record["stamps"]:
            record["stamps"] = stamps
            _write_record(path, record)
        return record
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_record(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(record))
    partial.replace(path.with_suffix(".json"))


def _write_shard(
    path: Path,
    files: Sequence[AudioFile],
    encoder: AudioEncoder,
    targets: Targets,
    crop: int,
    device: torch.device,
) -> dict[str, Any]:
    stamps, whole = [file_stamp(item) for item in files], [whole_digest(item) for item in files]
    contexts, codes, skips = [], [], []

    def encode(part: Sequence[Clip]) -> list[tuple[Tensor, Tensor]]:
        windows = [torch.from_numpy(samples) for _, samples in part]
        padded = nn.utils.rnn.pad_sequence(windows, batch_first=True)
        features, lengths = encoder.encode(padded.to(device), torch.tensor([len(window) for window in windows]))
        check_usable(part, features, lengths)
        made = []
        for window, rows, length in zip(windows, features.float().cpu(), lengths.tolist()):
            found = targets.codes(window)
            rows = align(rows[: int(length)], encoder.hop_size_in_ms / 1000, len(found), targets.seconds)
            made.append((rows, found))
        return made

    shortest = round(2 * targets.seconds * encoder.sampling_rate)
    for item in iterate_clips(files, encoder.sampling_rate, min_seconds=2 * targets.seconds):
        if isinstance(item, Skip):
            skips.append(str(item))
            continue
        file, samples = item
        cuts = [samples[start : start + crop] for start in range(0, len(samples), crop)]
        windows = [(file, cut) for cut in cuts if len(cut) >= shortest]
        refused = []
        for start in range(0, len(windows), WINDOWS_AT_ONCE):
            for made in encode_or_skip(encoder, windows[start : start + WINDOWS_AT_ONCE], encode):
                if isinstance(made, Skip):
                    refused.append(made)
                else:
                    contexts.append(made[0])
                    codes.append(made[1])
        if refused:
            detail = f"{len(refused)} of {counted(len(windows), 'window')}, {refused[0].detail}"
            skips.append(str(replace(refused[0], detail=detail)))
    width, books = encoder.output_dim, targets.quantizer.num_codebooks
    tensors = {
        "context": torch.cat(contexts) if contexts else torch.zeros(0, width),
        "codes": torch.cat(codes).int() if codes else torch.zeros(0, books, dtype=torch.int32),
    }
    path.with_suffix(".json").unlink(missing_ok=True)
    write_tensors(path, tensors, {})
    record = {"sha256": _sha256(path), "lengths": [len(rows) for rows in codes], "skips": skips}
    record |= {"stamps": stamps, "whole": whole}
    _write_record(path, record)
    return record
