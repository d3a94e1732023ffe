"""What an index does without changing anything: reading documents and searching them."""

import json
import logging
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike

from autoregembed_indexes.arguments import (
    check_k,
    check_lambda,
    check_weights,
    coarse_depth,
    id_list,
    paired_texts,
    text_list,
)
from autoregembed_indexes.copies import VectorCopy
from autoregembed_indexes.errors import DocumentIndexError
from autoregembed_indexes.gpu import Gpus
from autoregembed_indexes.lock import WriterLock
from autoregembed_indexes.ranking import diversify, fuse
from autoregembed_indexes.records import Document, Hit
from autoregembed_indexes.settings import State, check_query, first_width
from autoregembed_indexes.store import DocumentStore, Filter, Rows
from autoregembed_indexes.vectors import Float32, as_matrix, normalise

CLOSING_SECONDS = 30

logger = logging.getLogger(__name__)


class SearchableIndex:
    """The reading half of `DocumentIndex`: its connection, its copies of the vectors, and every search."""

    def __init__(
        self, store: DocumentStore, lock: WriterLock | None, path: Path | None, gpus: Gpus, *, read_only: bool
    ) -> None:
        self._store = store
        self._path = path
        self._gpus = gpus
        self._read_only = read_only
        self._copies: dict[int, VectorCopy] = {}
        self._mutex = threading.RLock()
        self._pid = os.getpid()
        self._release = weakref.finalize(self, _release, store, self._copies, lock, self._mutex, self._pid)

    def get(self, ids: Sequence[str]) -> list[Document]:
        """Return the documents with these ids, in this order, leaving out ids that are not there."""
        wanted = id_list(ids)
        with self._session():
            found = self._store.documents_by_id(dict.fromkeys(wanted))
        return [
            Document(doc_id, found[doc_id][0], json.loads(found[doc_id][1]))
            for doc_id in wanted
            if doc_id in found
        ]

    def ids(self, filter: Filter | None = None) -> list[str]:  # noqa: A002
        """Return the ids of all documents, or of those that match `filter` (see `search`), oldest first."""
        with self._session():
            return self._store.ids_where(filter)

    def vectors(self, ids: Sequence[str]) -> Float32:
        """Return the vectors of these documents as unit rows, float32 [n, dimension].

        Raises KeyError for an id that is not there.
        """
        wanted = id_list(ids)
        with self._session() as state:
            rows = self._rows_of(wanted)
            dimension = state.dimension or 0
            return self._vectors_of(rows, dimension, dimension)

    def cached(self, name: str, texts: Sequence[str]) -> Float32:
        """Return the number that `cache` put in for each text under `name`: float32 [n], NaN where there is none."""
        texts = text_list(texts, "texts")
        with self._session():
            return self._store.cached(name, texts)

    def search(
        self,
        vectors: ArrayLike,
        k: int = 10,
        filter: Filter | None = None,  # noqa: A002
        *,
        ids: Sequence[str] | None = None,
        min_score: float | None = None,
        num_tokens: int | None = None,
        fetch_k: int | None = None,
    ) -> list[list[Hit]]:
        """Return, for each query vector of [n, dimension], the k documents of highest cosine, best first.

        Where the index records its number of tokens (`create(tokens=...)`), a query may be the first few of the
        vectors of a flattened embedding, and is compared with the same part of each document. Or it has all of them,
        and with `num_tokens` the first few find candidates, which are then ranked by all.

        Args:
            vectors: float16, float32 or float64 [n, dimension], of any length but zero.
            k: how many; fewer come back only when fewer match.
            filter: what metadata must be; only documents that match are ranked. {"lang": "de"} is equality,
                {"year": {"$gte": 2000, "$lt": 2010}} an order, and $eq, $ne, $in, $nin, $exists, $contains, $any,
                $all, $text_match, $text_match_insensitive, $empty, $and, $or and $not are known; "author.name"
                is the key name of the object author. Values compare by JSON type: true is not 1. A function of
                the metadata works too, slowly: it is called for every document.
            ids: limits the search to these documents; unknown ids are fine.
            min_score: leaves out documents of a lower cosine.
            num_tokens: find candidates by this many of the query's tokens, which takes that share of the time and
                memory, and rank them by all, so that scores are those of a search without. The copy of the vectors
                that this needs is made at its first use (see `snapshot`).
            fetch_k: how many candidates, at least k, by default max(100, 10 k).

        Raises IndexMismatchError for vectors of another dimension, and for `num_tokens` where the index does not
        record its tokens; ValueError for k < 1, for k or `fetch_k` > 2048 on a GPU, for `num_tokens` that the query
        does not have, and for vectors with NaN, infinity or nothing but zeros; TypeError or ValueError, naming key
        and operator, for a bad filter.
        """
        matrix = as_matrix(vectors, "query vectors")
        k = check_k(k)
        fetch = coarse_depth(k, num_tokens, fetch_k)
        with self._session() as state:
            scores, rows = self._nearest(state, matrix, k, self._among(filter, ids), num_tokens, fetch)
            found = [
                list(zip(*line, strict=True)) for line in zip(rows.tolist(), scores.tolist(), strict=True)
            ]
            if min_score is not None:
                found = [[(row, score) for row, score in line if score >= min_score] for line in found]
            return self._hits(found)

    @overload
    def search_text(  # type: ignore[overload-overlap]  # a str is a sequence of str, too
        self,
        query: str,
        k: int = 10,
        filter: Filter | None = None,
        *,
        ids: Sequence[str] | None = None,
    ) -> list[Hit]: ...

    @overload
    def search_text(
        self,
        query: Sequence[str],
        k: int = 10,
        filter: Filter | None = None,
        *,
        ids: Sequence[str] | None = None,
    ) -> list[list[Hit]]: ...

    def search_text(
        self,
        query: str | Sequence[str],
        k: int = 10,
        filter: Filter | None = None,  # noqa: A002
        *,
        ids: Sequence[str] | None = None,
    ) -> list[Hit] | list[list[Hit]]:
        """Return the k documents whose texts match the words of `query` best, for a list of queries a list each.

        Scores are BM25's, higher is better, comparable within one result only. Documents need one of the words;
        nothing in a query is an operator. `filter` and `ids` as in `search`.
        """
        queries = [query] if isinstance(query, str) else text_list(query, "queries")
        k = check_k(k)
        with self._session() as state:
            among = self._among(filter, ids)
            found = self._hits(
                [self._store.search_words(text, state.tokenizer, k, among) for text in queries]
            )
        return found[0] if isinstance(query, str) else found

    def search_hybrid(
        self,
        vectors: ArrayLike,
        queries: Sequence[str],
        k: int = 10,
        filter: Filter | None = None,  # noqa: A002
        *,
        ids: Sequence[str] | None = None,
        weights: tuple[float, float] = (1.0, 1.0),
        fetch_k: int | None = None,
        num_tokens: int | None = None,
    ) -> list[list[Hit]]:
        """Fuse `search` and `search_text` by reciprocal rank: sum of weight / (60 + rank) over both rankings.

        `vectors` [n, dimension] and `queries` (n texts) belong together; `weights` are those of the vectors and of
        the words, and 0 leaves that search out; each ranking is `fetch_k` deep, at least k and by default
        max(50, 4 k). Scores are the sums, comparable within one result only. `num_tokens` as in `search`, with
        max(100, 10 k) candidates, or `fetch_k` if that is more.
        """
        matrix = as_matrix(vectors, "query vectors")
        texts = paired_texts(queries, len(matrix))
        check_weights(weights)
        k = check_k(k)
        depth = max(k, max(50, 4 * k) if fetch_k is None else check_k(fetch_k, "fetch_k"))
        with self._session() as state:
            among = self._among(filter, ids)
            _, near = self._nearest(state, matrix, depth, among, num_tokens, coarse_depth(k))
            fused = []
            for line, text in zip(near.tolist(), texts, strict=True):
                worded = [row for row, _ in self._store.search_words(text, state.tokenizer, depth, among)]
                fused.append(fuse([line, worded], weights)[:k])
            return self._hits(fused)

    def search_mmr(
        self,
        vectors: ArrayLike,
        k: int = 10,
        filter: Filter | None = None,  # noqa: A002
        *,
        ids: Sequence[str] | None = None,
        fetch_k: int | None = None,
        lambda_mult: float = 0.5,
        num_tokens: int | None = None,
    ) -> list[list[Hit]]:
        """Choose k documents near each query and unlike each other, by maximal marginal relevance.

        They are chosen from the `fetch_k` nearest (at least k, by default max(20, 4 k)), in the order in which they
        come back; scores are cosines to the query. `lambda_mult` 1 is nearness alone, 0 unlikeness alone.
        `num_tokens` as in `search_hybrid`.
        """
        check_lambda(lambda_mult)
        matrix = as_matrix(vectors, "query vectors")
        k = check_k(k)
        depth = max(k, max(20, 4 * k) if fetch_k is None else check_k(fetch_k, "fetch_k"))
        with self._session() as state:
            among = self._among(filter, ids)
            scores, rows = self._nearest(state, matrix, depth, among, num_tokens, coarse_depth(k))
            chosen = []
            for query, line, cosines in zip(matrix, rows, scores.tolist(), strict=True):
                unit = normalise(query[None], ["query"])[0]
                candidates = self._vectors_of(line, state.dimension or 0, len(unit))
                picks = diversify(unit, candidates, k, lambda_mult)
                chosen.append([(int(line[pick]), cosines[pick]) for pick in picks])
            return self._hits(chosen)

    def search_similar(
        self,
        ids: Sequence[str],
        k: int = 10,
        filter: Filter | None = None,  # noqa: A002
    ) -> list[list[Hit]]:
        """Return, for each of these documents, the k others of highest cosine: more like this.

        Raises KeyError for an id that is not there.
        """
        wanted = id_list(ids)
        k = check_k(k)
        with self._session() as state:
            own = self._rows_of(wanted)
            matrix = self._vectors_of(own, state.dimension or 0, state.dimension or 0)
            scores, rows = self._nearest(state, matrix, k + 1, self._among(filter, None))
            lines = zip(own.tolist(), rows.tolist(), scores.tolist(), strict=True)
            return self._hits(
                [
                    [(row, score) for row, score in zip(near, cosines, strict=True) if row != itself][:k]
                    for itself, near, cosines in lines
                ]
            )

    def __len__(self) -> int:
        """Count the documents."""
        with self._session():
            return self._store.count()

    @property
    def path(self) -> Path | None:
        """The folder, or None in memory."""
        return self._path

    @property
    def read_only(self) -> bool:
        """Whether it was opened to search only."""
        return self._read_only

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

    def _copy(self, state: State, width: int) -> VectorCopy:
        """The FAISS copy of the vectors cut to `width`, made at its first use, as of this transaction.

        What was long in the making is written at once, so that even a process that is killed makes it once.
        """
        copy = self._copies.get(width)
        fresh = copy is None
        if copy is None:
            copy = self._new_copy(state, width)
        with self._dropping(copy):
            copy.catch_up(self._store, state)
            if fresh:
                copy.fold_if_worth_it(self._store, closing=True)
        self._copies[width] = copy
        return copy

    def _new_copy(self, state: State, width: int) -> VectorCopy:
        dimension = state.dimension or width
        return VectorCopy(state, dimension, width, self._path, self._gpus, read_only=self._read_only)

    @contextmanager
    def _dropping(self, copy: VectorCopy) -> Iterator[None]:
        """Forget a copy whose change failed half way: the next use makes another."""
        try:
            yield
        except BaseException:
            for width in [width for width, known in self._copies.items() if known is copy]:
                del self._copies[width]
            raise

    def _among(self, where: Filter | None, ids: Sequence[str] | None) -> Rows | None:
        """The ascending rows that a filter and a list of ids leave; None where neither limits."""
        among = None if where is None or where == {} else self._store.rows_where(where)
        if ids is None:
            return among
        named = self._store.rows_by_id(dict.fromkeys(id_list(ids)))
        return named if among is None else np.intersect1d(among, named, assume_unique=True)

    def _nearest(
        self,
        state: State,
        matrix: Any,  # noqa: ANN401
        k: int,
        among: Rows | None,
        num_tokens: int | None = None,
        fetch: int = 0,
    ) -> tuple[Float32, Rows]:
        """The k best rows for query vectors [n, width], as `VectorCopy.search` finds them.

        With `num_tokens`, the first so many tokens find at least `fetch`, and all tokens rank these.
        """
        width = matrix.shape[1] if len(matrix) else 0
        if len(matrix) and state.dimension is not None:
            check_query(width, state.dimension, state.tokens)
        first = first_width(num_tokens, width, state)
        if state.dimension is None or len(matrix) == 0:
            return np.empty((len(matrix), 0), np.float32), np.empty((len(matrix), 0), np.int64)
        queries = normalise(matrix, [f"query vectors[{position}]" for position in range(len(matrix))])
        return self._copy(state, first).search(self._store, queries, k, among, max(k, fetch))

    def _hits(self, ranked: Sequence[Iterable[tuple[int, float]]]) -> list[list[Hit]]:
        lines = [list(line) for line in ranked]
        rows = {row for line in lines for row, _ in line}
        found = self._store.documents_by_row(sorted(rows))
        if len(found) < len(rows):
            raise self._store.damage("there are vectors or words without a document")
        return [[_hit(found[row], score) for row, score in line] for line in lines]

    def _rows_of(self, ids: list[str]) -> Rows:
        rows = self._store.row_of_id(dict.fromkeys(ids))
        missing = [doc_id for doc_id in ids if doc_id not in rows]
        if missing:
            raise KeyError(f"no document has the id {missing[0]!r}")
        return np.array([rows[doc_id] for doc_id in ids], dtype=np.int64)

    def _vectors_of(self, rows: Rows, dimension: int, width: int) -> Float32:
        """The unit vectors of rows in any order, repeats allowed: [n, width]."""
        if len(rows) == 0:
            return np.empty((0, width), np.float32)
        unique, places = np.unique(rows, return_inverse=True)
        found = [unit for _, unit in self._store.vectors(dimension, width, unique)]
        if sum(map(len, found)) != len(unique):
            raise self._store.damage("there are documents without a vector")
        return np.concatenate(found)[places]


def _release(
    store: DocumentStore,
    copies: dict[int, VectorCopy],
    lock: WriterLock | None,
    mutex: threading.RLock,
    pid: int,
) -> None:
    """Close what an index holds, unless this is a fork: there it belongs to the parent."""
    if os.getpid() != pid:
        return
    if not mutex.acquire(timeout=CLOSING_SECONDS):
        return  # a thread that outlives the interpreter is in a call: its transaction is not ours to end
    try:
        try:
            with store.transaction(write=False):
                state = store.state()
                for copy in copies.values():
                    copy.catch_up(store, state)
                    copy.fold_if_worth_it(store, closing=True)
        except Exception as error:  # closing goes on: the documents are safe without a snapshot
            logger.warning("no snapshot was written at closing: %s", error)
        copies.clear()
        store.close()
        if lock is not None:
            lock.release()
    finally:
        mutex.release()


def _hit(document: tuple[str, str, str], score: float) -> Hit:
    doc_id, text, metadata = document
    return Hit(doc_id, score, text, json.loads(metadata))
