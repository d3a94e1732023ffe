"""AutoRegVectorStore: a DocumentIndex as a LlamaIndex vector store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from llama_index.core.bridge.pydantic import Field, PrivateAttr, SecretStr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.simple import DEFAULT_VECTOR_STORE, NAMESPACE_SEP
from llama_index.core.vector_stores.types import (
    DEFAULT_PERSIST_DIR,
    DEFAULT_PERSIST_FNAME,
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)

from autoregembed_indexes import DocumentIndex
from autoregembed_indexes.places import AnyIndex, place_of
from llama_index.vector_stores.autoregembed.filters import compile_filters
from llama_index.vector_stores.autoregembed.nodes import REF_DOC_KEY, node_to_row, row_to_node
from llama_index.vector_stores.autoregembed.queries import search

if TYPE_CHECKING:
    from autoregembed_rag import AutoRegEncoder

# Where StorageContext puts the vector store of a storage folder.
DEFAULT_PERSIST_PATH = f"{DEFAULT_PERSIST_DIR}/{DEFAULT_VECTOR_STORE}{NAMESPACE_SEP}{DEFAULT_PERSIST_FNAME}"


class AutoRegVectorStore(BasePydanticVectorStore):
    """Nodes and their vectors in a folder, in memory or on a Milvus server, searched by vector, by words, or by both.

    Query modes are "default", "text_search", "hybrid" and "mmr"; filters are all that MetadataFilters can say,
    and apply before nodes are ranked. No docstore is needed: nodes come back whole, relationships included.

    When a call that adds or deletes returns, the change is on disk, so that a store with a path needs no
    `persist`; one in memory writes itself to a folder then. The same folder serves LangChain
    (`langchain_autoregembed`). One store at a time may write to a folder, any number may read it with
    `read_only=True`; on a server, any number may write. The async methods run in a thread. Pickling keeps the path, or
    the address without its token, and the copy opens read-only.

        store = AutoRegVectorStore("index")
        index = VectorStoreIndex.from_vector_store(store, embed_model=AutoRegEmbedding())
        retriever = index.as_retriever(vector_store_query_mode="hybrid", similarity_top_k=5, alpha=0.7)
    """

    stores_text: bool = True
    path: str | None = Field(default=None, frozen=True, description="A folder; None: in memory, or at uri.")
    uri: str | None = Field(default=None, frozen=True, description="A Milvus server's address.")
    collection_name: str | None = Field(default=None, frozen=True, description="Where on the server.")
    token: SecretStr | None = Field(default=None, frozen=True, exclude=True, description="The server's.")
    encoder: str | None = Field(default=None, frozen=True, description="Fingerprint of the vectors' encoder.")
    factory: str = Field(default="auto", frozen=True, description="How a new index searches.")
    tokenizer: str | None = Field(default=None, frozen=True, description="How a new index splits words.")
    memory_budget: int | None = Field(default=None, frozen=True, description="Bytes for new vectors.")
    device: str = Field(default="auto", frozen=True, description="Where to search.")
    read_only: bool = Field(default=False, frozen=True, description="Search only.")
    strong: bool = Field(default=False, frozen=True, description="See others' writes on a server at once.")

    _index: AnyIndex = PrivateAttr()

    def __init__(
        self,
        path: str | PathLike[str] | None = None,
        *,
        uri: str | None = None,
        collection_name: str | None = None,
        token: str | SecretStr | None = None,
        encoder: str | AutoRegEncoder | None = None,
        factory: str = "auto",
        tokenizer: str | None = None,
        memory_budget: int | None = None,
        device: str = "auto",
        read_only: bool = False,
        strong: bool = False,
        **fields: Any,
    ) -> None:
        """Open the index at `path` or `uri`, or make it if there is none.

        Args:
            path: a folder; None, without a `uri`, keeps everything in memory.
            uri: a Milvus server instead, "http://host:19530" (see `MilvusDocumentIndex`).
            collection_name: where on the server, "autoregembed" by default.
            token: the server's, "user:password" or an API key; None takes the environment variable MILVUS_TOKEN. It is
                not written anywhere.
            encoder: the encoder of the vectors, or its fingerprint. A vector store never sees the model, so
                without it only the dimension, taken from the first `add`, is checked.
            factory: how a new index searches, see `DocumentIndex.create` or `MilvusDocumentIndex.create`; an index that
                is there stays as it is.
            tokenizer: how a new index splits texts into words, see there; None for its default.
            memory_budget: bytes that a new index of factory "auto" may use for vectors; None for the default.
            device: where this store searches: "cpu", "cuda", "cuda:0" or "auto", see there.
            read_only: search only; the index must exist.
            strong: on a server, see at once what other clients write, see `MilvusDocumentIndex.create`.
            **fields: the base class's own, as when LlamaIndex loads a store from a dict.

        Raises:
            ImportError: FAISS is missing, or for a `uri` pymilvus.
            IndexMismatchError: the index was built by another encoder; both are named.
            IndexLockedError: another store has the folder open for writing.
            FileNotFoundError: `read_only`, and there is no index at `path` or `uri`.
            DocumentIndexError: no server answers at `uri`, or it refuses the token.
            ValueError: options of a folder and of a server together.
        """
        fingerprint, tokens = _identity(encoder)
        where: dict[str, Any] = {
            "path": None if path is None else fspath(path),
            "uri": uri,
            "collection_name": collection_name,
            "token": SecretStr(token) if isinstance(token, str) else token,
        }
        made_with = {"tokenizer": tokenizer, "memory_budget": memory_budget}
        fields |= {**where, **made_with, "encoder": fingerprint, "factory": factory, "device": device}
        fields |= {"read_only": read_only, "strong": strong}
        super().__init__(**fields)
        kind, place = place_of(**where)
        options: dict[str, Any] = {name: value for name, value in made_with.items() if value is not None}
        misplaced = (
            [*options, *(["device"] if device != "auto" else [])] if uri else ["strong"] if strong else []
        )
        if misplaced:
            wrong = "a server" if uri is None else "an index in a folder"
            raise ValueError(f"{', '.join(misplaced)} belong to {wrong}: leave them out")
        here: dict[str, Any] = {"encoder": fingerprint, **({"strong": strong} if uri else {"device": device})}
        if (path, uri) != (None, None) and (read_only or kind.exists(**place)):
            self._index = kind.open(**place, **here, read_only=read_only)
        else:
            self._index = kind.create(**place, **here, tokens=tokens, factory=factory, **options)
        if not read_only:
            # Deleting a document looks for its nodes by this key; an index that has it stays as it is.
            self._index.create_metadata_index(REF_DOC_KEY)

    @classmethod
    def from_persist_path(cls, persist_path: str, fs: Any = None, **options: Any) -> AutoRegVectorStore:
        """Open the folder that `persist` wrote; from then on changes are on disk at once.

        `options` are the constructor's, such as `read_only`. Raises FileNotFoundError when there is no index, and
        ValueError for an `fs` that is not local.
        """
        _refuse_remote(fs)
        if not DocumentIndex.exists(persist_path):
            raise FileNotFoundError(
                f"no vector store was persisted to {persist_path}; one with a path stays there: "
                "open it with AutoRegVectorStore(path)"
            )
        return cls(persist_path, **options)

    @classmethod
    def from_persist_dir(
        cls,
        persist_dir: str = DEFAULT_PERSIST_DIR,
        namespace: str = DEFAULT_VECTOR_STORE,
        fs: Any = None,
        **options: Any,
    ) -> AutoRegVectorStore:
        """Open the store that `StorageContext.persist(persist_dir)` wrote from memory; see `from_persist_path`."""
        name = f"{namespace}{NAMESPACE_SEP}{DEFAULT_PERSIST_FNAME}"
        return cls.from_persist_path(str(Path(persist_dir) / name), fs, **options)

    @classmethod
    def class_name(cls) -> str:
        """The name LlamaIndex files this class under."""
        return "AutoRegVectorStore"

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is None and self.uri is None:
            raise TypeError("a vector store in memory cannot be pickled; make it with a path")
        kept = ("path", "uri", "collection_name", "encoder", "device", "strong")
        return _reopen, ({name: getattr(self, name) for name in kept},)

    @property
    def client(self) -> AnyIndex:
        """The index behind the store."""
        return self._index

    def close(self) -> None:
        """Let another store write to the folder, or the server's connection go; a store in memory is gone."""
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
        where = compile_filters(filters)
        if node_ids is None and not where:
            raise ValueError("delete_nodes needs node_ids or filters; clear() deletes everything")
        self._index.delete(self._ids(node_ids, where))

    def clear(self) -> None:
        """Delete every node."""
        self._index.clear()

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """The nodes with these ids, those that match `filters`, those that do both, or all; no embeddings."""
        found = self._index.get(self._ids(node_ids, compile_filters(filters)))
        return [row_to_node(row.id, row.text, row.metadata) for row in found]

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The nodes that fit a query best, best first, with their scores.

        Modes:
            default: the `similarity_top_k` nodes of highest cosine to `query_embedding`, in [-1, 1].
            text_search: the `sparse_top_k` (where None, `similarity_top_k`) nodes whose texts match the words of
                `query_str` best, by BM25; nodes with none of them are left out.
            hybrid: the `hybrid_top_k` (where None, `similarity_top_k`) best of both rankings, fused by reciprocal
                rank; `alpha` in [0, 1] is the weight of the vectors, 1 - `alpha` that of the words, 0.5 by default.
                `similarity_top_k` and `sparse_top_k` say how deep the rankings are where either is more than
                that. Scores only order the nodes of one result.
            mmr: `similarity_top_k` nodes near the query and unlike all that come before, with their cosines.
                `mmr_threshold` in [0, 1], of the query or an option, is the weight of nearness, 0.5 by default.
                They are chosen from the nearest `mmr_prefetch_k`, or `mmr_prefetch_factor` times as many as
                wanted: an option each, together an error, by default 4 times as many and at least 20.

        In all modes with vectors the option `num_tokens` has the embedding's first so many tokens find candidates,
        which are then ranked by all of them: faster, see `DocumentIndex.search`. In mode default the option `fetch_k`
        says how many (by default max(100, 10 `similarity_top_k`)). A retriever or query engine takes options as
        `vector_store_kwargs={"num_tokens": 2}`. The store must have been made with `encoder=` an AutoRegEncoder.

        `node_ids` and `doc_ids` (ids of source documents) restrict the search where they are not empty, and
        `filters` always; all apply before nodes are ranked, so that fewer come back only when fewer match.
        `output_fields` is ignored: nodes are whole. How filters compare is said in this package's `filters`.

        Raises:
            ValueError: another mode, no `query_embedding` or `query_str` where the mode needs it, an
                `embedding_field`, an `alpha`, `mmr_threshold` or `num_tokens` out of range, k < 1.
            TypeError: an unknown option, a filter whose value does not suit its operator.
            IndexMismatchError: the embedding has another dimension than the index; `num_tokens` for an index that
                does not know of tokens.
        """
        hits = search(self._index, query, kwargs)
        return VectorStoreQueryResult(
            nodes=[row_to_node(hit.id, hit.text, hit.metadata) for hit in hits],
            similarities=[hit.score for hit in hits],
            ids=[hit.id for hit in hits],
        )

    def persist(self, persist_path: str = DEFAULT_PERSIST_PATH, fs: Any = None) -> None:
        """Write a store in memory to the folder `persist_path`, replacing what an earlier call wrote there.

        `from_persist_path` opens it. A store with a path or a uri is written already, and stays there. What is
        written is what was stored, but for the last digit of a vector's entries at very few dimensions.

        Raises ValueError for an `fs` that is not local, FileExistsError when there is something else at
        `persist_path`, IndexMismatchError when there is an index of another encoder or dimension.
        """
        if isinstance(self._index, DocumentIndex) and self.path is None:
            _refuse_remote(fs)
            _write(self._index, persist_path)

    def _ids(self, node_ids: list[str] | None, where: dict[str, Any]) -> list[str]:
        if node_ids is None:
            return self._index.ids(where)
        if not where:
            return node_ids
        matching = set(self._index.ids(where))
        return [id_ for id_ in node_ids if id_ in matching]

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


def _reopen(kept: dict[str, Any]) -> AutoRegVectorStore:
    return AutoRegVectorStore(**kept, read_only=True)


def _refuse_unknown(options: dict[str, Any]) -> None:
    if options:
        raise TypeError(f"unknown options {sorted(options)}: AutoRegVectorStore would have to ignore them")


def _refuse_remote(fs: Any) -> None:
    if fs is not None and not isinstance(fs, LocalFileSystem):
        raise ValueError(f"an index is a folder on a local disk; {type(fs).__name__} is not supported")


def _write(index: DocumentIndex, folder: str) -> None:
    """Make the index in `folder`, a new one where there is none, hold what `index` holds.

    All is added before what is too many is deleted, so that no failure loses a node.
    """
    info = index.info()
    settings = {name: info[name] for name in ("dimension", "encoder")}
    if DocumentIndex.exists(folder):
        copy = DocumentIndex.open(folder, **settings)
    else:
        settings |= {name: info[name] for name in ("factory", "tokens", "tokenizer", "memory_budget")}
        copy = DocumentIndex.create(folder, **settings)
    with copy:
        for key in info["metadata_indexes"]:
            copy.create_metadata_index(key)
        found = index.get(index.ids())
        ids = [document.id for document in found]
        if ids:
            texts = [document.text for document in found]
            copy.add(index.vectors(ids), texts, ids, [document.metadata for document in found])
        copy.delete(list(set(copy.ids()).difference(ids)))
