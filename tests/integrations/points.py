"""Nodes in two dimensions, at an angle from the x axis, and queries for them."""

import math

from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters, VectorStoreQuery


def point(degrees, name=None, **fields):
    angle = math.radians(degrees)
    return TextNode(
        id_=name or str(degrees),
        text=f"at {degrees}",
        embedding=[math.cos(angle), math.sin(angle)],
        **fields,
    )


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
