"""Devices without float64, where what has to be exact is computed on the CPU."""

import torch

WITHOUT_FLOAT64 = ("mps",)  # types of devices


def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64."""
    return device.type not in WITHOUT_FLOAT64


def exact_device(device: torch.device) -> torch.device:
    """``device``, or the CPU for a device without float64."""
    return device if has_float64(device) else torch.device("cpu")
