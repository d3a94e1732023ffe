"""AutoRegVectorStore: a DocumentIndex as a LangChain vector store."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Protocol, runtime_checkable

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance
from numpy.typing import NDArray

from autoregembed_indexes import DocumentIndex, Hit

# What the LlamaIndex store keeps of a node beside its text and metadata; never shown to LangChain.
RESERVED_PREFIX = "_llama_index_"


@runtime_checkable
class _ArrayEmbeddings(Protocol):
    """Embeddings that give arrays, which at 20,000 dimensions spares most of the memory that lists take."""

    def _embed_documents_array(self, texts: list[str]) -> NDArray[np.float32]: ...

    def _embed_query_array(self, text: str) -> NDArray[np.float32]: ...

    def _index_settings(self) -> dict[str, Any]: ...


class AutoRegVectorStore(VectorStore):
    """Documents and their vectors in a folder, or in memory; exact search by cosine.

    When a call that adds or deletes returns, the change is on disk. The same folder serves LlamaIndex
    (`llama_index.vector_stores.autoregembed`). One store at a time may write to a folder, any number may
    read it with `read_only=True`. The async methods run in a thread. Pickling keeps the path, and the copy
    opens read-only.

        store = AutoRegVectorStore(AutoRegEmbeddings(), "index")
        store.add_texts(["Goethe wrote Faust."], metadatas=[{"lang": "en"}], ids=["faust"])
        retriever = store.as_retriever(search_kwargs={"k": 3, "filter": {"lang": "en"}})
    """

    def __init__(
        self,
        embedding: Embeddings,
        path: str | PathLike[str] | None = None,
        *,
        factory: str = "auto",
        read_only: bool = False,
    ) -> None:
        """Open the index at `path`, or make it if there is none.

        Args:
            embedding: any LangChain embeddings. Those of this package record their fingerprint in the index.
            path: a folder; None keeps everything in memory.
            factory: how a new index searches, see `DocumentIndex.create`.
            read_only: search only; the index must exist.

        Raises:
            ImportError: FAISS is missing.
            IndexMismatchError: the index was built by another encoder; both are named.
            IndexLockedError: another store has the folder open for writing.
            FileNotFoundError: `read_only`, and there is no index at `path`.
        """
        self.embedding = embedding
        arrays = embedding if isinstance(embedding, _ArrayEmbeddings) else None
        settings = arrays._index_settings() if arrays else {}
        self._embed_documents = arrays._embed_documents_array if arrays else embedding.embed_documents
        self._embed_query = arrays._embed_query_array if arrays else embedding.embed_query
        if path is not None and (read_only or DocumentIndex.exists(path)):
            self.index = DocumentIndex.open(path, encoder=settings.get("encoder"), read_only=read_only)
        else:
            self.index = DocumentIndex.create(path, factory=factory, **settings)

    @property
    def embeddings(self) -> Embeddings:
        """The embeddings given at construction."""
        return self.embedding

    def close(self) -> None:
        """Let another store write to the folder; a store in memory is gone."""
        self.index.close()

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,  # noqa: ARG002  (LangChain's indexing API passes batch_size to every store)
    ) -> list[str]:
        """Embed and store texts, replacing those whose id is already there.

        An id that is None becomes a new uuid; where an id occurs twice, the last text stays. All texts are
        stored, or none. Returns the ids, one per text.

        Raises ValueError or TypeError, naming the document and key, for text or metadata that could not be
        returned equal (lone surrogates, NaN, what is not JSON), and for keys that start with "_llama_index_".
        """
        rows = list(texts)
        metadatas = [None] * len(rows) if metadatas is None else list(metadatas)
        ids = [None] * len(rows) if ids is None else list(ids)
        if not len(rows) == len(metadatas) == len(ids):
            raise ValueError(
                f"{len(rows)} texts, {len(metadatas)} metadatas and {len(ids)} ids: one of each is needed"
            )
        all_ids = [str(uuid.uuid4()) if id_ is None else id_ for id_ in ids]
        _refuse_reserved(metadatas, all_ids)
        last = list({id_: position for position, id_ in enumerate(all_ids)}.values())
        vectors = self._embed_documents([rows[i] for i in last])
        self.index.add(
            np.asarray(vectors, dtype=np.float32),
            [rows[i] for i in last],
            ids=[all_ids[i] for i in last],
            metadatas=[metadatas[i] for i in last],
        )
        return all_ids

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> AutoRegVectorStore:
        """Make or open a store (`path`, `factory`: see the constructor) and add texts to it."""
        store = cls(embedding, **kwargs)
        try:
            store.add_texts(texts, metadatas, ids=ids)
        except BaseException:
            store.close()
            raise
        return store

    def delete(self, ids: Sequence[str] | None = None, **kwargs: Any) -> bool:
        """Delete by id, or everything when `ids` is None; ids that are not there are fine."""
        _refuse_unknown(kwargs)
        if ids is None:
            self.index.clear()
        else:
            self.index.delete(ids)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents with these ids, in this order, leaving out those that are not there."""
        return [_document(found.id, found.text, found.metadata) for found in self.index.get(ids)]

    def similarity_search(
        self,
        query: str,
        k: int = 4,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[Document]:
        """The k documents most similar to a query, best first; see `similarity_search_with_score`."""
        return [document for document, _ in self.similarity_search_with_score(query, k, filter, **kwargs)]

    def similarity_search_with_score(
        self,
        query: str,
        k: int = 4,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[tuple[Document, float]]:
        """The k documents most similar to a query, each with its cosine in [-1, 1], best first.

        `filter` is {metadata key: value, ...}, all of which must be equal, by JSON type (true is not 1).
        Fewer than k come back only when fewer than k match.
        """
        _refuse_unknown(kwargs)
        return self._search(self._embed_query(query), k, filter)

    def similarity_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[Document]:
        """The k documents most similar to a query's vector, best first."""
        _refuse_unknown(kwargs)
        return [document for document, _ in self._search(embedding, k, filter)]

    def similarity_search_with_score_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
    ) -> list[tuple[Document, float]]:
        """The k documents most similar to a query's vector, each with its cosine in [-1, 1], best first."""
        return self._search(embedding, k, filter)

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[Document]:
        """k of the `fetch_k` most similar documents, chosen to be similar to the query and unlike each other.

        `lambda_mult` is the weight of similarity: 1 ignores diversity, 0 is all diversity.
        """
        _refuse_unknown(kwargs)
        return self._diverse(self._embed_query(query), k, fetch_k, lambda_mult, filter)

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[Document]:
        """`max_marginal_relevance_search` for a query's vector."""
        _refuse_unknown(kwargs)
        return self._diverse(embedding, k, fetch_k, lambda_mult, filter)

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: max(0.0, cosine)

    def _hits(
        self, vector: Sequence[float] | NDArray[np.float32], k: int, where: Mapping[str, Any] | None
    ) -> list[Hit]:
        return self.index.search(np.asarray([vector], dtype=np.float32), k=k, filter=where)[0]

    def _search(
        self, vector: Sequence[float] | NDArray[np.float32], k: int, where: Mapping[str, Any] | None
    ) -> list[tuple[Document, float]]:
        return [
            (_document(hit.id, hit.text, hit.metadata), hit.score) for hit in self._hits(vector, k, where)
        ]

    def _diverse(
        self,
        vector: Sequence[float] | NDArray[np.float32],
        k: int,
        fetch_k: int,
        lambda_mult: float,
        where: Mapping[str, Any] | None,
    ) -> list[Document]:
        hits = self._hits(vector, max(k, fetch_k), where)
        query = np.asarray(vector, dtype=np.float32)
        # A query of fewer compressed tokens is compared with the same part of each document.
        rows = self.index.vectors([hit.id for hit in hits])[:, : len(query)]
        chosen = maximal_marginal_relevance(query, list(rows), lambda_mult=lambda_mult, k=k) if hits else []
        return [_document(hits[i].id, hits[i].text, hits[i].metadata) for i in chosen]


def _document(id_: str, text: str, metadata: Mapping[str, Any]) -> Document:
    own = {key: value for key, value in metadata.items() if not key.startswith(RESERVED_PREFIX)}
    return Document(id=id_, page_content=text, metadata=own)


def _refuse_reserved(metadatas: Iterable[Mapping[str, Any] | None], ids: Iterable[str]) -> None:
    for metadata, id_ in zip(metadatas, ids, strict=True):
        for key in metadata or ():
            if isinstance(key, str) and key.startswith(RESERVED_PREFIX):
                raise ValueError(
                    f"metadata key {key!r} of id {id_!r}: keys that start with {RESERVED_PREFIX!r} belong to "
                    "the LlamaIndex store; rename it"
                )


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    if options:
        raise TypeError(f"unknown options {sorted(options)}: AutoRegVectorStore would have to ignore them")
