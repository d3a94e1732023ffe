"""MilvusDocumentIndex: the documents and vectors of a `DocumentIndex`, on a Milvus server."""

from autoregembed_indexes.milvus.index import MilvusDocumentIndex

__all__ = ["MilvusDocumentIndex"]
