"""A local transformers folder as an encoder: the model of ``AutoModel``, with a measured frame rate.

Rules. Audio goes through the folder's own feature extractor. Speech-to-text models give their encoder. Three forms:

- Fixed windows (Whisper): every clip is padded to the extractor's 30 s; of the frames of a window those that begin
  inside of the clip are kept.
- Audio spectrogram Transformers (AST): the class and distillation tokens are dropped, tokens of one time column are
  averaged over frequency, and columns whose centre lies in the clip are kept. Windows of whole columns, each seeing the
  audio up to the extractor's full length.
- Everything else (wav2vec 2.0, HuBERT, WavLM, data2vec, wav2vec2-bert, ...): windows of 30 s of whole frames, each
  seeing 0.1 s more. The hop is measured: four more seconds of audio, divided by the frames that they add, or where
  these are no whole number of frames, the lengths at which a clip gets one more. Where the final output has other
  frames than the blocks before (an adapter of wav2vec 2.0), it is all that is shown.

Clips of one length are always processed together; clips of several lengths only if the feature extractor asks for an
attention mask and, measured when the folder is opened, a clip has the same features alone and in a padded batch (models
with group norm over time do not).
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from bestrq2.config import ConfigError
from bestrq2.errors import CheckpointError
from bestrq2.models.build import check_finite
from bestrq2.real_content import real_content
from bestrq2.runs.checkpoint import unreadable

from .adapters import ForeignEncoder

WINDOW_SECONDS = 30.0
CONTEXT_SECONDS = MIN_SECONDS = 0.1
UNUSED = ("masked_spec_embed",)  # parameters for training that many published folders lack
EXACT = 1e-4


def is_transformers_folder(path: Path) -> bool:
    """Return True if a folder holds a transformers model other than ours or a published BEST-RQ-2 export.

    Raises:
        CheckpointError: if its config.json may not be read.
    """
    try:
        document = json.loads((path / "config.json").read_bytes())
    except PermissionError as error:
        raise unreadable(path / "config.json", error) from error
    except (OSError, ValueError):
        return False
    if not isinstance(document, dict) or document.get("model_type") == "bestrq2" or "encoder_kwargs" in document:
        return False
    return "model_type" in document or "auto_map" in document


class TransformersEncoder(ForeignEncoder):
    """See the module's text.

    Args:
        folder: with config.json, preprocessor_config.json and model.safetensors.
        trust_remote_code: run the folder's own Python code, where it needs that.

    Raises:
        ConfigError: if transformers is missing or cannot open the folder, weights are pickled or incomplete, or the
            model gives no features ``(B, T, D)``.
    """

    def __init__(self, folder: str | Path, trust_remote_code: bool = False) -> None:
        super().__init__()
        self.folder = Path(folder)
        model, self.extractor = _open(self.folder, trust_remote_code)
        if trust_remote_code and (sources := sorted(self.folder.glob("*.py"))):
            # Kept with what is cached of this encoder: other code gives other features of the same weights.
            self.code = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()
        if getattr(model.config, "is_encoder_decoder", False):
            model = model.get_encoder()
        self.model = model.eval().requires_grad_(False)
        check_finite({name: p for name, p in model.named_parameters() if not name.endswith(UNUSED)}, folder)
        self.sampling_rate = int(self.extractor.sampling_rate)
        self.min_samples = round(MIN_SECONDS * self.sampling_rate)
        self.group = "equal"
        config = self.model.config
        if config.model_type == "audio-spectrogram-transformer":
            self.form = "spectrogram"
        else:
            self.form = "fixed" if hasattr(self.extractor, "nb_max_frames") else "free"
        try:
            getattr(self, f"_measure_{self.form}")()
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            if isinstance(error, ConfigError):
                raise
            kind = type(self.model).__name__
            raise ConfigError(f"{folder}: {kind} gives no frame features: {type(error).__name__}: {error}") from error

    def _noise(self, seconds: float) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(0)
        return 0.1 * torch.randn(
            round(seconds * self.sampling_rate), generator=generator, dtype=torch.float32, device="cpu"
        )

    def _look(self, hidden: tuple[Tensor, ...]) -> None:
        """Width and depth from the outputs of one run."""
        last = hidden[-1]
        if last.dim() != 3:
            raise ConfigError(f"{self.folder}: expected features (B, T, D), got {tuple(last.shape)}")
        alike = all(state.shape == last.shape for state in hidden)
        self.output_dim, self.depth = last.shape[2], max(0, len(hidden) - 2) if alike else 0

    def _measure_free(self) -> None:
        short, long = (self._noise(seconds) for seconds in (2, 6))
        hidden, frames = self._forward([short])
        self._look(hidden)
        more = int(self._forward([long])[1][0]) - int(frames[0])
        if more < 1:
            raise ConfigError(f"{self.folder}: {type(self.model).__name__} gives no more frames for more audio")
        hop = (len(long) - len(short)) / more
        if not hop.is_integer():  # so far it may be wrong by a frame in four seconds, which adds up
            hop = self._exact_hop(long, hop)
        self.hop_size_in_ms = 1000 * hop / self.sampling_rate
        self.window_frames = max(1, round(WINDOW_SECONDS * self.sampling_rate / hop))
        self.context_samples = round(CONTEXT_SECONDS * self.sampling_rate)
        lengths = getattr(self.model, "_get_feat_extract_output_lengths", None)
        if lengths is None or not getattr(self.extractor, "return_attention_mask", False):
            return
        if self.model.main_input_name != "input_values":
            return
        counts = [int(lengths(torch.tensor(len(clip), device="cpu"))) for clip in (short, long)]
        batched, _ = self._forward([short, long])
        alone, together = hidden[-1][0], batched[-1][0, : hidden[-1].shape[1]]
        same = alone.shape == together.shape and float((together - alone).norm()) <= EXACT * float(alone.norm())
        if same and counts == [hidden[-1].shape[1], batched[-1].shape[1]]:
            self.group = "masked"

    def _exact_hop(self, noise: Tensor, about: float) -> float:
        """Samples between frames, from the lengths at which clips of half a second and of three get one more."""

        def frames(samples: int) -> int:
            return int(self._forward([noise[:samples]])[1][0])

        found = []
        for seconds in (0.5, 3.0):
            low = round(seconds * self.sampling_rate)
            high, count = low + math.ceil(2 * about), frames(low)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if frames(middle) > count else (middle, high)
            found.append((high, frames(high)))
        return (found[1][0] - found[0][0]) / max(1, found[1][1] - found[0][1])

    def _measure_fixed(self) -> None:
        hidden, _ = self._forward([self._noise(1)])
        self._look(hidden)
        frames = hidden[-1].shape[1]
        self.hop_size_in_ms = 1000 * self.extractor.n_samples / frames / self.sampling_rate
        self.window_frames = frames

    def _measure_spectrogram(self) -> None:
        config = self.model.config
        self.columns = (config.max_length - config.patch_size) // config.time_stride + 1
        # Not `rows`, which says that rows="concatenate" keeps them apart: of another encoder they are always averaged.
        self.bands = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        hidden, _ = self._forward([self._noise(1)])
        self._look(hidden)
        if hidden[-1].shape[1] != self.columns:
            raise ConfigError(f"{self.folder}: expected {self.columns} columns, got {hidden[-1].shape[1]}")
        frame = self.sampling_rate / 100  # of the extractor's spectrogram
        self.hop_size_in_ms = 10.0 * config.time_stride
        # Whole columns that fit between two starts of windows; what they see goes on to the extractor's end.
        self.window_frames = config.max_length // config.time_stride
        self.window_frames = min(self.window_frames, self.columns)
        self.context_samples = round(config.max_length * frame - self.window_frames * self.hop_samples)

    def _forward(self, clips: list[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        """All hidden states and the final output ``(B, T, D)``, in this order, and the frames of each clip."""
        arrays: list[np.ndarray] = [clip.cpu().numpy() for clip in clips]
        options: dict[str, Any] = {"sampling_rate": self.sampling_rate, "return_tensors": "pt"}
        if self.form == "free":
            options["padding"] = True
        inputs = self.extractor(arrays, **options)
        weight = next(p for p in self.model.parameters() if p.is_floating_point())
        values = {  # audio in the type of the weights, as these models expect after .half() or .bfloat16()
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }
        mask = values.get("attention_mask")
        if self.form != "free":
            values.pop("attention_mask", None)
        with torch.no_grad():
            output = self.model(**values, output_hidden_states=True)
        states = [*(output.hidden_states or ()), output.last_hidden_state]
        samples = torch.tensor([len(clip) for clip in clips], device="cpu")
        if self.form == "spectrogram":
            states = [
                state[:, 2:].unflatten(1, (self.bands, self.columns)).mean(1)  # frequency runs slowest
                for state in states
            ]
            step, patch = self.model.config.time_stride, self.model.config.patch_size
            spectrum = samples.double() * 100 / self.sampling_rate  # frames
            frames = torch.ceil((spectrum - patch / 2) / step).long().clamp(1, self.columns)
        elif self.form == "fixed":
            frames = -(-samples * states[-1].shape[1] // self.extractor.n_samples)
            frames = frames.clamp(max=states[-1].shape[1])
        elif self.group == "masked":
            frames = self.model._get_feat_extract_output_lengths(samples).long()
        elif mask is not None and mask.shape[1] == states[-1].shape[1]:
            frames = mask.sum(1).cpu()
        else:
            frames = torch.full((len(clips),), states[-1].shape[1], device="cpu")
        return tuple(states), frames

    def _run(self, clips: list[Tensor], wanted: list[int | None]) -> list[Tensor]:
        states, frames = self._forward(clips)
        chosen = torch.stack([states[-1 if layer is None else layer + 1] for layer in wanted])
        return [chosen[:, row, :count] for row, count in enumerate(frames.tolist())]


def _open(folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    try:
        from transformers import AutoFeatureExtractor, AutoModel
    except ImportError as error:
        raise ConfigError(
            f"{folder}: a transformers folder needs transformers: pip install 'bestrq2[transformers]'"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder}: no model.safetensors; pickled weights are never opened here, because that can run code. Where "
            "you trust them, convert once: transformers.AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), "
            "and copy preprocessor_config.json"
        )
    common = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # parameters that the file lacks must be the same at every opening
            model, found = AutoModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **common
            )
        extractor = AutoFeatureExtractor.from_pretrained(folder, **common)
    except SafetensorError as error:
        found = ((path, real_content(path)) for path in sorted(folder.glob("*.safetensors")))
        told = next((f"{path}: {what}" for path, what in found if what), f"{folder}: damaged weights: {error}")
        raise CheckpointError(told) from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = ""
        if not trust_remote_code and "trust_remote_code" in str(error):
            hint = "; it needs Python code of its own: read it, then give --trust-remote-code"
            hint += " (in training: frozen.trust_remote_code=true)"
        raise ConfigError(f"{folder}: transformers cannot open it: {reason}{hint}") from error
    used = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    own = {id(parameter) for parameter in used.parameters()}
    inside = {name for name, parameter in model.named_parameters() if id(parameter) in own}
    missing = sorted(name for name in found["missing_keys"] if name in inside and not name.endswith(UNUSED))
    if missing:
        listed = ", ".join(missing[:6])
        raise ConfigError(f"{folder}: model.safetensors lacks {len(missing)} tensors of the encoder: {listed}")
    return model, extractor
