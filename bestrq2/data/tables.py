"""Rows of a manifest file: delimited tables, JSON lines, JSON documents, plain or gzipped; each row with its line.

A table is read strictly. What decides between two readings is looked for in the file, and where the file leaves it open
it is refused with the line: a row must not vanish in silence.
"""

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bestrq2.data.cells import TwiceError, read_json
from bestrq2.data.fields import PATH_NAMES
from bestrq2.data.files import is_audio
from bestrq2.encodings import TextEncodingError, decode_text, foreign_letter
from bestrq2.errors import ManifestError, printable

__all__ = ["check_encoding", "is_manifest", "read_lines", "rows_of"]

_JSON = {".jsonl", ".json", ".ndjson", ".list"}
_TABLES = {".csv": ",;\t|", ".tsv": "\t"}  # which delimiters are looked for
_SUFFIXES = frozenset(_JSON | set(_TABLES))

_NAMING = frozenset((*PATH_NAMES, "audio", "recording", "sources"))  # columns with names of files

Row = tuple[int, dict[str, Any]]


def suffix_of(path: str | os.PathLike[str]) -> str:
    """Of the file, or under ``.gz`` of what is compressed."""
    name = Path(path).name.lower()
    return Path(name[:-3] if name.endswith(".gz") else name).suffix


def is_manifest(path: str | os.PathLike[str]) -> bool:
    """Return True for the name of a manifest: a table, JSON lines, wav.scp; also gzipped."""
    return suffix_of(path) in _SUFFIXES or Path(path).name == "wav.scp"


def read_lines(source: Path) -> list[str]:
    """The lines of a text file in UTF-8, or UTF-16 with a mark, plain or gzipped.

    Bytes that are not UTF-8 are kept, since names of files may have them; see :func:`check_encoding`.

    Raises:
        ManifestError: for a damaged gzip file, or a binary one.
        OSError: if it cannot be read.
    """
    data = source.read_bytes()
    if source.name.lower().endswith(".gz") or data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, gzip.BadGzipFile, ValueError, OSError) as error:
            raise ManifestError(f"{source}: a damaged gzip file ({error})") from error
        except Exception as error:  # zlib.error has no common base
            raise ManifestError(f"{source}: a damaged gzip file ({error})") from error
    try:
        text = decode_text(data, keep_bytes=True)
    except TextEncodingError as error:
        raise ManifestError(f"{source}:{error.line}: {error}") from error
    return text.splitlines(keepends=True) if "\r" in text and "\n" not in text else io.StringIO(text, "").readlines()


def rows_of(path: str | os.PathLike[str]) -> list[Row]:
    """(line, columns) of every row.

    Raises:
        ManifestError: for a file that is no such table, naming the line.
        OSError: it cannot be read.
    """
    source = Path(path)
    suffix = suffix_of(source)
    if suffix not in _SUFFIXES:
        raise ManifestError(f"{source}: a manifest must end in .csv, .tsv or .jsonl, got {suffix!r}")
    lines = read_lines(source)
    rows = list(_json_rows(source, lines)) if suffix in _JSON else _table_rows(source, lines, _TABLES[suffix])
    if any(foreign_letter(line) for line in lines if not line.isascii()):
        for number, row in rows:
            check_encoding(f"{source}:{number}", row)
    return rows


def check_encoding(where: str, row: dict[str, Any]) -> None:
    """Refuse labels and names of columns that are not UTF-8.

    Names of files, and a domain that is a part of one, are bytes: they may be anything.

    Raises:
        ManifestError: it names the line and the column.
    """
    names = "\0".join(_texts([row[name] for name in row if name.strip().lower() in _NAMING]))
    for column, value in row.items():
        if what := foreign_letter(column):
            raise ManifestError(f"{where}: the column {printable(column)} is {what}")
        if column.strip().lower() in _NAMING:
            continue
        for text in _texts(value):
            if (what := foreign_letter(text)) and not (column.strip().lower() == "domain" and text in names):
                raise ManifestError(f"{where}: {column} is {what}")


def _texts(value: Any) -> list[str]:
    """All texts in nested lists and objects."""
    if isinstance(value, str):
        return [value]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [text for key, item in inner for text in (*_texts(key), *_texts(item))]


def _table_rows(source: Path, lines: list[str], delimiters: str) -> list[Row]:
    if lines and (told := re.fullmatch(r"\"?sep=(.)\"?\s*", lines[0], re.I)):  # for Excel: the delimiter
        delimiters, lines = told[1], ["\n", *lines[1:]]
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise ManifestError(f"{source}: the file is empty; expected a header line with a column 'path'")
    if (listed := _fairseq_rows(source, lines)) is not None:
        return listed
    fitting = [mark for mark in delimiters if set(PATH_NAMES) & {name.lower() for name in _header(first, mark)}]
    if not fitting:
        names = max((_header(first, mark) for mark in delimiters), key=len)
        if any(is_audio(name) for name in names):
            raise ManifestError(
                f"{source}: the first line must name the columns, for example path,label; it is {first.strip()!r}"
            )
        raise ManifestError(
            f"{source}: no column 'path' in the header line; its columns are {names}. Names that are known: "
            f"{', '.join(PATH_NAMES)}"
        )
    # A path column alone in its header line fits every delimiter; otherwise the one that splits most.
    delimiter = max(fitting, key=lambda mark: len(_header(first, mark)))
    if delimiter == "\t" and (unquoted := _unquoted(source, lines)) is not None:
        return unquoted
    return _quoted(source, lines, delimiter)


def _header(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return [name.strip() for name in line.split(delimiter)]


def _check_header(source: Path, header: list[str]) -> None:
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise ManifestError(f"{source}: the column {twice!r} is there twice")


def _unquoted(source: Path, lines: list[str]) -> list[Row] | None:
    """Rows of a tab-separated table without quoting (Common Voice), if every row then has all fields; else None.

    Text such as ``"Yes", he said`` stays as it is; a field that is quoted as a whole, as spreadsheets do it, is
    unquoted.
    """
    table = [(number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(lines, 1) if line.strip("\r\n")]
    header = [_whole(name.strip()) for name in table[0][1]]
    _check_header(source, header)
    if any(len(fields) != len(header) for _, fields in table):
        return None
    return [(number, dict(zip(header, map(_whole, fields)))) for number, fields in table[1:]]


def _whole(field: str) -> str:
    quoted = re.fullmatch(r'"((?:[^"]|"")*)"', field)
    return quoted[1].replace('""', '"') if quoted else field


def _spaced(first: str, lines: list[str], delimiter: str) -> bool:
    """Return True if a space behind the delimiter belongs to it: so it is in the header, or before a quoted field."""
    try:
        names = next(csv.reader([first], delimiter=delimiter), [])
    except csv.Error:
        names = []
    behind = [name.startswith(" ") for name in names[1:]]
    mark = f'{delimiter} "'
    return (all(behind) and bool(behind)) or any(mark in re.sub(r" +", " ", line) for line in lines)


def _quoted(source: Path, lines: list[str], delimiter: str) -> list[Row]:
    first = next(line for line in lines if line.strip())
    spaced = _spaced(first, lines, delimiter)
    reader = csv.reader(iter(lines), delimiter=delimiter, strict=True, skipinitialspace=spaced)
    rows: list[Row] = []
    header: list[str] = []
    begin = 1
    # Where every field is quoted, a lone mark cannot swallow a row: that row's first mark would end the field.
    field = r'"(?:[^"]|"")*"'
    all_quoted = re.fullmatch(rf"{field}(?:[,;\t|]{field})*\s*", first) is not None
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            what = f"{error}"
            if "unexpected end" in what:
                what = "a quotation mark is opened here and never closed; write it twice inside of a quoted field"
            raise ManifestError(f"{source}:{begin}: {what}") from error
        if fields is None:
            return rows
        if not (all_quoted and lines[begin - 1].startswith('"')):
            _check_lines(source, lines, begin, reader.line_num, len(header), delimiter)
        if not header:
            header = [name.strip() for name in fields]
            _check_header(source, header)
        elif fields:
            if len(fields) != len(header):
                raise ManifestError(f"{source}:{reader.line_num}: expected {len(header)} fields, got {len(fields)}")
            rows.append((reader.line_num, dict(zip(header, fields))))
        begin = reader.line_num + 1


def _check_lines(source: Path, lines: list[str], begin: int, end: int, width: int, delimiter: str) -> None:
    """Refuse a quoted field over several lines that has swallowed whole rows, after a lone quotation mark."""
    if width < 2:
        return
    for line in lines[begin : end - 1]:
        if line.count(delimiter) >= width - 1:
            raise ManifestError(
                f"{source}:{begin}: a quotation mark is opened here and closed in line {end}, so that whole rows would "
                "be part of one field; write a lone quotation mark twice inside of a quoted field"
            )


def _fairseq_rows(source: Path, lines: list[str]) -> list[Row] | None:
    """Rows of fairseq's list: a folder in the first line, then ``path <tab> samples``; None if it is none."""
    root = lines[0].rstrip("\r\n")
    if not root or "\t" in root or len(lines) < 2 or not re.fullmatch(r"[^\t]+\t\d+\s*", lines[1]):
        return None
    if source.suffix.lower() == ".csv":
        return None
    rows: list[Row] = []
    for number, line in enumerate(lines[1:], 2):
        text = line.rstrip("\r\n")
        if not text:
            continue
        parts = text.split("\t")
        if len(parts) != 2 or not parts[1].strip().isdecimal():
            raise ManifestError(f"{source}:{number}: expected a path, a tab and a number of samples, got {text!r}")
        rows.append((number, {"path": os.path.join(root, parts[0]), "num_samples": parts[1].strip()}))
    return rows


def _json_rows(source: Path, lines: list[str]) -> Iterator[Row]:
    content = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    try:
        whole = _document(content, lines) if content else None
    except TwiceError as error:
        raise ManifestError(f"{source}: {error}") from error
    if whole is not None:
        yield from whole
        return
    for number, text in content:
        try:
            row = read_json(text)
        except TwiceError as error:
            raise ManifestError(f"{source}:{number}: {error}") from error
        except ValueError as error:
            raise ManifestError(f"{source}:{number}: not JSON ({error}); expected one object a line") from error
        if not isinstance(row, dict):
            raise ManifestError(f"{source}:{number}: expected a JSON object, got {type(row).__name__}")
        yield number, row


def _document(content: list[tuple[int, str]], lines: list[str]) -> list[Row] | None:
    """Rows of one JSON document: a list of objects, or SpeechBrain's object of objects by name; None if it is none."""
    try:
        json.loads(content[0][1])
        if len(content) > 1:
            return None  # JSON lines, each read with its number
    except (ValueError, RecursionError):
        pass
    try:
        document = read_json("".join(lines))
    except ValueError:
        return None
    if isinstance(document, list) and document and all(isinstance(row, dict) for row in document):
        return list(enumerate(document, 1))
    if isinstance(document, dict) and document and all(isinstance(row, dict) for row in document.values()):
        if set(PATH_NAMES) & set(document) or "recording" in document:
            return None
        return [(number, {"ID": name, **row}) for number, (name, row) in enumerate(document.items(), 1)]
    return None
