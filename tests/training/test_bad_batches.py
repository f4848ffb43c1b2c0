"""Batches kept for inspection: what is written, what is refused, what the statistics say."""

import math

import pytest
import torch

from bestrq2.data import Batch
from bestrq2.errors import TrainingError
from bestrq2.runs.bad_batches import clip_statistics, load_bad_batch, save_bad_batch


@pytest.fixture
def batch() -> Batch:
    waveform = torch.randn(3, 1000) * 0.1
    waveform[0, 10] = float("nan")
    waveform[1, 600:] = 0
    waveform[2, 5], waveform[2, 6] = float("inf"), -1.0
    return Batch(waveform, torch.tensor([1000, 600, 1000]), torch.tensor([7, 8, 9]))


def test_round_trip(tmp_path, batch):
    path = save_bad_batch(tmp_path, 12, 1, batch, float("nan"), float("inf"), files=["a.wav", "b.wav", "c.wav"])
    assert path == tmp_path / "bad_batches" / "step-00000012-rank-1.safetensors"
    kept = load_bad_batch(path)
    assert torch.equal(kept.waveform, batch.waveform) or kept.waveform.isnan().sum() == 1
    assert torch.equal(kept.waveform.nan_to_num(3.0), batch.waveform.nan_to_num(3.0))
    assert torch.equal(kept.lengths, batch.lengths)
    assert torch.equal(kept.index, batch.index)
    assert (kept.step, kept.rank, kept.files) == (12, 1, ["a.wav", "b.wav", "c.wav"])
    assert math.isnan(kept.loss)
    assert kept.grad_norm == math.inf
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".safetensors"]


def test_others_may_read_it_as_far_as_they_may_read_other_files(tmp_path, batch):
    path = save_bad_batch(tmp_path, 12, 1, batch, 1.0, 1.0)
    assert path.stat().st_mode == path.with_suffix(".json").stat().st_mode


def test_limit_counts_each_rank(tmp_path, batch):
    paths = [save_bad_batch(tmp_path, step, 0, batch, 1.0, 1.0, limit=2) for step in range(4)]
    assert [path is not None for path in paths] == [True, True, False, False]
    assert save_bad_batch(tmp_path, 0, 1, batch, 1.0, 1.0, limit=2) is not None
    assert save_bad_batch(tmp_path, 1, 0, batch, 1.0, 1.0, limit=2) == paths[1]  # a resumed run comes by again


def test_unwritable_place_is_a_warning(tmp_path, batch, caplog):
    (tmp_path / "bad_batches").write_text("a file where the folder should be")
    assert save_bad_batch(tmp_path, 3, 0, batch, 1.0, 1.0) is None
    assert "the batch of step 3 could not be kept" in caplog.text


def test_other_files_are_refused(tmp_path, batch):
    path = save_bad_batch(tmp_path, 3, 0, batch, 1.0, 1.0)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(TrainingError, match="not a batch kept by training"):
        load_bad_batch(path)
    with pytest.raises(TrainingError, match=r"missing.safetensors"):
        load_bad_batch(tmp_path / "missing.safetensors")


def test_statistics(tmp_path, batch):
    kept = load_bad_batch(save_bad_batch(tmp_path, 3, 0, batch, 1.0, 1.0))
    first, second, third = clip_statistics(kept)
    assert (first["index"], first["nan"], first["inf"], first["samples"]) == (7, 1, 0, 1000)
    finite = batch.waveform[0][batch.waveform[0].isfinite()].double()
    assert first["rms"] == pytest.approx(float(finite.square().mean().sqrt()))
    assert first["min"] == pytest.approx(float(finite.min()))
    assert (second["samples"], second["zeros"]) == (600, 0.0)  # the padding is not counted
    assert (third["nan"], third["inf"], third["min"]) == (0, 1, -1.0)
    assert third["clipped"] == pytest.approx(1 / 999)
