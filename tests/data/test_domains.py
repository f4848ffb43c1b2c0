"""Domain weights: shares hold at every draw, each domain passes through its own epochs, mistakes are named."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bestrq2.data import AudioFile, CropDataset, DataError, DomainSchedule, batches, tiny_dataset
from bestrq2.data.domains import LARGEST_PERIOD, apportion
from bestrq2.data.fingerprint import data_fingerprint

WEIGHTS = {"speech": 0.45, "music": 0.35, "env": 0.2}


@pytest.mark.parametrize(
    "weights",
    [
        WEIGHTS,
        {"a": 1},
        {"a": 1, "b": 1, "c": 1},
        {"a": 0.999, "b": 0.001},
        {"a": 0.333, "b": 0.333, "c": 0.334},
        {str(i): i + 1 for i in range(12)},
    ],
)
def test_counts_stay_within_one_of_their_shares(weights):
    schedule = DomainSchedule(weights)
    total = sum(weights.values())
    shares = np.array([weights[name] / total for name in schedule.names])
    counts = np.zeros(len(weights))
    for index in range(3 * schedule.period):
        domain, before = schedule.draw(index)
        assert before == counts[domain]
        counts[domain] += 1
        assert np.abs(counts - (index + 1) * shares).max() < 1
    np.testing.assert_allclose(counts, 3 * schedule.period * shares)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=7), st.integers(0, 10**9))
def test_any_weights(quotas, far):
    schedule = DomainSchedule({str(i): quota for i, quota in enumerate(quotas)})
    weights = np.array([quotas[int(name)] for name in schedule.names])
    bound = 1 - 1 / (2 * len(quotas) - 2)  # Tijdeman's
    counts = np.zeros(len(quotas))
    for index in range(schedule.period):
        counts[schedule.draw(index)[0]] += 1
        assert np.abs(counts - (index + 1) * weights / weights.sum()).max() <= bound + 1e-9
    cycle, place = divmod(far, schedule.period)
    domain, before = schedule.draw(place)
    assert schedule.draw(far) == (domain, before + cycle * schedule.quotas[domain])


def test_shares_without_a_common_denominator_are_rounded():
    schedule = DomainSchedule({"a": 0.7071067811865476, "b": 1.4142135623730951, "c": 1e-9})
    assert schedule.period == sum(schedule.quotas) == LARGEST_PERIOD
    assert schedule.quotas[2] == 1
    assert abs(schedule.quotas[0] / LARGEST_PERIOD - 1 / 3) < 2 / LARGEST_PERIOD


def test_order_never_changes_between_versions():
    """A resumed run must see the order it began with: these values are part of the format."""
    schedule = DomainSchedule(WEIGHTS)
    order = [schedule.draw(index)[0] for index in range(20)]
    assert order == [2, 1, 0, 2, 1, 2, 1, 2, 0, 2, 1, 2, 1, 0, 2, 1, 2, 0, 1, 2]
    files = [AudioFile(f"{i}.wav", 1.0 + i / 4, 16000, "ab"[i % 3 == 0]) for i in range(12)]
    dataset = CropDataset(files, 10.0, seed=3, domain_weights={"a": 2, "b": 1})
    dataset._crop = lambda unit, *_: np.full(1, unit, np.float32)
    assert [int(dataset[index].waveform[0]) for index in range(12)] == [5, 9, 4, 11, 3, 7, 8, 0, 10, 2, 6, 1]


def test_apportion():
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(7, [5, 3, 2]) == [4, 2, 1]
    assert apportion(0, [2, 3]) == [0, 0]


def test_samples_by_share_not_by_hours():
    files = [item for item in tiny_dataset() if item.domain != "speech" or item.path.endswith("it_status.wav")]
    files += [item for item in tiny_dataset() if item.domain == "speech"][:2]
    dataset = CropDataset(files, crop_seconds=1.0, seed=7, domain_weights=WEIGHTS)
    drawn = [dataset[index].domain for index in range(200)]
    for number in (1, 13, 100, 200):
        counts = Counter(drawn[:number])
        assert all(abs(counts[name] - number * share) < 1 for name, share in WEIGHTS.items())
    (batch,) = batches(dataset, 20, num_steps=1)
    assert batch.domains == drawn[:20]


def test_every_domain_has_its_own_epochs(tmp_path):
    """Each domain's files come once each before any comes twice, however often the others came meanwhile."""
    import soundfile

    files = []
    for domain, number in (("music", 3), ("speech", 7)):
        for i in range(number):
            path = tmp_path / f"{domain}{i}.wav"
            value = (100 * (domain == "music") + i + 1) / 2**15
            soundfile.write(path, np.full(1600, value), 16000, subtype="PCM_16")
            files.append(AudioFile(str(path), 0.1, 16000, domain))
    dataset = CropDataset(files, 0.1, seed=1, domain_weights={"music": 0.75, "speech": 0.25})
    heard = {"music": [], "speech": []}
    for index in range(84):
        sample = dataset[index]
        heard[sample.domain].append(round(float(sample.waveform[0]) * 2**15))
    for domain, number in (("music", 3), ("speech", 7)):
        epochs = np.array(heard[domain]).reshape(-1, number)
        assert all(len(set(epoch)) == number for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1
    # a file that vanishes is replaced inside its domain, so the shares stay
    (tmp_path / "speech0.wav").unlink()
    domains = [dataset[index].domain for index in range(84)]
    assert domains == [dataset.schedule.names[dataset.schedule.draw(index)[0]] for index in range(84)]
    assert any(dataset[index].skips for index in range(84))


def test_join_short_stays_inside_its_domain():
    files = [AudioFile(item.path, item.duration, item.sampling_rate, item.domain) for item in tiny_dataset()]
    dataset = CropDataset(files, 5.0, join_short=True, domain_weights=WEIGHTS)
    assert [dataset[i].domain for i in range(20)].count("speech") == 9
    assert all(len(dataset[i].waveform) == 80000 for i in range(6))


def test_ranks_and_resume():
    dataset = CropDataset(tiny_dataset(), 1.0, domain_weights=WEIGHTS)
    whole = list(batches(dataset, 6, num_steps=4))
    halves = [list(batches(dataset, 6, start_step=2, num_steps=2, rank=rank, world_size=2)) for rank in range(2)]
    for step in range(2):
        parts = [half[step] for half in halves]
        assert torch.equal(torch.cat([part.waveform for part in parts]), whole[2 + step].waveform)


def test_fingerprint_covers_the_weights():
    plain = data_fingerprint(CropDataset(tiny_dataset(), 1.0))
    one = data_fingerprint(CropDataset(tiny_dataset(), 1.0, domain_weights=WEIGHTS))
    scaled = {name: 100 * weight for name, weight in reversed(WEIGHTS.items())}
    other = data_fingerprint(CropDataset(tiny_dataset(), 1.0, domain_weights={**WEIGHTS, "env": 0.3}))
    assert one == data_fingerprint(CropDataset(tiny_dataset(), 1.0, domain_weights=scaled))
    assert len({plain, one, other}) == 3


def test_mistakes_are_named():
    files = tiny_dataset()
    with pytest.raises(DataError, match=r"name 'musik', which no file has; .*env \(8 files\), music \(8 files\)"):
        CropDataset(files, domain_weights={**WEIGHTS, "musik": 1})
    with pytest.raises(DataError, match=r"domain 'env' has no weight .*give it one, or 0 to leave it out"):
        CropDataset(files, domain_weights={"speech": 1, "music": 1})
    with pytest.raises(DataError, match=r'files without a domain, whose name is "", have no weight .*: "" \(1 files\)'):
        CropDataset([*files, AudioFile("x.wav", 1.0)], domain_weights=WEIGHTS)
    for weights in ({**WEIGHTS, "env": -1}, {**WEIGHTS, "env": float("nan")}, dict.fromkeys(WEIGHTS, 0)):
        with pytest.raises(ValueError, match="domain weights: expected"):
            CropDataset(files, domain_weights=weights)
    dataset = CropDataset(files, domain_weights={**WEIGHTS, "env": 0})
    assert {item.domain for item in dataset.files} == {"speech", "music"}
