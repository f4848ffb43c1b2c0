"""Text files that users wrote: UTF-8, or what a byte order mark states. Other encodings are refused, never guessed.

Latin-1 and its relatives cannot be told apart by their bytes: a guess would give wrong labels without a word.
"""

import codecs
import re

__all__ = ["TextEncodingError", "decode_text", "foreign_letter", "name_in_another_encoding"]

# UTF-32 before UTF-16, whose mark begins that of UTF-32.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_REMEDY = "save the file as UTF-8 (one in Latin-1: iconv -f CP1252 -t UTF-8)"
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as Python keeps them


class TextEncodingError(ValueError):
    """Text in an unknown encoding; ``line`` counts from 1, the message says what was found there and the remedy."""

    def __init__(self, line: int, found: str) -> None:
        self.line = line
        super().__init__(f"{found}: {_REMEDY}")


def decode_text(content: bytes, keep_bytes: bool = False) -> str:
    """The text of a file in UTF-8, or in UTF-8, UTF-16 or UTF-32 with a byte order mark.

    Args:
        content: the file.
        keep_bytes: keep bytes that are not UTF-8, as ``surrogateescape`` does: a file may have such a name.

    Raises:
        TextEncodingError: for any other encoding, and for binary content.
    """
    mark, encoding = next((entry for entry in _MARKS if content.startswith(entry[0])), (b"", "utf-8"))
    wide = encoding != "utf-8"
    if not wide and b"\0" in content[:1024]:
        raise TextEncodingError(content.count(b"\n", 0, content.index(b"\0")) + 1, "binary, or UTF-16 without a mark")
    try:
        return content[len(mark) :].decode(encoding, "surrogateescape" if keep_bytes and not wide else "strict")
    except UnicodeDecodeError as error:
        if wide:
            line = error.object[: error.start].decode(encoding, "replace").count("\n") + 1
            raise TextEncodingError(line, f"damaged {encoding.upper()}") from error
        line = error.object.count(b"\n", 0, error.start) + 1
        raise TextEncodingError(line, f"not UTF-8 (byte {error.object[error.start]:#04x})") from error


def foreign_letter(text: str) -> str:
    """The fault of text out of :func:`decode_text` with ``keep_bytes``, and the remedy; empty if it is UTF-8."""
    found = _ESCAPED.search(text)
    return "" if found is None else f"not UTF-8 (byte {ord(found[0]) - 0xDC00:#04x}): {_REMEDY}"


def name_in_another_encoding(name: str) -> str:
    """The name (UTF-8 with ``surrogateescape``) with its bytes read as CP1252; empty if it is UTF-8 or cannot be."""
    if _ESCAPED.search(name) is None:
        return ""
    try:
        return name.encode("utf-8", "surrogateescape").decode("cp1252")
    except UnicodeError:
        return ""
