"""Query modes: what a VectorStoreQuery asks of a DocumentIndex."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryMode
from numpy.typing import NDArray

from autoregembed_indexes import Hit
from autoregembed_indexes.places import AnyIndex
from llama_index.vector_stores.autoregembed.filters import compile_filters
from llama_index.vector_stores.autoregembed.nodes import REF_DOC_KEY

DEFAULT_ALPHA = 0.5
DEFAULT_MMR_THRESHOLD = 0.5
_OPTIONS: dict[VectorStoreQueryMode, tuple[str, ...]] = {
    VectorStoreQueryMode.DEFAULT: ("num_tokens", "fetch_k"),
    VectorStoreQueryMode.HYBRID: ("num_tokens",),
    VectorStoreQueryMode.MMR: ("num_tokens", "mmr_threshold", "mmr_prefetch_factor", "mmr_prefetch_k"),
}


def search(index: AnyIndex, query: VectorStoreQuery, options: Mapping[str, Any]) -> list[Hit]:
    """The hits of a query in its mode, best first; see `AutoRegVectorStore.query`."""
    mode = VectorStoreQueryMode(query.mode)
    if mode not in _SEARCHES:
        modes = ", ".join(repr(known.value) for known in _SEARCHES)
        raise ValueError(f"query mode {mode.value!r} is not supported; these are: {modes}")
    if unknown := sorted(set(options).difference(_OPTIONS.get(mode, ()))):
        raise TypeError(
            f"unknown options {unknown} in query mode {mode.value!r}: AutoRegVectorStore would have to ignore them"
        )
    if query.embedding_field is not None:
        raise ValueError(f"embedding_field {query.embedding_field!r}: nodes have one embedding; leave it out")
    among = {"filter": _where(query), "ids": query.node_ids or None}
    return _SEARCHES[mode](index, query, among, **options)


def _nearest(
    index: AnyIndex,
    query: VectorStoreQuery,
    among: dict[str, Any],
    num_tokens: int | None = None,
    fetch_k: int | None = None,
) -> list[Hit]:
    vector, k = _vector(query), query.similarity_top_k
    return index.search(vector, k, num_tokens=num_tokens, fetch_k=fetch_k, **among)[0]


def _worded(index: AnyIndex, query: VectorStoreQuery, among: dict[str, Any]) -> list[Hit]:
    return index.search_text(_text(query), query.sparse_top_k or query.similarity_top_k, **among)


def _fused(
    index: AnyIndex, query: VectorStoreQuery, among: dict[str, Any], num_tokens: int | None = None
) -> list[Hit]:
    alpha = _fraction("alpha", DEFAULT_ALPHA if query.alpha is None else query.alpha)
    k = query.hybrid_top_k or query.similarity_top_k
    depth = max(query.similarity_top_k, query.sparse_top_k or 0)
    return index.search_hybrid(
        _vector(query),
        [_text(query)],
        k,
        weights=(alpha, 1 - alpha),
        fetch_k=depth if depth > k else None,
        num_tokens=num_tokens,
        **among,
    )[0]


def _diverse(
    index: AnyIndex,
    query: VectorStoreQuery,
    among: dict[str, Any],
    num_tokens: int | None = None,
    mmr_threshold: float | None = None,
    mmr_prefetch_factor: float | None = None,
    mmr_prefetch_k: int | None = None,
) -> list[Hit]:
    if mmr_prefetch_factor is not None and mmr_prefetch_k is not None:
        raise ValueError("mmr_prefetch_factor and mmr_prefetch_k say the same: pass one of them")
    if mmr_prefetch_factor is not None:
        mmr_prefetch_k = math.ceil(mmr_prefetch_factor * query.similarity_top_k)
    given = [value for value in (query.mmr_threshold, mmr_threshold) if value is not None]
    threshold = _fraction("mmr_threshold", given[0] if given else DEFAULT_MMR_THRESHOLD)
    return index.search_mmr(
        _vector(query),
        query.similarity_top_k,
        fetch_k=mmr_prefetch_k,
        lambda_mult=threshold,
        num_tokens=num_tokens,
        **among,
    )[0]


_SEARCHES: dict[VectorStoreQueryMode, Callable[..., list[Hit]]] = {
    VectorStoreQueryMode.DEFAULT: _nearest,
    VectorStoreQueryMode.TEXT_SEARCH: _worded,
    VectorStoreQueryMode.HYBRID: _fused,
    VectorStoreQueryMode.MMR: _diverse,
}


def _where(query: VectorStoreQuery) -> dict[str, Any]:
    """The filter that `filters` and `doc_ids` make together."""
    where = compile_filters(query.filters)
    return {"$and": [{REF_DOC_KEY: {"$in": query.doc_ids}}, where]} if query.doc_ids else where


def _vector(query: VectorStoreQuery) -> NDArray[np.float32]:
    if query.query_embedding is None:
        raise ValueError(f"query mode {_name(query)} needs query_embedding; 'text_search' does without it")
    return np.asarray([query.query_embedding], dtype=np.float32)


def _text(query: VectorStoreQuery) -> str:
    if query.query_str is None:
        raise ValueError(f"query mode {_name(query)} needs query_str, the words to search for")
    return query.query_str


def _name(query: VectorStoreQuery) -> str:
    return repr(VectorStoreQueryMode(query.mode).value)


def _fraction(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")
    return value
