"""Seeded documents and queries for `benchmarks.search`: vectors as embeddings are, or as bad as can be; Zipf texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

TOKENS = 5
TOPICS = 64
QUERIES = 128
WORDS = 20_000
WORDS_PER_TEXT = 60
WORDS_PER_QUERY = 8
SCORE_MARGIN = 1e-4

# Metadata keys, and how many values each has: one value selects 0.1 %, 1 %, 10 % and 50 % of the documents.
KEYS = {"source": 1000, "author": 100, "section": 10, "public": 2}


@dataclass(frozen=True)
class Collection:
    """Documents and queries: unit vectors [n, d] and [q, d], texts, metadata; document i has the id str(i)."""

    vectors: Float32
    texts: list[str]
    metadatas: list[dict[str, int]]
    queries: Float32
    query_texts: list[str]

    @cached_property
    def ids(self) -> list[str]:
        """The documents' ids."""
        return [str(position) for position in range(len(self.texts))]


@dataclass(frozen=True)
class Where:
    """A filter on one metadata value, and what those need who cannot filter: the matches, a search depth."""

    key: str
    value: int
    matches: NDArray[np.bool_]
    fetch_k: int

    @property
    def filter(self) -> dict[str, int]:
        """The filter as a dict."""
        return {self.key: self.value}


def structured(documents: int, dimension: int, seed: int) -> Collection:
    """Vectors as a flattened embedding has them: 5 unit vectors, one per compressed token, joined and scaled.

    Each is a mixture of 64 topics of power-law weight, noise as strong, and a part common to all. A query lies
    near a document.
    """
    rng = np.random.default_rng(seed)
    weights = np.arange(1, TOPICS + 1, dtype=np.float32) ** -0.5
    weights /= np.linalg.norm(weights)
    mixtures = rng.standard_normal((documents, TOPICS), dtype=np.float32) * weights
    near = rng.choice(documents, QUERIES)
    vectors = np.empty((documents, dimension), dtype=np.float32)
    queries = np.empty((QUERIES, dimension), dtype=np.float32)
    for token in np.array_split(np.arange(dimension), TOKENS):
        part = slice(token[0], token[-1] + 1)
        topics, common, noise, aside = (
            rng.standard_normal((count, len(token)), dtype=np.float32)
            for count in (TOPICS, 1, documents, QUERIES)
        )
        noise += mixtures @ topics
        vectors[:, part] = _unit(noise + common)
        queries[:, part] = _unit(vectors[near, part] + 0.7 * _unit(aside))
    return Collection(
        _unit(vectors),
        _texts(rng, rng.poisson(WORDS_PER_TEXT, documents)),
        _metadatas(rng, documents),
        _unit(queries),
        _texts(rng, np.full(QUERIES, WORDS_PER_QUERY)),
    )


def isotropic(like: Collection, seed: int) -> Collection:
    """The same documents with Gaussian vectors and queries, which have no structure to use: the worst case."""
    rng = np.random.default_rng(seed)
    shapes = like.vectors.shape, like.queries.shape
    vectors, queries = (_unit(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes)
    return replace(like, vectors=vectors, queries=queries)


def conditions(data: Collection, k: int) -> dict[str, Where]:
    """One filter per metadata key by its selectivity, "0.1 %" and so on; `fetch_k` lets 2 k matches be expected."""
    found = {}
    for key, values in KEYS.items():
        matches = np.array([metadata[key] == 0 for metadata in data.metadatas])
        found[f"{100 / values:g} %"] = Where(key, 0, matches, min(len(matches), 2 * k * values))
    return found


def recall(found: Sequence[Sequence[int]], scores: Float32, k: int) -> float:
    """The share of the exact k best documents that was found; `scores` [q, n] are those of all documents.

    A document within 1e-4 of the k-th score counts as one of the best: rounding may have changed its place.
    """
    worst = -np.partition(-scores, k - 1, axis=1)[:, k - 1] - SCORE_MARGIN
    hits = [
        (line[positions] >= least).sum() for positions, line, least in zip(found, scores, worst, strict=True)
    ]
    return float(np.minimum(hits, k).mean() / k)


def _unit(vectors: Float32) -> Float32:
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _texts(rng: np.random.Generator, lengths: NDArray[np.int64]) -> list[str]:
    chances = 1 / np.arange(1, WORDS + 1)
    drawn = rng.choice(WORDS, int(lengths.sum()), p=chances / chances.sum()).tolist()
    words = [f"word{rank}" for rank in range(WORDS)]
    ends = np.cumsum(lengths).tolist()
    return [
        " ".join([words[rank] for rank in drawn[end - length : end]])
        for end, length in zip(ends, lengths.tolist(), strict=True)
    ]


def _metadatas(rng: np.random.Generator, documents: int) -> list[dict[str, int]]:
    columns = {key: (rng.permutation(documents) % values).tolist() for key, values in KEYS.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
