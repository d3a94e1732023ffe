"""One search of a collection: the best k of the documents that match, exactly those.

The server leaves out what an expression can rule out. What it finds is judged by the documents' own metadata, and
more is asked for until k match. Where that would take more than a server answers, the keys of all that match are
listed, and searched.
"""

import json
from collections.abc import Iterable, Sequence

import numpy as np

from autoregembed_indexes.milvus.collection import MOST_HITS, Collection, Line, Row, among, chunks
from autoregembed_indexes.milvus.expressions import Judge, expression_of
from autoregembed_indexes.records import Hit
from autoregembed_indexes.store import Filter
from autoregembed_indexes.vectors import Float32

Queries = Float32 | Sequence[str]  # vectors [n, dimension], or texts


class Finding:
    """What a call has read so far, and what it may find."""

    def __init__(self, collection: Collection, where: Filter | None, keys: Sequence[str] | None) -> None:
        """`keys`, where given, limit what is found, and `where` does."""
        self._collection = collection
        self._judge = None if where is None or where == {} else Judge(where)
        self._expression = expression_of(where)
        self._verdicts: dict[str, bool] = {}
        self._rows: dict[str, Row] = {}
        self._possible: int | None = None  # how many documents the expression leaves, once it matters
        self._keys = None if keys is None else self.matching(dict.fromkeys(keys))

    def best(self, queries: Queries, k: int) -> list[Line]:
        """The k best for each query."""
        if self._keys is not None:
            return self.best_among(queries, k, self._keys)
        found: list[Line] = [[] for _ in range(len(queries))]
        unfinished, limit = list(range(len(queries))), k
        while unfinished:
            lines = self._search(_part(queries, unfinished), limit, self._expression)
            matching = set(self.matching({key for line in lines for key, _ in line}))
            asked, unfinished = unfinished, []
            for position, line in zip(asked, lines, strict=True):
                found[position] = [(key, score) for key, score in line if key in matching][:k]
                if len(found[position]) < k and not self._is_all(queries, line, limit):
                    unfinished.append(position)
            if limit == MOST_HITS:
                break
            limit = min(4 * limit, MOST_HITS)
        if unfinished:
            rest = self.best_among(_part(queries, unfinished), k, self.all_matching())
            for position, line in zip(unfinished, rest, strict=True):
                found[position] = line
        return found

    def best_among(self, queries: Queries, k: int, keys: Sequence[str]) -> list[Line]:
        """The k best of these keys for each query."""
        found: list[Line] = [[] for _ in range(len(queries))]
        for chunk in chunks(keys):
            lines = self._search(queries, min(k, len(chunk)), among(chunk), thorough=True)
            if isinstance(queries, np.ndarray) and not self._collection.kind.exact:
                lines = self._completed(queries, lines, min(k, len(chunk)), chunk)
            found = [
                sorted([*line, *more], key=lambda item: (-item[1], item[0]))[:k]
                for line, more in zip(found, lines, strict=True)
            ]
        return found

    def matching(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys whose documents match."""
        keys = list(keys)
        if self._judge is None:
            return keys
        unknown = [key for key in keys if key not in self._verdicts]
        metadatas = {key: self._rows[key].metadata for key in unknown if key in self._rows}
        metadatas |= self._collection.metadatas([key for key in unknown if key not in metadatas])
        verdicts = self._judge(list(metadatas.values()))
        self._verdicts |= zip(metadatas, verdicts, strict=True)
        return [key for key in keys if self._verdicts.get(key)]

    def all_matching(self) -> list[str]:
        """The keys of all documents that match."""
        if self._keys is not None:
            return self._keys
        found = []
        for page in self._collection.pages(self._expression, metadata=self._judge is not None):
            verdicts = self._judge([metadata for _, metadata in page]) if self._judge else [True] * len(page)
            found += [key for (key, _), matches in zip(page, verdicts, strict=True) if matches]
        return found

    def hits(self, lines: Sequence[Line], min_score: float | None = None) -> list[list[Hit]]:
        """The documents of keys and scores; those that were deleted meanwhile are left out."""
        kept = [
            [(key, score) for key, score in line if min_score is None or score >= min_score] for line in lines
        ]
        missing = {key for line in kept for key, _ in line if key not in self._rows}
        rows = self._rows | self._collection.read(missing)
        return [[_hit(rows[key], score) for key, score in line if key in rows] for line in kept]

    def _search(self, queries: Queries, limit: int, expression: str, *, thorough: bool = False) -> list[Line]:
        return self._collection.search(queries, limit, expression, rows=self._rows, thorough=thorough)

    def _is_all(self, queries: Queries, line: Line, limit: int) -> bool:
        """Whether a line of fewer than `limit` is all that there is."""
        if len(line) == limit:
            return False
        if self._collection.kind.exact or not isinstance(queries, np.ndarray):
            return True
        if self._possible is None:
            self._possible = self._collection.count(self._expression)
        return len(line) >= self._possible

    def _completed(self, queries: Float32, lines: list[Line], k: int, keys: Sequence[str]) -> list[Line]:
        """Score here what an approximate index did not find of keys that it was given."""
        if all(len(line) == k for line in lines):
            return lines
        vectors = self._collection.vectors(keys)
        stored = np.array(list(vectors.values()), np.float32).reshape(len(vectors), -1)
        scores = queries @ stored.T / np.linalg.norm(queries, axis=1)[:, None]
        return [list(zip(vectors, line.tolist(), strict=True)) for line in scores]


def _part(queries: Queries, positions: list[int]) -> Queries:
    return (
        queries[positions]
        if isinstance(queries, np.ndarray)
        else [queries[position] for position in positions]
    )


def _hit(row: Row, score: float) -> Hit:
    return Hit(row.id, score, row.text, json.loads(row.metadata))
