"""The content of files whose names say something else: downloads that failed, other formats renamed."""

import os

from bestrq2.errors import printable

__all__ = ["real_content"]

_CONVERT = "which is not read here: convert it (ffmpeg -i IN OUT.flac)"
_BY_START = (  # place of the bytes, the bytes, what they begin
    (0, b"version https://git-lfs", "a Git LFS pointer instead of the file: run git lfs pull"),
    (4, b"ftyp", f"MP4, M4A or MOV, {_CONVERT}"),
    (0, b"\xff\xf1", f"AAC, {_CONVERT}"),
    (0, b"\xff\xf9", f"AAC, {_CONVERT}"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", f"WMA or WMV, {_CONVERT}"),
    (0, b"\x1a\x45\xdf\xa3", f"WebM or Matroska, {_CONVERT}"),
    (0, b"#!AMR", f"AMR, {_CONVERT}"),
    (0, b"wvpk", f"WavPack, {_CONVERT}"),
    (0, b"MAC ", f"Monkey's Audio, {_CONVERT}"),
    (8, b"AVI LIST", f"AVI, {_CONVERT}"),
    (0, b"ID3", "an ID3 tag without audio behind it, or in a format that is not known"),
    (0, b"\x89PNG", "a picture (PNG)"),
    (0, b"\xff\xd8\xff", "a picture (JPEG)"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\x03\x04", "a ZIP archive, or a checkpoint of torch.save"),
    (0, b"\x1f\x8b", "compressed by gzip: unpack it"),
)
_PAGES = (b"<!doctype html", b"<html", b"<?xml", b"<error")
_SHORT = 4096  # bytes, of a text that a server sent instead of the file


def real_content(path: str | os.PathLike[str]) -> str:
    """Name the content of a file that could not be read as what its name says, with a remedy; empty if unknown."""
    try:
        with open(path, "rb") as file:
            start = file.read(_SHORT + 1)
    except OSError:
        return ""
    if not start:
        return "an empty file"
    for place, magic, what in _BY_START:
        if start[place:].startswith(magic):
            return what
    shown = printable(start.strip()[:60].decode("utf-8", "replace"))
    if start.lstrip()[:14].lower().startswith(_PAGES):
        return f"a web page instead of the file: download it anew ({shown})"
    if len(start) <= _SHORT and start.isascii() and not set(start) & {*range(9), *range(14, 32)}:
        return f"text instead of the file: {shown}"
    return ""
