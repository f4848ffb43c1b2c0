"""``bestrq2 stats`` prints a recipe and nothing else."""

import subprocess
import sys

from bestrq2.stats import main


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


def test_no_more_clips_than_asked_for_are_measured(capsys):
    """At most one epoch: batches of similar length would have several times as many."""
    for asked, measured in ((10, 10), (100, 24)):
        assert main(["--clips", str(asked), "data.batching=buckets", "data.crop_seconds=8"]) == 0
        assert f" of {measured} clips of the packaged clips" in capsys.readouterr().out


def test_crops_are_not_called_clips(capsys):
    """Each of the 24 clips of 2 s has four crops of half a second."""
    assert main(["--clips", "48", "data.crop_seconds=0.5"]) == 0
    assert " of 48 crops of the packaged clips" in capsys.readouterr().out


def test_as_many_clips_as_asked_for_are_measured(capsys):
    """Of buckets whose steps have a single clip, one was measured for every eight that were asked for."""
    assert main(["--clips", "20", "data.batching=buckets", "data.crop_seconds=2", "data.batch_seconds=2"]) == 0
    assert " of 20 clips of the packaged clips" in capsys.readouterr().out
