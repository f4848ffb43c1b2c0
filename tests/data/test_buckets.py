"""Batches of similar durations: bounded, little padding, every clip once an epoch, pure in (seed, step)."""

import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch

from bestrq2.data import AudioFile, BucketDataset, DataError, batches
from bestrq2.data.fingerprint import data_fingerprint


def _durations(number: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(1.2, 0.8, number), 0.3, 40).round(3)


def _files(durations, domains=("",)) -> list[AudioFile]:
    return [AudioFile(f"a/{i}.wav", float(d), 16000, domains[i % len(domains)]) for i, d in enumerate(durations)]


@pytest.fixture
def numbered(monkeypatch):
    """Reading file n gives its stated length, or the part asked for, filled with n: any number of files."""

    def load(item, rate, *, start=0.0, duration=None):
        number = int(item.path.split("/")[1].split(".")[0])
        have = round(float(DURATIONS[number]) * rate) - round(start * rate)
        return np.full(max(1, min(have, round((duration or 1e9) * rate))), number, np.float32)

    monkeypatch.setattr("bestrq2.data.dataset.load_clip", load)


DURATIONS = _durations(1500)


def test_an_epoch_hears_every_clip_once(numbered):
    dataset = BucketDataset(_files(DURATIONS), 10.0, seed=3)
    plan = dataset.plan(16)
    slots = Counter({i: max(1, round(d / 10)) for i, d in enumerate(DURATIONS)})
    orders = []
    for epoch in range(2):
        heard, indices, padded, audio, composition = Counter(), [], 0, 0, []
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            samples = [dataset[index] for index in plan.samples(step)]
            lengths = [len(sample.waveform) for sample in samples]
            assert max(lengths) * len(lengths) <= 16 * 160000
            assert len(samples) >= plan.min_rows == 16
            padded, audio = padded + max(lengths) * len(lengths), audio + sum(lengths)
            names = [int(sample.waveform[0]) for sample in samples]
            for name, length in zip(names, lengths):
                assert abs(length - min(160000, round(DURATIONS[name] * 16000))) <= 1  # whole, or a crop
            heard.update(names)
            indices += [sample.index for sample in samples]
            composition.append(frozenset(names))
        assert len(set(indices)) == len(indices)
        repeats = heard - slots
        assert not slots - heard
        assert repeats.total() == len(indices) - dataset.samples_per_epoch < 16
        assert 1 - audio / padded < 0.06
        assert padded > 0.97 * 16 * 160000 * plan.steps_per_epoch  # steps are full
        orders.append((indices, composition))
    assert not set(orders[0][0]) & set(orders[1][0])  # the index of a sample, from which its mask is drawn, is unique
    assert len(set(orders[0][1]) & set(orders[1][1])) < 0.05 * plan.steps_per_epoch  # drawn anew


def test_order_of_batches_is_shuffled():
    dataset = BucketDataset(_files(DURATIONS), 10.0, seed=3)
    plan = dataset.plan(16)
    sizes = [len(plan.samples(step)) for step in range(plan.steps_per_epoch)]
    ranks = np.argsort(np.argsort(sizes, kind="stable"))
    correlation = np.corrcoef(ranks, np.arange(len(ranks)))[0, 1]
    assert abs(correlation) < 5 / len(ranks) ** 0.5
    assert sizes != [len(plan.samples(plan.steps_per_epoch + step)) for step in range(plan.steps_per_epoch)]


@pytest.mark.parametrize("number", [1, 2, 5, 40])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_small_sets(numbered, number, batch_size):
    """Fewer clips than a step holds are repeated: every step has the rows that any number of ranks counts on."""
    dataset = BucketDataset(_files(DURATIONS[:number]), 10.0)
    plan = dataset.plan(batch_size)
    assert plan.min_rows >= batch_size
    seen = []
    for step in range(2 * plan.steps_per_epoch):
        samples = [dataset[index] for index in plan.samples(step)]
        assert len(samples) >= plan.min_rows
        assert len(samples) * max(len(sample.waveform) for sample in samples) <= batch_size * 160000
        seen += [sample.index for sample in samples]
    assert len(set(seen)) == len(seen)


def _clips(tmp_path, seconds) -> list[AudioFile]:
    files = []
    for number, duration in enumerate(seconds):
        path = tmp_path / f"{number}.wav"
        noise = np.random.default_rng(number).uniform(-0.5, 0.5, round(duration * 16000))
        soundfile.write(path, noise, 16000, subtype="PCM_16")
        files.append(AudioFile(str(path), duration, 16000))
    return files


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_ranks_workers_and_resume(tmp_path):
    """The audio of a step depends on neither; every rank has at least one sample in as many steps."""
    dataset = BucketDataset(_clips(tmp_path, np.linspace(0.2, 1.4, 23).round(3)), 1.0, seed=5)
    assert dataset.plan(4).steps_per_epoch < 8
    whole = list(batches(dataset, 4, num_steps=12))
    for start, world_size, workers in ((0, 1, 2), (3, 2, 0), (7, 3, 0), (5, 4, 1)):
        share = {"start_step": start, "num_steps": 12 - start, "world_size": world_size, "workers": workers}
        ranks = [list(batches(dataset, 4, rank=rank, **share)) for rank in range(world_size)]
        assert {len(rank) for rank in ranks} == {12 - start}
        for step, expected in enumerate(whole[start:]):
            parts = [rank[step] for rank in ranks]
            assert all(len(part) >= 1 for part in parts)
            assert torch.equal(torch.cat([part.index for part in parts]), expected.index)
            assert torch.equal(torch.cat([part.lengths for part in parts]), expected.lengths)
            rows = [row[:length] for part in parts for row, length in zip(part.waveform, part.lengths)]
            gold = [row[:length] for row, length in zip(expected.waveform, expected.lengths)]
            assert all(torch.equal(one, other) for one, other in zip(rows, gold))
            assert all(part.waveform.shape[1] == part.lengths.max() for part in parts)
    with pytest.raises(ValueError, match="world_size must be at most 4, the samples of the smallest step, got 5"):
        batches(dataset, 4, world_size=5)


def test_unreadable_clips_and_wrong_durations_keep_the_bound(tmp_path):
    files = _clips(tmp_path, [0.3] * 3 + [0.5] + [1.0] * 5)
    (tmp_path / "0.wav").unlink()  # others of its length remain
    (tmp_path / "3.wav").unlink()  # alone in its bucket
    files[1] = AudioFile(files[8].path, 0.3)  # the manifest says 0.3 s of a clip of 1 s
    dataset = BucketDataset(files, 1.0, row_seconds=0.5)
    plan = dataset.plan(4)
    reasons = Counter()
    for step in range(plan.steps_per_epoch):
        samples = [dataset[index] for index in plan.samples(step)]
        lengths = [len(sample.waveform) for sample in samples]
        assert len(lengths) * max(lengths) <= 32000
        reasons.update(skip.path.split("/")[-1] for sample in samples for skip in sample.skips)
    assert set(reasons) == {"0.wav", "3.wav"}
    for item in files:
        (tmp_path / item.path).unlink(missing_ok=True)
    with pytest.raises(DataError, match="gave up on training sample 0: 8 files"):
        dataset[0]


def test_domain_weights(numbered):
    """Shares are exact over an epoch, and every clip of every domain is heard at least once in it."""
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    dataset = BucketDataset(_files(DURATIONS[:300], ("a", "a", "b", "c", "c", "c")), 10.0, domain_weights=weights)
    plan = dataset.plan(8)
    regular = [
        dataset[index]
        for step in range(plan.steps_per_epoch)
        for index in plan.samples(step)
        if index < dataset.samples_per_epoch
    ]
    counts = Counter(sample.domain for sample in regular)
    assert len(regular) == dataset.samples_per_epoch
    assert {name: count / len(regular) for name, count in counts.items()} == pytest.approx(weights, abs=1e-12)
    heard = Counter(int(sample.waveform[0]) for sample in regular)
    assert set(heard) == set(range(300))


def test_order_never_changes_between_versions(numbered):
    """A resumed run must see the order it began with: these values are part of the format."""
    durations = [1.0 + i / 4 for i in range(12)]
    dataset = BucketDataset(_files(durations), 3.0, seed=3, row_seconds=1.5)
    plan = dataset.plan(4)
    dataset._crop = lambda unit, *_: np.full(1, unit, np.float32)
    order = [[int(dataset[index].waveform[0]) for index in plan.samples(step)] for step in range(7)]
    assert order == [[7, 8], [5, 6], [3, 4], [11, 8], [0, 1, 2], [10, 9], [7, 8]]
    assert [plan.samples(step).start for step in range(7)] == [7, 5, 3, 11, 0, 9, 12 + 2**20 + 7]


def test_extreme_weights():
    """A domain of many clips and a tiny share makes an epoch long, but neither slow nor large."""
    files = _files(_durations(20_000), ("rare",) * 99 + ("common",))
    dataset = BucketDataset(files, 10.0, domain_weights={"rare": 1e-5, "common": 0.99999})
    assert dataset.samples_per_epoch > 5 * 10**8
    start = time.process_time()
    plan = dataset.plan(32)
    steps = [plan.samples(step) for step in (0, 10**6, 10**12)]
    cells = [dataset._draw(index)[0] for step in steps for index in step]
    assert time.process_time() - start < 20, "going through an epoch would take minutes"
    assert max(steps[-1]) < 2**63
    assert len(cells) >= 96


def test_many_files():
    """A plan costs no more than sorting the durations, and a step far into training no more than the first."""
    dataset = BucketDataset(_files(_durations(200_000)), 10.0)
    start = time.process_time()
    plan = dataset.plan(64)
    planned = time.process_time() - start
    start = time.process_time()
    for step in (0, 10**5, 10**7, 10**9):
        for index in plan.samples(step):
            dataset._draw(index)
    print(f"plan {planned:.4f} s, four steps {time.process_time() - start:.4f} s")
    assert planned < 20, "comparing all pairs would take minutes"
    # 64-bit indices; steps cover each place of an epoch once
    borders = sorted((plan.samples(step).start, plan.samples(step).stop) for step in range(plan.steps_per_epoch))
    assert borders[0][0] == 0
    assert all(one[1] == other[0] for one, other in pairwise(borders))
    assert borders[-1][1] >= dataset.samples_per_epoch


def test_fingerprint_covers_the_batching():
    files = _files(DURATIONS[:50])
    settings = [{}, {"row_seconds": 5.0}, {"seed": 1}]
    found = {data_fingerprint(BucketDataset(files, 10.0, **options)) for options in settings}
    assert len(found) == 3
    assert data_fingerprint(BucketDataset(files, 10.0)) == data_fingerprint(BucketDataset(files, 10.0))


def test_rejects_bad_arguments():
    files = _files(DURATIONS[:5])
    with pytest.raises(ValueError, match="row_seconds"):
        BucketDataset(files, 10.0, row_seconds=0)
    plan = BucketDataset(files, 10.0, row_seconds=0.1).plan(2)  # 0.2 s: still one clip at a time
    assert [len(plan.samples(step)) for step in range(plan.steps_per_epoch)] == [1] * plan.steps_per_epoch
