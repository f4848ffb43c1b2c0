"""Colours for the codes of a codebook: codes that point in similar directions get similar colours."""

import numpy as np

COMPONENTS = 3
LIGHTNESS, CHROMA = (38.0, 85.0), 62.0


def code_colours(codebook: np.ndarray, used: np.ndarray) -> np.ndarray:
    """sRGB colours of all codes.

    The codes become points on their first three principal components, weighted by how often each is ``used``; ranks
    among the used codes spread them evenly over lightness (first component) and the two colour axes of CIELAB, whose
    distances follow what the eye sees. A function of the codebook and the used codes alone, not of a training step.

    Args:
        codebook: ``(V, d)`` unit rows.
        used: ``(N,)`` int codes of the pictured tokens, with repeats.

    Returns:
        ``(V, 3)`` float in 0..1.
    """
    codebook = codebook.astype(np.float64)
    vectors = codebook[used]
    centre = vectors.mean(0)
    _, axes = np.linalg.eigh((vectors - centre).T @ (vectors - centre))
    axes = axes[:, ::-1][:, :COMPONENTS]
    # An eigenvector's sign is arbitrary: its largest entry is made positive.
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    position = np.full((len(codebook), COMPONENTS), 0.5)
    for k, values in enumerate(((codebook - centre) @ axes).T):
        ordered = np.sort(values[used])
        below = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
        position[:, k] = below / (2 * len(ordered))
    low, high = LIGHTNESS
    lab = np.stack(
        (
            low + (high - low) * position[:, 0],
            CHROMA * (2 * position[:, 1] - 1),
            CHROMA * (2 * position[:, 2] - 1),
        ),
        axis=1,
    )
    return lab_to_srgb(lab)


def lab_to_srgb(lab: np.ndarray) -> np.ndarray:
    """CIELAB (D65) ``(..., 3)`` to sRGB in 0..1 by the formulas of CIE 15 and IEC 61966-2-1, clipped to its gamut."""
    lightness, a, b = np.moveaxis(lab, -1, 0)
    y = (lightness + 16) / 116
    f = np.stack((y + a / 500, y, y - b / 200), axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.95047, 1.0, 1.08883)
    matrix = np.array(
        [[3.2404542, -1.5371385, -0.4985314], [-0.9692660, 1.8760108, 0.0415560], [0.0556434, -0.2040259, 1.0572252]]
    )
    linear = np.clip(xyz @ matrix.T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
