"""DocumentIndex: documents and their vectors, in a folder or in memory."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from autoregembed_indexes.arguments import id_list, text_list
from autoregembed_indexes.copies import import_faiss
from autoregembed_indexes.database import DATABASE_NAME
from autoregembed_indexes.errors import DocumentIndexError, IndexDamagedError
from autoregembed_indexes.filters import index_expression
from autoregembed_indexes.gpu import Gpus
from autoregembed_indexes.kinds import DEFAULT_MEMORY_BUDGET
from autoregembed_indexes.lexical import DEFAULT_TOKENIZER
from autoregembed_indexes.lock import LOCK_NAME, WriterLock
from autoregembed_indexes.records import (
    prepare_ids,
    prepare_metadatas,
    prepare_texts,
)
from autoregembed_indexes.searching import SearchableIndex
from autoregembed_indexes.settings import State, check_added, check_opened, first_width, new_state
from autoregembed_indexes.snapshot import snapshot_path
from autoregembed_indexes.store import Rows, create_store, open_store
from autoregembed_indexes.vectors import Float16, as_matrix, round_for_storage

logger = logging.getLogger(__name__)


class DocumentIndex(SearchableIndex):
    """A searchable collection of documents; make one with `create` or `open`.

    An index with a path is a folder. When `add` or `delete` returns, the change is on disk; when they raise,
    nothing has changed. One process writes at a time; any number read (`open(path, read_only=True)`) and see
    every committed change at their next call. Safe to share between threads, not across a fork. Pickling
    keeps the path, and the copy opens read-only. Close it, or use it in a `with` block. Like a list, an index
    is falsy while empty.
    """

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        dimension: int | None = None,
        factory: str = "auto",
        encoder: str | None = None,
        tokens: int | None = None,
        tokenizer: str = DEFAULT_TOKENIZER,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        device: str = "auto",
    ) -> "DocumentIndex":
        """Make an empty index in the folder `path`, which is new or empty, or in memory when `path` is None.

        Args:
            path: a folder, or None.
            dimension: entries of a vector; None takes it from the first `add`.
            factory: how vectors are searched, as FAISS writes it: "SQfp16" and "Flat" (float32) are exact;
                "IVF1024,Flat", "IVF1024,SQ8" and "IVF1024,RaBitQ" (RaBitQ2 ... RaBitQ9: more bits) visit some
                of 1024 lists and rank what they find by the stored vectors; "IVF,SQ8" chooses the number of
                lists. "auto" is exact while that fits the memory budget.
            encoder: fingerprint of the encoder that the vectors come from.
            tokens: the number k of compressed tokens of a flattened embedding; allows queries of the first j < k.
            tokenizer: FTS5's, for search by text; "trigram" for languages without spaces.
            memory_budget: bytes that "auto" may use for vectors, 1 GiB by default.
            device: where to search, of this object and not kept in the folder: "cpu", "cuda" (all GPUs), "cuda:0"
                (one), or "auto": GPUs where FAISS has some. They hold a copy of a large index, for any k up to 2048;
                what they cannot do, and where they are not there, the CPU does, with the same results.

        Raises FileExistsError when there is something else, or another index, at `path`.
        """
        state = new_state(factory, dimension, tokens, encoder, tokenizer, memory_budget)
        gpus = Gpus(import_faiss(), device)
        in_memory = create_store(None, state)  # refuses a tokenizer before there is a folder
        if path is None:
            return cls(in_memory, None, None, gpus, read_only=False)
        in_memory.close()
        folder = Path(path).absolute()
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file; an index is a folder")
        _check_vacant(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as on_error:
            lock = WriterLock(folder)
            on_error.callback(lock.release)
            _check_vacant(folder)  # again: another process may have made one before the lock was ours
            index = cls(create_store(folder, state), lock, folder, gpus, read_only=False)
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
        device: str = "auto",
    ) -> "DocumentIndex":
        """Open the index in the folder `path`, to write and search, or only to search.

        `dimension` and `encoder` (a fingerprint) are checked against the index where both sides have one. `device`
        says where to search (see `create`).

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
        gpus = Gpus(import_faiss(), device)
        with ExitStack() as on_error:
            lock = None if read_only else WriterLock(folder)
            if lock:
                on_error.callback(lock.release)
                for leftover in folder.glob("vectors-*.faiss.new"):  # of a process that was killed
                    with suppress(OSError):
                        leftover.unlink()
            store = open_store(folder, read_only=read_only)
            on_error.callback(store.close)
            index = cls(store, lock, folder, gpus, read_only=read_only)
            on_error.callback(index.close)
            with index._session() as state:
                check_opened(str(folder), state, dimension, encoder)
                for width in index._widths(state, on_disk=not read_only):
                    index._copy(state, width)
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
        rounded = round_for_storage(matrix, prepared_ids)
        prepared_texts = prepare_texts(texts, prepared_ids)
        prepared_metadatas = prepare_metadatas(metadatas, prepared_ids)
        with self._mutex:
            with self._session(write=True) as state:
                if not prepared_ids:
                    return []
                check_added(matrix.shape[1], state)
                rows = self._store.upsert(prepared_ids, prepared_texts, prepared_metadatas, rounded)
            self._take_up(state, matrix.shape[1], rows, rounded())
        return prepared_ids

    def delete(self, ids: Sequence[str]) -> int:
        """Delete documents by id, and return how many there were; unknown ids are fine."""
        wanted = id_list(ids)
        with self._mutex:
            with self._session(write=True) as state:
                rows = self._store.delete(wanted)
            if len(rows) and state.dimension is not None:
                self._take_up(state, state.dimension, rows, None)
        return len(rows)

    def clear(self) -> int:
        """Delete every document and cached number, and return how many documents there were; dimension and encoder
        stay."""
        with self._session(write=True):
            return self._store.delete_all()

    def cache(self, name: str, texts: Sequence[str], numbers: ArrayLike) -> None:
        """Keep a float32 number [n] for each text under `name`: what is costly to compute of a text and needed again.

        Texts need not be documents here, and a number outlives its document until `clear`. Raises ValueError for a
        number that is NaN or infinite, or not one for each text.
        """
        texts = text_list(texts, "texts")
        with np.errstate(over="ignore"):
            values = np.asarray(numbers, dtype=np.float32) + np.float32(0)  # SQLite knows no -0.0
        if values.shape != (len(texts),) or not np.isfinite(values).all():
            raise ValueError(
                f"numbers must be {len(texts)} finite float32 numbers, one for each text, got {numbers!r:.100}"
            )
        with self._session(write=True):
            self._store.cache(name, texts, values.tolist())

    def create_metadata_index(self, key: str) -> None:
        """Make filters on a metadata key fast: ==, $in and order; "a.b" is the key b of the object a.

        It costs a little at each `add`. A key that has an index already is fine.
        """
        with self._session(write=True):
            self._store.index_metadata(key)

    def drop_metadata_index(self, key: str) -> bool:
        """Undo `create_metadata_index`; tells whether there was one."""
        index_expression(key)
        with self._session(write=True):
            return self._store.drop_metadata_index(key)

    @property
    def metadata_indexes(self) -> list[str]:
        """The metadata keys whose filters are fast."""
        with self._session():
            return self._store.metadata_keys()

    def refresh(self) -> None:
        """Read what other processes have committed now, so that the next search need not."""
        with self._session() as state:
            for width in list(self._copies):
                self._copy(state, width)

    def snapshot(self, *, num_tokens: int | None = None) -> None:
        """Write the FAISS index to the folder, so that opening maps it; `close` does so when much has changed.

        `num_tokens` also writes the copy of the vectors' first so many tokens that `search(num_tokens=...)` needs. A
        search makes it by itself, but only where the index is open for writing does it stay. Once it is in the
        folder, it is kept up with every change.
        """
        with self._writing() as state:
            width = first_width(num_tokens, state.dimension or 0, state)
            if state.dimension is not None:
                self._copy(state, width)
            for width in list(self._copies):
                copy = self._copy(state, width)
                with self._dropping(copy):
                    copy.fold(self._store)

    def compact(self) -> None:
        """Make files as small and searches as fast as they can be: drop what is deleted, merge, rewrite.

        Takes time and, for a while, as much disk again. Raises DocumentIndexError when the disk is full.
        """
        with self._mutex:
            self.snapshot()
            self._store.tidy()

    def verify(self) -> list[str]:
        """Check everything that can be checked, and return what is wrong in words, [] when nothing is.

        Reads the whole database: SQLite's own structures, each checksum, the words, the snapshot's checksums, and
        whether a sample of documents is found by its own vectors. The words are checked only where the index is open
        for writing. A damaged snapshot is rebuilt at the next opening; a damaged database needs a copy.
        """
        try:
            with self._session() as state:
                problems = self._store.problems(writable=not self._read_only)
                if not problems:
                    widths = self._widths(state, on_disk=True)
                    problems = [found for w in widths for found in self._copy(state, w).problems(self._store)]
        except IndexDamagedError as error:
            return [str(error)]
        return problems

    def info(self) -> dict[str, Any]:
        """Say what the index is: its settings, what it holds, and how it searches."""
        with self._session() as state:
            copy = None if state.dimension is None else self._copy(state, state.dimension)
            return {
                "path": None if self._path is None else str(self._path),
                "documents": self._store.count(),
                "dimension": state.dimension,
                "tokens": state.tokens,
                "encoder": state.encoder,
                "factory": state.factory,
                "kind": None if copy is None else str(copy.kind),
                "device": self._gpus.device if copy is not None and copy.on_gpu else "cpu",
                "pending": 0 if copy is None else copy.pending,
                "snapshot": None if copy is None or copy.snapshot is None else copy.snapshot.path.name,
                "metadata_indexes": self._store.metadata_keys(),
                "tokenizer": state.tokenizer,
                "memory_budget": state.memory_budget,
                "version": state.version,
                "bytes": _folder_bytes(self._path),
            }

    def close(self) -> None:
        """Close the index, for good if it is in memory; closing twice is fine."""
        if os.getpid() != self._pid:
            return  # a fork has nothing of its own to close, and its mutex may never be released
        with self._mutex:
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
        return _open_read_only, (str(self._path), self._gpus.device)

    @contextmanager
    def _writing(self) -> Iterator[State]:
        """A session that reads the database but changes the folder."""
        if self._read_only:
            raise DocumentIndexError(f"{self!r} cannot be changed; open it without read_only")
        with self._session() as state:
            yield state

    def _take_up(self, before: State, width: int, rows: Rows, stored: Float16 | None) -> None:
        """Bring the copies of the vectors from the state `before` a write to what it wrote, without reading it back.

        The write is done: what goes wrong here is mended when the next search makes another copy.
        """
        with self._session() as state:
            if before.version == 0:
                self._copies[width] = self._new_copy(state, width)
            for copy in [copy for copy in self._copies.values() if copy.version == before.version]:
                try:
                    with self._dropping(copy):
                        copy.take_up(self._store, state, rows, stored)
                        copy.fold_if_worth_it(self._store, closing=False)
                except Exception as error:
                    logger.warning("%r: the vectors are loaded again at the next search (%s)", self, error)

    def _widths(self, state: State, *, on_disk: bool) -> list[int]:
        """How wide copies of the vectors are: whole, those in use, and those whose snapshots are on disk."""
        dimension, tokens = state.dimension, state.tokens
        if dimension is None:
            return []
        widths = {dimension, *self._copies}
        if on_disk and self._path is not None and tokens:
            narrow = [dimension // tokens * number for number in range(1, tokens)]
            widths |= {width for width in narrow if snapshot_path(self._path, width).is_file()}
        return sorted(widths, reverse=True)


def _open_read_only(path: str, device: str) -> DocumentIndex:
    return DocumentIndex.open(path, read_only=True, device=device)


def _folder_bytes(folder: Path | None) -> int | None:
    """What lies in a folder; a writer may take a file away meanwhile."""
    if folder is None:
        return None
    sizes = 0
    for item in folder.iterdir():
        with suppress(FileNotFoundError):
            sizes += item.stat().st_size
    return sizes


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
