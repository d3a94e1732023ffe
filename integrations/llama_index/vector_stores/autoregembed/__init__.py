"""AutoRegEmbed for LlamaIndex: `from llama_index.vector_stores.autoregembed import AutoRegVectorStore`."""

try:
    import llama_index.core  # noqa: F401
except ImportError as error:
    raise ImportError(
        "llama_index.vector_stores.autoregembed needs llama-index-core: "
        'pip install "autoregembed-rag[llama-index]"'
    ) from error

from llama_index.vector_stores.autoregembed.base import AutoRegVectorStore

__all__ = ["AutoRegVectorStore"]
