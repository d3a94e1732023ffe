"""The documents of a folder or file of text, Markdown, HTML and JSONL.

Notable decisions:
- a file that cannot be read, is not UTF-8 (or UTF-16 with a byte order mark) or holds no text, and a folder that cannot
  be read, are left out and named in one warning for each reason; a malformed JSONL line is an error, as half a file of
  records is more likely a mistake than intended;
- links to folders are followed, and no folder is read twice.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ..training.sources import numbered_rows
from .documents import (
    Document,
    html_document,
    markdown_document,
    plain_document,
    text_document,
    valid_unicode,
)

logger = logging.getLogger(__name__)

JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
MARKDOWN = (".md", ".markdown")
HTML = (".html", ".htm")
SUFFIXES = (".txt", *MARKDOWN, *HTML, *JSONL)

NAMED = 10
"""How many left-out documents a warning names."""


def read_documents(path: str | Path) -> list[Document]:
    """The documents of a file or, from all levels, of a folder, in the order of their names; all are in memory.

    Hidden files and folders are skipped, and files of other kinds than `SUFFIXES`. A document of a JSONL file has
    `text` and optionally `title` and `_id` (or `id`; else its line is its id); any other file is one document.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: a JSONL line is malformed (file and line are named), an id occurs twice, or there is no text.
    """
    path = Path(path)
    files, unreadable = ([path], []) if path.is_file() else document_files(path)
    documents: list[Document] = []
    places: dict[str, str] = {}
    undecodable, empty = [], []
    for file in tqdm(files, desc="reading documents", unit="file", delay=2):
        name = valid_unicode(path.name if file == path else file.relative_to(path).as_posix())
        try:
            found = list(_parse(file, name, alone=len(files) == 1))
        except UnicodeDecodeError:
            undecodable.append(name)
            continue
        except OSError as error:
            unreadable.append(f"{name} ({error.strerror})")
            continue
        for place, document in found:
            if not document.sections:
                empty.append(document.id)
                continue
            documents.append(document)
            if (first := places.setdefault(document.id, place)) != place:
                raise ValueError(
                    f"{first} and {place}: two documents have the id {document.id!r}; ids must be unique, and a row "
                    "without one has the number of its line"
                )
    _warn(unreadable, "files or folders cannot be read and were left out")
    _warn(undecodable, "files are not UTF-8 text and were left out; save them as UTF-8")
    _warn(empty, "documents hold no text and were left out")
    if not documents:
        raise ValueError(f"{path} holds no text that can be read in files of the kinds {', '.join(SUFFIXES)}")
    return documents


def document_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of `SUFFIXES` in a folder, from all levels, and the folders that cannot be read, with the reason."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist")
    files: list[Path] = []
    failed: list[OSError] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, onerror=failed.append, followlinks=True):
        real = os.path.realpath(here)
        new = real not in seen  # a link may lead to a folder around it
        seen.add(real)
        folders[:] = sorted(name for name in folders if new and name[0] != ".")
        files += [file for name in names if new and _is_document(file := Path(here, name))]
    unreadable = [
        f"{valid_unicode(os.path.relpath(error.filename, folder))} ({error.strerror})" for error in failed
    ]
    return sorted(files), unreadable


def _is_document(file: Path) -> bool:
    if file.name.startswith(".") or not file.name.lower().endswith(SUFFIXES):
        return False
    try:
        return stat.S_ISREG(file.stat().st_mode)
    except OSError:
        return True  # reading it will say why it cannot be read


def _warn(names: list[str], what: str) -> None:
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        logger.warning("%d %s: %s%s", len(names), what, ", ".join(names[:NAMED]), more)


def _parse(file: Path, name: str, *, alone: bool) -> Iterator[tuple[str, Document]]:
    """Each document with its place."""
    lower = file.name.lower()
    if lower.endswith(JSONL):
        yield from _records(file, "" if alone else f"{name}:")
    elif lower.endswith(MARKDOWN):
        yield str(file), markdown_document(name, _decoded(file))
    elif lower.endswith(HTML):
        yield str(file), html_document(name, _decoded(file))
    else:
        yield str(file), text_document(name, _decoded(file))


def _decoded(file: Path) -> str:
    raw = file.read_bytes()
    utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = raw.decode("utf-16" if utf16 else "utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _records(file: Path, prefix: str) -> Iterator[tuple[str, Document]]:
    for number, row in numbered_rows(file):
        place = f"{file}, line {number}"
        fields = {"title": row.get("title") or "", "text": row.get("text")}
        for field, value in fields.items():
            if not isinstance(value, str):
                raise ValueError(
                    f"{place}: field {field!r} must be a text, not {type(value).__name__}; "
                    f"the row has {sorted(row)}, a document needs 'text' and may have 'title' and '_id'"
                )
        key = next((row[name] for name in ("_id", "id") if row.get(name) is not None), number)
        name = valid_unicode(f"{prefix}{key}")
        yield place, plain_document(name, str(fields["title"]), str(fields["text"]))
