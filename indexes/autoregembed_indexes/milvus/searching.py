"""What an index on a server does without changing anything: reading documents and searching them."""

import json
import re
from collections.abc import Sequence
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
from autoregembed_indexes.errors import DocumentIndexError
from autoregembed_indexes.lexical import MAX_WORDS
from autoregembed_indexes.milvus.collection import MOST_HITS, Collection, Line, id_of, key_of
from autoregembed_indexes.milvus.expressions import Judge
from autoregembed_indexes.milvus.finding import Finding
from autoregembed_indexes.milvus.server import Server
from autoregembed_indexes.ranking import diversify, fuse
from autoregembed_indexes.records import Document, Hit
from autoregembed_indexes.settings import State, check_query, first_width
from autoregembed_indexes.store import Filter
from autoregembed_indexes.vectors import Float32, as_matrix, normalise, stored_to_unit


class SearchableCollection:
    """The reading half of `MilvusDocumentIndex`."""

    _server: Server
    _state: State

    def _opened(self) -> Collection | None:
        """The collection, once there is one."""
        raise NotImplementedError

    def get(self, ids: Sequence[str]) -> list[Document]:
        """Return the documents with these ids, in this order, leaving out ids that are not there."""
        keys = [key_of(doc_id) for doc_id in id_list(ids)]
        collection = self._opened()
        found = collection.read(dict.fromkeys(keys)) if collection else {}
        rows = [found[key] for key in keys if key in found]
        return [Document(row.id, row.text, json.loads(row.metadata)) for row in rows]

    def ids(self, filter: Filter | None = None) -> list[str]:  # noqa: A002
        """Return the ids of all documents, or of those that match `filter` (see `search`), in no special order."""
        finding = self._finding(filter, None)
        return [id_of(key) for key in finding.all_matching()] if finding else []

    def vectors(self, ids: Sequence[str]) -> Float32:
        """Return the vectors of these documents as unit rows, float32 [n, dimension].

        Raises KeyError for an id that is not there.
        """
        wanted = id_list(ids)
        collection = self._opened()
        return self._vectors_of(collection, [key_of(doc_id) for doc_id in wanted])

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

        Arguments and errors are those of `DocumentIndex.search`, but that `k` and `fetch_k` are at most 16,384. A
        query of the first few tokens, or `num_tokens`, finds candidates as if all tokens of a document had the same
        length, which is so in a flattened embedding. With a factory other than "Flat", documents may be missed, but
        not for a filter's sake.
        """
        matrix = as_matrix(vectors, "query vectors")
        k = _check_k(k)
        fetch = _check_k(coarse_depth(k, num_tokens, fetch_k), "fetch_k", cut=fetch_k is None)
        finding = self._finding(filter, ids)
        lines = self._nearest(finding, matrix, k, num_tokens, fetch)
        return finding.hits(lines, min_score) if finding else [[] for _ in lines]

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

        As `DocumentIndex.search_text`, where the server has BM25: Milvus from 2.5 on, and milvus-lite. Raises
        DocumentIndexError, naming the server's version, where it has not.
        """
        queries = [query] if isinstance(query, str) else text_list(query, "queries")
        k = _check_k(k)
        self._check_words()
        finding = self._finding(filter, ids)
        found = finding.hits(_worded(finding, queries, k)) if finding else [[] for _ in queries]
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
        """Fuse `search` and `search_text` by reciprocal rank, as `DocumentIndex.search_hybrid` does.

        Raises DocumentIndexError where the server cannot search by words.
        """
        matrix = as_matrix(vectors, "query vectors")
        texts = paired_texts(queries, len(matrix))
        check_weights(weights)
        k = _check_k(k)
        depth = max(
            k, _check_k(max(50, 4 * k) if fetch_k is None else fetch_k, "fetch_k", cut=fetch_k is None)
        )
        self._check_words()
        finding = self._finding(filter, ids)
        near = self._nearest(finding, matrix, depth, num_tokens, _check_k(coarse_depth(k), cut=True))
        if finding is None:
            return [[] for _ in texts]
        worded = _worded(finding, texts, depth)
        return finding.hits(
            [_fused([line, words], weights)[:k] for line, words in zip(near, worded, strict=True)]
        )

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
        """Choose k documents near each query and unlike each other, as `DocumentIndex.search_mmr` does."""
        check_lambda(lambda_mult)
        matrix = as_matrix(vectors, "query vectors")
        k = _check_k(k)
        depth = max(
            k, _check_k(max(20, 4 * k) if fetch_k is None else fetch_k, "fetch_k", cut=fetch_k is None)
        )
        finding = self._finding(filter, ids)
        lines = self._nearest(finding, matrix, depth, num_tokens, _check_k(coarse_depth(k), cut=True))
        if finding is None:
            return [[] for _ in lines]
        chosen = []
        for query, line in zip(matrix, lines, strict=True):
            unit = normalise(query[None], ["query"])[0]
            vectors = self._vectors_of(self._opened(), [key for key, _ in line])
            candidates = stored_to_unit(vectors, len(unit))
            chosen.append([line[pick] for pick in diversify(unit, candidates, k, lambda_mult)])
        return finding.hits(chosen)

    def search_similar(
        self,
        ids: Sequence[str],
        k: int = 10,
        filter: Filter | None = None,  # noqa: A002
    ) -> list[list[Hit]]:
        """Return, for each of these documents, the k others of highest cosine: more like this.

        Raises KeyError for an id that is not there.
        """
        keys = [key_of(doc_id) for doc_id in id_list(ids)]
        k = _check_k(k)
        finding = self._finding(filter, None)
        matrix = self._vectors_of(self._opened(), keys)
        lines = self._nearest(finding, matrix, min(k + 1, MOST_HITS))
        others = [
            [(key, score) for key, score in line if key != own][:k]
            for own, line in zip(keys, lines, strict=True)
        ]
        return finding.hits(others) if finding else [[] for _ in others]

    def __len__(self) -> int:
        """Count the documents."""
        collection = self._opened()
        return collection.count() if collection else 0

    def _finding(self, where: Filter | None, ids: Sequence[str] | None) -> Finding | None:
        """A search among the documents that a filter and ids leave; None where there is no collection yet."""
        keys = None if ids is None else [key_of(doc_id) for doc_id in id_list(ids)]
        collection = self._opened()
        if collection is None and where:
            Judge(where)  # refuses what is not a filter
        return Finding(collection, where, keys) if collection else None

    def _nearest(
        self,
        finding: Finding | None,
        matrix: Any,  # noqa: ANN401
        k: int,
        num_tokens: int | None = None,
        fetch: int = 0,
    ) -> list[Line]:
        """The k best for query vectors [n, width]; the first `num_tokens` find at least `fetch`, all rank these."""
        state = self._state
        width = matrix.shape[1] if len(matrix) else 0
        if len(matrix) and state.dimension is not None:
            check_query(width, state.dimension, state.tokens)
        first = first_width(num_tokens, width, state)
        if finding is None or state.dimension is None or len(matrix) == 0:
            return [[] for _ in range(len(matrix))]
        queries = normalise(matrix, [f"query vectors[{position}]" for position in range(len(matrix))])
        whole = _padded(queries, state.dimension)
        if first == width == state.dimension:
            lines = finding.best(whole, k)
        elif first == width:
            lines = finding.best(whole, min(2 * k + 16, MOST_HITS))
        else:
            lines = finding.best(_padded(queries[:, :first], state.dimension), max(k, fetch))
            if width == state.dimension:
                lines = [
                    finding.best_among(whole[position : position + 1], k, [key for key, _ in line])[0]
                    for position, line in enumerate(lines)
                ]
        if width < state.dimension:
            lines = [self._ranked(query, line, k) for query, line in zip(queries, lines, strict=True)]
        return [[(key, max(-1.0, min(score, 1.0))) for key, score in line] for line in lines]

    def _ranked(self, query: Float32, line: Line, k: int) -> Line:
        """Rank candidates by the part of their vectors that a query [width] has, whose length no server divides by."""
        keys = [key for key, _ in line]
        parts = stored_to_unit(self._vectors_of(self._opened(), keys), len(query))
        scores = (parts @ query).tolist()
        return sorted(zip(keys, scores, strict=True), key=lambda item: (-item[1], item[0]))[:k]

    def _vectors_of(self, collection: Collection | None, keys: list[str]) -> Float32:
        found = collection.vectors(dict.fromkeys(keys)) if collection else {}
        missing = [key for key in keys if key not in found]
        if missing:
            raise KeyError(f"no document has the id {id_of(missing[0])!r}")
        if not keys:
            return np.empty((0, self._state.dimension or 0), np.float32)
        stored = np.stack([found[key] for key in keys])
        return stored_to_unit(stored, stored.shape[1]) if collection and collection.has_half else stored

    def _check_words(self) -> None:
        collection = self._opened()
        if collection.has_words if collection else self._server.has_words:
            return
        at = f"Milvus {self._server.version_text} at {self._server.uri}"
        if self._server.has_words:
            raise DocumentIndexError(
                f"the collection was made when {at} was older and could not search by words; make a new one, or search "
                "by vectors: search, search_mmr, search_similar"
            )
        raise DocumentIndexError(
            f"{at} cannot search by words, which came with Milvus 2.5; search by vectors: search, search_mmr, "
            "search_similar"
        )


def _check_k(k: int, name: str = "k", *, cut: bool = False) -> int:
    checked = check_k(k, name)
    if checked > MOST_HITS and not cut:
        raise ValueError(
            f"{name} must be at most {MOST_HITS:,}, the most that Milvus returns, got {checked:,}"
        )
    return min(checked, MOST_HITS)


def _padded(queries: Float32, dimension: int) -> Float32:
    """Query vectors of the first tokens, with zeros for the others: [n, dimension]."""
    padded = np.zeros((len(queries), dimension), np.float32)
    padded[:, : queries.shape[1]] = queries
    return padded


def _worded(finding: Finding, texts: Sequence[str], k: int) -> list[Line]:
    """The k best for each text's words; a word counts once, and those after the first 1,000 do not."""
    words = [" ".join(list(dict.fromkeys(re.findall(r"\w+", text)))[:MAX_WORDS]) for text in texts]
    asked = [position for position, text in enumerate(words) if text]
    found: list[Line] = [[] for _ in texts]
    for position, line in zip(asked, finding.best([words[position] for position in asked], k), strict=True):
        found[position] = line
    return found


def _fused(rankings: list[Line], weights: tuple[float, float]) -> Line:
    keys = sorted({key for ranking in rankings for key, _ in ranking})
    number = {key: position for position, key in enumerate(keys)}
    fused = fuse([[number[key] for key, _ in ranking] for ranking in rankings], weights)
    return [(keys[position], score) for position, score in fused]
