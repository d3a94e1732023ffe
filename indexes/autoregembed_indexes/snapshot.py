"""One file with a FAISS index, so that opening need not build it again; written beside and renamed.

    FAISS' own bytes, which are mapped into memory | row numbers | the trained, empty index | a JSON head |
    length and checksum of the head, and MAGIC

A snapshot is only ever a copy of the database at some version: a missing, foreign or damaged one costs time,
never data. It is never changed in place.
"""

import json
import os
import struct
import zlib
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from autoregembed_indexes.database import sync_folder
from autoregembed_indexes.errors import DocumentIndexError
from autoregembed_indexes.kinds import Faiss, FaissIndex, Kind, check_factory
from autoregembed_indexes.store import Rows

MAGIC = b"AREVEC01"
_TAIL = struct.Struct("<QI8s")
_READ_BYTES = 2**24


class SnapshotError(DocumentIndexError):
    """A snapshot cannot be used; the database can."""


@dataclass(frozen=True)
class Section:
    """Where a part of the file lies, and the CRC-32 of its bytes."""

    offset: int
    length: int
    checksum: int


@dataclass(frozen=True)
class Snapshot:
    """The head of a snapshot: which vectors it holds, as of which version of which index.

    Everything is read through `file`, which stays open: a writer may put a newer snapshot in its place.
    """

    file: BinaryIO = field(repr=False)
    path: Path
    name: str
    version: int
    kind: Kind
    width: int
    count: int
    vectors: Section
    rows: Section
    template: Section

    def map(self, faiss: Faiss) -> tuple[FaissIndex, Rows]:
        """Map the FAISS index and its rows into memory, to be read only: FAISS aborts when one is changed."""
        try:
            index = faiss.read_index(f"/dev/fd/{self.file.fileno()}", faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise SnapshotError(f"{self.path}: FAISS cannot read it ({error})") from error
        if (index.ntotal, index.d) != (self.count, self.width):
            raise SnapshotError(f"{self.path}: it holds {index.ntotal} vectors, not {self.count}")
        rows: Rows = np.memmap(self.file, "<i8", "r", self.rows.offset, (self.count,))
        return index, rows

    def read_template(self, faiss: Faiss) -> FaissIndex:
        """Read the trained, empty index into memory, to be added to."""
        self.file.seek(self.template.offset)
        buffer = np.frombuffer(self.file.read(self.template.length), dtype=np.uint8)
        return faiss.deserialize_index(buffer)

    def check(self, *parts: str) -> None:
        """Compare checksums, of the whole file where no part is named; SnapshotError names what differs."""
        for part in parts or ("vectors", "rows", "template"):
            section: Section = getattr(self, part)
            if _checksum(self.file, section) != section.checksum:
                raise SnapshotError(f"{self.path}: its {part} do not have their checksum")


def snapshot_path(folder: Path, width: int) -> Path:
    """Where the snapshot of vectors cut to `width` entries lies."""
    return folder / f"vectors-{width}.faiss"


def write_snapshot(
    path: Path,
    faiss: Faiss,
    index: FaissIndex,
    rows: Rows,
    template: bytes,
    *,
    name: str,
    version: int,
    kind: Kind,
) -> Snapshot:
    """Write a snapshot beside `path`, make it durable, put it in place and open it.

    Raises SnapshotError, and leaves what was there, when it cannot be written.
    """
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("w+b") as file:
            faiss.write_index(index, f"/dev/fd/{file.fileno()}")  # FAISS takes no path that is not UTF-8
            length = file.seek(0, os.SEEK_END)
            sections = {"vectors": Section(0, length, _checksum(file, Section(0, length, 0)))}
            for part, content in (("rows", rows.astype("<i8").tobytes()), ("template", template)):
                start = file.seek(-(-length // 8) * 8)
                length = start + file.write(content)
                sections[part] = Section(start, len(content), zlib.crc32(content))
            head = json.dumps(
                {
                    "name": name,
                    "version": version,
                    "kind": str(kind),
                    "width": index.d,
                    "count": len(rows),
                    **{part: asdict(section) for part, section in sections.items()},
                }
            ).encode()
            file.write(head + _TAIL.pack(len(head), zlib.crc32(head), MAGIC))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise SnapshotError(
            f"{path} could not be written ({error}); the database is complete without"
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink()
    return read_snapshot(path)


def read_snapshot(path: Path) -> Snapshot:
    """Open a snapshot and read its head; SnapshotError when it is not whole."""
    with ExitStack() as on_error:
        try:
            file = on_error.enter_context(path.open("rb"))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL.size))
            tail = file.read()
            if len(tail) < _TAIL.size:
                raise SnapshotError(f"{path}: it is too short")
            length, checksum, magic = _TAIL.unpack(tail)
            if magic != MAGIC or length > size - _TAIL.size:
                raise SnapshotError(f"{path}: its end is missing, or another release wrote it")
            file.seek(size - _TAIL.size - length)
            head = file.read(length)
        except OSError as error:
            raise SnapshotError(f"{path}: {error.strerror}") from error
        if zlib.crc32(head) != checksum:
            raise SnapshotError(f"{path}: its head does not have its checksum")
        fields = json.loads(head)
        try:
            sections = {part: Section(**fields[part]) for part in ("vectors", "rows", "template")}
            kind = Kind.parse(check_factory(fields["kind"]))
            snapshot = Snapshot(**{**fields, **sections, "path": path, "file": file, "kind": kind})
        except (KeyError, TypeError, ValueError) as error:
            raise SnapshotError(f"{path}: another release wrote it ({error})") from error
        on_error.pop_all()
    return snapshot


def _checksum(file: BinaryIO, section: Section) -> int:
    file.seek(section.offset)
    left, checksum = section.length, 0
    while left and (part := file.read(min(left, _READ_BYTES))):
        checksum = zlib.crc32(part, checksum)
        left -= len(part)
    return checksum
