"""Targets from a layer of an earlier encoder: the second iteration of BEST-RQ-2."""

import hashlib

import torch
from torch import Tensor

from bestrq2.layers.patches import Patches

from .conformer import ConformerEncoder
from .encoder import token_width
from .vit import ViTEncoder

Encoder = ViTEncoder | ConformerEncoder


class Teacher:
    """A frozen encoder whose features are quantized in place of log-mel patches.

    It hears the whole clip, without masks, in fp32 and evaluation mode. It is no module: its weights belong to no
    checkpoint of the model that learns from it.

    Frame t of the teacher is the target of time column t. Both begin at sample ``t * hop`` and the hops are equal, so
    they cover the same time up to their windows. Where the teacher has fewer frames, because its first stage needs more
    audio, its last frame stands for the columns behind it. A student with one token a time step (strips, a Conformer)
    takes any teacher, whose rows are averaged; one with a grid of patches takes a teacher of as many rows, token by
    token.

    Args:
        encoder: any encoder of ours; it is frozen in place, so it cannot be the one that learns.
        layer: 0..depth-1 for the output of a block, None for the final, normalised output. A middle one is usual.
        settings: a digest of what decides its features beside its weights.

    Attributes:
        width: values of a frame.

    Raises:
        ValueError: for a layer that the encoder does not have.
    """

    def __init__(self, encoder: Encoder, layer: int | None, settings: str = "") -> None:
        if layer is not None and not 0 <= layer < encoder.depth:
            raise ValueError(f"targets.layer: expected a block of the teacher, 0..{encoder.depth - 1}, got {layer}")
        self.encoder, self.layer = encoder.eval().requires_grad_(False), layer
        self.settings, self.width = settings, token_width(encoder)

    def check(self, student: Encoder) -> None:
        """
        Raises:
            ValueError: if frames of the teacher and tokens of ``student`` do not fall together, naming both, or if
                they share weights.
        """
        teacher = self.encoder
        own = {id(parameter) for parameter in teacher.parameters()}
        if any(id(parameter) in own for parameter in student.parameters()):
            raise ValueError(
                "expected a teacher with weights of its own, got those of the encoder that is to learn, which are "
                "frozen now: call encoder.requires_grad_(True).train() and Teacher(copy.deepcopy(encoder), layer)"
            )
        if teacher.sampling_rate != student.sampling_rate:
            raise ValueError(
                f"targets.encoder: expected a teacher for {student.sampling_rate} Hz, the sampling rate of the model, "
                f"got one for {teacher.sampling_rate} Hz"
            )
        if teacher.hop_size_in_ms != student.hop_size_in_ms:
            raise ValueError(
                f"targets.encoder: expected a teacher with a frame every {student.hop_size_in_ms:g} ms, like the "
                f"tokens of the model, got one with a frame every {teacher.hop_size_in_ms:g} ms"
            )
        if student.rows not in (1, teacher.rows):
            raise ValueError(
                f"targets.encoder: expected a teacher with {student.rows} rows of patches, like the model, got one "
                f"with {teacher.rows}; a model of patches over all bands takes any teacher"
            )

    @torch.no_grad()
    def features(self, waveform: Tensor, lengths: Tensor | None, patches: Patches) -> Tensor:
        """``(B, N, width)`` float32, a frame for every token of ``patches``; zeros behind a clip's end."""
        if next(self.encoder.parameters()).device != waveform.device:
            self.encoder.to(waveform.device)
        with torch.autocast(waveform.device.type, enabled=False):
            joined = "average" if patches.rows == 1 else "concatenate"
            frames, counts = self.encoder.encode(waveform.float(), lengths, self.layer, rows=joined)
        frames = frames.unflatten(2, (patches.rows, self.width)).flatten(1, 2)  # tokens, as those of ``patches`` lie
        token = torch.arange(patches.values.shape[1], device=waveform.device)
        last, valid = (
            x.to(waveform.device, non_blocking=True)[:, None] for x in ((counts - 1).clamp(min=0), patches.lengths)
        )
        index = torch.minimum(token // patches.rows, last) * patches.rows + token % patches.rows
        aligned = frames.gather(1, index[..., None].expand(-1, -1, self.width))
        inside = token < valid
        return torch.where(inside[..., None], aligned, 0)

    def flops(self, columns: int) -> float:
        """Matrix-product operations for one clip of ``columns`` time steps."""
        tokens = columns * self.encoder.rows
        return self.encoder.flops(tokens, tokens)

    def digest(self) -> str:
        """SHA-256 of the weights by name, and of the layer, before the digest of the settings; old runs lack that."""
        sha = hashlib.sha256(str(self.layer).encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return "-".join(filter(None, (sha.hexdigest(), self.settings)))
