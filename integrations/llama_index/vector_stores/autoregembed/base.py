"""AutoRegVectorStore: a DocumentIndex as a LlamaIndex vector store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)

from autoregembed_indexes import DocumentIndex
from llama_index.vector_stores.autoregembed.nodes import REF_DOC_KEY, equalities, node_to_row, row_to_node

if TYPE_CHECKING:
    from autoregembed_rag import AutoRegEncoder


class AutoRegVectorStore(BasePydanticVectorStore):
    """Nodes and their vectors in a folder, or in memory; exact search by cosine.

    When a call that adds or deletes returns, the change is on disk, so `persist` has nothing to do. The same
    folder serves LangChain (`langchain_autoregembed`). One store at a time may write to a folder, any number
    may read it with `read_only=True`. Queries are of mode "default", filters are `==` joined by `and`. The
    async methods run in a thread. Pickling keeps the path, and the copy opens read-only.

        store = AutoRegVectorStore("index")
        index = VectorStoreIndex.from_vector_store(store, embed_model=AutoRegEmbedding())
    """

    stores_text: bool = True
    path: str | None = Field(default=None, frozen=True, description="A folder; None: in memory.")
    encoder: str | None = Field(default=None, frozen=True, description="Fingerprint of the vectors' encoder.")
    factory: str = Field(default="auto", frozen=True, description="How a new index searches.")
    read_only: bool = Field(default=False, frozen=True, description="Search only.")

    _index: DocumentIndex = PrivateAttr()

    def __init__(
        self,
        path: str | PathLike[str] | None = None,
        *,
        encoder: str | AutoRegEncoder | None = None,
        factory: str = "auto",
        read_only: bool = False,
        **fields: Any,
    ) -> None:
        """Open the index at `path`, or make it if there is none.

        Args:
            path: a folder; None keeps everything in memory.
            encoder: the encoder of the vectors, or its fingerprint. A vector store never sees the model, so
                without it only the dimension, taken from the first `add`, is checked.
            factory: how a new index searches, see `DocumentIndex.create`.
            read_only: search only; the index must exist.
            **fields: the base class's own, as when LlamaIndex loads a store from a dict.

        Raises:
            ImportError: FAISS is missing.
            IndexMismatchError: the index was built by another encoder; both are named.
            IndexLockedError: another store has the folder open for writing.
            FileNotFoundError: `read_only`, and there is no index at `path`.
        """
        fingerprint, tokens = _identity(encoder)
        folder = None if path is None else fspath(path)
        fields |= {"path": folder, "encoder": fingerprint, "factory": factory, "read_only": read_only}
        super().__init__(**fields)
        if folder is not None and (read_only or DocumentIndex.exists(folder)):
            self._index = DocumentIndex.open(folder, encoder=fingerprint, read_only=read_only)
        else:
            self._index = DocumentIndex.create(folder, factory=factory, encoder=fingerprint, tokens=tokens)

    @classmethod
    def class_name(cls) -> str:
        """The name LlamaIndex files this class under."""
        return "AutoRegVectorStore"

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is None:
            raise TypeError("a vector store in memory cannot be pickled; make it with a path")
        return _reopen, (self.path, self.encoder)

    @property
    def client(self) -> DocumentIndex:
        """The index behind the store."""
        return self._index

    def close(self) -> None:
        """Let another store write to the folder; a store in memory is gone."""
        self._index.close()

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Store nodes with their embeddings, replacing those whose id is there; all of them, or none.

        Returns the ids. Raises ValueError or TypeError, naming the node and key, for text or metadata that
        could not be returned equal (lone surrogates, NaN, what is not JSON), for keys that start with
        "_llama_index_" and for nodes without an embedding; IndexMismatchError for another dimension.
        """
        _refuse_unknown(kwargs)
        if missing := [node.node_id for node in nodes if node.embedding is None]:
            raise ValueError(f"node {missing[0]!r} has no embedding: embed nodes before adding them")
        if not nodes:
            return []
        rows = [node_to_row(node) for node in nodes]
        return self._index.add(
            np.asarray([node.embedding for node in nodes], dtype=np.float32),
            [text for text, _ in rows],
            ids=[node.node_id for node in nodes],
            metadatas=[metadata for _, metadata in rows],
        )

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete every node whose source document is `ref_doc_id`."""
        _refuse_unknown(delete_kwargs)
        self._index.delete(self._index.ids({REF_DOC_KEY: ref_doc_id}))

    def delete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """Delete the nodes with these ids, those that match `filters`, or those that do both."""
        _refuse_unknown(delete_kwargs)
        if node_ids is None and filters is None:
            raise ValueError("delete_nodes needs node_ids or filters; clear() deletes everything")
        self._index.delete(self._ids(node_ids, equalities(filters)))

    def clear(self) -> None:
        """Delete every node."""
        self._index.clear()

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """The nodes with these ids, those that match `filters`, those that do both, or all; no embeddings."""
        found = self._index.get(self._ids(node_ids, equalities(filters)))
        return [row_to_node(row.id, row.text, row.metadata) for row in found]

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The `similarity_top_k` most similar nodes, with cosines in [-1, 1], best first.

        `node_ids` and `doc_ids` (ids of source documents) restrict the search where they are not empty.

        Raises:
            ValueError: another mode than "default", a filter that is not `==` joined by `and`, no embedding.
            IndexMismatchError: the embedding has another dimension than the index.
        """
        _refuse_unknown(kwargs)
        if query.mode != VectorStoreQueryMode.DEFAULT:
            raise ValueError(f"query mode {query.mode.value!r} is not supported: use 'default'")
        if query.query_embedding is None:
            raise ValueError("the query has no embedding: AutoRegVectorStore searches by vector")
        where = equalities(query.filters)
        vector = np.asarray(query.query_embedding, dtype=np.float32)
        hits = self._index.search(
            vector[None], k=query.similarity_top_k, filter=where, ids=self._allowed(query)
        )[0]
        return VectorStoreQueryResult(
            nodes=[row_to_node(hit.id, hit.text, hit.metadata) for hit in hits],
            similarities=[hit.score for hit in hits],
            ids=[hit.id for hit in hits],
        )

    def persist(self, persist_path: str, fs: Any = None) -> None:  # noqa: ARG002
        """Nothing to do for a folder, which is always up to date; ValueError for a store in memory."""
        if self.path is None:
            raise ValueError("a vector store in memory cannot be persisted: make it with a path")

    def _ids(self, node_ids: list[str] | None, where: dict[str, Any]) -> list[str]:
        if node_ids is None:
            return self._index.ids(where)
        if not where:
            return node_ids
        matching = set(self._index.ids(where))
        return [id_ for id_ in node_ids if id_ in matching]

    def _allowed(self, query: VectorStoreQuery) -> list[str] | None:
        """The ids that `node_ids` and `doc_ids` leave; None where neither restricts."""
        if not query.doc_ids:
            return query.node_ids or None
        ids = [id_ for doc_id in query.doc_ids for id_ in self._index.ids({REF_DOC_KEY: doc_id})]
        return [id_ for id_ in ids if not query.node_ids or id_ in query.node_ids]

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """`add` in a thread."""
        return await asyncio.to_thread(self.add, nodes, **kwargs)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """`delete` in a thread."""
        await asyncio.to_thread(self.delete, ref_doc_id, **delete_kwargs)

    async def adelete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """`delete_nodes` in a thread."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters, **delete_kwargs)

    async def aclear(self) -> None:
        """`clear` in a thread."""
        await asyncio.to_thread(self.clear)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """`get_nodes` in a thread."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """`query` in a thread."""
        return await asyncio.to_thread(self.query, query, **kwargs)


def _identity(encoder: str | AutoRegEncoder | None) -> tuple[str | None, int | None]:
    """An encoder's fingerprint, and its number of tokens where its vectors may be truncated."""
    if encoder is None or isinstance(encoder, str):
        return encoder, None
    return encoder.fingerprint, encoder.num_tokens if encoder.config.pooling == "flatten" else None


def _reopen(path: str, encoder: str | None) -> AutoRegVectorStore:
    return AutoRegVectorStore(path, encoder=encoder, read_only=True)


def _refuse_unknown(options: dict[str, Any]) -> None:
    if options:
        raise TypeError(f"unknown options {sorted(options)}: AutoRegVectorStore would have to ignore them")
