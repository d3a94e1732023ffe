"""What callers of a search give, checked."""

import operator
from collections.abc import Sequence

import numpy as np

from autoregembed_indexes.records import check_ids

MOST_HITS = 2**40  # no index has more, and SQLite's and FAISS' integers end at 2**63


def id_list(ids: Sequence[str]) -> list[str]:
    """Check a list of ids, and copy it."""
    if isinstance(ids, str):
        raise TypeError("ids must be a list of ids, got str")
    wanted = list(ids)
    check_ids(wanted)
    return wanted


def text_list(texts: Sequence[str], argument: str) -> list[str]:
    """Check a list of texts, and copy it."""
    if isinstance(texts, str):
        raise TypeError(f"{argument} must be a list of texts, got str")
    checked = list(texts)
    for position, text in enumerate(checked):
        if not isinstance(text, str):
            raise TypeError(f"{argument}[{position}] must be str, got {type(text).__name__}")
    return checked


def check_weights(weights: Sequence[float]) -> None:
    """Raise ValueError unless a fusion can use them."""
    try:
        vectors, words = (float(weight) for weight in weights)
        sound = 0 <= vectors < np.inf and 0 <= words < np.inf and vectors + words > 0
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(
            f"weights must be two numbers of at least 0 (vectors, words), not both 0, got {weights!r}"
        )


def paired_texts(queries: Sequence[str], count: int) -> list[str]:
    """Check the query texts that belong to `count` query vectors, and copy them."""
    texts = text_list(queries, "queries")
    if len(texts) != count:
        raise ValueError(f"{count} query vectors but {len(texts)} query texts")
    return texts


def check_lambda(lambda_mult: float) -> None:
    """Raise ValueError for a weight of nearness that is no share."""
    if not 0 <= lambda_mult <= 1:
        raise ValueError(f"lambda_mult must be between 0 and 1, got {lambda_mult}")


def check_k(k: int, name: str = "k") -> int:
    """Check a number of hits."""
    k = operator.index(k)
    if k < 1:
        raise ValueError(f"{name} must be at least 1, got {k}")
    return min(k, MOST_HITS)


def coarse_depth(k: int, num_tokens: int | None = None, fetch_k: int | None = None) -> int:
    """How many documents the first `num_tokens` tokens find where k are wanted: max(100, 10 k) by default."""
    if fetch_k is None:
        return max(100, 10 * k)
    depth = max(k, check_k(fetch_k, "fetch_k"))
    if num_tokens is None:
        raise ValueError(
            f"fetch_k={fetch_k} is how many documents the first num_tokens tokens find: give num_tokens, too, or "
            "leave both out to search by all tokens"
        )
    return depth
