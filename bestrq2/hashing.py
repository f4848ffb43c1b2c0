"""Numbers that are a pure function of integers: the same on every machine, device, rank and resumed run.

What is drawn for a training sample (its place in the order, its crop, its mask) is a hash of the seed and of what it
belongs to, never the state of a generator: nothing has to be saved to resume, and nothing depends on what ran before.
"""

_MASK = (1 << 64) - 1


def mix(*keys: int) -> int:
    """Hash integers to 64 well mixed bits (the finaliser of SplitMix64, Steele et al. 2014, applied in a chain)."""
    state = 0
    for key in keys:
        state = (state ^ (key & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def uniform(*keys: int) -> float:
    """A number in [0, 1) drawn by the hash of ``keys``."""
    return (mix(*keys) >> 11) * 2.0**-53
