"""nDCG@10, Recall@100 and MRR@10, computed by ir-measures; Spearman's rank correlation."""

from collections.abc import Mapping

import ir_measures
import numpy as np
from ir_measures import RR, R, nDCG

MEASURES = {"nDCG@10": nDCG @ 10, "Recall@100": R @ 100, "MRR@10": RR @ 10}
DEPTH = 100
"""How many documents a system has to return per query for the measures above."""


def score_run(
    qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Means over the judged queries; `run` is query id -> document id -> score, without hits counts 0."""
    answered = {query: dict(hits) for query, hits in run.items() if hits}
    if not answered:
        return dict.fromkeys(MEASURES, 0.0)
    values = ir_measures.calc_aggregate(list(MEASURES.values()), qrels, answered)
    return {name: float(values[measure]) for name, measure in MEASURES.items()}


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation in [-1, 1] of two equally long series, equal values sharing their mean rank.

    ValueError where it is undefined: fewer than two values, or all values of one side equal.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"two series of the same length, 2 or more, are needed, not {len(first)} and {len(second)}"
        )
    x, y = (ranks - ranks.mean() for ranks in (_mean_ranks(first), _mean_ranks(second)))
    norm = float(np.sqrt((x @ x) * (y @ y)))
    if norm == 0:
        raise ValueError("all values of one series are equal: a rank correlation is undefined")
    return float(x @ y) / norm


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]
