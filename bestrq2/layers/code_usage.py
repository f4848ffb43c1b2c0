"""Number of codes that the targets use. Random targets cannot collapse during training, but can start collapsed."""

import torch
from torch import Tensor, nn

from bestrq2.ops.common.devices import exact_device

LOW_PERPLEXITY_SHARE = 0.05


class CodeUsage(nn.Module):
    """Decayed counts of target codes: usage, perplexity and the unigram baseline, per codebook.

    The *unigram baseline* is the accuracy of always predicting the commonest code: a masked accuracy that is not well
    above it means nothing was learned.

    Args:
        num_codebooks, codebook_size: G and V.
        decay: factor on old counts per update; 0.999 remembers about a thousand steps.
    """

    counts: Tensor
    total: Tensor

    def __init__(self, num_codebooks: int, codebook_size: int, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("counts", torch.zeros(num_codebooks, codebook_size, dtype=torch.float64, device="cpu"))
        self.register_buffer("total", torch.zeros((), dtype=torch.float64, device="cpu"))

    def _apply(self, fn, recurse=True):
        # Counts stay float64 in any model, and on the CPU beside a device without it.
        place = fn(torch.empty(0, dtype=torch.float32, device=self.counts.device)).device
        self.counts, self.total = (kept.to(exact_device(place)) for kept in (self.counts, self.total))
        return self

    @torch.no_grad()
    def update(self, codes: Tensor, valid: Tensor | None = None, decay: bool = True) -> Tensor:
        """Add codes ``(..., G)``; ``valid (...)`` bool leaves out padding; ``decay`` False adds to the same update,
        for a batch in parts. Returns this update's counts ``(G, V)``."""
        books, size = self.counts.shape
        flat = codes.reshape(-1, books)
        weight = torch.ones(flat.shape[0], device=codes.device, dtype=torch.int32)
        if valid is not None:
            weight = valid.reshape(-1).to(torch.int32)
        # Unlike bincount, this does not make the host wait for a GPU, whose atomic additions are fast for integers.
        counts = torch.zeros(books, size, device=codes.device, dtype=torch.int32)
        fresh = counts.scatter_add_(1, flat.T.clamp(min=0), weight.expand(books, -1)).to(self.counts.device).double()
        self.add(fresh, decay)
        return fresh

    @torch.no_grad()
    def add(self, fresh: Tensor, decay: bool = True) -> None:
        """Add counts ``(G, V)``, e.g. summed over ranks."""
        if decay:
            self.counts.mul_(self.decay)
            self.total.mul_(self.decay)
        self.counts.add_(fresh)
        self.total.add_(fresh[0].sum())

    def metrics(self) -> dict[str, float]:
        """``codes_used``, ``perplexity`` and ``unigram`` accuracy in 0..1: means over codebooks; with several codebooks
        also of each, as ``perplexity/0``, ``perplexity/1`` and so on."""
        total = self.counts.sum(1, keepdim=True).clamp(min=1e-12)
        share = self.counts / total
        entropy = -(share * share.clamp(min=1e-300).log()).sum(1)
        books = {
            "codes_used": (self.counts > 0).sum(1).double().tolist(),
            "perplexity": entropy.exp().tolist(),
            "unigram": share.max(1).values.tolist(),
        }
        found = {name: sum(values) / len(values) for name, values in books.items()}
        if self.counts.shape[0] > 1:
            found |= {f"{name}/{g}": value for name, values in books.items() for g, value in enumerate(values)}
        return found

    def advice(self, normalize: str = "none", projection: str = "random", measured: bool = True) -> str | None:
        """A warning when perplexity is under 5 % of what the codebook (or the few targets seen) could show, or None.

        Args:
            normalize: how the quantizer standardises patches now.
            projection: its projection now.
            measured: statistics of log-mel may standardise patches. They do not apply to the features of a teacher, nor
                behind a front end that standardises.
        """
        size = self.counts.shape[1]
        attainable = min(size, float(self.total))
        perplexity = self.metrics()["perplexity"]
        if attainable < 100 or perplexity >= LOW_PERPLEXITY_SHARE * attainable:
            return None
        cures = ["model.targets.normalize=patch"] if normalize != "patch" else []
        if measured and normalize == "none":
            cures.append("model.targets.normalize=global with statistics from `bestrq2 stats`")
        elif projection != "whitened_pca":
            cures.append("model.targets.projection=whitened_pca")
        cause = "The common level of the patches dominates the projection: t" if normalize == "none" else "T"
        return (
            f"targets use few codes: perplexity {perplexity:.1f} of {size} codes over {float(self.total):.0f} targets "
            f"(below {LOW_PERPLEXITY_SHARE:.0%}). {cause}ry {', or '.join(cures or ['more varied audio'])}."
        )
