"""What is to be encoded: files of records or of text, and the parts that they are encoded in.

A part is a byte range of a JSONL file (the records whose line begins in it), a range of rows of a Parquet file, a whole
compressed file, or a few text files. So nothing but sizes is read to plan them.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any, NamedTuple

from .files import Info, Place, needed

logger = logging.getLogger(__name__)

LINES = (".jsonl", ".ndjson")
PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
TEXTS = (".txt", ".text", ".md", ".markdown", ".rst")
KINDS = f"JSONL ({', '.join(LINES)}; also {', '.join(PACKED)}), .parquet, text ({', '.join(TEXTS)})"
PART_BYTES = 16 << 20
MOST_PARTS = 20_000  # of a corpus whose parts nobody has sized: each costs a little in many places
TEXTS_AT_ONCE = 4096
NAMED = 5  # files that a message names


class Part(NamedTuple):
    """What is encoded into one shard: bytes `start` to `stop` of a file, or its rows, or some text files.

    `size` is how many bytes that is, more or less; `rows` the number of documents, once they were counted.
    """

    number: int
    kind: str
    files: tuple[Info, ...]
    start: int
    stop: int
    size: int
    rows: int = 0


class Source(NamedTuple):
    """The files that are to be encoded, in the order of their names, which are relative to `folder`."""

    folder: Place
    files: list[Info]


def find_source(address: str) -> Source:
    """The files at an address.

    FileNotFoundError: nothing is there. ValueError: no file is of a kind that can be read.
    """
    place = Place(address)
    kind = place.kind
    if kind == "nothing":
        raise FileNotFoundError(f"there is nothing at {place}; give {KINDS}, or a folder of these")
    folder = place.parent if kind == "file" else place
    alone = folder.info(place.name) if kind == "file" else None
    found = place.files(recursive=True) if alone is None else [alone]
    files = [info for info in found if kind_of(info.name)]
    if not files:
        raise ValueError(f"{place} holds nothing that can be read: give {KINDS}, or a folder of these")
    names = {info.name for info in files}
    if {"corpus.jsonl", "queries.jsonl"} <= names:
        raise ValueError(
            f"{place} is a folder in BEIR's format, with documents and queries: give {place}/corpus.jsonl"
        )
    if others := [info.name for info in found if info.name not in names and not is_hidden(info.name)]:
        logger.warning(
            "%d files in %s are left out, being none of %s: %s%s",
            len(others),
            place,
            KINDS,
            ", ".join(others[:NAMED]),
            ", ..." if len(others) > NAMED else "",
        )
    return Source(folder, files)


def kind_of(name: str) -> str | None:
    """ "lines", "packed", "rows" or "text", by the name's ending; None for a hidden file and one
    of another kind."""
    lower = name.lower()
    if is_hidden(name):
        return None
    if lower.endswith(LINES):
        return "lines"
    if any(lower.endswith(tuple(ending + packed for ending in LINES)) for packed in PACKED):
        return "packed"
    if lower.endswith(".parquet"):
        return "rows"
    return "text" if lower.endswith(TEXTS) else None


def is_hidden(name: str) -> bool:
    """Has a file, or a folder above it, a name that begins with a dot or an underscore?"""
    return any(step.startswith((".", "_")) for step in name.split("/"))


def default_part_bytes(source: Source) -> int:
    """16 MiB, or more where that would make too many parts."""
    return max(PART_BYTES, sum(info.size for info in source.files) // MOST_PARTS)


def plan(source: Source, part_bytes: int) -> list[Part]:
    """The parts, in the order of the files.

    ValueError: a Parquet file has no column of texts, or a text file is empty.
    """
    parts: list[Part] = []
    for info in source.files:
        kind = kind_of(info.name) or ""
        if kind == "text":
            _plan_text(parts, info, part_bytes)
            continue
        entries, size = info.size, info.size
        if kind == "rows":
            entries, size = _rows_and_bytes(source.folder / info.name)
        pieces = 1 if kind == "packed" else max(1, -(-size // part_bytes))
        ends = [entries * piece // pieces for piece in range(pieces + 1)]
        for start, stop in pairwise(ends):
            parts.append(Part(len(parts), kind, (info,), start, stop, size // pieces))
    return parts


def _plan_text(parts: list[Part], info: Info, part_bytes: int) -> None:
    """Put a text file into the last part, if that has room for it."""
    last = parts[-1] if parts else None
    if (
        last is not None
        and last.kind == "text"
        and last.size + info.size <= part_bytes
        and len(last.files) < TEXTS_AT_ONCE
    ):
        parts[-1] = last._replace(files=(*last.files, info), stop=last.stop + 1, size=last.size + info.size)
    else:
        parts.append(Part(len(parts), "text", (info,), 0, 1, info.size))


def _rows_and_bytes(place: Place) -> tuple[int, int]:
    arrow, parquet = needed("pyarrow"), needed("pyarrow.parquet")
    try:
        with place.opened() as file:
            found: Any = parquet.ParquetFile(file)
            names, metadata = found.schema_arrow.names, found.metadata
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{place} is no Parquet file, or is cut short: {error}") from error
    if "text" not in names:
        raise ValueError(
            f"{place} has no column 'text', but {', '.join(names)}: rename the one that holds the texts"
        )
    sizes = (metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return metadata.num_rows, sum(sizes)
