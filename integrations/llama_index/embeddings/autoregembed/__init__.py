"""AutoRegEmbed for LlamaIndex: `from llama_index.embeddings.autoregembed import AutoRegEmbedding`."""

try:
    import llama_index.core  # noqa: F401
except ImportError as error:
    raise ImportError(
        "llama_index.embeddings.autoregembed needs llama-index-core: "
        'pip install "autoregembed-rag[llama-index]"'
    ) from error

from llama_index.embeddings.autoregembed.base import AutoRegEmbedding

__all__ = ["AutoRegEmbedding"]
