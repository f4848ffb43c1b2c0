"""A cache that an earlier version filled: its MP3s have seams, and are decoded again; the rest stays."""

import json

import numpy as np

from bestrq2.data import AudioFile
from bestrq2.data.cache import to_int16
from bestrq2.data.cache_build import open_cache
from bestrq2.data.parts import load_clip

from .conftest import convert


def index(folder):
    return [json.loads(line) for line in (folder / "16000" / "index.jsonl").read_text().splitlines()]


def test_mp3s_of_an_earlier_version_are_decoded_again(tmp_path, speech):
    convert(tmp_path / "a.MP3", speech, 44100, 2, "MP3", "MPEG_LAYER_III")
    convert(tmp_path / "gone.mp3", speech, 16000, 1, "MP3", "MPEG_LAYER_III")
    convert(tmp_path / "b.wav", speech, 16000)
    files = [AudioFile(str(tmp_path / name), 4.0) for name in ("a.MP3", "gone.mp3", "b.wav")]
    files.append(AudioFile(str(tmp_path / "a.MP3"), 1.0, start=1.0, end=2.0))
    folder = tmp_path / "cache"
    assert open_cache(folder, files)[1].older == 0
    head, *rows = index(folder)
    for row in rows:
        assert row.pop("decoder") == 2
    (folder / "16000" / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (head, *rows)))
    samples = folder / "16000" / "samples-00000.i16"
    samples.write_bytes(bytes(samples.stat().st_size))  # what an earlier version decoded
    (tmp_path / "gone.mp3").unlink()
    cache, report = open_cache(folder, files)
    assert (report.added, report.older, report.changed, report.files) == (2, 2, 0, 4)
    assert "2 MP3s again that an earlier version decoded with seams" in str(report)
    for item in (files[0], files[3]):
        np.testing.assert_array_equal(cache.load(item, 16000), to_int16(load_clip(item, 16000))[0])
    assert [row["path"] for row in index(folder)[5:]] == [rows[0]["path"], rows[3]["path"]]
    report = open_cache(folder, files)[1]
    assert (report.added, report.older) == (0, 0)
    assert "again" not in str(report)
