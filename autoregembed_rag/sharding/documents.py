"""The documents of a part, checked.

A record has `text`, and may have `_id` or `id`, `title` (which goes before the text, on a line of its own, as BEIR's
sets are read everywhere here), an object `metadata`, and other fields, which are metadata, too. An id that is missing
is made of the file's name and the record's place in it, so that it is the same every time.
"""

from __future__ import annotations

import datetime
import io
import json
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from typing import Any, NamedTuple

from .files import BLOCK, Place, needed
from .source import PACKED, Part

ROWS = 1024
LINES_COUNTED = 1 << 30  # bytes before a bad line that are read again to give its number
_JSON = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=lambda value: _plain(value)
)


class Document(NamedTuple):
    """What a row of a shard holds, but for its vector; `metadata` is JSON."""

    id: str
    text: str
    metadata: str


def read_part(folder: Place, part: Part) -> Iterator[Document]:
    """The documents of a part, in order; its files are named relative to `folder`.

    Raises:
        ValueError: one has no text, or cannot be kept as it is; file and line, row or byte are named. Or a file has
            changed since it was planned.
        OSError: a file cannot be read.
    """
    for info in part.files:
        if (now := folder.info(info.name)) != info:
            what = "is gone" if now is None else "has changed"
            raise ValueError(f"{folder}/{info.name} {what} since its encoding began: give another --output")
    name = part.files[0].name
    if part.kind == "text":
        for info in part.files:
            yield _text_document(info.name, folder / info.name)
    elif part.kind == "rows":
        yield from _row_documents(name, folder / name, part.start, part.stop)
    else:
        yield from _line_documents(name, folder / name, part)


def _line_documents(name: str, place: Place, part: Part) -> Iterator[Document]:
    lines = _packed_lines(place) if part.kind == "packed" else _lines(place, part.start, part.stop)
    for offset, line in lines:
        if not line.strip():
            continue
        try:
            yield _document(_parsed(line), f"{name}:{offset}")
        except ValueError as error:
            raise ValueError(f"{_line_place(place, part, offset)}: {error}") from None


def _lines(place: Place, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """The lines that begin at `start` or later, and before `stop`, with the bytes before them."""
    with place.opened() as file:
        lines = io.BufferedReader(file, BLOCK)
        offset = 0
        if start:
            lines.seek(start - 1)
            offset = start - 1 + len(lines.readline())  # the rest of a line that begins before
        while offset < stop and (line := lines.readline()):
            yield offset, line
            offset += len(line)


def _packed_lines(place: Place) -> Iterator[tuple[int, bytes]]:
    """The lines of a compressed file, with the uncompressed bytes before them."""
    offset = 0
    compression = next(kind for ending, kind in PACKED.items() if place.path.lower().endswith(ending))
    with place.fs.open_input_stream(place.path, compression=compression) as file:
        lines = io.BufferedReader(file, BLOCK)
        try:
            for line in lines:
                yield offset, line
                offset += len(line)
        except OSError as error:
            raise ValueError(f"{place} is damaged or cut off ({error}); fetch it again") from error


def _line_place(place: Place, part: Part, offset: int) -> str:
    where = f"byte {offset:,}"
    if part.kind == "lines" and offset > LINES_COUNTED:
        return f"{place}, {where}"
    lines = _packed_lines(place) if part.kind == "packed" else _lines(place, 0, offset)
    number = 1 + sum(1 for begin, _ in lines if begin < offset)
    return f"{place}, line {number:,} ({where})"


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.removeprefix(BOM_UTF8).decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"broken UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, not {type(record).__name__}")
    return record


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def _row_documents(name: str, place: Place, start: int, stop: int) -> Iterator[Document]:
    arrow, parquet = needed("pyarrow"), needed("pyarrow.parquet")
    with place.opened() as file:
        table = parquet.ParquetFile(file)
        groups, row = [], 0  # those that hold some of the rows
        first = 0
        for number in range(table.metadata.num_row_groups):
            end = row + table.metadata.row_group(number).num_rows
            if end <= start:
                first = end
            elif row < stop:
                groups.append(number)
            row = end
        row = first
        try:
            for batch in table.iter_batches(ROWS, row_groups=groups):
                wanted = batch.slice(
                    max(0, start - row), max(0, min(stop, row + len(batch)) - max(start, row))
                )
                for number, record in enumerate(wanted.to_pylist(), max(start, row)):
                    try:
                        yield _document(record, f"{name}:{number}")
                    except ValueError as error:
                        raise ValueError(f"{place}, row {number:,}: {error}") from None
                row += len(batch)
                if row >= stop:
                    return
        except (arrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{place} is damaged or cut off ({error}); fetch it again") from error


def _text_document(name: str, place: Place) -> Document:
    with place.opened() as file:
        content = file.read()
    encoding = "utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: {error.reason} at byte {error.start:,}; save the file as UTF-8, or take it away"
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise ValueError(f"{place}: the file holds no text; take it away")
    return Document(name, text, "{}")


def _document(record: dict[str, Any], made_id: str) -> Document:
    """ValueError says what is wrong with a record."""
    fields = dict(record)
    key = "_id" if fields.get("_id") is not None else "id"
    given = fields.pop(key, None)
    title, text = fields.pop("title", None), fields.pop("text", None)
    if not isinstance(text, str):
        found = "is missing" if "text" not in record else f"is {_kind(text)}"
        raise ValueError(f"'text' {found}; the fields are {_names(record)}, and a document needs a text")
    if not text.strip():
        raise ValueError("'text' is empty; take the document away, or give it one")
    if title is not None and not isinstance(title, str):
        raise ValueError(f"'title' is {_kind(title)}, and must be a text")
    if isinstance(fields.get("metadata"), dict):
        fields |= fields.pop("metadata")
    document = Document(
        _id(made_id if given is None else given),
        f"{title}\n{text}" if title else text,
        _metadata(fields),
    )
    try:
        "".join(document).encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair (\\ud800 ... \\udfff), which is not valid Unicode") from None
    return document


def _id(given: object) -> str:
    if isinstance(given, str):
        return given
    if isinstance(given, int) and not isinstance(given, bool):
        return str(given)
    raise ValueError(f"the id is {_kind(given)}, and must be a text or an integer")


def _metadata(fields: dict[str, Any]) -> str:
    try:
        return _JSON.encode(fields) if fields else "{}"
    except (TypeError, ValueError) as error:
        bad = next((name for name, value in fields.items() if not _is_json(value)), None)
        raise ValueError(f"the metadata {bad!r} has no JSON form ({error})") from None


def _is_json(value: object) -> bool:
    try:
        _JSON.encode(value)
    except (TypeError, ValueError):
        return False
    return True


def _plain(value: object) -> str:
    """Dates, which Parquet has and JSON has not, in ISO's form."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _kind(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _names(record: dict[str, Any]) -> str:
    names = [str(name)[:40] for name in record]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "none"
