"""Pictures of a probe: classes may have any names."""

import numpy as np
import pytest
from PIL import Image

from bestrq2.probing.picture import save_confusions, save_per_class

CLASSES = ["$\\frac$", "_hidden", "a\nb", "caf\udce9", "\ud83d", "x$y$"]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_names_of_classes(tmp_path):
    save_confusions(tmp_path / "a.png", {"encoder, $\\linear": np.eye(6, dtype=int)}, CLASSES)
    bars = {name: [0.5] * 6 for name in ("_own", "$\\frac$")}
    save_per_class(tmp_path / "b.png", bars, [0.1] * 6, CLASSES, "of $_")
    for name in ("a.png", "b.png"):
        assert Image.open(tmp_path / name).size[0] > 100
