"""Names of the tensors in a published checkpoint: which were used, and an error that lists them."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from bestrq2.errors import UnknownLayoutError


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

    def get(self, name: str) -> Tensor | None:
        if name not in self.tensors:
            return None
        self.used.add(name)
        tensor = self.tensors[name]
        return tensor.float() if tensor.is_floating_point() else tensor

    def need(self, name: str) -> Tensor:
        tensor = self.get(name)
        if tensor is None:
            raise unknown_layout(self.origin, f"no tensor {name!r}", list(self.tensors))
        return tensor

    def below(self, stem: str) -> list[str]:
        return [name for name in self.tensors if name.startswith(stem)]

    def rest(self) -> list[str]:
        return sorted(set(self.tensors) - self.used)
