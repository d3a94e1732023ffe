"""AutoRegEmbed for LlamaIndex: `from llama_index.postprocessor.autoregembed_rerank import AutoRegRerank`."""

try:
    import llama_index.core  # noqa: F401
except ImportError as error:
    raise ImportError(
        "llama_index.postprocessor.autoregembed_rerank needs llama-index-core: "
        'pip install "autoregembed-rag[llama-index]"'
    ) from error

from llama_index.postprocessor.autoregembed_rerank.base import AutoRegRerank

__all__ = ["AutoRegRerank"]
