"""The SQLite file: its schema, how it is made and opened, and what SQLite's errors mean for an index."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from autoregembed_indexes.errors import DocumentIndexError, IndexDamagedError
from autoregembed_indexes.filters import register_functions
from autoregembed_indexes.lexical import WORDS_MEMORY, WORDS_TABLE
from autoregembed_indexes.lock import has_writer
from autoregembed_indexes.settings import State

DATABASE_NAME = "documents.sqlite"
APPLICATION_ID = 0x41524547
FORMAT_VERSION = 3
MIN_SQLITE = (3, 35)

# Of what cannot be read, or is not there although we made it.
_SIGNS_OF_DAMAGE = (
    "decode to UTF-8",
    "malformed",
    "corrupt",
    "no such ",
    "unknown function",
    "vtable constructor",
)

# Vectors have their own table: a filter scans metadata without reading them.
_SCHEMA = """
CREATE TABLE state (
    name TEXT NOT NULL, factory TEXT NOT NULL, dimension INTEGER, tokens INTEGER, encoder TEXT,
    tokenizer TEXT NOT NULL, memory_budget INTEGER NOT NULL,
    version INTEGER NOT NULL DEFAULT 0, deleted INTEGER NOT NULL DEFAULT 0, checksum INTEGER NOT NULL
);
CREATE TABLE documents (
    row INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, metadata TEXT NOT NULL,
    text TEXT NOT NULL, checksum INTEGER NOT NULL
);
CREATE TABLE vectors (
    row INTEGER PRIMARY KEY, version INTEGER NOT NULL, checksum INTEGER NOT NULL, vector BLOB NOT NULL
);
CREATE INDEX vectors_by_version ON vectors(version);
CREATE TABLE cached (
    name TEXT NOT NULL, digest BLOB NOT NULL, number REAL NOT NULL, checksum INTEGER NOT NULL,
    PRIMARY KEY (name, digest)
) WITHOUT ROWID;
CREATE TABLE metadata_keys (number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE);
"""


def create_database(folder: Path | None, state: State) -> sqlite3.Connection:
    """Make the database in `folder`, or in memory; a folder holds a whole one or none."""
    if folder is None:
        connection = _connect(":memory:")
        _write_schema(connection, state)
        return connection
    beside = folder / f"{DATABASE_NAME}.new"
    for leftover in folder.glob(f"{DATABASE_NAME}.new*"):
        leftover.unlink()
    try:
        with closing(_connect(_uri(beside, "rwc"))) as connection:
            _write_schema(connection, state)
    except sqlite3.Error as error:
        beside.unlink(missing_ok=True)
        raise describe(error, str(beside)) from error
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    beside.replace(folder / DATABASE_NAME)
    sync_folder(folder)
    return open_database(folder, read_only=False)[0]


def open_database(folder: Path, *, read_only: bool) -> tuple[sqlite3.Connection, bool]:
    """Connect to the database in `folder` and check that it is one of ours.

    Also tells whether the connection takes the file for one that nobody changes.
    """
    database = folder / DATABASE_NAME
    if not read_only:
        options = "rw"
    elif os.access(folder, os.W_OK) or has_writer(folder):
        options = "ro"
    else:  # a log cannot be read where nobody keeps its shared index
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
        _check_whole(connection, database)
        if not read_only:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error as error:
        connection.close()
        raise describe(error, str(database)) from error
    except BaseException:
        connection.close()
        raise
    return connection, "immutable" in options


def describe(error: sqlite3.Error, name: str) -> Exception:
    """Say what an SQLite error means for the index."""
    if "no such module: fts5" in str(error):
        return DocumentIndexError("Python's SQLite was built without FTS5, which an index needs for text")
    if type(error) is sqlite3.DatabaseError or any(sign in str(error) for sign in _SIGNS_OF_DAMAGE):
        return damage(name, str(error))
    return DocumentIndexError(f"{name}: {error}; nothing was changed")


def damage(name: str, what: str) -> IndexDamagedError:
    """Make the error for a database that cannot be read or contradicts itself."""
    return IndexDamagedError(f"{name} is damaged: {what}; restore it from a copy, or add its documents again")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_whole(connection: sqlite3.Connection, database: Path) -> None:
    """Find a database cut off inside a page, which SQLite would read as zeros.

    Without opening the file: closing it again would drop every lock that SQLite holds on it for this process.
    """
    log = database.with_name(f"{DATABASE_NAME}-wal")
    if log.exists() and log.stat().st_size:
        return  # a checkpoint may be under way, or is repeated from the log
    (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    if database.stat().st_size % page_size:
        raise damage(str(database), "it ends inside a page, so that its end is missing")


def _check_format(connection: sqlite3.Connection, database: Path) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise DocumentIndexError(f"{database} is not the database of a document index")
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    if found != FORMAT_VERSION:
        raise DocumentIndexError(
            f"{database} has format {found}, this release reads format {FORMAT_VERSION}; use the release "
            "that wrote it, or add its documents to a new index"
        )
    connection.execute("SELECT count(*) FROM state").fetchone()


def _write_schema(connection: sqlite3.Connection, state: State) -> None:
    connection.execute("PRAGMA page_size = 16384")  # so that few vectors leave a page half empty
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
    connection.execute("BEGIN")
    for statement in _SCHEMA.split(";\n"):
        connection.execute(statement)
    try:
        connection.execute(WORDS_TABLE.format(tokenizer=state.tokenizer.replace("'", "''")))
        connection.execute(WORDS_MEMORY)
    except sqlite3.OperationalError as error:
        if "no such module" in str(error):
            raise describe(error, "") from error
        raise ValueError(
            f"tokenizer {state.tokenizer!r} is not one that SQLite's FTS5 knows ({error}); use "
            "'porter unicode61' (English), 'unicode61' or 'trigram' (languages without spaces)"
        ) from error
    values = (*state, state.checksum)
    connection.execute(f"INSERT INTO state VALUES ({', '.join('?' * len(values))})", values)  # noqa: S608
    connection.execute("COMMIT")


def _connect(target: str) -> sqlite3.Connection:
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        needed = ".".join(map(str, MIN_SQLITE))
        raise DocumentIndexError(f"SQLite {needed} or newer is needed, Python has {sqlite3.sqlite_version}")
    connection = sqlite3.connect(
        target, timeout=30, isolation_level=None, check_same_thread=False, uri=target != ":memory:"
    )
    register_functions(connection)
    return connection


def _uri(database: Path, options: str) -> str:
    return f"{database.as_uri()}?mode={options}"
