"""Integer arithmetic of launchers on the host: Triton's own functions for it take 5 to 9 us a call there."""


def ceil_div(number: int, size: int) -> int:
    """The number of parts of ``size`` that hold ``number``."""
    return -(-number // size)


def power_of_2(number: int) -> int:
    """Smallest power of 2 that is at least ``number`` (at least 1)."""
    return 1 << max(number - 1, 0).bit_length()
