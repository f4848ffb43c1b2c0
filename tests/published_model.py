"""The published BEST-RQ-2 forward pass, written again in plain torch, independently of bestrq2: Conv2d patch
embedding, frequency-major tokens, stored sin-cos table, hand-written attention.

Its ``state_dict`` has the published names."""

import math

import torch
import torch.nn.functional as F
from torch import nn

RATE = 16000


class Holder(nn.Module):
    """A module that only gives names: ``spectrogram.mel_spec.mel_scale.fb``."""


def mel_bank(n_fft, num_mels):
    def mel(f):
        return 2595.0 * math.log10(1.0 + f / 700.0)

    points = torch.linspace(mel(0.0), mel(RATE / 2), num_mels + 2)
    hertz = 700.0 * (10.0 ** (points / 2595.0) - 1.0)
    bank = torch.zeros(n_fft // 2 + 1, num_mels)
    for m in range(num_mels):
        low, centre, high = hertz[m], hertz[m + 1], hertz[m + 2]
        f = torch.linspace(0, RATE // 2, n_fft // 2 + 1)
        bank[:, m] = torch.clamp(torch.minimum((f - low) / (centre - low), (high - f) / (high - centre)), min=0.0)
    return bank


def sincos_table(rows, columns, dim):
    """timm's build_sincos2d_pos_embed, one token at a time."""
    quarter = dim // 4
    table = torch.zeros(1, rows * columns, dim)
    for f in range(rows):
        for t in range(columns):
            for k in range(quarter):
                omega = 1.0 / 10000.0 ** (k / quarter)
                values = math.sin(f * omega), math.sin(t * omega), math.cos(f * omega), math.cos(t * omega)
                for part, value in enumerate(values):
                    table[0, f * columns + t, part * quarter + k] = value
    return table


class RmsNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight


class Rope(nn.Module):
    def __init__(self, head_dim, two_dimensional):
        super().__init__()
        if two_dimensional:
            frequencies = torch.tensor([10000.0 ** (-k / (head_dim // 4)) for k in range(head_dim // 4)])
            self.register_buffer("inv_freq_h", frequencies)
            self.register_buffer("inv_freq_w", frequencies.clone())
        else:
            self.register_buffer(
                "inv_freq", torch.tensor([10000.0 ** (-k / (head_dim // 2)) for k in range(head_dim // 2)])
            )

    @staticmethod
    def half_rotation(x, place, frequencies):
        angle = torch.cat((place[:, None] * frequencies, place[:, None] * frequencies), -1)
        first, second = x.chunk(2, -1)
        return x * angle.cos() + torch.cat((-second, first), -1) * angle.sin()

    def forward(self, x, rows, columns):
        token = torch.arange(rows * columns)
        if hasattr(self, "inv_freq"):
            return self.half_rotation(x, token.float(), self.inv_freq)
        frequency, time = x.chunk(2, -1)
        return torch.cat(
            (
                self.half_rotation(frequency, (token // columns).float(), self.inv_freq_h),
                self.half_rotation(time, (token % columns).float(), self.inv_freq_w),
            ),
            -1,
        )


class Attention(nn.Module):
    def __init__(self, width, heads, bias, qk_norm, rope):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)
        self.q_norm = RmsNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RmsNorm(width // heads) if qk_norm else nn.Identity()
        self.rope = rope

    def forward(self, x, rows, columns):
        b, n, width = x.shape
        q, k, v = (part.view(b, n, self.heads, -1).transpose(1, 2) for part in self.qkv(x).split(width, -1))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, rows, columns), self.rope(k, rows, columns)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width / self.heads)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, width))


class GeluMlp(nn.Module):
    def __init__(self, width, hidden, bias):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        y = self.fc1(x)
        return self.fc2(0.5 * y * (1 + torch.erf(y / math.sqrt(2))))


class SwigluMlp(nn.Module):
    def __init__(self, width, hidden, bias):
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, hidden, bias=bias), nn.Linear(width, hidden, bias=bias)
        self.w2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        gate = self.w1(x)
        return self.w2(gate * torch.sigmoid(gate) * self.w3(x))


class Block(nn.Module):
    def __init__(self, width, heads, hidden, modern, rope):
        super().__init__()
        norm = RmsNorm if modern else nn.LayerNorm
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn = Attention(width, heads, not modern, modern, rope)
        self.mlp = (SwigluMlp if modern else GeluMlp)(width, hidden, not modern)

    def forward(self, x, rows, columns):
        x = x + self.attn(self.norm1(x), rows, columns)
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    def __init__(self, depth, width, heads, hidden, rows, columns, modern, rope):
        super().__init__()
        if rope:
            self.rope = Rope(width // heads, rows > 1)
        else:
            self.register_buffer("pos_embed", sincos_table(rows, columns, width))
        # The same rotary module is registered once here and once in every block, as published.
        shared = self.rope if rope else None
        self.blocks = nn.ModuleList(Block(width, heads, hidden, modern, shared) for _ in range(depth))
        self.norm = (RmsNorm if modern else nn.LayerNorm)(width)

    def forward(self, x, rows, columns, add_positions=True):
        if add_positions and hasattr(self, "pos_embed"):
            x = x + self.pos_embed[:, : x.shape[1]]  # the published fault: rows of the full grid for any grid
        for block in self.blocks:
            x = block(x, rows, columns)
        return self.norm(x)


class PublishedModel(nn.Module):
    """kind: "two_step" (2.0), "one_stage", or "strip" (2.1: RMSNorm, SwiGLU, query norm, temporal RoPE, no biases)."""

    def __init__(self, kind="two_step", width=64, heads=4, depth=2, codes=32, rope=False, n_fft=2048, hop=625):
        super().__init__()
        strip = kind == "strip"
        self.kind, self.n_fft, self.hop, mels = kind, n_fft, hop, 128
        self.height, self.frames = (mels, 4) if strip else (16, 16)
        self.rows, self.columns = mels // self.height, 16
        self.spectrogram = Holder()
        self.spectrogram.mel_spec = Holder()
        self.spectrogram.mel_spec.spectrogram, self.spectrogram.mel_spec.mel_scale = Holder(), Holder()
        self.spectrogram.mel_spec.spectrogram.register_buffer("window", torch.hann_window(n_fft))
        self.spectrogram.mel_spec.mel_scale.register_buffer("fb", mel_bank(n_fft, mels))
        self.patch_embed = Holder()
        self.patch_embed.patch_embed = Holder()
        kernel = (self.height, self.frames)
        self.patch_embed.patch_embed.proj = nn.Conv2d(1, width, kernel, kernel)
        shape = (self.rows, self.columns, strip, rope or strip)
        self.encoder = Vit(depth, width, heads, 2 * width, *shape)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width))
        self.quantizer = Holder()
        self.quantizer.register_buffer("P", torch.randn(self.height * self.frames, 8) / 16)
        self.quantizer.register_buffer("CB", F.normalize(torch.randn(codes, 8), dim=-1))
        if kind == "one_stage":
            self.output_proj = nn.Linear(width, codes)
        else:
            self.predictor = Vit(1, width, heads, 2 * width, *shape)
            self.predictor_input_proj = nn.Linear(width, width)
            self.rq_proj = nn.Linear(width, codes)
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if "norm" in name and name.endswith("weight"):
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=0.3 if "attn" in name else 0.1)
        with torch.no_grad():
            self.patch_embed.patch_embed.proj.weight.mul_(0.02)  # raw dB values are near -50

    def spectrogram_db(self, waveform):
        spectrum = torch.stft(
            waveform,
            self.n_fft,
            self.hop,
            window=self.spectrogram.mel_spec.spectrogram.window,
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        spectrum = spectrum / self.spectrogram.mel_spec.spectrogram.window.square().sum().sqrt()
        mel = self.spectrogram.mel_spec.mel_scale.fb.T @ spectrum.abs().square()
        return 10 * mel.clamp(min=1e-10).log10()  # (B, mel, time)

    def tokens(self, decibels):
        x = self.patch_embed.patch_embed.proj(decibels[:, None])
        return x.flatten(2).transpose(1, 2), x.shape[3]

    def features(self, waveform):
        """Frame features (B, T, D) of clips no longer than the position table, as published inference has them."""
        decibels = self.spectrogram_db(waveform)
        decibels = decibels[..., : decibels.shape[-1] // self.frames * self.frames]
        tokens, columns = self.tokens(decibels)
        output = self.encoder(tokens, self.rows, columns)
        return output.view(len(output), self.rows, columns, -1).mean(1)

    def codes(self, waveform):
        """(B, rows * columns) codes of all patches in the published, frequency-major order."""
        decibels = self.spectrogram_db(waveform)
        decibels = decibels[..., : decibels.shape[-1] // self.frames * self.frames]
        patches = F.unfold(decibels[:, None], (self.height, self.frames), stride=(self.height, self.frames))
        projected = F.normalize(patches.transpose(1, 2) @ self.quantizer.P, dim=-1)
        return (projected @ self.quantizer.CB.T).argmax(-1)

    def logits(self, waveform, masked):
        """Logits (B, M, V) at the frequency-major token indices ``masked`` (M,), the same for all clips."""
        decibels = self.spectrogram_db(waveform)[..., : self.columns * self.frames]
        tokens, columns = self.tokens(decibels)
        if self.kind == "one_stage":
            tokens = tokens.clone()
            tokens[:, masked] = self.mask_token
            return self.output_proj(self.encoder(tokens, self.rows, columns)[:, masked])
        everything = torch.arange(tokens.shape[1])
        seen = everything[~torch.isin(everything, masked)]
        context = tokens[:, seen] + self.encoder.pos_embed[:, seen]
        for block in self.encoder.blocks:
            context = block(context, 0, 0)
        context = self.predictor_input_proj(self.encoder.norm(context))
        masks = (self.mask_token + self.predictor.pos_embed[:, masked]).expand(len(tokens), -1, -1)
        merged = torch.cat((context, masks), 1)[:, torch.cat((seen, masked)).argsort()]
        hidden = self.predictor(merged, self.rows, columns, add_positions=False)
        return self.rq_proj(hidden[:, masked])
