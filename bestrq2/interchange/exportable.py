"""Our encoders as one graph from waveform to features, for torch.export and ONNX: no branch depends on data or sizes.

The arithmetic is that of ``encode`` (windows, per-clip reflection, masks), written so that batch size and length can
stay symbols: the discrete Fourier transform is a matrix product in float64, every mask is always applied, and attention
of a Conformer is the reference formula, whose scores take memory quadratic in the length whatever the chunk size.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq2.layers.conformer import ConformerBlock, ConvolutionModule
from bestrq2.layers.conformer_attention import RelativeAttention, relative_sinusoids
from bestrq2.layers.conformer_convolution import MaskedBatchNorm, past_frames
from bestrq2.layers.log_mel import AMPLITUDE_FLOOR, LogMel
from bestrq2.models import ConformerEncoder, ViTEncoder


class ExportableLogMel(nn.Module):
    """:class:`~bestrq2.layers.LogMel` by matrix products.

    Shapes: waveform ``(B, S)``, and M pieces of it: clip ``(M,)``, first sample begin ``(M,)`` and lengths ``(M,)`` of
    each; number of frames T -> ``(M, T, F)`` float32. Frames behind a piece's own end are to be masked.
    """

    basis: Tensor
    filters: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, log_mel: LogMel) -> None:
        super().__init__()
        size, length = log_mel.n_fft, log_mel.win_length
        self.size, self.hop = size, log_mel.hop_length
        self.floor_db = log_mel.floor_db
        window = F.pad(log_mel.window.cpu().double(), ((size - length) // 2, size - length - (size - length) // 2))
        window = window / window.square().sum().sqrt()
        # Angles from an exact integer product: n * k modulo size.
        turns = torch.outer(torch.arange(size, device="cpu"), torch.arange(size // 2 + 1, device="cpu")) % size
        angles = turns.double() * (2 * torch.pi / size)
        basis = torch.cat((angles.cos(), angles.sin()), dim=1) * window[:, None]
        self.register_buffer("basis", basis)  # (n_fft, 2 (n_fft // 2 + 1))
        self.register_buffer("filters", log_mel.filters.cpu().double())
        self.register_buffer("mean", log_mel.mean.cpu().float())
        self.register_buffer("std", log_mel.std.cpu().float())

    def forward(self, waveform: Tensor, clip: Tensor, begin: Tensor, lengths: Tensor, num_frames: int) -> Tensor:
        start = torch.arange(num_frames, device=waveform.device) * self.hop - self.size // 2
        position = (start[:, None] + torch.arange(self.size, device=waveform.device))[None]  # (1, T, n_fft)
        length = lengths[:, None, None]
        period = (2 * (length - 1)).clamp(min=1)  # see layers.log_mel.reflect_edges
        folded = torch.remainder(position, period)
        source = torch.minimum(folded, period - folded) * (length > 1) + begin[:, None, None]
        last = waveform.shape[1] - 1
        framed = waveform[clip[:, None, None], source.clamp(max=last)]  # (M, T, n_fft)
        framed = framed * ((position < length + self.size - self.size // 2) & (source <= last)).to(waveform.dtype)
        spectrum = (framed.double() @ self.basis).square()
        bins = self.size // 2 + 1
        power = spectrum[..., :bins] + spectrum[..., bins:]
        mel = (power @ self.filters).clamp(min=AMPLITUDE_FLOOR)
        decibels = (10.0 * torch.log10(mel)).float().clamp(min=self.floor_db)
        return (decibels - self.mean) / self.std


class ExportableEncoder(nn.Module):
    """Parts that both kinds of encoder share.

    Shapes: waveform ``(B, S)`` float32, lengths ``(B,)`` int64 in 1..S -> features ``(B, T, D)`` float32, zero behind a
    clip's end, and feature_lengths ``(B,)`` int64. T is the largest of these. Inside it is at least 2: sizes of 1 would
    make graphs of their own. A graph cannot refuse lengths below 1 or above S, so features of such a clip are NaN.
    """

    def __init__(self, encoder: ViTEncoder | ConformerEncoder, frames_per_column: int) -> None:
        super().__init__()
        self.log_mel = ExportableLogMel(encoder.front_end)
        self.hop, self.width = encoder.front_end.hop_length, frames_per_column
        self.shortest = encoder.min_samples  # with one feature frame

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        num_samples = waveform.shape[1]
        there = (lengths >= 1) & (lengths <= num_samples)
        features, totals = self.encode(waveform, lengths.clamp(min=1, max=num_samples))
        return torch.where(there[:, None, None], features, torch.nan), totals

    def encode(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def columns(self, samples: Tensor) -> Tensor:
        return (1 + samples // self.hop) // self.width

    def most_columns(self, samples: Tensor) -> int:
        """The largest number of columns as a size of its own: what divides what is not asked of a plain symbol."""
        size = self.columns(samples).max().clamp(min=2).item()
        torch._check(size >= 2)
        return size  # type: ignore[return-value]


def _inside(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _cut(features: Tensor, totals: Tensor) -> Tensor:
    """Without the second frame that sizes of at least 2 add where every clip has one."""
    longest = totals.max().item()
    torch._check(longest >= 1)
    torch._check(longest <= features.shape[1])
    return features.narrow(1, 0, longest)  # type: ignore[arg-type]


class ExportableViT(ExportableEncoder):
    """See :class:`ExportableEncoder`.

    Raises:
        ValueError: for an encoder that reproduces the published fault of positions.
    """

    def __init__(self, encoder: ViTEncoder) -> None:
        super().__init__(encoder, encoder.patch_width)
        if encoder.published_positions:
            raise ValueError("published_positions cannot be exported: it exists only to compare with old numbers")
        self.encoder = encoder
        self.window = encoder.window_columns

    def encode(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        num_samples = waveform.shape[1]
        window, column = self.window, self.hop * self.width
        waveform = torch.where(_inside(lengths, num_samples), waveform, 0.0)
        lengths = lengths.clamp(min=self.shortest)
        totals = self.columns(lengths)
        columns = self.most_columns(lengths)
        time = torch.arange(columns, device=waveform.device)
        # Column t is the start of a window where t is a multiple of its length; a last one that would be short reaches
        # back. Windows of all clips are numbered one after the other.
        starts = ((time % window == 0) & (time < totals[:, None])).nonzero()  # (M, 2): clip, column
        clip, start = starts[:, 0], starts[:, 1]
        first = torch.minimum(start, totals[clip] - window).clamp(min=0)
        begin = first * column
        samples = (lengths[clip] - begin).clamp(max=window * column)
        inner = self.most_columns(samples)
        features = self._encode_pieces(waveform, clip, begin, samples, inner)
        # Column t of a clip is column t - first of its window.
        counts = (totals + window - 1) // window
        number = (counts.cumsum(0) - counts)[:, None] + torch.minimum(time // window, counts[:, None] - 1)
        place = (time - first[number]).clamp(min=0, max=inner - 1)
        features = features[number, place]  # (B, T, D)
        return _cut(features * _inside(totals, columns).to(features.dtype)[..., None], totals), totals

    def _encode_pieces(self, waveform: Tensor, clip: Tensor, begin: Tensor, lengths: Tensor, columns: int) -> Tensor:
        encoder = self.encoder
        height, width, rows = encoder.patch_height, self.width, encoder.rows
        frames = self.log_mel(waveform, clip, begin, lengths, columns * width)
        grid = frames[..., : rows * height].unflatten(2, (rows, height)).unflatten(1, (columns, width))
        values = grid.permute(0, 1, 3, 4, 2).flatten(3).flatten(1, 2)
        token = torch.arange(columns * rows, device=waveform.device)
        positions = torch.stack((token % rows, token // rows), dim=-1)[None]
        x = encoder.embed(values, positions)
        tokens = self.columns(lengths) * rows
        angles = encoder.angles(positions)
        rotation = None if angles is None else (angles.cos(), angles.sin())
        for block in encoder.encoder.blocks:
            x = block(x, tokens, rotation)
        x = encoder.encoder.norm(x).float()
        x = x.unflatten(1, (columns, rows))
        return x.flatten(2) if encoder.join_rows == "concatenate" else x.mean(2)


class ExportableConformer(ExportableEncoder):
    """See :class:`ExportableEncoder`. Attention and convolution keep to the encoder's own ``layout``."""

    def __init__(self, encoder: ConformerEncoder) -> None:
        super().__init__(encoder, encoder.factor)
        self.encoder = encoder

    def encode(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        num_samples = waveform.shape[1]
        waveform = torch.where(_inside(lengths, num_samples), waveform, 0.0)
        lengths = lengths.clamp(min=self.shortest)
        totals = self.columns(lengths)
        columns = self.most_columns(lengths)
        clip = torch.arange(waveform.shape[0], device=waveform.device)
        frames = self.log_mel(waveform, clip, torch.zeros_like(clip), lengths, columns * self.width)
        valid = _inside(totals, columns)
        x = self.encoder.subsampling(frames, valid)
        settings = self.encoder.encoder.settings
        width, symmetric = settings.width, settings.symmetric_positions
        table = relative_sinusoids(1 - columns, columns - 1, width, symmetric, x.device)  # offsets of all pairs
        time = torch.arange(columns, device=x.device)
        row = (columns - 1 + time[:, None] - time)[None, None]  # of the table, for every pair
        visible = self.encoder.layout.mask(columns, device=x.device) & valid[:, None, None]
        for block in self.encoder.encoder.blocks:
            x = self._block(block, x, valid, visible, table, row)  # type: ignore[arg-type]
        x = self.encoder.encoder.norm(x).float()
        return _cut(x * valid.to(x.dtype)[..., None], totals), totals

    def _block(
        self, block: ConformerBlock, x: Tensor, valid: Tensor, visible: Tensor, table: Tensor, row: Tensor
    ) -> Tensor:
        x = x + 0.5 * block.ff1(x)
        x = x + self._attend(block.attn, block.attn_norm(x), visible, table, row)
        x = x + self._convolve(block.conv, x, valid)
        x = x + 0.5 * block.ff2(x)
        return block.norm(x)

    def _attend(self, attention: RelativeAttention, x: Tensor, visible: Tensor, table: Tensor, row: Tensor) -> Tensor:
        """The formula of ``ops.reference.chunked_attention``. What padded queries give is masked later."""
        num_clips, num_frames, width = x.shape
        heads, head_dim = attention.heads, width // attention.heads
        query, key, value = attention.qkv(x).reshape(num_clips, num_frames, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        position = attention.position(table).unflatten(1, (heads, head_dim)).transpose(0, 1)  # (H, 2 T - 1, d)
        by_offset = (query + attention.position_bias[:, None]) @ position.transpose(1, 2)
        score = (query + attention.content_bias[:, None]) @ key.transpose(2, 3)
        score = score + by_offset.gather(3, row.expand(num_clips, heads, num_frames, num_frames))
        weights = (score * attention.scale).masked_fill(~visible, torch.finfo(score.dtype).min).softmax(-1)
        return attention.proj((weights @ value).transpose(1, 2).reshape(num_clips, num_frames, width))

    def _convolve(self, module: ConvolutionModule, x: Tensor, valid: Tensor) -> Tensor:
        x = F.glu(module.pointwise1(module.norm(x)), dim=-1)
        x = x * valid.to(x.dtype)[..., None]
        num_clips, num_frames, width = x.shape
        kernel, chunk = module.depthwise.weight.shape[-1], self.encoder.layout.chunk_size
        left = past_frames(kernel, module.mode)
        weight, bias = module.depthwise.weight, module.depthwise.bias
        if module.mode != "chunk" or chunk is None:
            padded = F.pad(x.transpose(1, 2), (left, kernel - 1 - left))
            x = F.conv1d(padded, weight, bias, groups=width).transpose(1, 2)
        else:
            chunks = (num_frames + chunk - 1) // chunk
            # Chunks with the frames before them, then zeros: see layers.conformer_convolution.depthwise_convolution.
            start = torch.arange(chunks, device=x.device)[:, None] * chunk
            source = (start + torch.arange(left + chunk, device=x.device)).reshape(-1)
            pieces = F.pad(x, (0, 0, left, chunk)).index_select(1, source)
            pieces = pieces.reshape(num_clips * chunks, left + chunk, width).transpose(1, 2)
            out = F.conv1d(F.pad(pieces, (0, kernel - 1 - left)), weight, bias, groups=width).transpose(1, 2)
            x = out.reshape(num_clips, chunks * chunk, width)[:, :num_frames]
        norm = module.conv_norm
        x = norm(x, None) if isinstance(norm, MaskedBatchNorm) else norm(x)
        return module.pointwise2(module.act(x))


def exportable(encoder: ViTEncoder | ConformerEncoder) -> ExportableViT | ExportableConformer:
    """The graph of a copy of an encoder, on the CPU, in float32 and in evaluation mode; ``encoder`` stays as it is."""
    encoder = copy.deepcopy(encoder).to("cpu", torch.float32)
    whole = ExportableViT(encoder) if isinstance(encoder, ViTEncoder) else ExportableConformer(encoder)
    return whole.cpu().eval().requires_grad_(False)
