"""Columns of Arrow and Parquet files by their names and types: which one is audio, and which others are read."""

import json
import textwrap
from typing import Any

from bestrq2.data.channels import is_of_channels
from bestrq2.data.fields import PATH_NAMES, is_read
from bestrq2.data.places import may_hold_a_place
from bestrq2.data.splits import SPLIT_COLUMNS

__all__ = [
    "USED",
    "audio_columns",
    "class_names",
    "columns_to_read",
    "features",
    "is_plain",
    "is_text",
    "no_audio",
    "path_name",
]

USED = ("duration", "sampling_rate", "domain", "label")


def is_text(kind: Any) -> bool:
    """Return True for a type of text."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind)


def is_plain(kind: Any) -> bool:
    """Return True for a type of truth values, numbers and text, also in lists and structs."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return is_plain(kind.value_type)
    if types.is_map(kind) or types.is_union(kind):
        return False
    if types.is_nested(kind):
        return all(is_plain(kind.field(i).type) for i in range(kind.num_fields))
    return (
        is_text(kind)
        or types.is_null(kind)
        or types.is_boolean(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
    )


def class_names(feature: Any) -> list[str] | None:
    """Names of the classes of a column, also of lists of them (``Sequence``, ``List``)."""
    if isinstance(feature, list):
        return class_names(feature[0]) if feature else None
    if not isinstance(feature, dict):
        return None
    return feature.get("names") or class_names(feature.get("feature"))


def features(schema: Any) -> dict[str, Any]:
    """Metadata that ``datasets`` wrote about the columns."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}


def audio_columns(schema: Any) -> tuple[str, list[str]]:
    """The name of the column with audio, "" if there is none; and all, if there are several and none is "audio"."""
    import pyarrow

    marked = [
        name
        for name, feature in features(schema).items()
        if isinstance(feature, dict) and feature.get("_type") == "Audio" and name in schema.names
    ]
    shaped = [
        field.name
        for field in schema
        if pyarrow.types.is_struct(field.type) and {"bytes", "path"} <= {part.name for part in field.type}
    ]
    binary = pyarrow.types.is_binary, pyarrow.types.is_large_binary
    stored = [field.name for field in schema if field.name == "audio" and any(of(field.type) for of in binary)]
    # As pandas writes a manifest.
    paths = [field.name for field in schema if path_name(field.name) and is_text(field.type)]
    found = marked or shaped or stored or paths
    if "audio" in found:
        return "audio", []
    return (found[0] if len(found) == 1 else ""), found[1:] and found


def path_name(column: str) -> str:
    """The name of a manifest's path that a column has, "" if it has none."""
    known = column.strip().lower()
    return known if known in (*PATH_NAMES, "audio") else ""


def no_audio(schema: Any, rivals: list[str]) -> str:
    """Say why a table has no audio column."""
    if rivals:
        return f"several columns with audio, {', '.join(rivals)}: call the one that is meant audio"
    columns = ", ".join(f"{field.name} ({textwrap.shorten(str(field.type), 60)})" for field in schema)
    return (
        "no audio column: neither one with the fields bytes and path, nor audio files as binary in a column called "
        f"audio, nor text called path, file and so on; the columns are {columns}"
    )


def columns_to_read(schema: Any, audio: str, of_paths: bool) -> list[str]:
    """Names of the columns beside the audio that are looked at; ``of_paths``: as those of a manifest."""
    import pyarrow

    wanted = is_read if of_paths else lambda name: name in USED or name.strip().lower() in SPLIT_COLUMNS
    plain = [
        field.name
        for field in schema
        if not pyarrow.types.is_nested(field.type)
        or (of_paths and (may_hold_a_place(field.name) or is_of_channels(field.name)))
        or (field.name == "label" and is_plain(field.type))
    ]
    return [name for name in plain if wanted(name) and name != audio]
