"""Rankings made from rankings: fusion of two, and diversity within one."""

from collections.abc import Iterable, Sequence

import numpy as np

from autoregembed_indexes.vectors import Float32

RANK_CONSTANT = 60


def fuse(rankings: Iterable[Sequence[int]], weights: Sequence[float]) -> list[tuple[int, float]]:
    """Reciprocal-rank fusion (Cormack et al., 2009): sum of weight / (60 + rank), best first.

    Rankings list rows, best first; of equal sums the lower row comes first. A ranking of weight 0 adds no rows.
    """
    scores: dict[int, float] = {}
    for ranking, weight in zip(rankings, weights, strict=True):
        if weight == 0:
            continue
        for rank, row in enumerate(ranking, 1):
            scores[row] = scores.get(row, 0.0) + weight / (RANK_CONSTANT + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def diversify(query: Float32, candidates: Float32, k: int, lambda_mult: float) -> list[int]:
    """Maximal marginal relevance (Carbonell and Goldstein, 1998): positions of k candidates, in order of choice.

    Each choice maximises lambda * cosine to the query - (1 - lambda) * highest cosine to one chosen before; of
    equals, the first is chosen. `query` [d] and `candidates` [n, d] are unit vectors.
    """
    wide = candidates.astype(np.float64)  # sums in float32 would tell equal vectors apart by their place

    def cosines(vector: Float32) -> Float32:
        found: Float32 = (wide @ vector).astype(np.float32)
        return found

    relevance = cosines(query)
    closest = np.full(len(candidates), -np.inf, dtype=np.float32)
    chosen: list[int] = []
    while len(chosen) < min(k, len(candidates)):
        redundancy = np.where(np.isfinite(closest), closest, 0)
        gain = lambda_mult * relevance - (1 - lambda_mult) * redundancy
        gain[chosen] = -np.inf
        best = int(np.argmax(gain))
        chosen.append(best)
        closest = np.maximum(closest, cosines(candidates[best]))
    return chosen
