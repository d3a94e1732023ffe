"""AutoRegVectorStore: a DocumentIndex as a LangChain vector store."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Protocol, runtime_checkable

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import run_in_executor
from langchain_core.vectorstores import VectorStore
from numpy.typing import NDArray
from pydantic import SecretStr

from autoregembed_indexes import DocumentIndex, Filter
from autoregembed_indexes.places import AnyIndex, place_of
from langchain_autoregembed.documents import (
    own_filter,
    refuse_reserved,
    to_document,
    with_scores,
    without_scores,
)
from langchain_autoregembed.retrievers import AutoRegRetriever

Vector = Sequence[float] | NDArray[np.float32]


@runtime_checkable
class _ArrayEmbeddings(Protocol):
    """Embeddings that give arrays, which at 20,000 dimensions spares most of the memory that lists take."""

    def _embed_documents_array(self, texts: list[str]) -> NDArray[np.float32]: ...

    def _embed_query_array(self, text: str) -> NDArray[np.float32]: ...

    def _index_settings(self) -> dict[str, Any]: ...


class AutoRegVectorStore(VectorStore):
    """Documents and their vectors in a folder, in memory or on a Milvus server, searched by cosine, by words, or both.

    When a call that adds or deletes returns, the change is on disk. The same folder serves LlamaIndex
    (`llama_index.vector_stores.autoregembed`). One store at a time may write to a folder, any number may
    read it with `read_only=True`; on a server, any number may write. The async methods run in a thread. Pickling
    keeps the path, or the address without its token, and the copy opens read-only.

    A `filter` is a dict such as {"lang": "en", "year": {"$gte": 2000}}, in the operators of
    `DocumentIndex.search`, or, slower, a function from metadata to bool. Only what matches is ranked: fewer
    than k documents come back only when fewer match.

        store = AutoRegVectorStore(AutoRegEmbeddings(), "index")
        store.add_texts(["Goethe wrote Faust."], metadatas=[{"lang": "en", "year": 1808}], ids=["faust"])
        store.similarity_search("Who wrote Faust?", k=3, filter={"year": {"$lt": 1900}})
        retriever = store.as_retriever(search_type="hybrid", search_kwargs={"k": 3})
    """

    def __init__(
        self,
        embedding: Embeddings,
        path: str | PathLike[str] | None = None,
        *,
        uri: str | None = None,
        collection_name: str | None = None,
        token: str | SecretStr | None = None,
        read_only: bool = False,
        **index_options: Any,
    ) -> None:
        """Open the index at `path` or `uri`, or make it if there is none.

        Args:
            embedding: any LangChain embeddings. Those of this package record their fingerprint in the index;
                for others, `encoder="a name of your own"` does.
            path: a folder; None, without a `uri`, keeps everything in memory.
            uri: a Milvus server instead, "http://host:19530" (see `MilvusDocumentIndex`).
            collection_name: where on the server, "autoregembed" by default.
            token: the server's, "user:password" or an API key; None takes the environment variable MILVUS_TOKEN.
            read_only: search only; the index must exist.
            **index_options: see `DocumentIndex.create` and `MilvusDocumentIndex.create`. `factory`, `tokenizer` and
                `memory_budget` are for a new index; one that exists keeps its own.

        Raises:
            ImportError: FAISS is missing, or for a `uri` pymilvus.
            IndexMismatchError: the index was built by another encoder; both are named.
            IndexLockedError: another store has the folder open for writing.
            FileNotFoundError: `read_only`, and there is no index at `path` or `uri`.
            DocumentIndexError: no server answers at `uri`, or it refuses the token.
            ValueError: `path` and `uri` together, or a server's option without a `uri`.
            TypeError: an option is unknown, or the embeddings settle it.
        """
        self.embedding = embedding
        arrays = embedding if isinstance(embedding, _ArrayEmbeddings) else None
        settings = arrays._index_settings() if arrays else {}
        self._embed_documents = arrays._embed_documents_array if arrays else embedding.embed_documents
        self._embed_query = arrays._embed_query_array if arrays else embedding.embed_query
        kind, place = place_of(path, uri, collection_name, token)
        self.index = _open_or_create(kind, place, settings, index_options, read_only=read_only)

    @property
    def embeddings(self) -> Embeddings:
        """The embeddings given at construction."""
        return self.embedding

    def as_retriever(self, **kwargs: Any) -> AutoRegRetriever:
        """A retriever for chains: `search_type` and `search_kwargs` as `AutoRegRetriever` describes them."""
        tags = kwargs.pop("tags", None) or self._get_retriever_tags()
        return AutoRegRetriever(vectorstore=self, tags=tags, **kwargs)

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
        refuse_reserved(metadatas, all_ids)
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
        """Make or open a store (`path` and other options: see the constructor) and add texts to it."""
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
        return [to_document(found.id, found.text, found.metadata) for found in self.index.get(ids)]

    def similarity_search(
        self,
        query: str,
        k: int = 4,
        filter: Filter | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[Document]:
        """The k documents most similar to a query, best first; options as in `similarity_search_with_score`."""
        return without_scores(self.similarity_search_with_score(query, k, filter, **kwargs))

    def similarity_search_with_score(
        self,
        query: str,
        k: int = 4,
        filter: Filter | None = None,  # noqa: A002
        *,
        num_tokens: int | None = None,
        fetch_k: int | None = None,
        **kwargs: Any,
    ) -> list[tuple[Document, float]]:
        """The k documents most similar to a query, each with its cosine in [-1, 1], best first.

        With `num_tokens`, the query's first so many tokens find `fetch_k` documents (by default max(100, 10 k)),
        which are then ranked by all of its tokens: faster, see `DocumentIndex.search`.
        `similarity_search_with_relevance_scores` gives max(0, cosine), where 1 is a perfect match.
        """
        _refuse_unknown(kwargs)
        vector = self._embed_query(query)
        return self.similarity_search_with_score_by_vector(
            vector, k, filter, num_tokens=num_tokens, fetch_k=fetch_k
        )

    def similarity_search_by_vector(
        self,
        embedding: Vector,
        k: int = 4,
        filter: Filter | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[Document]:
        """The k documents most similar to a query's vector, best first."""
        _refuse_unknown({name: kwargs[name] for name in kwargs.keys() - {"num_tokens", "fetch_k"}})
        return without_scores(self.similarity_search_with_score_by_vector(embedding, k, filter, **kwargs))

    def similarity_search_with_score_by_vector(
        self,
        embedding: Vector,
        k: int = 4,
        filter: Filter | None = None,  # noqa: A002
        *,
        num_tokens: int | None = None,
        fetch_k: int | None = None,
    ) -> list[tuple[Document, float]]:
        """The k documents most similar to a query's vector, each with its cosine in [-1, 1], best first."""
        [hits] = self.index.search(
            _as_row(embedding), k, own_filter(filter), num_tokens=num_tokens, fetch_k=fetch_k
        )
        return with_scores(hits)

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[Document]:
        """k of the `fetch_k` most similar documents, chosen to be similar to the query and unlike each other.

        `lambda_mult` is the weight of similarity: 1 ignores diversity, 0 is all diversity. `num_tokens` as in
        `similarity_search_with_score`.
        """
        return self.max_marginal_relevance_search_by_vector(
            self._embed_query(query), k, fetch_k, lambda_mult, filter, **kwargs
        )

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: Vector,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,  # noqa: A002
        *,
        num_tokens: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """`max_marginal_relevance_search` for a query's vector."""
        _refuse_unknown(kwargs)
        [hits] = self.index.search_mmr(
            _as_row(embedding),
            k,
            own_filter(filter),
            fetch_k=fetch_k,
            lambda_mult=lambda_mult,
            num_tokens=num_tokens,
        )
        return without_scores(with_scores(hits))

    def text_search(
        self,
        query: str,
        k: int = 4,
        filter: Filter | None = None,  # noqa: A002
    ) -> list[Document]:
        """The k documents that match a query's words best, best first; at least one word must occur."""
        return without_scores(self.text_search_with_score(query, k, filter))

    def text_search_with_score(
        self,
        query: str,
        k: int = 4,
        filter: Filter | None = None,  # noqa: A002
    ) -> list[tuple[Document, float]]:
        """`text_search` with BM25 scores: higher is better, comparable within one result only."""
        return with_scores(self.index.search_text(query, k, own_filter(filter)))

    def hybrid_search(
        self,
        query: str,
        k: int = 4,
        filter: Filter | None = None,  # noqa: A002
        *,
        weights: tuple[float, float] = (1.0, 1.0),
        fetch_k: int | None = None,
        num_tokens: int | None = None,
    ) -> list[Document]:
        """The k best documents by similarity and by words together, best first.

        The two rankings are fused by rank, see `DocumentIndex.search_hybrid`; `weights` are those of
        similarity and of words, `fetch_k` says how deep each ranking is (by default max(50, 4 k)),
        `num_tokens` as in `similarity_search_with_score`.
        """
        return without_scores(
            self.hybrid_search_with_score(
                query, k, filter, weights=weights, fetch_k=fetch_k, num_tokens=num_tokens
            )
        )

    def hybrid_search_with_score(
        self,
        query: str,
        k: int = 4,
        filter: Filter | None = None,  # noqa: A002
        *,
        weights: tuple[float, float] = (1.0, 1.0),
        fetch_k: int | None = None,
        num_tokens: int | None = None,
    ) -> list[tuple[Document, float]]:
        """`hybrid_search` with scores, which only order one result: neither cosines nor relevance in [0, 1]."""
        vector = _as_row(self._embed_query(query))
        [hits] = self.index.search_hybrid(
            vector, [query], k, own_filter(filter), weights=weights, fetch_k=fetch_k, num_tokens=num_tokens
        )
        return with_scores(hits)

    def more_like(
        self,
        id: str,  # noqa: A002
        k: int = 4,
        filter: Filter | None = None,  # noqa: A002
    ) -> list[Document]:
        """The k documents most similar to a stored one, which is left out; KeyError if it is not there."""
        return without_scores(with_scores(self.index.search_similar([id], k, own_filter(filter))[0]))

    def search(self, query: str, search_type: str, **kwargs: Any) -> list[Document]:
        """Search in one of the ways of `AutoRegRetriever`, with the arguments of that search."""
        _check_search_type(search_type)
        if search_type == "hybrid":
            return self.hybrid_search(query, **kwargs)
        return super().search(query, search_type, **kwargs)

    async def asearch(self, query: str, search_type: str, **kwargs: Any) -> list[Document]:
        """`search` in a thread."""
        _check_search_type(search_type)
        if search_type == "hybrid":
            return await self.ahybrid_search(query, **kwargs)
        return await super().asearch(query, search_type, **kwargs)

    async def asimilarity_search_with_score_by_vector(
        self, *args: Any, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """`similarity_search_with_score_by_vector` in a thread."""
        return await run_in_executor(None, self.similarity_search_with_score_by_vector, *args, **kwargs)

    async def atext_search(self, *args: Any, **kwargs: Any) -> list[Document]:
        """`text_search` in a thread."""
        return await run_in_executor(None, self.text_search, *args, **kwargs)

    async def atext_search_with_score(self, *args: Any, **kwargs: Any) -> list[tuple[Document, float]]:
        """`text_search_with_score` in a thread."""
        return await run_in_executor(None, self.text_search_with_score, *args, **kwargs)

    async def ahybrid_search(self, *args: Any, **kwargs: Any) -> list[Document]:
        """`hybrid_search` in a thread."""
        return await run_in_executor(None, self.hybrid_search, *args, **kwargs)

    async def ahybrid_search_with_score(self, *args: Any, **kwargs: Any) -> list[tuple[Document, float]]:
        """`hybrid_search_with_score` in a thread."""
        return await run_in_executor(None, self.hybrid_search_with_score, *args, **kwargs)

    async def amore_like(self, *args: Any, **kwargs: Any) -> list[Document]:
        """`more_like` in a thread."""
        return await run_in_executor(None, self.more_like, *args, **kwargs)

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: max(0.0, cosine)


def _open_or_create(
    kind: type[AnyIndex],
    place: dict[str, Any],
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    read_only: bool,
) -> AnyIndex:
    """`settings` are the embeddings' own, `options` the user's."""
    placed = {"path", "uri", "collection_name", "token"}
    known = inspect.signature(kind.create).parameters.keys() - settings.keys() - placed
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"unknown options {unknown}: an index with these embeddings takes {sorted(known)}")
    in_memory = kind is DocumentIndex and place["path"] is None
    if in_memory and read_only:
        raise ValueError("read_only needs a path: a new store in memory would have nothing to read")
    if in_memory or not (read_only or kind.exists(**place)):
        return kind.create(**place, **settings, **options)
    # Not the embeddings' dimension: with fewer tokens than the index has, they may still search it.
    offered = {"encoder": settings.get("encoder"), **options}
    taken = inspect.signature(kind.open).parameters.keys() & offered.keys()
    return kind.open(**place, read_only=read_only, **{name: offered[name] for name in taken})


def _as_row(vector: Vector) -> NDArray[np.float32]:
    return np.asarray([vector], dtype=np.float32)


def _check_search_type(search_type: str) -> None:
    allowed = AutoRegRetriever.allowed_search_types
    if search_type not in allowed:
        raise ValueError(f"search_type of {search_type} not allowed. Valid values are: {allowed}")


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    if options:
        raise TypeError(f"unknown options {sorted(options)}: AutoRegVectorStore would have to ignore them")
