"""Names of the tensors in a published checkpoint: which were used, and an error that lists them."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bestrq2.errors import ConfigError, UnknownLayoutError


def unknown_layout(origin: str | Path, why: str, names: list[str], shown: int = 24) -> UnknownLayoutError:
    listed = ", ".join(sorted(names)[:shown])
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return UnknownLayoutError(f"{origin}: {why}. Its keys: {listed}{more}")


@dataclass
class Keys:
    """The tensors of a file, and which of them have been understood."""

    tensors: dict[str, Tensor]
    origin: Path | str
    used: set[str] = field(default_factory=set)

    def get(self, name: str, dims: int | None = None) -> Tensor | None:
        """A tensor in float32, or None.

        Raises:
            ConfigError: if it has integers, is empty, or has another number of dimensions than ``dims``.
        """
        if name not in self.tensors:
            return None
        self.used.add(name)
        tensor = self.tensors[name]
        if not tensor.is_floating_point() or not tensor.numel() or dims not in (None, tensor.dim()):
            wanted = "floating numbers" if dims is None else f"floating numbers in {dims} dimensions"
            raise ConfigError(f"{self.origin}: {name}: expected {wanted}, got {tensor.dtype} {list(tensor.shape)}")
        return tensor.float()

    def tolerance(self, name: str) -> float:
        """Largest error of a number up to 1 in the precision in which a tensor is stored, at least 1e-4."""
        return max(1e-4, torch.finfo(self.tensors[name].dtype).eps)

    def need(self, name: str, dims: int | None = None) -> Tensor:
        tensor = self.get(name, dims)
        if tensor is None:
            raise unknown_layout(self.origin, f"no tensor {name!r}", list(self.tensors))
        return tensor

    def below(self, stem: str) -> list[str]:
        return [name for name in self.tensors if name.startswith(stem)]

    def rest(self) -> list[str]:
        return sorted(set(self.tensors) - self.used)
