"""Reasons why a file of audio is missing or not decodable that a user can act on."""

import os
import unicodedata

from bestrq2.data.files import to_text
from bestrq2.encodings import name_in_another_encoding
from bestrq2.errors import printable

__all__ = ["not_audio", "same_letters"]


def same_letters(name: str) -> str:
    """A hint if the folder has a file of the same letters in other bytes; empty if there is none.

    The encoding may differ (a manifest in Latin-1, or names out of an old archive), or the Unicode normal form: macOS
    and archives made there write \u00e4 as a and two dots (NFD), most tables as one character (NFC).
    """
    folder, base = os.path.split(name)
    base = to_text(base)
    if base.isascii():
        return ""

    def letters(text: str) -> str:
        return unicodedata.normalize("NFC", name_in_another_encoding(text) or text)

    wanted = letters(base)
    try:
        found = (to_text(entry) for entry in os.listdir(folder or "."))
        other = next((entry for entry in found if letters(entry) == wanted), None)
    except OSError:
        return ""
    if other is None or other == base:
        return ""
    if name_in_another_encoding(base):
        return "a file of this name in UTF-8 is there: save the manifest as UTF-8 (iconv -f CP1252 -t UTF-8)"
    if name_in_another_encoding(other):
        return "a file of this name in Latin-1 is there: rename it (convmv -f cp1252 -t utf-8)"
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
