"""The order of training samples as a pure function of (seed, epoch, position).

Nothing is shuffled and nothing is stored: a keyed bijection maps a position of an epoch to an item in constant time and
memory, so a run resumes at any sample at once, with any number of workers and ranks. Only integer arithmetic written
here is involved, so the order does not depend on the versions of NumPy or PyTorch.
"""

from math import isqrt

from bestrq2.hashing import mix

__all__ = ["SampleOrder", "permute"]

_ROUNDS = 8


def permute(position: int, size: int, *keys: int) -> int:
    """Item at ``position`` of the permutation of range(``size``) that ``keys`` choose.

    A Feistel network over a rectangle a x b >= size: each round adds to one coordinate a hash of the other, which is
    undone by subtracting it, so every round is a bijection of the rectangle. Positions that land outside range(size)
    walk on until they are inside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    if not 0 <= position < size:
        raise IndexError(f"position must be in [0, {size}), got {position}")
    if size == 1:
        return 0
    a = isqrt(size - 1) + 1
    b = -(-size // a)
    key = mix(*keys)
    item = position
    while True:
        left, right = item // b, item % b
        for step in range(0, 2 * _ROUNDS, 2):
            left = (left + mix(key, step, right)) % a
            right = (right + mix(key, step + 1, left)) % b
        item = left * b + right
        if item < size:
            return item


class SampleOrder:
    """An endless sequence of epochs, each a different permutation of ``num_items`` items.

    Args:
        num_items: items per epoch, at least 1.
        seed: any integer; another seed gives unrelated permutations.
    """

    def __init__(self, num_items: int, seed: int = 0) -> None:
        if num_items < 1:
            raise ValueError(f"num_items must be at least 1, got {num_items}")
        self.num_items = num_items
        self.seed = seed

    def item(self, global_index: int) -> tuple[int, int]:
        """The (epoch, item) of the sample with this index, counted from the beginning of training."""
        if global_index < 0:
            raise IndexError(f"global_index must be >= 0, got {global_index}")
        epoch, position = divmod(global_index, self.num_items)
        return epoch, permute(position, self.num_items, self.seed, epoch)
