"""AutoRegEmbed for LangChain: embeddings, a vector store and its retriever.

Importing it is cheap: PyTorch is loaded by the first `AutoRegEmbeddings(...)`, FAISS by the first store.
"""

try:
    import langchain_core  # noqa: F401
except ImportError as error:
    raise ImportError(
        'langchain_autoregembed needs langchain-core: pip install "autoregembed-rag[langchain]"'
    ) from error

from langchain_autoregembed.embeddings import AutoRegEmbeddings
from langchain_autoregembed.retrievers import AutoRegRetriever
from langchain_autoregembed.vectorstores import AutoRegVectorStore

__all__ = ["AutoRegEmbeddings", "AutoRegRetriever", "AutoRegVectorStore"]
