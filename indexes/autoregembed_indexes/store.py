"""The truth: one SQLite database with the documents, their metadata and their vectors.

Every write takes the next `version`, and a vector carries the version that last changed it, so that a copy of
the vectors can catch up by reading what is newer than itself. `deleted` is the version of the last deletion.
Vectors have their own table: a filter scans metadata without reading them. Row numbers are never used twice.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoregembed_indexes.errors import DocumentIndexError, IndexDamagedError
from autoregembed_indexes.filters import compile_filter, register_functions
from autoregembed_indexes.settings import State
from autoregembed_indexes.vectors import CHUNK_BYTES, Float16, Float32, stored_to_unit

DATABASE_NAME = "documents.sqlite"
APPLICATION_ID = 0x41524547
FORMAT_VERSION = 1
MIN_SQLITE = (3, 35)
MAX_PARAMETERS = 500

Rows = NDArray[np.int64]

_SCHEMA = """
CREATE TABLE state (
    factory TEXT NOT NULL, dimension INTEGER, tokens INTEGER, encoder TEXT,
    version INTEGER NOT NULL DEFAULT 0, deleted INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE documents (
    row INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, metadata TEXT NOT NULL, text TEXT NOT NULL
);
CREATE TABLE vectors (row INTEGER PRIMARY KEY, version INTEGER NOT NULL, vector BLOB NOT NULL);
CREATE INDEX vectors_by_version ON vectors(version);
CREATE TRIGGER vector_follows_document AFTER DELETE ON documents
    BEGIN DELETE FROM vectors WHERE row = old.row; END;
"""


class DocumentStore:
    """A connection to the database; every method but `transaction` and `close` runs inside a transaction."""

    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        self._db = connection
        self._name = name
        register_functions(connection)

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[None]:
        """Run the block on one state of the database; a write is durable when the block ends, or undone."""
        try:
            try:
                self._db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise describe(error, self._name) from error

    def close(self) -> None:
        """Close the connection; the last one to a folder folds the write-ahead log into the database."""
        self._db.close()

    def damage(self, what: str) -> IndexDamagedError:
        """Make the error for a database that contradicts itself."""
        return _damage(self._name, what)

    def state(self) -> State:
        """Read what the index is now."""
        found = self._db.execute(
            "SELECT factory, dimension, tokens, encoder, version, deleted FROM state"
        ).fetchone()
        if found is None:
            raise self.damage("its settings are missing")
        return State(*found)

    def count(self) -> int:
        """Count the documents."""
        return int(self._db.execute("SELECT count(*) FROM documents").fetchone()[0])

    def upsert(self, ids: list[str], texts: list[str], metadatas: list[str], vectors: Float16) -> None:
        """Write whole documents, replacing those whose id is there."""
        (version,) = self._db.execute(
            "UPDATE state SET version = version + 1, dimension = ? RETURNING version", (vectors.shape[1],)
        ).fetchone()
        # Not REPLACE, which would give the document a new row and lose its place.
        self._db.executemany(
            "INSERT INTO documents(id, metadata, text) VALUES (?, ?, ?) "
            "ON CONFLICT(id) DO UPDATE SET metadata = excluded.metadata, text = excluded.text",
            zip(ids, metadatas, texts, strict=True),
        )
        little_endian = vectors.astype("<f2", copy=False)
        self._db.executemany(
            "INSERT INTO vectors(row, version, vector) SELECT row, ?, ? FROM documents WHERE id = ? "
            "ON CONFLICT(row) DO UPDATE SET version = excluded.version, vector = excluded.vector",
            ((version, vector.tobytes(), doc_id) for vector, doc_id in zip(little_endian, ids, strict=True)),
        )

    def delete(self, ids: Iterable[str]) -> int:
        """Delete by id, returning how many there were."""
        count = self._db.executemany(
            "DELETE FROM documents WHERE id = ?", ((doc_id,) for doc_id in ids)
        ).rowcount
        return self._note_deletion(max(0, count))

    def delete_all(self) -> int:
        """Delete every document, returning how many there were."""
        return self._note_deletion(self._db.execute("DELETE FROM documents").rowcount)

    def _note_deletion(self, count: int) -> int:
        if count:
            self._db.execute("UPDATE state SET version = version + 1, deleted = version + 1")
        return count

    def ids_where(self, where: Mapping[str, Any] | None) -> list[str]:
        """The ids of the documents that match a filter, oldest first."""
        condition, parameters = compile_filter(where)
        found = self._db.execute(f"SELECT id FROM documents WHERE {condition} ORDER BY row", parameters)  # noqa: S608
        return [doc_id for (doc_id,) in found]

    def rows_where(self, where: Mapping[str, Any] | None) -> Rows:
        """The rows of the documents that match a filter, ascending."""
        condition, parameters = compile_filter(where)
        found = self._db.execute(f"SELECT row FROM documents WHERE {condition} ORDER BY row", parameters)  # noqa: S608
        return np.fromiter((row for (row,) in found), dtype=np.int64)

    def documents_by_row(self, rows: Iterable[int]) -> dict[int, tuple[str, str, str]]:
        """Map rows to (id, text, metadata as JSON)."""
        return {
            row: tuple(rest) for row, *rest in self._select("documents.row, id, text, metadata", "row", rows)
        }

    def documents_by_id(self, ids: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Map the ids that are there to (text, metadata as JSON)."""
        return {
            doc_id: (text, metadata)
            for doc_id, text, metadata in self._select("id, text, metadata", "id", ids)
        }

    def rows_by_id(self, ids: Iterable[str]) -> Rows:
        """The rows of the ids that are there, ascending."""
        return np.sort(np.fromiter((row for (row,) in self._select("row", "id", ids)), dtype=np.int64))

    def vectors_by_id(self, ids: Iterable[str]) -> dict[str, bytes]:
        """Map the ids that are there to their stored vectors."""
        return dict(self._select("id, vector", "id", ids, source="documents JOIN vectors USING (row)"))

    def _select(
        self, columns: str, key: str, wanted: Iterable[object], source: str = "documents"
    ) -> Iterator[tuple[Any, ...]]:
        values = list(wanted)
        for start in range(0, len(values), MAX_PARAMETERS):
            part = values[start : start + MAX_PARAMETERS]
            marks = ", ".join("?" * len(part))
            yield from self._db.execute(f"SELECT {columns} FROM {source} WHERE {key} IN ({marks})", part)  # noqa: S608

    def rows_since(self, version: int) -> Rows:
        """The rows whose vectors are newer than `version`, ascending."""
        found = self._db.execute("SELECT row FROM vectors WHERE version > ?", (version,))
        return np.sort(np.fromiter((row for (row,) in found), dtype=np.int64))

    def vectors_since(self, version: int, dimension: int, width: int) -> Iterator[tuple[Rows, Float32]]:
        """Stream the vectors newer than `version` as chunks of (rows [n], unit vectors [n, width])."""
        # Version 0 means all of them, which a scan in the order of the table reads fastest.
        where, parameters = ("WHERE version > ?", (version,)) if version else ("", ())
        cursor = self._db.execute(f"SELECT row, vector FROM vectors {where}", parameters)  # noqa: S608
        step = max(1, CHUNK_BYTES // (2 * dimension))
        while chunk := cursor.fetchmany(step):
            rows, blobs = zip(*chunk, strict=True)
            yield np.array(rows, dtype=np.int64), self.unit_vectors(blobs, dimension, width)

    def unit_vectors(self, blobs: Sequence[bytes], dimension: int, width: int) -> Float32:
        """Read stored vectors, cut to their first `width` entries, as unit rows [n, width]."""
        if any(len(blob) != 2 * dimension for blob in blobs):
            raise self.damage(f"a stored vector does not have {dimension} entries")
        stored = np.frombuffer(b"".join(blobs), dtype="<f2").reshape(len(blobs), dimension)
        try:
            return stored_to_unit(stored, width)
        except ValueError as error:
            raise self.damage(str(error)) from error


def create_store(folder: Path | None, state: State) -> DocumentStore:
    """Make the database in `folder`, or in memory; a folder holds a whole one or none."""
    if folder is None:
        connection = _connect(":memory:")
        _write_schema(connection, state)
        return DocumentStore(connection, "the index in memory")
    beside = folder / f"{DATABASE_NAME}.new"
    for leftover in folder.glob(f"{DATABASE_NAME}.new*"):
        leftover.unlink()
    with closing(_connect(_uri(beside, "rwc"))) as connection:
        _write_schema(connection, state)
    beside.replace(folder / DATABASE_NAME)
    _sync_folder(folder)
    return open_store(folder, read_only=False)


def open_store(folder: Path, *, read_only: bool) -> DocumentStore:
    """Connect to the database in `folder` and check that it is one of ours."""
    database = folder / DATABASE_NAME
    if not read_only:
        options = "rw"
    elif os.access(folder, os.W_OK):
        options = "ro"
    else:  # a log cannot be read where its shared index cannot be written
        log = folder / f"{DATABASE_NAME}-wal"
        if log.exists() and log.stat().st_size:
            raise DocumentIndexError(
                f"{folder} is read-only and was not closed cleanly: {log.name} holds changes that are not "
                "in the database; open and close it once where it can be written"
            )
        options = "ro&immutable=1"
    try:
        connection = _connect(_uri(database, options))
    except sqlite3.Error as error:
        raise describe(error, str(database)) from error
    try:
        _check_format(connection, database)
        _check_whole(database)
        if not read_only:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error as error:
        connection.close()
        raise describe(error, str(database)) from error
    except BaseException:
        connection.close()
        raise
    return DocumentStore(connection, str(database))


def describe(error: sqlite3.Error, name: str) -> Exception:
    """Say what an SQLite error means for the index."""
    if type(error) is sqlite3.DatabaseError or "decode to UTF-8" in str(error):
        return _damage(name, str(error))
    return DocumentIndexError(f"{name}: {error}; nothing was changed")


def _damage(name: str, what: str) -> IndexDamagedError:
    return IndexDamagedError(f"{name} is damaged: {what}; restore it from a copy, or add its documents again")


def _check_whole(database: Path) -> None:
    """Find a database cut off inside a page, which SQLite would read as zeros."""
    log = database.with_name(f"{DATABASE_NAME}-wal")
    if log.exists() and log.stat().st_size:
        return  # a checkpoint may be under way, or is repeated from the log
    with database.open("rb") as file:
        page_size = int.from_bytes(file.read(18)[16:], "big")
    if page_size > 1 and database.stat().st_size % page_size:
        raise _damage(str(database), "it ends inside a page, so that its end is missing")


def _check_format(connection: sqlite3.Connection, database: Path) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise DocumentIndexError(f"{database} is not the database of a document index")
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    if found != FORMAT_VERSION:
        raise DocumentIndexError(
            f"{database} has format {found}, this release reads format {FORMAT_VERSION}; "
            "use the release that wrote it"
        )
    connection.execute("SELECT count(*) FROM state").fetchone()


def _write_schema(connection: sqlite3.Connection, state: State) -> None:
    connection.execute("PRAGMA page_size = 16384")  # so that few vectors leave a page half empty
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
    connection.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
    connection.execute("INSERT INTO state VALUES (?, ?, ?, ?, ?, ?)", state)


def _connect(target: str) -> sqlite3.Connection:
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        needed = ".".join(map(str, MIN_SQLITE))
        raise DocumentIndexError(f"SQLite {needed} or newer is needed, Python has {sqlite3.sqlite_version}")
    return sqlite3.connect(
        target, timeout=30, isolation_level=None, check_same_thread=False, uri=target != ":memory:"
    )


def _uri(database: Path, options: str) -> str:
    return f"{database.as_uri()}?mode={options}"


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
