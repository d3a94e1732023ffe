"""MilvusDocumentIndex: documents and their vectors in a collection of a Milvus server."""

import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from numpy.typing import ArrayLike

from autoregembed_indexes.arguments import id_list
from autoregembed_indexes.errors import DocumentIndexError
from autoregembed_indexes.filters import index_expression
from autoregembed_indexes.lexical import DEFAULT_TOKENIZER
from autoregembed_indexes.milvus.collection import MOST_BYTES, MOST_DIMENSIONS, Collection, key_of
from autoregembed_indexes.milvus.kinds import MilvusKind
from autoregembed_indexes.milvus.searching import SearchableCollection
from autoregembed_indexes.milvus.server import Server, check_name
from autoregembed_indexes.records import prepare_ids, prepare_metadatas, prepare_texts
from autoregembed_indexes.settings import State, check_added, check_opened, new_state
from autoregembed_indexes.vectors import as_matrix, round_for_storage

DEFAULT_COLLECTION = "autoregembed"


class MilvusDocumentIndex(SearchableCollection):
    """A `DocumentIndex` on a Milvus server: the same calls with the same meaning; make one with `create` or `open`.

    When `add` or `delete` returns, the server has logged the change, and this index, another one opened from then on
    and any with `strong=True` see it; others see it a moment later. Any number of clients write. Vectors are rounded
    as in a DocumentIndex, so that a search with the factory "Flat" finds the same documents with the same cosines.
    Search by words and hybrid need Milvus 2.5 or newer, or milvus-lite. Safe to share between threads. Pickling keeps
    the address, not the token, for which see `create`; the copy opens read-only.

    Where it differs from a DocumentIndex is written in docs/milvus.md.
    """

    def __init__(
        self,
        server: Server,
        name: str,
        state: State,
        collection: Collection | None,
        *,
        read_only: bool,
        strong: bool,
    ) -> None:
        """Use `create` or `open`."""
        self._server = server
        self._name = name
        self._state = state
        self._collection = collection
        self._read_only = read_only
        self._strong = strong
        self._closed = False
        self._mutex = threading.Lock()

    @classmethod
    def create(
        cls,
        uri: str,
        collection_name: str = DEFAULT_COLLECTION,
        *,
        token: str | None = None,
        dimension: int | None = None,
        factory: str = "auto",
        encoder: str | None = None,
        tokens: int | None = None,
        strong: bool = False,
    ) -> "MilvusDocumentIndex":
        """Make an empty index on the server at `uri`.

        Args:
            uri: "http://host:19530", "https://...", or the path of a milvus-lite file, "FILE.db".
            collection_name: where; letters, digits and underscores.
            token: "user:password" or an API key; None takes the environment variable MILVUS_TOKEN, if there is one.
            dimension: entries of a vector, at most 32,768; None takes it from the first `add`, which then makes the
                collection: until then there is nothing on the server.
            factory: how vectors are searched. "Flat" (or "SQfp16") is exact; "IVF1024,Flat" and "IVF1024,SQ8" visit
                some of 1024 lists, "HNSW32" is a graph with 32 links; "auto" leaves it to the server.
            encoder: fingerprint of the encoder that the vectors come from.
            tokens: the number k of compressed tokens of a flattened embedding; allows queries of the first j < k.
            strong: see what other clients have written as soon as they have; each search then waits for the server's
                clock, about 0.2 seconds. Without it, only the first search after a write of one's own does.

        Raises ImportError without pymilvus, FileExistsError when there is such a collection, ValueError for more
        dimensions, a factory or a name that Milvus does not have, DocumentIndexError when no server answers or it
        refuses the token.
        """
        state = _new_state(factory, dimension, tokens, encoder)
        server = Server(uri, token)
        if cls._is_there(server, check_name(collection_name)):
            raise FileExistsError(
                f"there is a collection {collection_name!r} at {uri}; MilvusDocumentIndex.open opens an index"
            )
        index = cls(server, collection_name, state, None, read_only=False, strong=strong)
        if dimension is not None:
            index._make(dimension)
        return index

    @classmethod
    def open(
        cls,
        uri: str,
        collection_name: str = DEFAULT_COLLECTION,
        *,
        token: str | None = None,
        dimension: int | None = None,
        encoder: str | None = None,
        read_only: bool = False,
        strong: bool = False,
    ) -> "MilvusDocumentIndex":
        """Open the index in a collection of the server at `uri`, to write and search, or only to search.

        `dimension` and `encoder` (a fingerprint) are checked against the index where both sides have one; the other
        arguments are those of `create`.

        Raises IndexMissingError, a FileNotFoundError, when there is no such collection, IndexMismatchError for another
        encoder or dimension, DocumentIndexError for a collection that is not an index and where `create` does.
        """
        server = Server(uri, token)
        collection = Collection(server, check_name(collection_name), strong=strong)
        state = _state_of(collection)
        check_opened(f"the collection {collection_name!r} at {uri}", state, dimension, encoder)
        return cls(server, collection_name, state, collection, read_only=read_only, strong=strong)

    @classmethod
    def exists(cls, uri: str, collection_name: str = DEFAULT_COLLECTION, *, token: str | None = None) -> bool:
        """Tell whether the server at `uri` has such a collection. Raises DocumentIndexError where `create` does."""
        return cls._is_there(Server(uri, token), check_name(collection_name))

    @staticmethod
    def _is_there(server: Server, collection_name: str) -> bool:
        with server.calls(f"look for the collection {collection_name!r}"):
            return bool(server.client.has_collection(collection_name))

    def add(
        self,
        vectors: ArrayLike,
        texts: Sequence[str],
        ids: Sequence[str | None] | None = None,
        metadatas: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> list[str]:
        """Store documents, one per row of `vectors` [n, dimension], replacing those whose id is there.

        As `DocumentIndex.add`, in several messages where one would be too large. Everything is checked before the
        first. When the server fails half way, DocumentIndexError says how many documents are stored; adding all of
        them again is safe.

        Raises ValueError, naming document and field, where its id, text or metadata has more than the 65,535 bytes
        of UTF-8 that Milvus holds in a field, and for vectors of more than 32,768 dimensions.
        """
        matrix = as_matrix(vectors, "vectors")
        if isinstance(texts, str):
            raise TypeError("texts must be a list with one text per vector, got str")
        all_ids = prepare_ids(ids, len(matrix))
        rounded = round_for_storage(matrix, all_ids)
        all_texts = prepare_texts(texts, all_ids)
        all_metadatas = prepare_metadatas(metadatas, all_ids)
        keys = [key_of(doc_id) for doc_id in all_ids]
        _check_bytes(all_ids, keys, all_texts, all_metadatas)
        stored = rounded()
        collection = self._writable()
        if not all_ids:
            return []
        check_added(matrix.shape[1], self._state)
        collection = collection or self._make(matrix.shape[1])
        collection.write(keys, all_texts, all_metadatas, stored)
        return all_ids

    def delete(self, ids: Sequence[str]) -> int:
        """Delete documents by id, and return how many there were; unknown ids are fine."""
        keys = [key_of(doc_id) for doc_id in dict.fromkeys(id_list(ids))]
        collection = self._writable()
        found = collection.present(keys) if collection else []
        if collection and found:
            collection.delete(found)
        return len(found)

    def clear(self) -> int:
        """Delete every document, and return how many there were; dimension and encoder stay."""
        collection = self._writable()
        count = collection.count() if collection else 0
        if collection and count:
            collection.delete_all()
        return count

    def drop(self) -> None:
        """Delete the index with all that is in it from the server, and close it."""
        if self._writable():
            with self._server.calls(f"drop the collection {self._name!r}"):
                self._server.client.drop_collection(self._name)
        self.close()

    def create_metadata_index(self, key: str) -> None:
        """Check a metadata key; a server finds what a filter names without an index of ours."""
        index_expression(key)
        self._writable()

    def drop_metadata_index(self, key: str) -> bool:
        """Check a metadata key, and return False: there are no indexes to drop."""
        index_expression(key)
        self._writable()
        return False

    @property
    def metadata_indexes(self) -> list[str]:
        """None: see `create_metadata_index`."""
        return []

    def refresh(self) -> None:
        """See with the next call what other clients have written by now."""
        collection = self._opened()
        if collection:
            collection.refresh()

    def info(self) -> dict[str, Any]:
        """Say what the index is: its settings, what it holds, and how its server searches."""
        collection = self._opened()
        state = self._state
        return {
            "uri": self._server.uri,
            "collection": self._name,
            "server": self._server.version_text,
            "documents": collection.count() if collection else 0,
            "dimension": state.dimension,
            "tokens": state.tokens,
            "encoder": state.encoder,
            "factory": state.factory,
            "kind": MilvusKind.of(state.factory).index_type,
            "vectors": None if collection is None else "float16" if collection.has_half else "float32",
            "words": collection.has_words if collection else self._server.has_words,
            "metadata_indexes": [],
        }

    @property
    def uri(self) -> str:
        """The server's address."""
        return self._server.uri

    @property
    def collection_name(self) -> str:
        """The collection's name."""
        return self._name

    @property
    def path(self) -> None:
        """None: it is no folder."""

    @property
    def read_only(self) -> bool:
        """Whether it was opened to search only."""
        return self._read_only

    @property
    def dimension(self) -> int | None:
        """The number of entries of a vector; None before the first `add` of an index made without it."""
        self._opened()
        return self._state.dimension

    @property
    def encoder(self) -> str | None:
        """The fingerprint of the encoder that the vectors come from, where it was given."""
        return self._state.encoder

    @property
    def tokens(self) -> int | None:
        """The number of compressed tokens that a vector is made of, where it was given."""
        return self._state.tokens

    def close(self) -> None:
        """Close the index; closing twice is fine."""
        with self._mutex:
            if not self._closed:
                self._closed = True
                self._server.close()

    def __enter__(self) -> "MilvusDocumentIndex":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_read_only, (self._server.uri, self._name, self._strong)

    def __repr__(self) -> str:
        read_only = " (read-only)" if self._read_only else ""
        return f"<MilvusDocumentIndex {self._name} at {self._server.uri}{read_only}>"

    def _opened(self) -> Collection | None:
        if self._closed:
            raise DocumentIndexError(f"{self!r} is closed; open it again with MilvusDocumentIndex.open")
        with self._mutex:
            if self._collection is None and self._is_there(self._server, self._name):
                self._adopt(Collection(self._server, self._name, strong=self._strong))
            return self._collection

    def _writable(self) -> Collection | None:
        if self._read_only:
            raise DocumentIndexError(f"{self!r} cannot be changed; open it without read_only")
        return self._opened()

    def _make(self, dimension: int) -> Collection:
        """Make the collection; where another client just has, that one is taken if it is alike."""
        _check_dimension(dimension)
        with self._mutex:
            if self._collection is None:
                self._adopt(
                    Collection.make(self._server, self._name, self._state, dimension, strong=self._strong)
                )
            collection = self._collection
        assert collection is not None  # noqa: S101  (adopted above)
        check_added(dimension, self._state)
        return collection

    def _adopt(self, collection: Collection) -> None:
        state = _state_of(collection)
        check_opened(f"the collection {self._name!r} at {self._server.uri}", state, None, self._state.encoder)
        self._collection, self._state = collection, state


def _open_read_only(uri: str, collection_name: str, strong: bool) -> MilvusDocumentIndex:
    return MilvusDocumentIndex.open(uri, collection_name, read_only=True, strong=strong)


def _new_state(factory: str, dimension: int | None, tokens: int | None, encoder: str | None) -> State:
    MilvusKind.of(factory)
    state = new_state("auto", dimension, tokens, encoder, DEFAULT_TOKENIZER, 1)
    if dimension is not None:
        _check_dimension(dimension)
    return state._replace(factory=factory)


def _state_of(collection: Collection) -> State:
    settings = collection.settings
    state = _new_state(settings["factory"], collection.dimension, settings["tokens"], settings["encoder"])
    return state._replace(name=collection.name)


def _check_dimension(dimension: int) -> None:
    if dimension > MOST_DIMENSIONS:
        raise ValueError(
            f"vectors have dimension {dimension:,}, and Milvus takes at most {MOST_DIMENSIONS:,}: use fewer compressed "
            "tokens (num_tokens=... where the embeddings are made), pooling='mean', or a DocumentIndex"
        )


def _check_bytes(ids: list[str], keys: list[str], texts: list[str], metadatas: list[str]) -> None:
    """Refuse what the server would refuse after it has taken other documents."""
    fields = (
        ("id, percent-encoded,", keys, "use shorter ids"),
        ("text", texts, "split it into several documents"),
        ("metadata, in JSON,", metadatas, "keep less of it here, such as a key to where the rest is"),
    )
    for name, values, remedy in fields:
        for doc_id, value in zip(ids, values, strict=True):
            size = len(value) if value.isascii() else len(value.encode())
            if size > MOST_BYTES:
                raise ValueError(
                    f"the {name} of id {doc_id!r:.200} has {size:,} bytes of UTF-8, and Milvus holds at most "
                    f"{MOST_BYTES:,} in a field: {remedy}, or use a DocumentIndex"
                )
