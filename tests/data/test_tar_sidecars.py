"""Labels beside the clips of a shard: which are used, and what is told of the others."""

import pytest
from tar_files import clip_bytes, write_tar

from bestrq2.data import find_audio


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
