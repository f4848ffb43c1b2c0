"""The state of a streaming encoder: everything that later audio can still depend on."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bestrq2.layers.conformer import BlockCache
from bestrq2.layers.conformer_attention import AttentionCache
from bestrq2.layers.log_mel_stream import LogMelState
from bestrq2.ops import ChunkLayout

UNLIMITED = -1
BROKEN = "an earlier call with this state failed midway: start a new one with start_stream()"


@dataclass
class StreamingState:
    """Made by ``ConformerEncoder.start_stream``, updated in place by ``stream``.

    Its size is bounded with a limited left context; with an unlimited one, keys and values of all frames are kept. It
    carries no gradient, and calls under ``no_grad``, ``inference_mode`` and neither may follow each other.

    Attributes:
        layout: the window of attention.
        front_end: last samples of every clip.
        frames: ``(B, t, F)`` log-mel frames of a chunk that is not complete yet.
        tokens: feature frames given out so far.
        subsampling: last input frame of every stage.
        blocks: keys, values and last convolution inputs of every block.
        broken: a call of ``stream`` failed midway (out of memory, Ctrl-C): part of its piece is in the state.
    """

    layout: ChunkLayout
    front_end: LogMelState
    frames: Tensor
    tokens: int
    subsampling: list[Tensor]
    blocks: list[BlockCache]
    broken: bool = False

    def settle(self) -> None:
        """Outside of inference mode, replace tensors that were made in it: they could not be written to, or used where
        a gradient flows."""
        if torch.is_inference_mode_enabled():
            return

        def normal(tensor: Tensor) -> Tensor:
            return tensor.clone() if tensor.is_inference() else tensor

        front = self.front_end
        front.signal, front.reflection, front.totals = map(normal, (front.signal, front.reflection, front.totals))
        self.frames, self.subsampling = normal(self.frames), [normal(tensor) for tensor in self.subsampling]
        for block in self.blocks:
            attention = block.attention
            attention.key, attention.value = normal(attention.key), normal(attention.value)
            block.convolution = normal(block.convolution)

    @property
    def num_clips(self) -> int:
        return len(self.frames)

    def to(self, device: torch.device | str) -> "StreamingState":
        """A copy on another device."""
        tensors = {name: tensor if name in ON_CPU else tensor.to(device) for name, tensor in self.state_dict().items()}
        return StreamingState.from_state_dict(tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """Named tensors, e.g. for safetensors; :meth:`from_state_dict` is the inverse.

        Raises:
            ValueError: for a broken state, with which nothing can go on.
        """
        if self.broken:
            raise ValueError(BROKEN)
        chunk, left = self.layout.chunk_size, self.layout.left_context
        front = self.front_end
        numbers = [chunk or 0, UNLIMITED if left is None else left, self.tokens]
        numbers += [front.start, front.received, front.next_frame]
        tensors = {
            "numbers": torch.tensor(numbers, dtype=torch.int64, device="cpu"),
            "totals": front.totals,
            "signal": front.signal,
            "reflection": front.reflection,
            "frames": self.frames,
        }
        tensors.update({f"subsampling.{i}": tensor for i, tensor in enumerate(self.subsampling)})
        for i, block in enumerate(self.blocks):
            tensors[f"blocks.{i}.key"] = block.attention.key
            tensors[f"blocks.{i}.value"] = block.attention.value
            tensors[f"blocks.{i}.convolution"] = block.convolution
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> "StreamingState":
        """The state that :meth:`state_dict` gave. It has copies, so several streams may begin from the same tensors.

        Raises:
            ValueError: if a tensor is missing.
        """
        stages = sum(name.startswith("subsampling.") for name in tensors)
        depth = sum(name.endswith(".key") for name in tensors)
        needed = ["numbers", "totals", "signal", "reflection", "frames"]
        needed += [f"blocks.{i}.{part}" for i in range(depth) for part in ("key", "value", "convolution")]
        if missing := [name for name in needed if name not in tensors]:
            raise ValueError(f"expected the tensors of a StreamingState, got none named {', '.join(missing)}")
        tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        chunk, left, tokens, start, received, next_frame = tensors["numbers"].tolist()
        layout = ChunkLayout(chunk, None if left == UNLIMITED else left)
        front = LogMelState(
            tensors["signal"], tensors["reflection"], tensors["totals"].cpu(), start, received, next_frame
        )
        blocks = [
            BlockCache(
                AttentionCache(tensors[f"blocks.{i}.key"], tensors[f"blocks.{i}.value"]),
                tensors[f"blocks.{i}.convolution"],
            )
            for i in range(depth)
        ]
        subsampling = [tensors[f"subsampling.{i}"] for i in range(stages)]
        return cls(layout, front, tensors["frames"], tokens, subsampling, blocks)


ON_CPU = ("numbers", "totals")
