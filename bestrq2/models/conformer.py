"""The Conformer encoder: log-mel frames, subsampling, Conformer blocks; with full context, in chunks, streaming."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bestrq2.errors import BestRQWarning
from bestrq2.layers.chunk_sampling import ChunkSampler
from bestrq2.layers.conformer import Conformer, ConformerSettings
from bestrq2.layers.conformer_subsampling import ConvSubsampling
from bestrq2.layers.frame_grid import FrameGrid
from bestrq2.layers.log_mel import LogMel, check_lengths, check_waveform, integer_lengths
from bestrq2.layers.log_mel_stream import GOES_ON, LogMelState, stream_frames
from bestrq2.layers.masking import MaskPlan
from bestrq2.layers.padding import length_mask, valid_mask
from bestrq2.layers.patches import Patches, extract_patches
from bestrq2.layers.positions import PositionKind
from bestrq2.ops import ChunkLayout

from .layer_choice import Layer, block_list, check_layers, choose_layers
from .readout import ROW_JOINS, ReadoutMixin, check_choice
from .streaming import BROKEN, StreamingState

PIECE_SECONDS = 30.0  # encode() takes clips that are longer in pieces of about this length


class ConformerEncoder(ReadoutMixin, nn.Module):
    """Waveform to features, one-stage and two-step pretraining, and streaming.

    A feature frame covers ``factor`` log-mel frames (4 or 8); the "patch" that its target is made of is these frames
    stacked. No stage before the blocks looks ahead of them.

    Args:
        front_end: log-mel transform.
        conformer: shape of the blocks.
        channels: of the subsampling stages, two for 4x, three for 8x.
        layout: window of attention outside of training, and in training without ``chunk_sampler``.
        chunk_sampler: draws the window of every training step (dynamic chunk training).
        activation_checkpointing: recompute activations in the backward pass.

    Attributes:
        sampling_rate (Hz), output_dim (D), hop_size_in_ms: of the features of :meth:`encode`.

    Streaming (:meth:`start_stream`, :meth:`stream`) gives what :meth:`encode` gives with the same layout, up to
    rounding, at any depth. It is exact for every chunk size and left context with right context 0 and conv_mode
    "causal" or "chunk", and refused for everything else.
    """

    position: PositionKind = "rope"  # how a two-step predictor places context and mask tokens
    rows = 1
    needs_mask_token = False

    def __init__(
        self,
        front_end: LogMel,
        conformer: ConformerSettings | None = None,
        channels: tuple[int, ...] = (64, 32),
        layout: ChunkLayout | None = None,
        chunk_sampler: ChunkSampler | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        settings = conformer or ConformerSettings()
        self.front_end = front_end
        self.subsampling = ConvSubsampling(front_end.num_mels, settings.width, channels)
        self.dropout = nn.Dropout(settings.dropout)
        self.encoder = Conformer(settings, activation_checkpointing)
        self.layout, self.chunk_sampler = layout or ChunkLayout(), chunk_sampler
        self.factor = self.subsampling.factor
        self.sampling_rate, self.output_dim = front_end.sampling_rate, settings.width
        self.hop_size_in_ms = 1000.0 * self.factor * front_end.hop_length / self.sampling_rate

    @property
    def depth(self) -> int:
        return len(self.encoder.blocks)

    @property
    def patch_dim(self) -> int:
        """Values of a target: ``factor`` stacked frames."""
        return self.factor * self.front_end.num_mels

    @property
    def min_samples(self) -> int:
        """Samples of the shortest clip with one feature frame; shorter ones are extended with silence."""
        return max(1, (self.factor - 1) * self.front_end.hop_length)

    def output_length(self, samples: int) -> int:
        """Feature frames that :meth:`encode` gives for a clip of ``samples`` samples."""
        return self.front_end.num_frames(max(samples, self.min_samples)) // self.factor

    def num_tokens(self, samples: int) -> int:
        """Tokens of a clip of ``samples`` samples: here the same as :meth:`output_length`."""
        return self.output_length(samples)

    def patches(self, waveform: Tensor, lengths: Tensor | None = None) -> Patches:
        """Stacked log-mel frames of a padded batch, ``(B, T, F * factor)``.

        Raises:
            ValueError: if a clip is shorter than ``min_samples``.
        """
        lengths = check_lengths(waveform, lengths)
        if lengths.numel() and int(lengths.min()) < self.min_samples:
            raise ValueError(
                f"expected clips of at least {self.min_samples} samples (one frame), got {int(lengths.min())}"
            )
        frames, frame_lengths = self.front_end(waveform, lengths)
        return extract_patches(frames, frame_lengths, self.front_end.num_mels, self.factor, keep_frames=True)

    def training_layout(self, step: int, num_frames: int) -> ChunkLayout:
        """The window of a training step; outside of training, the encoder's own."""
        if self.training and self.chunk_sampler is not None:
            return self.chunk_sampler.layout(step, num_frames)
        return self.layout

    def context(self, patches: Patches, plan: MaskPlan, step: int) -> Tensor:
        """Two-step: features ``(B, Ns, D)`` of the seen frames, from the seen frames alone.

        Masked frames are absent: zero in every convolution (of the subsampling, too) and invisible to attention; only
        seen frames go through the feed-forward layers. Distances stay those of the clip.
        """
        num_frames = patches.values.shape[1]
        grid = FrameGrid.of_seen(plan, num_frames)
        tokens = self.subsampling(_frames(patches), grid.frame_valid)
        tokens = self.dropout(grid.to_tokens(tokens))
        return self.encoder(tokens, grid, self.training_layout(step, num_frames))

    def infill(self, patches: Patches, masked: Tensor, fill: Tensor, step: int) -> Tensor:
        """One-stage: features ``(B, T, D)`` with the log-mel values of ``masked (B, T)`` frames replaced by the noise
        ``fill (B, T, F * factor)`` before anything reads them."""
        frames, hidden = _frames(patches), masked.repeat_interleave(self.factor, 1)
        frames = torch.where(hidden[..., None], fill.reshape(frames.shape), frames)
        return self.transform(frames, patches.lengths, self.training_layout(step, masked.shape[1]))

    def transform(
        self,
        frames: Tensor,
        lengths: Tensor | None = None,
        layout: ChunkLayout | None = None,
        layer_outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Subsampling and blocks: log-mel frames ``(B, T * factor, F)`` with ``lengths (B,)`` valid feature frames (on
        the CPU) -> ``(B, T, D)``."""
        tokens, grid = self._tokens(frames, lengths)
        return self.encoder(tokens, grid, layout or self.layout, None, layer_outputs)

    def _tokens(self, frames: Tensor, lengths: Tensor | None) -> tuple[Tensor, FrameGrid]:
        grid = FrameGrid.whole(frames.shape[1] // self.factor, lengths, frames.device)
        return self.dropout(self.subsampling(frames, grid.frame_valid)), grid

    def encode_layers(
        self,
        waveform: Tensor,
        lengths: Tensor | None = None,
        layers: Sequence[Layer] | None = None,
        layout: ChunkLayout | None = None,
        *,
        rows: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Like :meth:`encode`, for several layers in one pass.

        Memory grows linearly with the length. Without gradients, clips of more than 30 s pass the front end and the
        subsampling in pieces, and the blocks, too, if the layout can stream.

        Args:
            waveform, lengths: see :meth:`encode`.
            layout: window of attention instead of the encoder's own.
            rows: see :meth:`encode`; a Conformer has one token a time step, so both choices are the same.
            layers: 0..depth-1 for the output of a block, None for the final, normalised output, "embeddings" for what
                enters the first block. Default: every block,
                then the final output.

        Returns:
            features ``(L, B, T, D)`` float32 and feature_lengths ``(B,)``, T = ``output_length(S)`` of the
            longest clip.

        Raises:
            ValueError: as :meth:`encode`.
        """
        check_choice("rows", rows or self.join_rows, ROW_JOINS)
        lengths = check_lengths(waveform, lengths)
        wanted = check_layers(layers, self.depth, embeddings=True)
        layout = layout or self.layout
        counts = torch.tensor([self.output_length(n) for n in lengths.tolist()], dtype=torch.int64, device="cpu")
        if not len(counts):
            return waveform.new_zeros(len(wanted), 0, 0, self.output_dim, dtype=torch.float32), counts
        waveform = waveform[:, : int(lengths.max())]
        streams = self._obstacle(layout) is None
        chunk = self.factor * self.front_end.hop_length * ((layout.chunk_size if streams else None) or 1)
        piece = chunk * max(1, round(PIECE_SECONDS * self.sampling_rate / chunk))
        if waveform.shape[1] <= piece or torch.is_grad_enabled():  # nothing is cut where gradients flow
            audio = length_mask(lengths, waveform.shape[1], waveform.device)
            waveform = nn.functional.pad(
                torch.where(audio, waveform, 0), (0, max(0, self.min_samples - waveform.shape[1]))
            )
            patches = self.patches(waveform, lengths.clamp(min=self.min_samples))
            blocks = block_list(wanted)
            tokens, grid = self._tokens(_frames(patches), patches.lengths)
            features = choose_layers(self.encoder(tokens, grid, layout, None, blocks), blocks, wanted, tokens)
        else:
            state = self._new_state(waveform.shape[0], layout)
            outputs = []
            for begin in range(0, waveform.shape[1], piece):
                part = waveform[:, begin : begin + piece]
                valid = (lengths - begin).clamp(min=0, max=part.shape[1])
                tokens, grid = self._advance(part, valid, lengths <= begin + piece, state, layout if streams else None)
                outputs.append(self._through_blocks(tokens, grid, state, wanted) if streams else tokens[None])
            features = torch.cat(outputs, dim=2)
            if not streams:
                grid = FrameGrid.whole(features.shape[2], counts, features.device)
                blocks = block_list(wanted)
                tokens = features[0]
                features = choose_layers(self.encoder(tokens, grid, layout, None, blocks), blocks, wanted, tokens)
        features = features.float()
        inside = valid_mask(counts, features.shape[2], features.device)
        return features if inside is None else features * inside[..., None], counts

    def start_stream(
        self, num_clips: int = 1, layout: ChunkLayout | None = None, *, allow_untrained: bool = False
    ) -> StreamingState:
        """A state for streaming ``num_clips`` clips side by side.

        Args:
            num_clips: B.
            layout: window of attention; default: the encoder's own.
            allow_untrained: stream although the encoder was not trained in chunks.

        Raises:
            ValueError: if the setting cannot be streamed exactly, saying why, or if the encoder has been trained with
                full context only. A window that chunk training did not cover is a warning.
        """
        layout = layout or self.layout
        problem = self._obstacle(layout)
        if problem is not None:
            raise ValueError(f"cannot stream exactly: {problem}")
        if not allow_untrained:
            if self.chunk_sampler is None and self.layout.chunk_size is None:
                raise ValueError(
                    "this encoder was trained with full context only, and its features would be poor in chunks: train "
                    "with chunks (recipe streaming_conformer), or pass allow_untrained=True"
                )
            known = self.chunk_sampler.covers(layout) if self.chunk_sampler is not None else layout == self.layout
            if not known:
                trained = self.chunk_sampler or self.layout
                message = f"{layout} is outside of what this encoder was trained with: {trained}"
                warnings.warn(message, category=BestRQWarning, stacklevel=2)
        return self._new_state(num_clips, layout)

    def stream(
        self, waveform: Tensor, state: StreamingState, lengths: Tensor | None = None, final: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Features of the chunks that are complete with this piece of audio.

        Args:
            waveform: ``(B, S)`` next samples of every clip, S >= 0 and as long as you like.
            state: from :meth:`start_stream`, updated in place.
            lengths: ``(B,)`` valid samples of the piece; a clip with fewer than S ends here and ignores later pieces.
            final: all clips end with this piece.

        Returns:
            features ``(B, t, D)`` float32, t >= 0 new frames (zeros behind a clip's end), and ``(B,)`` int64 valid new
            frames on the CPU.

        Raises:
            ValueError: for wrong shapes, a clip that ends without a sample (as in ``encode``), audio after the end of
                all clips, a waveform that requires a gradient (the state carries none, so it would end at the border
                of the piece), a state of another number of blocks, or one whose last call failed.
        """
        num_clips = state.num_clips
        check_waveform(waveform, num_clips)
        num_samples = waveform.shape[1]
        if state.front_end.over:
            raise ValueError("all clips of this state have ended: start a new one with start_stream()")
        if state.broken:
            raise ValueError(BROKEN)
        if len(state.blocks) != self.depth:
            raise ValueError(f"expected a state of this encoder's {self.depth} blocks, got one of {len(state.blocks)}")
        if self.training:
            raise ValueError("stream() needs the encoder in evaluation mode: call .eval()")
        if waveform.requires_grad and torch.is_grad_enabled():
            raise ValueError("stream() gives no gradient of the waveform: use encode(), or pass waveform.detach()")
        if lengths is None:
            lengths = torch.full((num_clips,), num_samples, device="cpu")
        lengths = integer_lengths(lengths)
        if lengths.shape != (num_clips,) or int(lengths.min()) < 0 or int(lengths.max()) > num_samples:
            raise ValueError(f"expected {num_clips} lengths in 0..{num_samples}, got {lengths.tolist()}")
        ends = torch.ones(num_clips, dtype=torch.bool, device="cpu") if final else lengths < num_samples
        empty = (ends & (state.front_end.totals == GOES_ON) & (state.front_end.received + lengths == 0)).nonzero()
        if len(empty):
            raise ValueError(f"expected at least one sample of a clip before it ends, got none of clip {int(empty[0])}")
        state.settle()
        before, state.broken = state.tokens, True
        tokens, grid = self._advance(waveform, lengths, ends, state, state.layout)
        features = self._through_blocks(tokens, grid, state, [None])[0].float()
        state.broken = False
        valid = self._valid_tokens(state, before, features.shape[1])
        mask = valid_mask(valid, features.shape[1], features.device)
        return features if mask is None else features * mask[..., None], valid

    def _obstacle(self, layout: ChunkLayout) -> str | None:
        """Reason why a layout cannot be streamed exactly, or None."""
        if layout.chunk_size is None:
            return "attention to the whole sequence (chunk_size None) needs all of it"
        if layout.right_context != 0:
            return f"right_context {layout.right_context} looks further ahead with every block; expected 0"
        if self.encoder.settings.conv_mode == "full":
            return 'conv_mode "full" looks ahead with every block; expected "causal" or "chunk"'
        return None

    def _new_state(self, num_clips: int, layout: ChunkLayout) -> StreamingState:
        like = self.subsampling.linear.weight
        frames = like.new_zeros(num_clips, 0, self.front_end.num_mels, dtype=torch.float32)
        past = self.subsampling.start_past(num_clips, like)
        caches = self.encoder.start_caches(num_clips, like)
        return StreamingState(layout, LogMelState.begin(self.front_end, num_clips), frames, 0, past, caches)

    def _advance(
        self, waveform: Tensor, lengths: Tensor, ends: Tensor, state: StreamingState, layout: ChunkLayout | None
    ) -> tuple[Tensor, FrameGrid]:
        """Audio to tokens of whole chunks (of any length if layout is None), and where the valid ones lie."""
        front = state.front_end
        # A clip that ends before its first token is followed by silence.
        silence = (self.min_samples - front.received - lengths).clamp(min=0) * (ends & (front.totals == GOES_ON))
        frames = stream_frames(self.front_end, front, waveform, lengths, ends, silence)
        state.frames = torch.cat((state.frames, frames), dim=1)
        count = state.frames.shape[1] // self.factor
        if layout is not None and layout.chunk_size is not None and not front.over:
            count = count // layout.chunk_size * layout.chunk_size
        frames, state.frames = state.frames[:, : count * self.factor], state.frames[:, count * self.factor :].clone()
        grid = FrameGrid.whole(count, self._valid_tokens(state, state.tokens, count), frames.device)
        state.tokens += count
        if not count:
            return frames.new_zeros(len(frames), 0, self.output_dim), grid
        return self.dropout(self.subsampling(frames, grid.frame_valid, state.subsampling)), grid

    def _valid_tokens(self, state: StreamingState, first: int, count: int) -> Tensor:
        """``(B,)`` how many of the tokens first .. first + count - 1 lie inside of each clip."""
        totals = state.front_end.totals
        ends = (1 + totals // self.front_end.hop_length) // self.factor
        return torch.where(totals == GOES_ON, count, (ends - first).clamp(min=0, max=count))

    def _through_blocks(
        self, tokens: Tensor, grid: FrameGrid, state: StreamingState, wanted: Sequence[Layer]
    ) -> Tensor:
        """Tokens ``(B, t, D)`` -> ``(L, B, t, D)``."""
        if not tokens.shape[1]:
            return tokens.expand(len(wanted), *tokens.shape)
        blocks = block_list(wanted)
        return choose_layers(self.encoder(tokens, grid, state.layout, state.blocks, blocks), blocks, wanted, tokens)

    def flops(self, tokens: int, frames: int) -> float:
        """Matrix-product operations of one forward pass over one clip, ``tokens`` of whose ``frames`` are present.

        Random chunks make attention cheaper by an amount that varies from step to step; it is then left out.
        """
        layout = self.layout
        keys = float(frames)
        if self.chunk_sampler is not None:
            keys = 0.0
        elif layout.chunk_size is not None and layout.left_context is not None:
            keys = min(keys, layout.chunk_size + layout.left_context + (layout.right_context or 0))
        return self.encoder.flops(tokens, frames, keys) + self.subsampling.flops(frames)


def _frames(patches: Patches) -> Tensor:
    if patches.frames is None:
        raise ValueError("expected patches with their frames, as ConformerEncoder.patches gives them")
    return patches.frames
