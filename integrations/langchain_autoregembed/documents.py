"""The index's documents as LangChain's, without what the LlamaIndex store keeps in their metadata."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from langchain_core.documents import Document

from autoregembed_indexes import Filter, Hit

# What the LlamaIndex store keeps of a node beside its text and metadata; never shown to LangChain.
RESERVED_PREFIX = "_llama_index_"


def to_document(id_: str, text: str, metadata: Mapping[str, Any]) -> Document:
    """Make a LangChain document."""
    return Document(id=id_, page_content=text, metadata=_own_metadata(metadata))


def with_scores(hits: Iterable[Hit]) -> list[tuple[Document, float]]:
    """The documents that a search found, each with its score."""
    return [(to_document(hit.id, hit.text, hit.metadata), hit.score) for hit in hits]


def without_scores(scored: Iterable[tuple[Document, float]]) -> list[Document]:
    """The documents alone."""
    return [document for document, _ in scored]


def own_filter(where: Filter | None) -> Filter | None:
    """Let a function judge the same metadata that its documents come back with; a dict stays as it is."""
    if not callable(where):
        return where
    judge = where
    return lambda metadata: judge(_own_metadata(metadata))


def _own_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if not key.startswith(RESERVED_PREFIX)}


def refuse_reserved(metadatas: Iterable[Mapping[str, Any] | None], ids: Iterable[str]) -> None:
    """Raise ValueError for metadata with keys that belong to the LlamaIndex store."""
    for metadata, id_ in zip(metadatas, ids, strict=True):
        for key in metadata or ():
            if isinstance(key, str) and key.startswith(RESERVED_PREFIX):
                raise ValueError(
                    f"metadata key {key!r} of id {id_!r}: keys that start with {RESERVED_PREFIX!r} belong to "
                    "the LlamaIndex store; rename it"
                )
