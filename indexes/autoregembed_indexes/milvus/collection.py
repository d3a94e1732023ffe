"""One collection of a Milvus server: its fields, and reading, writing and searching it in messages that pass.

A document is a row: its id, percent-encoded so that no expression needs escapes; its text and its metadata in JSON,
which come back as they are; the metadata once more in a form that the server compares (`expressions`); its vector;
and, where the server searches by words, what it makes of the text for that.
"""

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np

from autoregembed_indexes.errors import DocumentIndexError, IndexMissingError
from autoregembed_indexes.milvus.expressions import EVERYTHING, comparable_fields
from autoregembed_indexes.milvus.kinds import MilvusKind
from autoregembed_indexes.milvus.server import RETRIES, Server, TooLargeError
from autoregembed_indexes.settings import State
from autoregembed_indexes.vectors import Float16, Float32, stored_to_unit

MESSAGE_BYTES = 48 * 2**20  # a server takes 64 MiB
MOST_BYTES = 65_535  # of UTF-8, in a field
MOST_DIMENSIONS = 32_768
MOST_HITS = 16_384  # of one query, and rows of one answer
FORMAT = 1
ANALYZER = {
    "tokenizer": "standard",
    "filter": ["lowercase", "asciifolding", {"type": "stemmer", "language": "english"}],
}
SETTINGS = "autoregembed"
MOST_QUERIES = 16_384  # in a message
SCORES_AT_ONCE = 2**18  # of all queries in one message


class Row(NamedTuple):
    """What is read of a document; `key` is its id, percent-encoded."""

    key: str
    text: str
    metadata: str

    @property
    def id(self) -> str:
        """The document's id."""
        return id_of(self.key)


Line = list[tuple[str, float]]  # what a query found: keys and scores, best first


def key_of(doc_id: str) -> str:
    """An id as the collection has it."""
    return quote(doc_id, safe="")


def id_of(key: str) -> str:
    """The id that a key stands for."""
    return unquote(key)


class Collection:
    """A collection that exists, loaded into the server's memory."""

    def __init__(self, server: Server, name: str, *, strong: bool) -> None:
        """Open it. Raises IndexMissingError, or DocumentIndexError for a collection that is not an index."""
        self.server = server
        self.name = name
        self._strong = strong
        self._writes, self._settled = 1, 0  # the number of writes, and of those that a read has waited for
        self._mutex = threading.Lock()
        with server.calls(f"open the collection {name!r}"):
            if not server.client.has_collection(name, retry_times=RETRIES):
                raise IndexMissingError(
                    f"no index at {server.uri}: it has no collection {name!r}; MilvusDocumentIndex.create makes one"
                )
            found = server.client.describe_collection(name)
            server.client.load_collection(name)
        fields = {field["name"]: field for field in found["fields"]}
        settings = _settings(found)
        if settings is None or not {"id", "text", "metadata", "fields", "vector"} <= fields.keys():
            raise DocumentIndexError(
                f"the collection {name!r} at {server.uri} was not made by MilvusDocumentIndex; choose another "
                "collection_name"
            )
        if settings["format"] != FORMAT:
            raise DocumentIndexError(
                f"the collection {name!r} at {server.uri} has format {settings['format']}, and this version "
                f"reads {FORMAT}; upgrade autoregembed-rag"
            )
        self.dimension = int(fields["vector"]["params"]["dim"])
        self.has_half = "FLOAT16" in str(fields["vector"]["type"].name)
        self.has_words = "words" in fields
        self.kind = MilvusKind.of(settings["factory"])
        self.settings: dict[str, Any] = settings

    @classmethod
    def make(cls, server: Server, name: str, state: State, dimension: int, *, strong: bool) -> "Collection":
        """Make it on the server, with all that the server can do, and open it."""
        halves = [False] if server.has_half is False else [True, False]  # what is not known is tried
        for half in halves:
            try:
                _create(server, name, state, dimension, half=half)
                break
            except DocumentIndexError:
                if half == halves[-1]:
                    raise
        return cls(server, name, strong=strong)

    def write(
        self, keys: Sequence[str], texts: Sequence[str], metadatas: Sequence[str], stored: Float16
    ) -> None:
        """Put rows in, or in place of those with their keys. Raises DocumentIndexError that says how many are in."""
        done = 0
        for part in self._batches(keys, texts, metadatas):
            rows = self._rows(keys[part], texts[part], metadatas[part], stored[part])
            try:
                with self._writing("write documents"):
                    self.server.client.upsert(self.name, rows, retry_times=RETRIES)
            except DocumentIndexError as error:
                raise DocumentIndexError(
                    f"{error}; {done:,} of {len(keys):,} documents were stored before that: add them all again, which "
                    "replaces those"
                ) from None
            done = part.stop

    def delete(self, keys: Sequence[str]) -> None:
        """Delete rows by key, whether they are there or not."""
        for chunk in chunks(keys):
            with self._writing("delete documents"):
                self.server.client.delete(self.name, ids=list(chunk), retry_times=RETRIES)

    def delete_all(self) -> None:
        """Delete every row."""
        with self._writing("delete all documents"):
            self.server.client.delete(self.name, filter=EVERYTHING, retry_times=RETRIES)

    def count(self, expression: str = "") -> int:
        """Count the rows for which an expression holds."""
        [found] = self._query("count documents", filter=expression, output_fields=["count(*)"])
        return int(found["count(*)"])

    def read(self, keys: Iterable[str]) -> dict[str, Row]:
        """Map the keys that are there to their rows."""
        found = self._of_keys(list(keys), ["text", "metadata"], 3 * MOST_BYTES)
        return {row["id"]: Row(row["id"], row["text"], row["metadata"]) for row in found}

    def present(self, keys: Sequence[str]) -> list[str]:
        """Those of the keys that are there."""
        return [row["id"] for row in self._of_keys(list(keys), [], MOST_BYTES)]

    def metadatas(self, keys: Iterable[str]) -> dict[str, str]:
        """Map the keys that are there to their metadata."""
        found = self._of_keys(list(keys), ["metadata"], 2 * MOST_BYTES)
        return {row["id"]: row["metadata"] for row in found}

    def vectors(self, keys: Iterable[str]) -> dict[str, Float32]:
        """Map the keys that are there to their vectors, [dimension]."""
        found = self._of_keys(list(keys), ["vector"], MOST_BYTES + 4 * self.dimension)
        return {row["id"]: _vector(row["vector"]) for row in found}

    def pages(self, expression: str, *, metadata: bool) -> Iterator[list[tuple[str, str]]]:
        """All rows for which an expression holds, in the order of their keys: (key, metadata or "")."""
        last, limit = None, MOST_HITS // 16 if metadata else MOST_HITS
        fields = ["id", "metadata"] if metadata else ["id"]
        # milvus-lite answers in the order of keys only to iterators.
        order = {"iterator": "True"} if self.server.is_lite else {}
        while True:
            after = EVERYTHING if last is None else f'id > "{last}"'
            where = f"{after} and ({expression})" if expression else after
            try:
                rows = self._query("list documents", filter=where, limit=limit, output_fields=fields, **order)
            except TooLargeError:
                if limit == 1:
                    raise
                limit //= 2
                continue
            if rows:
                yield [(row["id"], row.get("metadata", "")) for row in rows]
                last = rows[-1]["id"]
            if len(rows) < limit:
                return

    def search(
        self,
        data: Float32 | Sequence[str],
        limit: int,
        expression: str = "",
        *,
        rows: dict[str, Row] | None = None,
        thorough: bool = False,
    ) -> list[Line]:
        """The best `limit` of the rows for which an expression holds, for query vectors or for texts.

        Documents are put into `rows` where so few are asked for that they come along. `thorough` visits all that an
        approximate index has.
        """
        by_words = not isinstance(data, np.ndarray)
        fields = ["text", "metadata"] if rows is not None and limit * 3 * MOST_BYTES <= MESSAGE_BYTES else []
        step = max(1, min(MOST_QUERIES, SCORES_AT_ONCE // limit))
        if fields:
            step = min(step, MESSAGE_BYTES // (limit * 3 * MOST_BYTES))
        if not by_words:
            step = min(step, MESSAGE_BYTES // (4 * self.dimension))
        parameters = {"metric_type": "BM25"} if by_words else self.kind.search_parameters(limit, thorough)
        options = {
            "filter": expression,
            "limit": limit,
            "output_fields": fields,
            "anns_field": "words" if by_words else "vector",
            "search_params": parameters,
        }
        found: list[Line] = []
        while len(found) < len(data):
            part = data[len(found) : len(found) + step]
            try:
                answer = self._read("search", "search", data=self._queries(part), **options)
            except TooLargeError:  # as where ids are very long
                if step == 1:
                    raise
                step = min(step, len(part)) // 2 or 1
                continue
            lines = [list(line) for line in answer] or [[]] * len(part)
            for line in lines:
                if fields and rows is not None:
                    for hit in line:
                        entity = hit["entity"]
                        rows[hit["id"]] = Row(hit["id"], entity["text"], entity["metadata"])
                # milvus-lite tells BM25 as a distance, below 0.
                found.append(
                    [(hit["id"], abs(hit["distance"]) if by_words else hit["distance"]) for hit in line]
                )
        return found

    def refresh(self) -> None:
        """Let the next read wait for what others have written by now."""
        with self._mutex:
            self._writes += 1

    def _queries(self, part: Any) -> list[Any]:  # noqa: ANN401
        if isinstance(part, np.ndarray) and self.has_half:
            return list(part.astype(np.float16))
        return list(part)

    def _rows(
        self, keys: Sequence[str], texts: Sequence[str], metadatas: Sequence[str], stored: Float16
    ) -> list[dict[str, Any]]:
        vectors = stored if self.has_half else stored_to_unit(stored, stored.shape[1])
        return [
            {
                "id": key,
                "text": text,
                "metadata": metadata,
                "fields": comparable_fields(metadata),
                "vector": vector,
            }
            for key, text, metadata, vector in zip(keys, texts, metadatas, vectors, strict=True)
        ]

    def _batches(
        self, keys: Sequence[str], texts: Sequence[str], metadatas: Sequence[str]
    ) -> Iterator[slice]:
        """Rows that fit into a message together: the fields made of metadata count as much as they may."""
        start = size = 0
        for position, (key, text, metadata) in enumerate(zip(keys, texts, metadatas, strict=True)):
            own = (
                len(key)
                + len(text.encode())
                + min(16 * len(metadata), 2 * MOST_BYTES)
                + 4 * self.dimension
                + 200
            )
            if size + own > MESSAGE_BYTES and position > start:
                yield slice(start, position)
                start, size = position, 0
            size += own
        if len(keys) > start:
            yield slice(start, len(keys))

    def _of_keys(self, keys: list[str], fields: list[str], row_bytes: int) -> Iterator[Mapping[str, Any]]:
        for chunk in chunks(keys, MESSAGE_BYTES // row_bytes):
            yield from self._query("read documents", filter=among(chunk), output_fields=["id", *fields])

    def _query(self, doing: str, **options: Any) -> list[Mapping[str, Any]]:  # noqa: ANN401
        return list(self._read("query", doing, **options))

    def _read(self, method: str, doing: str, **options: Any) -> Any:  # noqa: ANN401
        """Read what this client has written: wait for the server to catch up after a write, and only then."""
        with self._mutex:
            writes = self._writes
            strong = self._strong or self._settled < writes
        with self.server.calls(f"{doing} in the collection {self.name!r}"):
            found = getattr(self.server.client, method)(
                self.name,
                consistency_level="Strong" if strong else "Session",
                retry_times=RETRIES,
                **options,
            )
        if strong:
            with self._mutex:
                self._settled = max(self._settled, writes)
        return found

    @contextmanager
    def _writing(self, doing: str) -> Iterator[None]:
        """Calls that write: whatever comes of them, the next read waits for it."""
        try:
            with self.server.calls(f"{doing} in the collection {self.name!r}"):
                yield
        finally:
            self.refresh()


def chunks(keys: Sequence[str], most: int = MOST_HITS) -> Iterator[Sequence[str]]:
    """Keys in lists that fit into an expression, of at most `most`."""
    start = size = 0
    for position, key in enumerate(keys):
        if position > start and (position - start == most or size + len(key) > MESSAGE_BYTES // 4):
            yield keys[start:position]
            start, size = position, 0
        size += len(key) + 4
    if len(keys) > start:
        yield keys[start:]


def among(keys: Iterable[str]) -> str:
    """The expression for rows with these keys."""
    return "id in [" + ", ".join(f'"{key}"' for key in keys) + "]"


def _create(server: Server, name: str, state: State, dimension: int, *, half: bool) -> None:
    from pymilvus import DataType, Function, FunctionType, MilvusClient

    words = server.has_words
    settings = {"format": FORMAT, "factory": state.factory, "encoder": state.encoder, "tokens": state.tokens}
    described = json.dumps({SETTINGS: settings})
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=described)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=MOST_BYTES)
    analyzed = {"enable_analyzer": True, "analyzer_params": ANALYZER} if words else {}
    schema.add_field("text", DataType.VARCHAR, max_length=MOST_BYTES, **analyzed)
    schema.add_field("metadata", DataType.VARCHAR, max_length=MOST_BYTES)
    schema.add_field("fields", DataType.JSON)
    schema.add_field("vector", DataType.FLOAT16_VECTOR if half else DataType.FLOAT_VECTOR, dim=dimension)
    indexes = MilvusClient.prepare_index_params()
    kind = MilvusKind.of(state.factory)
    indexes.add_index(
        "vector", index_type=kind.index_type, metric_type="COSINE", params=kind.build_parameters
    )
    if words:
        schema.add_field("words", DataType.SPARSE_FLOAT_VECTOR)
        schema.add_function(Function("bm25", FunctionType.BM25, ["text"], ["words"]))
        indexes.add_index("words", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
    # milvus-lite does not keep descriptions.
    kept = {"properties": {SETTINGS: described}} if server.is_lite else {}
    with server.calls(f"make the collection {name!r}"):
        server.client.create_collection(
            name, schema=schema, index_params=indexes, consistency_level="Strong", **kept
        )


def _settings(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings in a collection's description, None where it has none."""
    described = found.get("description") or dict(found.get("properties") or {}).get(SETTINGS, "")
    try:
        settings = json.loads(described)[SETTINGS]
    except (ValueError, TypeError, KeyError):
        return None
    return settings if isinstance(settings, dict) else None


def _vector(found: Any) -> Float32:  # noqa: ANN401
    """A vector as the client returns it: a list of floats, or the bytes of float16."""
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], bytes):
        [found] = found
    array = np.frombuffer(found, np.float16) if isinstance(found, bytes) else np.asarray(found)
    return array.astype(np.float32)
