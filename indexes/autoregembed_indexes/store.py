"""The truth: documents, their metadata, their words and their vectors, in one SQLite database.

Every write takes the next `version`, and a vector carries the version that last changed it, so that a copy of
the vectors can catch up by reading what is newer than itself. `deleted` is the version of the last deletion.
Row numbers are never used twice. Documents and vectors carry checksums, which SQLite's pages do not.
"""

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoregembed_indexes.database import DATABASE_NAME, create_database, damage, describe, open_database
from autoregembed_indexes.errors import DocumentIndexError, IndexDamagedError
from autoregembed_indexes.filters import compile_filter, index_expression
from autoregembed_indexes.lexical import match_expression
from autoregembed_indexes.settings import State
from autoregembed_indexes.vectors import CHUNK_BYTES, Float16, Float32, stored_to_unit

MAX_PARAMETERS = 500

Rows = NDArray[np.int64]
Filter = Mapping[str, Any] | Callable[[dict[str, Any]], bool]


class DocumentStore:
    """A connection to the database; every method but `transaction`, `tidy` and `close` runs in a transaction."""

    def __init__(self, connection: sqlite3.Connection, name: str, fixed: Path | None = None) -> None:
        """`fixed` is the file of a connection that does not see what others write to it."""
        self._db = connection
        self._name = name
        self._fixed = fixed and (fixed, _last_change(fixed))

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[None]:
        """Run the block on one state of the database; a write is durable when the block ends, or undone."""
        if self._fixed and _last_change(self._fixed[0]) != self._fixed[1]:
            raise DocumentIndexError(f"{self._name} was changed since it was opened; open it again")
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
        except UnicodeDecodeError as error:
            raise self.damage(str(error)) from error

    def close(self) -> None:
        """Close the connection; the last one to a folder folds the write-ahead log into the database."""
        self._db.close()

    def damage(self, what: str) -> IndexDamagedError:
        """Make the error for a database that contradicts itself."""
        return damage(self._name, what)

    def state(self) -> State:
        """Read what the index is now."""
        found = self._db.execute("SELECT * FROM state").fetchone()
        if found is None:
            raise self.damage("its settings are missing")
        *values, checksum = found
        state = State(*values)
        if checksum != state.checksum or not all(isinstance(number, int) for number in state[7:]):
            raise self.damage("its settings do not have their checksum")
        return state

    def count(self) -> int:
        """Count the documents."""
        return int(self._db.execute("SELECT count(*) FROM documents").fetchone()[0])

    def upsert(
        self, ids: list[str], texts: list[str], metadatas: list[str], rounded: Callable[[], Float16]
    ) -> Rows:
        """Write whole documents, replacing those whose id is there, and return their rows.

        `rounded` gives the vectors [n, dimension]; it is called last, so that they can be computed meanwhile.
        """
        version = self._next_version()
        known = dict(self._select("id, row", "id", ids))
        (last,) = self._db.execute("SELECT coalesce(max(row), 0) FROM documents").fetchone()
        fresh, replaced = [], []
        for doc_id, metadata, text in zip(ids, metadatas, texts, strict=True):
            values = (metadata, text, _checksum(doc_id, metadata, text))
            if doc_id in known:
                replaced.append((*values, known[doc_id]))
            else:
                fresh.append((doc_id, *values))
        # Words are written in bulk, which FTS5 does several times faster than a trigger for each row.
        self._forget_words(known.values())
        # Not REPLACE, which would give the document a new row and lose its place.
        self._db.executemany(
            "UPDATE documents SET metadata = ?, text = ?, checksum = ? WHERE row = ?", replaced
        )
        self._db.executemany("INSERT INTO documents(id, metadata, text, checksum) VALUES (?, ?, ?, ?)", fresh)
        added = [
            row
            for (row,) in self._db.execute("SELECT row FROM documents WHERE row > ? ORDER BY row", (last,))
        ]
        self._db.execute(
            "INSERT INTO words(rowid, text) SELECT row, text FROM documents WHERE row > ?", (last,)
        )
        self._db.execute(
            "INSERT INTO words(rowid, text) SELECT row, text FROM documents "
            "WHERE row IN (SELECT value FROM json_each(?))",
            (json.dumps(list(known.values())),),
        )
        known |= zip((values[0] for values in fresh), added, strict=True)
        rows = [known[doc_id] for doc_id in ids]
        vectors = rounded()
        changed = self.state()._replace(dimension=vectors.shape[1])
        self._db.execute(
            "UPDATE state SET dimension = ?, checksum = ?", (changed.dimension, changed.checksum)
        )
        blobs = (vector.tobytes() for vector in vectors.astype("<f2", copy=False))
        self._db.executemany(
            "INSERT INTO vectors(row, version, checksum, vector) VALUES (?, ?, ?, ?) ON CONFLICT(row) DO UPDATE "
            "SET version = excluded.version, checksum = excluded.checksum, vector = excluded.vector",
            ((row, version, zlib.crc32(blob), blob) for row, blob in zip(rows, blobs, strict=True)),
        )
        return np.array(rows, dtype=np.int64)

    def delete(self, ids: Iterable[str]) -> Rows:
        """Delete by id, returning the rows of those that were there."""
        rows = self.rows_by_id(ids)
        if len(rows):
            listed = rows.tolist()
            self._forget_words(listed)
            for table in ("vectors", "documents"):
                self._db.execute(
                    f"DELETE FROM {table} WHERE row IN (SELECT value FROM json_each(?))",  # noqa: S608
                    (json.dumps(listed),),
                )
            self._db.execute("UPDATE state SET deleted = ?", (self._next_version(),))
        return rows

    def delete_all(self) -> int:
        """Delete every document, returning how many there were."""
        count = self.count()
        self._db.execute("DELETE FROM cached")
        if count:
            self._db.execute("INSERT INTO words(words) VALUES ('delete-all')")
            self._db.execute("DELETE FROM vectors")
            self._db.execute("DELETE FROM documents")
            self._db.execute("UPDATE state SET deleted = ?", (self._next_version(),))
        return count

    def tidy(self) -> None:
        """Merge the words' index, rewrite the database without gaps, and empty the write-ahead log."""
        try:
            self._db.execute("INSERT INTO words(words) VALUES ('optimize')")
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error as error:
            raise describe(error, self._name) from error

    def problems(self, *, writable: bool) -> list[str]:
        """Check SQLite's structures, the words and every checksum; say what is wrong."""
        found = [text for (text,) in self._db.execute("PRAGMA integrity_check") if text != "ok"]
        if found:
            return found
        if writable:  # FTS5 takes its check for a write
            try:
                self._db.execute("INSERT INTO words(words, rank) VALUES ('integrity-check', 1)")
            except sqlite3.DatabaseError as error:
                found.append(f"the index of words does not agree with the texts ({error})")
        apart = self._db.execute(
            "SELECT count(*) FROM (SELECT row FROM documents EXCEPT SELECT row FROM vectors)"
        ).fetchone()[0]
        if apart or self.count() != self._db.execute("SELECT count(*) FROM vectors").fetchone()[0]:
            found.append("there are documents without a vector, or vectors without a document")
        query = "SELECT id, metadata, text, checksum FROM documents"
        for doc_id, metadata, text, checksum in self._db.execute(query):
            if not _is_sound(doc_id, metadata, text, checksum):
                found.append(f"document {doc_id!r} does not have its checksum")
        for row, checksum, vector in self._db.execute("SELECT row, checksum, vector FROM vectors"):
            if type(vector) is not bytes or checksum != zlib.crc32(vector):
                found.append(f"the vector in row {row} does not have its checksum")
        return found

    def _next_version(self) -> int:
        found = self._db.execute("UPDATE state SET version = version + 1 RETURNING version").fetchall()
        return int(found[0][0])

    def _forget_words(self, rows: Iterable[int]) -> None:
        self._db.execute(
            "INSERT INTO words(words, rowid, text) SELECT 'delete', row, text FROM documents "
            "WHERE row IN (SELECT value FROM json_each(?))",
            (json.dumps(list(rows)),),
        )

    def ids_where(self, where: Filter | None) -> list[str]:
        """The ids of the documents that match a filter, oldest first."""
        if callable(where):
            listed = json.dumps(self.rows_where(where).tolist())
            condition, parameters = "row IN (SELECT value FROM json_each(?))", [listed]
        else:
            condition, parameters = compile_filter(where, self.metadata_keys())
        found = self._db.execute(f"SELECT id FROM documents WHERE {condition} ORDER BY row", parameters)  # noqa: S608
        return [doc_id for (doc_id,) in found]

    def rows_where(self, where: Filter | None) -> Rows:
        """The rows of the documents that match a filter, ascending."""
        if where is None:
            # The index on versions holds the rows and little else.
            found = self._db.execute("SELECT row FROM vectors INDEXED BY vectors_by_version")
            return np.sort(np.fromiter((row for (row,) in found), dtype=np.int64))
        if callable(where):
            found = self._db.execute("SELECT row, metadata FROM documents ORDER BY row")
            return np.fromiter(
                (row for row, metadata in found if where(self._json(metadata))), dtype=np.int64
            )
        condition, parameters = compile_filter(where, self.metadata_keys())
        found = self._db.execute(f"SELECT row FROM documents WHERE {condition} ORDER BY row", parameters)  # noqa: S608
        return np.fromiter((row for (row,) in found), dtype=np.int64)

    def _json(self, metadata: str) -> dict[str, Any]:
        try:
            values: dict[str, Any] = json.loads(metadata)
        except (TypeError, ValueError) as error:
            raise self.damage(f"metadata is not JSON ({error})") from error
        return values

    def search_words(self, query: str, tokenizer: str, k: int, among: Rows | None) -> list[tuple[int, float]]:
        """The k rows whose texts match a user's words best: (row, BM25), higher is better."""
        expression = match_expression(query, tokenizer)
        if expression is None:
            return []
        condition, parameters = "", [expression]
        if among is not None:
            # The plus keeps SQLite from asking FTS5 once for every row in the list.
            condition = "AND +rowid IN (SELECT value FROM json_each(?))"
            parameters.append(json.dumps(among.tolist()))
        found = self._db.execute(
            f"SELECT rowid, -bm25(words) AS score FROM words WHERE words MATCH ? {condition} "  # noqa: S608
            "ORDER BY score DESC, rowid LIMIT ?",
            (*parameters, k),
        )
        return [(row, score) for row, score in found]

    def metadata_keys(self) -> list[str]:
        """The keys that have an index, oldest first."""
        return [key for (key,) in self._db.execute("SELECT key FROM metadata_keys ORDER BY number")]

    def index_metadata(self, key: str) -> None:
        """Make filters on a key fast."""
        expression = index_expression(key)
        if key not in self.metadata_keys():
            cursor = self._db.execute("INSERT INTO metadata_keys(key) VALUES (?)", (key,))
            self._db.execute(f"CREATE INDEX metadata_{cursor.lastrowid} ON documents({expression})")

    def drop_metadata_index(self, key: str) -> bool:
        """Undo `index_metadata`; tells whether there was an index."""
        found = self._db.execute(
            "DELETE FROM metadata_keys WHERE key = ? RETURNING number", (key,)
        ).fetchall()
        for (number,) in found:
            self._db.execute(f"DROP INDEX metadata_{int(number)}")
        return bool(found)

    def cached(self, name: str, texts: Sequence[str]) -> Float32:
        """The number kept for each text under `name`, [n]; NaN where there is none or not what was put in."""
        digests = [_digest(text) for text in texts]
        known = {}
        for digest in set(digests):
            found = self._db.execute(
                "SELECT number, checksum FROM cached WHERE name = ? AND digest = ?", (name, digest)
            ).fetchone()
            if found and found[1] == _cached_checksum(name, digest, found[0]):
                known[digest] = found[0]
        return np.array([known.get(digest, np.nan) for digest in digests], dtype=np.float32)

    def cache(self, name: str, texts: Sequence[str], numbers: Sequence[float]) -> None:
        """Keep a number for each text under `name`."""
        self._db.executemany(
            "INSERT INTO cached(name, digest, number, checksum) VALUES (?, ?, ?, ?) ON CONFLICT(name, digest) "
            "DO UPDATE SET number = excluded.number, checksum = excluded.checksum",
            (
                (name, digest, number, _cached_checksum(name, digest, number))
                for digest, number in zip(map(_digest, texts), numbers, strict=True)
            ),
        )

    def documents_by_row(self, rows: Iterable[int]) -> dict[int, tuple[str, str, str]]:
        """Map rows to (id, text, metadata as JSON)."""
        return {row: found for row, *found in self._documents("row", rows)}  # type: ignore[misc]

    def documents_by_id(self, ids: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Map the ids that are there to (text, metadata as JSON)."""
        return {doc_id: (text, metadata) for _, doc_id, text, metadata in self._documents("id", ids)}

    def _documents(self, key: str, wanted: Iterable[object]) -> Iterator[tuple[int, str, str, str]]:
        for row, doc_id, text, metadata, checksum in self._select(
            "row, id, text, metadata, checksum", key, wanted
        ):
            if not _is_sound(doc_id, metadata, text, checksum):
                raise self.damage(f"document {doc_id!r} does not have its checksum")
            yield row, doc_id, text, metadata

    def rows_by_id(self, ids: Iterable[str]) -> Rows:
        """The rows of the ids that are there, ascending."""
        return np.sort(np.fromiter((row for (row,) in self._select("row", "id", ids)), dtype=np.int64))

    def row_of_id(self, ids: Iterable[str]) -> dict[str, int]:
        """Map the ids that are there to their rows."""
        return dict(self._select("id, row", "id", ids))

    def _select(self, columns: str, key: str, wanted: Iterable[object]) -> Iterator[tuple[Any, ...]]:
        values = list(wanted)
        for start in range(0, len(values), MAX_PARAMETERS):
            part = values[start : start + MAX_PARAMETERS]
            marks = ", ".join("?" * len(part))
            yield from self._db.execute(f"SELECT {columns} FROM documents WHERE {key} IN ({marks})", part)  # noqa: S608

    def rows_since(self, version: int) -> Rows:
        """The rows whose vectors are newer than `version`, ascending."""
        found = self._db.execute("SELECT row FROM vectors WHERE version > ?", (version,))
        return np.sort(np.fromiter((row for (row,) in found), dtype=np.int64))

    def vectors(
        self, dimension: int, width: int, among: Rows | None = None
    ) -> Iterator[tuple[Rows, Float32]]:
        """Stream vectors cut to `width` as chunks of (rows [n], unit vectors [n, width]), rows ascending.

        `among`, ascending, says which; None means all.
        """
        condition, parameters = "", []
        if among is not None:
            condition = "WHERE row IN (SELECT value FROM json_each(?))"
            parameters = [json.dumps(among.tolist())]
        cursor = self._db.execute(
            f"SELECT row, checksum, vector FROM vectors {condition} ORDER BY row",  # noqa: S608
            parameters,
        )
        step = max(1, CHUNK_BYTES // (2 * dimension))
        while chunk := cursor.fetchmany(step):
            rows, _, blobs = zip(*chunk, strict=True)
            if any(type(blob) is not bytes or len(blob) != 2 * dimension for blob in blobs):
                raise self.damage(f"a stored vector does not have {dimension} entries")
            for row, checksum, blob in chunk:
                if checksum != zlib.crc32(blob):
                    raise self.damage(f"the vector in row {row} does not have its checksum")
            yield np.array(rows, dtype=np.int64), self._unit(blobs, dimension, width)

    def _unit(self, blobs: Sequence[bytes], dimension: int, width: int) -> Float32:
        stored = np.frombuffer(b"".join(blobs), dtype="<f2").reshape(len(blobs), dimension)
        try:
            return stored_to_unit(stored, width)
        except ValueError as error:
            raise self.damage(str(error)) from error


def create_store(folder: Path | None, state: State) -> DocumentStore:
    """Make the database in `folder`, or in memory."""
    name = str(folder / DATABASE_NAME) if folder else "the index in memory"
    return DocumentStore(create_database(folder, state), name)


def open_store(folder: Path, *, read_only: bool) -> DocumentStore:
    """Connect to the database in `folder`."""
    database = folder / DATABASE_NAME
    connection, fixed = open_database(folder, read_only=read_only)
    return DocumentStore(connection, str(database), database if fixed else None)


def _last_change(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_size


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _cached_checksum(name: str, digest: bytes, number: object) -> int:
    return zlib.crc32(repr((name, digest, number)).encode())


def _checksum(doc_id: str, metadata: str, text: str) -> int:
    return zlib.crc32(text.encode(), zlib.crc32(metadata.encode(), zlib.crc32(doc_id.encode())))


def _is_sound(doc_id: object, metadata: object, text: object, checksum: int) -> bool:
    return (
        isinstance(doc_id, str)
        and isinstance(metadata, str)
        and isinstance(text, str)
        and checksum == _checksum(doc_id, metadata, text)
    )
