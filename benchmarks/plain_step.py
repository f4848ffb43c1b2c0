"""The published way to pretrain, written out in plain PyTorch: what a reader of the papers would write first.

Independent of ``bestrq2``: nothing is imported from it, weights are PyTorch's own. fp32 STFT, ``nn.LayerNorm`` or
``nn.RMSNorm``, attention with stored scores, logits of the masked rows in full, ``F.cross_entropy``,
``torch.optim.AdamW`` with its defaults. Sources: arXiv 2606.30700 and its code (Transformer, masks shared
by the batch), the model card of BEST-RQ-2.1 (strips, rotary
positions, RMSNorm, SwiGLU, QK norm), SpeechBrain's BEST-RQ recipe (Conformer).

Shape letters: B clips, N tokens, D width, H heads, d = D / H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    """Of one model; see the presets in step.py."""

    width: int
    depth: int
    heads: int
    hidden: int
    predictor_width: int = 0
    predictor_depth: int = 0  # 0: one-stage
    predictor_heads: int = 0
    predictor_hidden: int = 0
    modern: bool = False  # RMSNorm, SwiGLU, QK norm, rotary positions, no biases; else LayerNorm, GELU, sin-cos
    conformer: bool = False
    n_fft: int = 2048
    win_length: int = 2048
    hop_length: int = 625
    num_mels: int = 128
    patch_height: int = 16
    patch_width: int = 16
    codes: int = 8192
    code_dim: int = 16
    ratio: float = 0.5
    seconds: float = 10.0
    drop_path: float = 0.0
    dropout: float = 0.0
    fused_attention: bool = False  # scaled_dot_product_attention in place of stored scores
    standardise: bool = False  # patches of the quantizer by layer norm
    mean: float = 0.0
    std: float = 1.0
    sampling_rate: int = 16000

    @property
    def rows(self) -> int:
        return self.num_mels // self.patch_height

    @property
    def tokens(self) -> int:
        frames = 1 + round(self.seconds * self.sampling_rate) // self.hop_length
        return frames // self.patch_width * self.rows


def mel_filters(s: Sizes) -> Tensor:
    """HTK triangles ``(bins, mels)`` without area normalisation."""
    bins = torch.linspace(0, s.sampling_rate // 2, s.n_fft // 2 + 1)
    top = 2595 * math.log10(1 + s.sampling_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, s.num_mels + 2) / 2595) - 1)
    slopes = edges[None] - bins[:, None]
    widths = edges[1:] - edges[:-1]
    return torch.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]).clamp(min=0)


class Spectrogram(nn.Module):
    """Waveform ``(B, S)`` -> dB patches ``(B, N, P)``, in fp32."""

    window: Tensor
    filters: Tensor

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.s = s
        self.register_buffer("window", torch.hann_window(s.win_length), persistent=False)
        self.register_buffer("filters", mel_filters(s), persistent=False)

    @torch.no_grad()
    def forward(self, waveform: Tensor) -> Tensor:
        s = self.s
        with torch.autocast(waveform.device.type, enabled=False):
            spectrum = torch.stft(
                waveform, s.n_fft, s.hop_length, s.win_length, self.window, center=True, return_complex=True
            )
            power = (spectrum / self.window.square().sum().sqrt()).abs().square()
            decibels = 10 * (power.transpose(1, 2) @ self.filters).clamp(min=1e-10).log10()  # (B, T, F)
            decibels = (decibels - s.mean) / s.std
            columns = decibels.shape[1] // s.patch_width
            image = decibels[:, : columns * s.patch_width].transpose(1, 2)[:, None]  # (B, 1, F, T)
            size = (s.patch_height, s.patch_width)
            return F.unfold(image, size, stride=size).transpose(1, 2)  # frequency-major tokens


def sincos(s: Sizes, width: int) -> Tensor:
    """``(N, width)``: sin(f), sin(t), cos(f), cos(t)."""
    columns = s.tokens // s.rows
    f, t = torch.meshgrid(torch.arange(s.rows), torch.arange(columns), indexing="ij")
    bands = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.stack((f.flatten(), t.flatten()), -1)[..., None] * bands  # (N, 2, width / 4)
    return torch.cat((angles.sin().flatten(1), angles.cos().flatten(1)), 1)


class Attention(nn.Module):
    """Self-attention with its scores stored, ``softmax(q k^T / sqrt(d) + mask) v``."""

    def __init__(self, s: Sizes, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.modern, self.fused = heads, s.modern, s.fused_attention
        self.qkv = nn.Linear(width, 3 * width, bias=not s.modern)
        self.proj = nn.Linear(width, width, bias=not s.modern)
        d = width // heads
        self.q_norm, self.k_norm = (nn.RMSNorm(d, eps=1e-5) if s.modern else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        """x ``(B, N, D)``, time ``(N,)`` of rotary positions, mask ``(1, 1, N, N)`` added to the scores."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.modern:
            q, k = rotary(q, time), rotary(k, time)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
            return self.proj(mixed.transpose(1, 2).reshape(B, N, D))
        scores = q @ k.transpose(-2, -1) * (D // self.heads) ** -0.5 + mask
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, D))


def rotary(x: Tensor, time: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    bands = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = time[:, None] * bands
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, -1)
        return self.fc2(F.silu(gate) * value)


def stochastic_depth(x: Tensor, probability: float) -> Tensor:
    if probability == 0:
        return x
    return x * (torch.rand(len(x), 1, 1, device=x.device) >= probability) / (1 - probability)


class Block(nn.Module):
    def __init__(self, s: Sizes, width: int, heads: int, hidden: int, drop_path: float = 0.0) -> None:
        super().__init__()
        norm = nn.RMSNorm if s.modern else nn.LayerNorm
        self.norm1, self.norm2 = norm(width, eps=1e-5), norm(width, eps=1e-5)
        self.attn = Attention(s, width, heads)
        gelu = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.mlp = SwiGLU(width, hidden) if s.modern else gelu
        self.drop_path = drop_path

    def forward(self, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        x = x + stochastic_depth(self.attn(self.norm1(x), time, mask), self.drop_path)
        return x + stochastic_depth(self.mlp(self.norm2(x)), self.drop_path)


class Transformer(nn.Module):
    def __init__(self, s: Sizes, width: int, depth: int, heads: int, hidden: int, drop_path: float = 0.0) -> None:
        super().__init__()
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(s, width, heads, hidden, rate) for rate in rates)
        self.norm = (nn.RMSNorm if s.modern else nn.LayerNorm)(width, eps=1e-5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        mask = x.new_zeros(1, 1, x.shape[1], x.shape[1])  # nothing is padded; written out as the papers' code has it
        for block in self.blocks:
            x = block(x, time, mask)
        return self.norm(x)


class Quantizer(nn.Module):
    """``argmax_v cos(x P, c_v)`` with every similarity stored."""

    projection: Tensor
    codebook: Tensor

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.standardise = s.standardise
        patch = s.patch_height * s.patch_width
        self.register_buffer("projection", nn.init.xavier_uniform_(torch.empty(patch, s.code_dim)))
        self.register_buffer("codebook", F.normalize(torch.randn(s.codes, s.code_dim), dim=-1))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = F.layer_norm(x, x.shape[-1:]) if self.standardise else x
            return (F.normalize(x @ self.projection, dim=-1) @ self.codebook.T).argmax(-1)


class TwoStep(nn.Module):
    """BEST-RQ-2. ``forward(waveform (B, S)) -> loss``, with one random mask for the batch."""

    place: Tensor
    predictor_place: Tensor

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.s = s
        self.spectrogram, self.quantizer = Spectrogram(s), Quantizer(s)
        self.embed = nn.Linear(s.patch_height * s.patch_width, s.width)
        self.encoder = Transformer(s, s.width, s.depth, s.heads, s.hidden, s.drop_path)
        self.input_proj = nn.Linear(s.width, s.predictor_width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, s.predictor_width) * 0.02)
        self.predictor = Transformer(s, s.predictor_width, s.predictor_depth, s.predictor_heads, s.predictor_hidden)
        self.head = nn.Linear(s.predictor_width, s.codes)
        self.register_buffer("place", sincos(s, s.width), persistent=False)
        self.register_buffer("predictor_place", sincos(s, s.predictor_width), persistent=False)

    def split(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        order = torch.randperm(tokens, device=device)
        count = int(tokens * self.s.ratio)
        return order[count:].sort().values, order[:count].sort().values

    def forward(self, waveform: Tensor) -> Tensor:
        s = self.s
        patches = self.spectrogram(waveform)
        seen, masked = self.split(patches.shape[1], waveform.device)
        codes = self.quantizer(patches[:, masked])
        columns = patches.shape[1] // s.rows
        x = self.embed(patches[:, seen])
        x = self.encoder(x if s.modern else x + self.place[seen], seen % columns)
        context = self.input_proj(x)
        masks = self.mask_token.expand(len(x), len(masked), -1)
        masks = masks if s.modern else masks + self.predictor_place[masked]
        # Merged and brought back into grid order, as published.
        order = torch.cat((seen, masked)).argsort()
        tokens = torch.cat((context, masks.to(context.dtype)), 1)[:, order]
        hidden = self.predictor(tokens, torch.arange(len(order), device=x.device) % columns)[:, masked]
        return F.cross_entropy(self.head(hidden).flatten(0, 1), codes.flatten())
