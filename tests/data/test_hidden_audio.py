"""Files whose header states less than they hold are reported; formats that cannot be entered by seeking are read."""

import io
import logging
import struct

import numpy as np
import pytest
import soundfile

from bestrq2.data import AudioError, DataError, audio_info, collect, load_audio
from bestrq2.data.audio import audio_digest
from bestrq2.data.hidden_audio import audio_behind_end

RATE = 16000
NOISE = np.random.default_rng(0).standard_normal(5 * RATE).astype(np.float32) * 0.1


def encoded(form, samples=NOISE, rate=RATE, **options):
    buffer = io.BytesIO()
    if form == "RAW":
        return bytearray((samples * 32767).astype("<i2").tobytes())
    soundfile.write(buffer, samples, rate, format=form, **options)
    return bytearray(buffer.getvalue())


def wav(stated):
    data = encoded("WAV", subtype="PCM_16")
    data[40:44] = struct.pack("<I", stated)
    return data


def flac(stated):
    data = encoded("FLAC", subtype="PCM_16")
    data[21:26] = (int.from_bytes(data[21:26], "big") >> 36 << 36 | stated).to_bytes(5, "big")
    return data


def stated(form, seconds=1):
    """The header of a shorter file before all of the audio."""
    return encoded(form, NOISE[: seconds * RATE], subtype="PCM_16") + encoded("RAW", subtype="PCM_16")


def silent_at_first():
    data = encoded("WAV", np.concatenate((NOISE, np.zeros(3 * RATE, np.float32), NOISE)), subtype="PCM_16")
    data[40:44] = struct.pack("<I", 2 * len(NOISE))
    return data


def unmarked(data):
    """An Ogg whose last page is not marked as the end, as of a capture that was stopped."""
    page = data.rindex(b"OggS")
    data[page + 5] &= ~4
    data[page + 22 : page + 26] = bytes(4)
    checksum = 0
    for byte in data[page:]:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x04C11DB7 if checksum >> 31 else 0)) & 0xFFFFFFFF
    data[page + 22 : page + 26] = struct.pack("<I", checksum)
    return data


def rifx(stated):
    """A WAV of big-endian numbers, which libsndfile reads and does not write in this form."""
    samples = (NOISE * 32767).astype(">i2").tobytes()
    head = struct.pack(">4sI8sIHHIIHH", b"RIFX", 36 + stated, b"WAVEfmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    return bytearray(head + b"data" + struct.pack(">I", stated) + samples)


def untagged(bitrate_mode="CONSTANT", rate=RATE, channels=1):
    """An MP3 without its first frame, the tag of LAME; loud at first."""
    samples = np.stack([NOISE * np.linspace(4, 0.01, len(NOISE), dtype=np.float32)] * channels, 1)
    data = encoded("MP3", samples, rate, bitrate_mode=bitrate_mode, compression_level=0.3)
    return data[data.index(data[:2], 64) :]


ID3 = b"ID3\x04\0\0" + bytes([0, 0, 1, 0]) + bytes(128)
APE = b"APETAGEX" + struct.pack("<4I", 2000, 32, 0, 0x80000000) + bytes(8) + bytes(32)

HIDDEN = {
    "tag before.flac": lambda: ID3 + flac(RATE // 2),
    "tag before.wav": lambda: ID3 + wav(RATE),
    "silent at first.wav": silent_at_first,
    "short.au": lambda: stated("AU"),
    "short.caf": lambda: stated("CAF"),
    "short.rf64": lambda: stated("RF64"),
    "many parts.flac": lambda: encoded("FLAC", subtype="PCM_16") * 17,
    "another depth.flac": lambda: encoded("FLAC", subtype="PCM_16") + encoded("FLAC", subtype="PCM_24"),
    "short part of another depth.flac": lambda: encoded("FLAC") + encoded("FLAC", NOISE[:RATE], subtype="PCM_24"),
    "another rate.flac": lambda: encoded("FLAC") + encoded("FLAC", rate=44100),
    "equal parts.flac": lambda: encoded("FLAC", subtype="PCM_16") * 4,
    "short part behind.flac": lambda: encoded("FLAC") + encoded("FLAC", NOISE[: 3 * RATE]),
    "long part behind.flac": lambda: encoded("FLAC", NOISE[: 3 * RATE]) + encoded("FLAC"),
    "tag between.ogg": lambda: encoded("OGG") + b"TAG" + bytes(125) + encoded("OGG", NOISE[::-1]),
    "first without end.ogg": lambda: unmarked(encoded("OGG")) + encoded("OGG", NOISE[::-1]),
    "ape tag between.mp3": lambda: encoded("MP3") + APE + encoded("MP3"),
    "short.wav": lambda: wav(RATE),
    "zero.wav": lambda: wav(0),
    "short.flac": lambda: flac(RATE // 2),
    "chain.ogg": lambda: encoded("OGG", subtype="VORBIS") * 2,
    "chain.opus": lambda: encoded("OGG", subtype="OPUS") + encoded("OGG", NOISE[::-1], subtype="OPUS"),
    "joined.mp3": lambda: encoded("MP3") * 3,
    "short.rifx": lambda: rifx(2 * RATE),
    "variable.mp3": lambda: untagged("VARIABLE"),
    "average behind a tag.mp3": lambda: ID3 + untagged("AVERAGE", 44100, 2) + b"TAG" + bytes(125),
    "another rate behind.mp3": lambda: untagged() + untagged(rate=22050),
    "stereo behind.mp3": lambda: untagged() + untagged(channels=2),
    "tag of no frames.mp3": lambda: encoded("MP3")[:29] + bytes(4) + encoded("MP3")[33:] + untagged(channels=2),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_more_than_the_header_states_is_reported(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(HIDDEN[name]())
    for read in (audio_info, load_audio, audio_digest):
        with pytest.raises(AudioError, match="only the first part would be read"):
            read(path)


WHOLE = {
    "plain.wav": lambda: encoded("WAV", subtype="PCM_16"),
    "tags.wav": lambda: encoded("WAV", subtype="PCM_16") + b"LIST" + struct.pack("<I", 60000) + bytes(60000),
    "padded.wav": lambda: encoded("WAV", subtype="PCM_16") + bytes(50000),
    "piped.wav": lambda: wav(0xFFFFFFFF),
    "plain.aiff": lambda: encoded("AIFF", subtype="PCM_24"),
    "odd.wav": lambda: encoded("WAV", NOISE[:-1], subtype="PCM_U8") + b"LIST" + struct.pack("<I", 5000) + bytes(5000),
    "long padding.wav": lambda: encoded("WAV", subtype="PCM_16") + bytes(200000) + b"junk\x01\0\0\0x",
    "plain.au": lambda: encoded("AU", subtype="PCM_16"),
    "little.au": lambda: encoded("AU", subtype="PCM_16", endian="LITTLE"),
    "plain.caf": lambda: encoded("CAF", subtype="PCM_16"),
    "plain.rf64": lambda: encoded("RF64", subtype="PCM_16"),
    "tag before.flac": lambda: ID3 + encoded("FLAC"),
    "silent.flac": lambda: encoded("FLAC", 0 * NOISE),
    "long.flac": lambda: encoded("FLAC", np.tile(NOISE, 4)),
    "plain.flac": lambda: encoded("FLAC", subtype="PCM_16"),
    "24.flac": lambda: encoded("FLAC", np.stack((NOISE, -NOISE), 1), subtype="PCM_24"),
    "unstated.flac": lambda: flac(0),
    # Looks like the header of a block of 192 samples, but for its checksum, as compressed audio sometimes does.
    "like a header.flac": lambda: encoded("FLAC", subtype="PCM_16") + b"\xff\xf8\x19\x18" + bytes(12),
    "plain.ogg": lambda: encoded("OGG", subtype="VORBIS"),
    "plain.opus": lambda: encoded("OGG", subtype="OPUS"),
    "tagged.ogg": lambda: encoded("OGG", subtype="VORBIS") + b"TAG" + bytes(125),
    "plain.mp3": lambda: encoded("MP3"),
    "tagged.mp3": lambda: encoded("MP3") + b"TAG" + bytes(125),
    "untagged.mp3": untagged,
    "zeros before.mp3": lambda: bytes(500) + untagged(),
    "plain.rifx": lambda: rifx(2 * len(NOISE)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_are_read(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(WHOLE[name]())
    assert audio_behind_end(io.BytesIO(path.read_bytes())) is None
    assert len(load_audio(path)) == pytest.approx((4 if name == "long.flac" else 1) * len(NOISE), abs=3000)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_cut_ogg_is_reported(tmp_path, subtype, share):
    data = bytes(encoded("OGG", subtype=subtype))
    path = tmp_path / "cut.ogg"
    last = data.rindex(b"OggS")
    for end in (round(share * len(data)), last):  # inside of a page, and at the beginning of the last one
        path.write_bytes(data[:end])
        for read in (audio_info, load_audio, audio_digest):
            with pytest.raises(AudioError, match=r"truncated|not decodable"):
                read(path)
    with pytest.raises(AudioError, match="its last page is not marked as the end"):
        load_audio(path)
    with pytest.raises(DataError, match=r"1 truncated"):
        collect(path)


def test_a_cut_big_endian_wav_is_reported(tmp_path):
    path = tmp_path / "cut.wav"
    path.write_bytes(rifx(4 * len(NOISE)))
    with pytest.raises(AudioError, match=r"truncated \(50\.0 % of the audio bytes are missing"):
        audio_info(path)


def test_a_long_mp3_is_looked_at_in_pieces(tmp_path):
    """Equal bitrates give the length; one piece of another has every frame counted, which is right, too."""
    path = tmp_path / "long.mp3"
    constant = np.tile(NOISE, 16)
    data = encoded("MP3", constant, bitrate_mode="CONSTANT", compression_level=0.0)
    path.write_bytes(data[data.index(data[:2], 64) :])
    assert path.stat().st_size > 1 << 18
    assert len(load_audio(path)) == pytest.approx(len(constant), abs=3000)
    other = encoded("MP3", constant, bitrate_mode="CONSTANT", compression_level=0.9)
    path.write_bytes(data[data.index(data[:2], 64) :] + other[other.index(other[:2], 64) :])
    with pytest.raises(AudioError, match="no tag counts the frames of its variable bitrate"):
        audio_info(path)


CUT = [(form, "PCM_16") for form in ("AU", "WAV", "W64", "NIST", "VOC", "SVX", "CAF")]


@pytest.mark.parametrize(("form", "subtype"), [*CUT, ("NIST", "ULAW"), ("CAF", "ALAC_16")])
def test_a_cut_file_is_reported(tmp_path, form, subtype):
    path = tmp_path / "cut"
    for lead in (b"", ID3) if form in ("AU", "WAV") else (b"",):
        data = lead + encoded(form, subtype=subtype)
        path.write_bytes(data)
        assert audio_info(path).num_samples == len(NOISE)
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(AudioError, match=r"truncated \(5\d\.\d % of the audio bytes are missing"):
            audio_info(path)


def test_a_compressed_caf_that_lacks_its_last_packet(tmp_path):
    """libsndfile counts whole packets, of 4096 samples."""
    path = tmp_path / "cut.caf"
    path.write_bytes(encoded("CAF", subtype="ALAC_16")[:-1])
    with pytest.raises(AudioError, match=rf"truncated \(\d+ of {len(NOISE)} samples\)"):
        audio_info(path)


def test_a_caf_with_an_impossible_chunk(tmp_path):
    path = tmp_path / "damaged.caf"
    data = encoded("CAF", subtype="PCM_16")
    path.write_bytes(data.replace(b"free" + data[data.index(b"free") + 4 :][:8], b"free\x70" + bytes(7)))
    with pytest.raises(AudioError, match="not decodable"):  # not: "not readable", as if the disk were at fault
        audio_info(path)


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "NMS_ADPCM_16", "NMS_ADPCM_32", "IMA_ADPCM", "MS_ADPCM"])
def test_formats_without_seeking(tmp_path, subtype):
    path = tmp_path / "a.wav"
    if not soundfile.check_format("WAV", subtype):
        pytest.skip(f"this libsndfile has no {subtype}")
    try:
        soundfile.write(path, NOISE[:RATE], 8000, subtype=subtype)
    except soundfile.LibsndfileError as error:
        pytest.skip(str(error))
    whole, _ = soundfile.read(path, dtype="float32")
    assert audio_info(path).num_samples == len(whole)
    np.testing.assert_array_equal(load_audio(path, 8000), whole)
    part = load_audio(path, 8000, start=0.5, duration=0.25)
    np.testing.assert_array_equal(part, whole[4000:6000])


def test_undivided_integers_are_named(tmp_path, caplog):
    soundfile.write(tmp_path / "loud.wav", NOISE * 32768, RATE, subtype="FLOAT")
    with caplog.at_level(logging.WARNING, "bestrq2"):
        for _ in range(3):
            load_audio(tmp_path / "loud.wav")
    assert [record.message.split(":")[0] for record in caplog.records] == [str(tmp_path / "loud.wav")]
