"""Text embeddings by information compression and conditional distribution alignment (AutoRegEmbed, EMNLP 2025).

from autoregembed_rag import AutoRegEncoder

encoder = AutoRegEncoder.from_pretrained("mini")
queries = encoder.encode_queries(["Who wrote Faust?"])             # under I_next
documents = encoder.encode_documents(["Goethe wrote Faust."])      # under I_self
scores = queries @ documents.T                                     # cosines
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import AutoRegConfig
    from .decoder import FrozenDecoder
    from .encoder import AutoRegEncoder
    from .pooling import truncate
    from .reranking import GenerativeReranker

__all__ = ["AutoRegConfig", "AutoRegEncoder", "FrozenDecoder", "GenerativeReranker", "truncate"]

_HOMES = {
    "AutoRegConfig": ".config",
    "AutoRegEncoder": ".encoder",
    "FrozenDecoder": ".decoder",
    "GenerativeReranker": ".reranking",
    "truncate": ".pooling",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    # Imported on first use: torch takes seconds, and adapters and the command line may not need it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
