"""DocumentIndex: vectors (FAISS) and documents (SQLite) in one folder.

>>> import numpy as np
>>> from autoregembed_indexes import DocumentIndex
>>> with DocumentIndex.create(dimension=3) as index:
...     ids = index.add(np.eye(3), ["red", "green", "blue"], ids=["r", "g", "b"])
...     [hit.text for hit in index.search([[0.0, 1.0, 0.1]], k=2)[0]]
['green', 'blue']
"""

from autoregembed_indexes.errors import (
    DocumentIndexError,
    IndexDamagedError,
    IndexLockedError,
    IndexMismatchError,
    IndexMissingError,
)
from autoregembed_indexes.index import DocumentIndex
from autoregembed_indexes.milvus import MilvusDocumentIndex
from autoregembed_indexes.records import Document, Hit
from autoregembed_indexes.store import Filter

__all__ = [
    "Document",
    "DocumentIndex",
    "DocumentIndexError",
    "Filter",
    "Hit",
    "IndexDamagedError",
    "IndexLockedError",
    "IndexMismatchError",
    "IndexMissingError",
    "MilvusDocumentIndex",
]
