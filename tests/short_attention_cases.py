"""Attention over few keys against float64, for the operator on every device: packed inputs, and separate ones."""

import torch
import torch.nn.functional as F
from accuracy import assert_no_worse_than_torch

SHAPES = [  # tokens, head size, padded, first query
    (1, 64, False, 0),
    (17, 32, False, 5),
    (63, 48, True, 0),
    (64, 64, False, 0),
    (100, 72, True, 30),
    (128, 64, True, 0),
    (128, 80, False, 127),
    (128, 128, True, 1),
    (200, 64, True, 0),
]


def packed(tokens, dim, dtype, device, heads=2, clips=2):
    generator = torch.Generator().manual_seed(tokens + dim)
    qkv = 1.5 * torch.randn(clips, tokens, 3, heads, dim, generator=generator)
    return qkv.to(device, dtype).requires_grad_()


def some_lengths(tokens, device):
    return torch.tensor([max(1, tokens // 3), tokens], device=device)


def plain(query, key, value, lengths, offset):
    """By PyTorch, with zero in padded queries; the first query is the token ``offset``, None: queries are no tokens."""
    if lengths is None:
        return F.scaled_dot_product_attention(query, key, value)
    valid = (torch.arange(key.shape[2], device=key.device) < lengths[:, None])[:, None, None]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=valid)
    return out if offset is None else out.masked_fill(~valid[..., offset:].mT, 0.0)


def plain_self(qkv, lengths, first):
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return plain(query[:, :, first:], key, value, lengths, first)


def compare(function, theirs, inputs, *options):
    """Output and gradients within twice the error of PyTorch's own attention in the dtype of the inputs.

    ``function`` and ``theirs`` take the inputs and the options.
    """
    found = function(*inputs, *options)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.device, found.dtype)
    double = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for out, leaves in ((found, inputs), (theirs(*inputs, *options), inputs), (theirs(*double, *options), double)):
        results.append([out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))])
    for name, mine, base, gold in zip(("output", "first input", "second", "third"), *results):
        assert mine.dtype == inputs[0].dtype
        assert_no_worse_than_torch(name, mine, base, gold)


def compare_self(function, tokens, dim, padded, first, dtype, device, heads=2):
    """``function(qkv, lengths, first)``."""
    lengths = some_lengths(tokens, device) if padded else None
    compare(function, plain_self, [packed(tokens, dim, dtype, device, heads)], lengths, first)


def separate(queries, keys, dim, dtype, device):
    """Queries, keys and values in an order of their own in memory, as after rotary positions."""
    generator = torch.Generator().manual_seed(queries)
    frames = [torch.randn(2, 2, n, dim, generator=generator) for n in (queries, keys, keys)]
    return [x.to(device, dtype).requires_grad_() for x in frames]


def compare_separate(function, queries, keys, dim, dtype, device):
    """``function(query, key, value, lengths)``."""
    lengths = some_lengths(keys, device)
    offset = 0 if queries == keys else None

    def theirs(query, key, value, lengths):
        return plain(query, key, value, lengths, offset)

    compare(function, theirs, separate(queries, keys, dim, dtype, device), lengths)
