"""DocumentIndex: documents and their vectors, in a folder or in memory."""

import json
import operator
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from autoregembed_indexes.errors import DocumentIndexError
from autoregembed_indexes.flat import FlatCopy, import_faiss
from autoregembed_indexes.lock import LOCK_NAME, WriterLock
from autoregembed_indexes.records import (
    Document,
    Hit,
    check_ids,
    prepare_ids,
    prepare_metadatas,
    prepare_texts,
)
from autoregembed_indexes.settings import State, check_added, check_opened, check_query, new_state
from autoregembed_indexes.store import DATABASE_NAME, DocumentStore, create_store, open_store
from autoregembed_indexes.vectors import Float32, as_matrix, normalise, round_for_storage


class DocumentIndex:
    """A searchable collection of documents; make one with `create` or `open`.

    An index with a path is a folder. When `add` or `delete` returns, the change is on disk; when they raise,
    nothing has changed. One process writes at a time; any number read (`open(path, read_only=True)`) and see
    every committed change at their next call. Safe to share between threads, not across a fork. Pickling
    keeps the path, and the copy opens read-only. Close it, or use it in a `with` block. Like a list, an index
    is falsy while empty.
    """

    def __init__(
        self, store: DocumentStore, lock: WriterLock | None, path: Path | None, *, read_only: bool
    ) -> None:
        self._store = store
        self._path = path
        self._read_only = read_only
        self._copies: dict[int, FlatCopy] = {}
        self._mutex = threading.RLock()
        self._pid = os.getpid()
        self._release = weakref.finalize(self, _release, store, lock, self._pid)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        dimension: int | None = None,
        factory: str = "auto",
        encoder: str | None = None,
        tokens: int | None = None,
    ) -> "DocumentIndex":
        """Make an empty index in the folder `path`, which is new or empty, or in memory when `path` is None.

        `dimension` is taken from the first `add` when None. `factory` says how vectors are searched: "flat"
        is exact, and "auto" chooses. `encoder` is the fingerprint of the encoder that the vectors come from.
        `tokens` is the number k of compressed tokens of a flattened embedding: it allows queries of the first
        j < k.

        Raises FileExistsError when there is something else, or another index, at `path`.
        """
        state = new_state(factory, dimension, tokens, encoder)
        import_faiss()
        if path is None:
            return cls(create_store(None, state), None, None, read_only=False)
        folder = Path(path).absolute()
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file; an index is a folder")
        _check_vacant(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as on_error:
            lock = WriterLock(folder)
            on_error.callback(lock.release)
            _check_vacant(folder)  # again: another process may have made one before the lock was ours
            index = cls(create_store(folder, state), lock, folder, read_only=False)
            on_error.pop_all()
        return index

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        dimension: int | None = None,
        encoder: str | None = None,
        read_only: bool = False,
    ) -> "DocumentIndex":
        """Open the index in the folder `path`, to write and search, or only to search.

        `dimension` and `encoder` (a fingerprint) are checked against the index where both sides have one.

        Raises FileNotFoundError when there is no index at `path`, IndexMismatchError for another encoder or
        dimension, IndexLockedError when another writer has it, IndexDamagedError for an unreadable database.
        """
        folder = Path(path).absolute()
        if not cls.exists(folder):
            what = (
                "a file" if folder.is_file() else "a folder without one" if folder.exists() else "not there"
            )
            raise FileNotFoundError(
                f"no index at {folder}: it is {what}; DocumentIndex.create makes an index"
            )
        import_faiss()
        with ExitStack() as on_error:
            lock = None if read_only else WriterLock(folder)
            if lock:
                on_error.callback(lock.release)
            store = open_store(folder, read_only=read_only)
            on_error.callback(store.close)
            index = cls(store, lock, folder, read_only=read_only)
            with index._session() as state:
                check_opened(str(folder), state, dimension, encoder)
                if state.dimension is not None:
                    index._copy(state.dimension, state.dimension)
            on_error.pop_all()
        return index

    @staticmethod
    def exists(path: str | os.PathLike[str]) -> bool:
        """Tell whether there is an index at `path`, one that `open` would open and `create` would refuse."""
        return (Path(path) / DATABASE_NAME).is_file()

    def add(
        self,
        vectors: ArrayLike,
        texts: Sequence[str],
        ids: Sequence[str | None] | None = None,
        metadatas: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> list[str]:
        """Store documents, one per row of `vectors` [n, dimension], replacing those whose id is there.

        An id that is None becomes a new uuid, metadata that is None becomes {}. Vectors are normalised, so
        their length is not kept. Returns the ids. All documents are stored, or none.

        Raises ValueError or TypeError, naming the document, for anything that could not be returned equal,
        and for vectors with NaN, infinity or nothing but zeros; IndexMismatchError for another dimension.
        """
        matrix = as_matrix(vectors, "vectors")
        if isinstance(texts, str):
            raise TypeError("texts must be a list with one text per vector, got str")
        prepared_ids = prepare_ids(ids, len(matrix))
        prepared_texts = prepare_texts(texts, prepared_ids)
        prepared_metadatas = prepare_metadatas(metadatas, prepared_ids)
        rounded = round_for_storage(matrix, prepared_ids)
        with self._session(write=True) as state:
            if not prepared_ids:
                return []
            check_added(matrix.shape[1], state)
            self._store.upsert(prepared_ids, prepared_texts, prepared_metadatas, rounded)
        return prepared_ids

    def delete(self, ids: Sequence[str]) -> int:
        """Delete documents by id, and return how many there were; unknown ids are fine."""
        wanted = _id_list(ids)
        with self._session(write=True):
            return self._store.delete(wanted)

    def clear(self) -> int:
        """Delete every document, and return how many there were; dimension and encoder stay."""
        with self._session(write=True):
            return self._store.delete_all()

    def get(self, ids: Sequence[str]) -> list[Document]:
        """Return the documents with these ids, in this order, leaving out ids that are not there."""
        wanted = _id_list(ids)
        with self._session():
            found = self._store.documents_by_id(dict.fromkeys(wanted))
        return [
            Document(doc_id, found[doc_id][0], json.loads(found[doc_id][1]))
            for doc_id in wanted
            if doc_id in found
        ]

    def ids(self, filter: Mapping[str, Any] | None = None) -> list[str]:  # noqa: A002
        """Return the ids of all documents, or of those that match `filter` (see `search`), oldest first."""
        with self._session():
            return self._store.ids_where(filter)

    def vectors(self, ids: Sequence[str]) -> Float32:
        """Return the vectors of these documents as unit rows, float32 [n, dimension].

        Raises KeyError for an id that is not there.
        """
        wanted = _id_list(ids)
        with self._session() as state:
            found = self._store.vectors_by_id(dict.fromkeys(wanted))
            missing = [doc_id for doc_id in wanted if doc_id not in found]
            if missing:
                raise KeyError(f"no document has the id {missing[0]!r}")
            dimension = state.dimension or 0
            return self._store.unit_vectors([found[doc_id] for doc_id in wanted], dimension, dimension)

    def search(
        self,
        vectors: ArrayLike,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
        *,
        ids: Sequence[str] | None = None,
    ) -> list[list[Hit]]:
        """Return, for each query vector of [n, dimension], the k documents of highest cosine, best first.

        `filter` is {metadata key: value, ...}, all of which must be equal; only documents that match are
        ranked. Values compare by JSON type: true is not 1, and None matches a null but not a missing key.
        `ids` limits the search to these documents; unknown ids are fine. Fewer than k come back only when fewer
        than k match. Where the index records its number of tokens k, a
        query may be the first j of k vectors of a flattened embedding, and is compared with the same part of
        each document.

        Raises IndexMismatchError for vectors of another dimension, ValueError for k < 1 and for vectors with
        NaN, infinity or nothing but zeros, TypeError or ValueError for a filter that is not an equality.
        """
        matrix = as_matrix(vectors, "query vectors")
        k = operator.index(k)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        named = None if ids is None else _id_list(ids)
        with self._session() as state:
            among = self._store.rows_where(filter) if filter else None
            if named is not None:
                rows_named = self._store.rows_by_id(dict.fromkeys(named))
                among = rows_named if among is None else np.intersect1d(among, rows_named, assume_unique=True)
            if state.dimension is None or len(matrix) == 0:
                return [[] for _ in matrix]
            width = matrix.shape[1]
            check_query(width, state.dimension, state.tokens)
            queries = normalise(matrix, [f"query vectors[{position}]" for position in range(len(matrix))])
            scores, rows = self._copy(state.dimension, width).search(queries, k, among)
            found = self._store.documents_by_row(np.unique(rows).tolist())
        if len(found) < len(np.unique(rows)):
            raise self._store.damage("there are vectors without a document")
        return [
            [_hit(found[row], score) for row, score in zip(row_list, score_list, strict=True)]
            for row_list, score_list in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        """Count the documents."""
        with self._session():
            return self._store.count()

    @property
    def path(self) -> Path | None:
        """The folder, or None in memory."""
        return self._path

    @property
    def dimension(self) -> int | None:
        """The number of entries of a vector; None before the first `add` of an index made without it."""
        with self._session() as state:
            return state.dimension

    @property
    def encoder(self) -> str | None:
        """The fingerprint of the encoder that the vectors come from, where it was given."""
        with self._session() as state:
            return state.encoder

    @property
    def tokens(self) -> int | None:
        """The number of compressed tokens that a vector is made of, where it was given."""
        with self._session() as state:
            return state.tokens

    def close(self) -> None:
        """Close the index, for good if it is in memory; closing twice is fine."""
        if os.getpid() != self._pid:
            return  # a fork has nothing of its own to close, and its mutex may never be released
        with self._mutex:
            self._copies.clear()
            self._release()

    def __enter__(self) -> "DocumentIndex":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._path is None:
            raise TypeError("an index in memory cannot be pickled; create it with a path")
        return _open_read_only, (str(self._path),)

    def __repr__(self) -> str:
        return f"<DocumentIndex {self._name}{' (read-only)' if self._read_only else ''}>"

    @property
    def _name(self) -> str:
        return str(self._path) if self._path else "in memory"

    @contextmanager
    def _session(self, *, write: bool = False) -> Iterator[State]:
        """Run the block in one transaction, alone among threads."""
        if os.getpid() != self._pid:
            raise DocumentIndexError(
                f"{self!r} was opened in process {self._pid} and cannot be used in its fork {os.getpid()}; "
                "open it again there with DocumentIndex.open(path, read_only=True)"
            )
        with self._mutex:
            if not self._release.alive:
                raise DocumentIndexError(f"{self!r} is closed; open it again with DocumentIndex.open")
            if write and self._read_only:
                raise DocumentIndexError(f"{self!r} cannot be changed; open it without read_only")
            with self._store.transaction(write=write):
                yield self._store.state()

    def _copy(self, dimension: int, width: int) -> FlatCopy:
        """The FAISS copy of the vectors cut to `width`, made at its first use, as of this transaction."""
        copy = self._copies.pop(width, None) or FlatCopy(dimension, width)
        copy.catch_up(self._store)
        self._copies[width] = copy  # only now: a copy that failed half way is gone
        return copy


def _release(store: DocumentStore, lock: WriterLock | None, pid: int) -> None:
    """Close what an index holds, unless this is a fork: there it belongs to the parent."""
    if os.getpid() != pid:
        return
    store.close()
    if lock is not None:
        lock.release()


def _open_read_only(path: str) -> DocumentIndex:
    return DocumentIndex.open(path, read_only=True)


def _hit(document: tuple[str, str, str], score: float) -> Hit:
    doc_id, text, metadata = document
    return Hit(doc_id, score, text, json.loads(metadata))


def _id_list(ids: Sequence[str]) -> list[str]:
    if isinstance(ids, str):
        raise TypeError("ids must be a list of ids, got str")
    wanted = list(ids)
    check_ids(wanted)
    return wanted


def _check_vacant(folder: Path) -> None:
    """Refuse a folder with anything in it but what a creation that did not finish may leave."""
    if DocumentIndex.exists(folder):
        raise FileExistsError(f"there is an index at {folder}; DocumentIndex.open opens it")
    if folder.exists():
        others = [
            item.name for item in folder.iterdir() if not item.name.startswith((LOCK_NAME, DATABASE_NAME))
        ]
        if others:
            raise FileExistsError(
                f"{folder} is not empty (it holds {others[0]!r}); an index needs a folder of its own"
            )
