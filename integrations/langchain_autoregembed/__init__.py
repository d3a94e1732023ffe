"""AutoRegEmbed for LangChain: embeddings, a vector store, its retriever, and a reranker.

Importing it is cheap: each name is imported on first use, PyTorch by the first `AutoRegEmbeddings(...)` or
`AutoRegReranker(...)`, FAISS by the first store.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    import langchain_core  # noqa: F401
except ImportError as error:
    raise ImportError(
        'langchain_autoregembed needs langchain-core: pip install "autoregembed-rag[langchain]"'
    ) from error

if TYPE_CHECKING:
    from langchain_autoregembed.embeddings import AutoRegEmbeddings
    from langchain_autoregembed.rerankers import AutoRegReranker
    from langchain_autoregembed.retrievers import AutoRegRetriever
    from langchain_autoregembed.vectorstores import AutoRegVectorStore

__all__ = ["AutoRegEmbeddings", "AutoRegReranker", "AutoRegRetriever", "AutoRegVectorStore"]

_HOMES = {
    "AutoRegEmbeddings": ".embeddings",
    "AutoRegReranker": ".rerankers",
    "AutoRegRetriever": ".retrievers",
    "AutoRegVectorStore": ".vectorstores",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
