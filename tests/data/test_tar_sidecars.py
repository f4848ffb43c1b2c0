"""Labels beside the clips of a shard: which are used, and what is told of the others."""

import json
import tarfile

import pytest
from tar_files import clip_bytes, write_tar

from bestrq2 import shards
from bestrq2.data import collect, find_audio


@pytest.mark.parametrize("keys", [("spk.0", "spk.1"), ("a", "a")])
def test_labels_of_several_kinds_that_came_with_their_clip(tmp_path, keys):
    members = []
    for number, key in enumerate(keys):
        members.append((f"{key}.{('ogg', 'wav')[number]}", clip_bytes(number)))
        members += [(f"{key}.json", b'{"label": "%d"}' % number), (f"{key}.txt", b"some words")]
    found = find_audio(write_tar(tmp_path / "s.tar", members))
    assert ([item.label for item in found.files], found.notes, found.skips) == (["0", "1"], [], [])


def test_sidecars_that_are_not_used_are_counted(tmp_path):
    """Labels under other names than webdataset's were lost without a word."""
    members = [
        ("a.ogg", clip_bytes(0)),
        ("a.meta.json", b'{"label": 1}'),
        ("a.speaker.txt", b"x"),
        ("a.json", b'["dog"]'),
    ]
    members += [
        ("b.ogg", clip_bytes(1)),
        ("b.cls", b"cat"),
        ("b.json", b'"dog"'),
        ("other.txt", b"x"),
        ("c.7.cls", b"x"),
    ]
    found = find_audio(write_tar(tmp_path / "s.tar", members))
    assert [item.label for item in found.files] == ["", "cat"]
    assert found.ignored == {".meta.json": 1, ".speaker.txt": 1, ".json (no object)": 2, ".txt": 1, ".cls": 1}


def test_objects_with_a_name_twice_are_told_and_not_used(tmp_path):
    """The last of two labels was taken, where manifests refuse both."""
    members = [("a.ogg", clip_bytes(0)), ("a.json", b'{"label": "dog", "label": "cat"}')]
    members += [("b.ogg", clip_bytes(1)), ("b.json", b"[" * 5000), ("b.cls", b"cat")]
    found = find_audio(write_tar(tmp_path / "s.tar", members))
    assert [item.label for item in found.files] == ["", "cat"]
    assert [skip.detail for skip in found.skips] == [
        "the .json beside a.ogg is ambiguous: 'label' is there twice in one object; it is not used",
        "the .json beside b.ogg is not JSON (it is nested too deeply); it is not used",
    ]


def test_numbers_that_no_json_has(tmp_path):
    """NaN is nothing, as in Arrow and tables; what is written beside packed clips is JSON for every reader."""
    row = b'{"label": NaN, "domain": NaN, "duration": Infinity, "snr": Infinity, "age": NaN, "f0": [NaN, 1, -Infinity]}'
    source = write_tar(tmp_path / "s.tar", [("x/a.ogg", clip_bytes(0)), ("x/a.json", row)])
    (item,) = find_audio(source).files
    assert (item.label, item.domain, item.duration) == ("", "x", None)
    assert shards.main([str(source), "--out", str(tmp_path / "out")]) == 0

    def refused(name):
        raise AssertionError(name)

    with tarfile.open(tmp_path / "out" / "shards-000000.tar") as tar:
        written = json.load(tar.extractfile("a.json"), parse_constant=refused)
    assert {name: written[name] for name in ("snr", "age", "f0", "label", "domain")} == {
        "snr": "inf",
        "age": None,
        "f0": [None, 1, "-inf"],
        "label": "",
        "domain": "x",
    }
    (again,) = collect(tmp_path / "out")[0]
    assert (again.label, again.domain) == ("", "x")
    assert (tmp_path / "out" / "manifest.csv").read_text().splitlines()[1].endswith(',inf,,"[null, 1, ""-inf""]"')


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1" + "0" * 400])
def test_numbers_that_are_not_finite_are_told(tmp_path, value):
    row = f'{{"duration": {value}, "sampling_rate": NaN, "label": "dog", "f0": NaN}}'.encode()
    source = write_tar(tmp_path / "s.tar", [("a.ogg", clip_bytes(0)), ("a.json", row)])
    found = find_audio(source)
    assert [(item.duration, item.sampling_rate, item.label) for item in found.files] == [(None, None, "dog")]
    shown = {"NaN": "nan", "-Infinity": "-inf"}.get(value, "a larger one than a float holds")
    assert [skip.detail for skip in found.skips] == [
        "the .json beside a.ogg: sampling_rate must be a finite number, got nan; it is not used",
        f"the .json beside a.ogg: duration must be a finite number, got {shown}; it is not used",
    ]
