"""Retrieval before and after training, on queries that training did not see.

A difference is only called better if chance is an unlikely explanation: see `Comparison.better`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tqdm import tqdm

DEPTH = 10
"""The rank down to which nDCG looks."""

ENCODED_AT_ONCE = 512
"""Documents whose vectors are in memory at the same time."""

RESAMPLES = 10_000
RESAMPLED_NUMBERS_AT_ONCE = 4_000_000
CONFIDENCE = 0.95

FEWEST = 6
"""Queries from which a difference can be told: of fewer, p cannot go below 2 / 2^queries > 1 - CONFIDENCE."""

FEW_QUERIES = (
    f"fewer than {FEWEST} held-out queries can never show a difference, however large: hold out a larger share "
    "(held_out, --held-out), or give more documents or queries"
)


class Encoder(Protocol):
    """What is measured: an `AutoRegEncoder`, or anything else with its two methods."""

    def encode_queries(self, texts: list[str], *, batch_size: int | None = None) -> np.ndarray:
        """float32 [n, dimension], unit rows."""
        ...

    def encode_documents(self, texts: list[str], *, batch_size: int | None = None) -> np.ndarray:
        """float32 [n, dimension], unit rows."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """Queries with their relevant texts.

    Attributes:
        queries: id -> text.
        corpus: id -> text of everything that is searched.
        qrels: query id -> corpus id -> grade; above 0 is relevant.
    """

    queries: Mapping[str, str]
    corpus: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]

    def __post_init__(self) -> None:
        if not self.queries:
            raise ValueError("an evaluation needs at least one query")
        for query in self.queries:
            relevant = [text for text, grade in self.qrels.get(query, {}).items() if grade > 0]
            if not relevant:
                raise ValueError(f"query {query!r} has no relevant text")
            if unknown := [text for text in relevant if text not in self.corpus]:
                raise ValueError(
                    f"query {query!r} has the relevant text {unknown[0]!r}, which is not in the corpus"
                )


@dataclass(frozen=True)
class Scores:
    """nDCG@10 of every query, in [0, 1]."""

    per_query: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Over all queries."""
        return float(np.mean(list(self.per_query.values())))


def retrieval_score(
    encoder: Encoder, evaluation: Evaluation, *, batch_size: int | None = None, show_progress: bool = False
) -> Scores:
    """nDCG@10 of exact search by cosine, computed by ir-measures.

    Needs the vectors of all queries and of 512 texts of the corpus in memory.

    Raises:
        ImportError: ir-measures is not installed; it comes with the extra `train`.
        ValueError: the encoder returns vectors that are not finite.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise ImportError(
            'measuring retrieval needs ir-measures: pip install "autoregembed-rag[train]"'
        ) from error
    queries, texts = list(evaluation.queries), list(evaluation.corpus)
    vectors = encoder.encode_queries([evaluation.queries[query] for query in queries], batch_size=batch_size)
    scores = np.full((len(queries), 0), 0, dtype=np.float32)
    found = np.empty((len(queries), 0), dtype=np.int64)
    with tqdm(total=len(texts), desc="held-out search", unit="text", disable=not show_progress) as progress:
        for start in range(0, len(texts), ENCODED_AT_ONCE):
            part = [evaluation.corpus[text] for text in texts[start : start + ENCODED_AT_ONCE]]
            here = vectors @ encoder.encode_documents(part, batch_size=batch_size).T
            if not np.isfinite(here).all():
                raise ValueError("the encoder returns vectors that are not finite: its training has diverged")
            places = np.broadcast_to(np.arange(start, start + len(part)), here.shape)
            scores, found = _best(np.hstack([scores, here]), np.hstack([found, places]))
            progress.update(len(part))
    run = {
        query: {texts[place]: float(score) for place, score in zip(places, row, strict=True)}
        for query, places, row in zip(queries, found, scores, strict=True)
    }
    qrels = {query: dict(evaluation.qrels[query]) for query in queries}
    values = {
        v.query_id: float(v.value) for v in ir_measures.iter_calc([ir_measures.nDCG @ DEPTH], qrels, run)
    }
    return Scores({query: values[query] for query in queries})


def _best(scores: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The DEPTH best columns of every row, equal ones in the order of the corpus."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(places, order, axis=1)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same queries.

    Attributes:
        before, after: mean nDCG@10.
        difference: after - before.
        low, high: 95% interval of the difference, from a paired bootstrap over the queries.
        p_value: of a two-sided randomisation test that swaps before and after query by query.
        queries: how many there are.
    """

    before: float
    after: float
    difference: float
    low: float
    high: float
    p_value: float
    queries: int

    @property
    def better(self) -> bool:
        """True only if the difference is above 0, its whole interval too, and p is below 0.05.

        The two ask the same of many queries. Of few, the bootstrap is too sure of itself (three queries that all
        gained give an interval above 0), and the randomisation test, which cannot go below 2 / 2^queries, is not.
        """
        return self.difference > 0 and self.low > 0 and self.p_value < 1 - CONFIDENCE

    @property
    def worse(self) -> bool:
        """As `better`, in the other direction. Neither: the queries cannot tell."""
        return self.difference < 0 and self.high < 0 and self.p_value < 1 - CONFIDENCE

    def __str__(self) -> str:
        verdict = (
            "better"
            if self.better
            else "worse"
            if self.worse
            else "no difference that these queries can show"
        )
        return (
            f"nDCG@{DEPTH} {self.before:.4f} -> {self.after:.4f}, difference {self.difference:+.4f} "
            f"(95% interval {self.low:+.4f} to {self.high:+.4f}, p = {self.p_value:.4f}, "
            f"{self.queries} queries): {verdict}"
        )


def compare(before: Scores, after: Scores, *, seed: int = 0) -> Comparison:
    """Whether `after` is better than `before`, by paired tests of 10,000 resamples each; the same for the same seed.

    ValueError if the two were not measured on the same queries.
    """
    if before.per_query.keys() != after.per_query.keys() or not before.per_query:
        raise ValueError("before and after must be scores of the same queries, at least one")
    first = np.array(list(before.per_query.values()))
    second = np.array([after.per_query[query] for query in before.per_query])
    differences = second - first
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            differences[rng.integers(0, differences.size, shape)].mean(axis=1)
            for shape in _shapes(differences.size)
        ]
    )
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    swapped = np.concatenate(
        [(rng.choice([-1.0, 1.0], shape) * differences).mean(axis=1) for shape in _shapes(differences.size)]
    )
    difference = float(differences.mean())
    # A hair below, so that rounding does not make an equal mean a smaller one; the observed outcome counts as one.
    extreme = int((np.abs(swapped) >= abs(difference) * (1 - 1e-9)).sum())
    return Comparison(
        before=float(first.mean()),
        after=float(second.mean()),
        difference=difference,
        low=float(low),
        high=float(high),
        p_value=(1 + extreme) / (1 + RESAMPLES),
        queries=differences.size,
    )


def _shapes(queries: int) -> Iterator[tuple[int, int]]:
    """(resamples, queries) of the blocks that make up RESAMPLES, none of them large."""
    size = max(1, RESAMPLED_NUMBERS_AT_ONCE // queries)
    for start in range(0, RESAMPLES, size):
        yield min(size, RESAMPLES - start), queries
