"""Exact cosines of queries with stored vectors."""

import numpy as np
from numpy.typing import NDArray

from autoregembed_indexes.kinds import FLOAT_MARGIN
from autoregembed_indexes.segment import best, dot, locate
from autoregembed_indexes.store import DocumentStore, Rows
from autoregembed_indexes.vectors import Float32


def score(
    store: DocumentStore,
    dimension: int,
    queries: Float32,
    k: int,
    among: Rows | None,
    candidates: Rows | None = None,
) -> tuple[Float32, Rows]:
    """Score the first entries of stored vectors against unit `queries` [n, width], and keep the best k of each.

    `among`, ascending, says which; None means all. `candidates` [n, m] says which of these count for each query;
    None means all. Scores and rows are [n, k], best first, equal scores in the order of their rows.
    """
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    for part, unit in store.vectors(dimension, queries.shape[1], among):
        rough = queries @ unit.T
        if candidates is not None:
            rough[~_holds(candidates, part)] = -np.inf
        for line, query in enumerate(queries):
            least = np.partition(rough[line], -k)[-k] if k < len(part) else -np.inf
            bound = max(least, scores[line, -1], -2) - FLOAT_MARGIN
            likely = np.flatnonzero(rough[line] >= bound)  # few, so that summing in float64 costs little
            found = np.concatenate([scores[line], dot(unit[likely], query)])
            scores[line], rows[line] = best(found[None], np.concatenate([rows[line], part[likely]])[None], k)
    return scores, rows


def _holds(lists: Rows, rows: Rows) -> NDArray[np.bool_]:
    """Tell which of the ascending `rows` [m] each of the `lists` [n, any] holds: [n, m]."""
    places, here = locate(rows, lists)
    held = np.zeros((len(lists), len(rows)), dtype=bool)
    held[np.nonzero(here)[0], places[here]] = True
    return held
