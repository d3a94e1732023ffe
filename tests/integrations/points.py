"""Nodes in two dimensions, at an angle from the x axis, and queries for them."""

import math

from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters, VectorStoreQuery

from llama_index.vector_stores.autoregembed import AutoRegVectorStore


def point(degrees, name=None, **fields):
    angle = math.radians(degrees)
    return TextNode(
        id_=name or str(degrees),
        text=f"at {degrees}",
        embedding=[math.cos(angle), math.sin(angle)],
        **fields,
    )


def store_of_three():
    store = AutoRegVectorStore()
    store.add(
        [point(0, metadata={"a": 1}), point(10, metadata={"a": 2}), point(90, metadata={"a": 1, "b": "x"})]
    )
    return store


def equal(**pairs):
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value) for key, value in pairs.items()])


def where(key, operator, value=None):
    return MetadataFilters(filters=[MetadataFilter(key=key, operator=operator, value=value)])


def ask(store, degrees=0, k=10, **options):
    angle = math.radians(degrees)
    query = VectorStoreQuery(
        query_embedding=[math.cos(angle), math.sin(angle)], similarity_top_k=k, **options
    )
    return store.query(query)
