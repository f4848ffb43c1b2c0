"""``bestrq2 stats`` prints a recipe and nothing else."""

import subprocess
import sys


def test_the_printed_snippet_is_a_recipe(tmp_path):
    printed = subprocess.run(
        [sys.executable, "-m", "bestrq2.stats", "--clips", "8", "data.crop_seconds=1"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    recipe = tmp_path / "stats.yaml"
    recipe.write_text(printed.stdout)
    from bestrq2.config import load_config

    front_end = load_config(str(recipe), [], {}).model.front_end
    assert front_end.normalize == "global"
    assert front_end.std > 0
    assert "Data" in printed.stderr
