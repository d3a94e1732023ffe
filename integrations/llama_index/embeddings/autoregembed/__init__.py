"""AutoRegEmbed for LlamaIndex: `from llama_index.embeddings.autoregembed import AutoRegEmbedding`.

`AutoRegFinetuneEngine` is imported when it is asked for: it needs the extra `train`.
"""

from typing import TYPE_CHECKING, Any

try:
    import llama_index.core  # noqa: F401
except ImportError as error:
    raise ImportError(
        "llama_index.embeddings.autoregembed needs llama-index-core: "
        'pip install "autoregembed-rag[llama-index]"'
    ) from error

from llama_index.embeddings.autoregembed.base import AutoRegEmbedding

if TYPE_CHECKING:
    from llama_index.embeddings.autoregembed.finetuning import AutoRegFinetuneEngine

__all__ = ["AutoRegEmbedding", "AutoRegFinetuneEngine"]


def __getattr__(name: str) -> Any:
    if name == "AutoRegFinetuneEngine":
        from llama_index.embeddings.autoregembed.finetuning import AutoRegFinetuneEngine

        return AutoRegFinetuneEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
