"""Reasons why a file of audio is missing or not decodable that a user can act on."""

import os
import unicodedata

from bestrq2.data.files import to_text
from bestrq2.errors import printable

__all__ = ["not_audio", "other_normal_form"]


def other_normal_form(name: str) -> str:
    """A hint if the folder has a file of the same letters in another Unicode normal form: macOS and archives made there
    write \u00e4 as a and two dots (NFD), most tables as one character (NFC). Empty if there is none."""
    folder, base = os.path.split(name)
    base = to_text(base)
    if base.isascii():
        return ""
    wanted = unicodedata.normalize("NFC", base)
    try:
        found = (to_text(entry) for entry in os.listdir(folder or "."))
        other = next((entry for entry in found if unicodedata.normalize("NFC", entry) == wanted), None)
    except OSError:
        return ""
    if other is None or other == base:
        return ""
    form = "NFD" if unicodedata.is_normalized("NFC", base) else "NFC"
    return f"a file of this name in Unicode normal form {form} is there: rename it, or write the manifest in {form}"


def not_audio(name: str) -> str:
    """A name for the content of a file that no decoder takes, by its first bytes; empty if unknown."""
    try:
        with open(name, "rb") as file:
            start = file.read(256).lstrip()
    except OSError:
        return ""
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer instead of the file: run git lfs pull"
    if start[:14].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return f"a web page: {printable(start[:40].decode('utf-8', 'replace'))}"
    if start.startswith(b"ID3"):
        return "an ID3 tag without audio behind it, or in a format that is not known"
    return ""
