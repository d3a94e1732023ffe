"""What `benchmarks.search` compares, under one interface: `DocumentIndex`, FAISS itself, community FAISS.

All three see the same vectors, texts and metadata. FAISS itself holds vectors only: its user keeps the rest.
"""

import shutil
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autoregembed_indexes import DocumentIndex
from autoregembed_indexes.copies import import_faiss
from autoregembed_indexes.kinds import Kind, search_parameters
from benchmarks.synthetic import Collection, Float32, Where

faiss = import_faiss()

STATUS = Path("/proc/self/status")
MEMORY_SEARCHES = 64


class Store(Protocol):
    """A store in a folder. Vectors and queries are passed as `prepare` made them, what is found as it comes."""

    name: str
    folder: Path

    def prepare(self, vectors: Float32) -> Any: ...  # noqa: ANN401
    def add(self, vectors: Any, data: Collection) -> None: ...  # noqa: ANN401
    def save(self) -> None: ...
    def close(self) -> None: ...
    def open(self) -> None: ...
    def search(self, queries: Any, k: int, where: Where | None = None) -> Any: ...  # noqa: ANN401
    def positions(self, found: Any) -> list[list[int]]: ...  # noqa: ANN401
    def delete(self, positions: NDArray[np.int64]) -> None: ...
    def upsert(self, positions: NDArray[np.int64], vectors: Any, data: Collection) -> None: ...  # noqa: ANN401
    def vector_bytes(self) -> int: ...


class OurStore:
    """`DocumentIndex`: durable when `add`, `upsert` or `delete` returns; `close` writes the snapshot."""

    name = "DocumentIndex"

    def __init__(self, folder: Path, factory: str) -> None:
        self.folder = folder
        self.kind = ""
        self._factory = factory
        self._index: Any = None

    @property
    def index(self) -> DocumentIndex:
        """The index, while open."""
        found: DocumentIndex = self._index
        return found

    def prepare(self, vectors: Float32) -> Float32:
        """An array is fine."""
        return vectors

    def add(self, vectors: Float32, data: Collection) -> None:
        """Create the index and add everything."""
        self._index = DocumentIndex.create(
            self.folder, dimension=vectors.shape[1], factory=self._factory, device="cpu"
        )
        self.index.add(vectors, data.texts, ids=data.ids, metadatas=data.metadatas)
        self.kind = self.index.info()["kind"]

    def save(self) -> None:
        """Everything is on disk already."""

    def close(self) -> None:
        """Close the index."""
        self.index.close()
        self._index = None

    def open(self) -> None:
        """Open the index, to write too."""
        self._index = DocumentIndex.open(self.folder, device="cpu")

    def search(self, queries: Float32, k: int, where: Where | None = None) -> Any:  # noqa: ANN401
        """Hits with text and metadata."""
        return self.index.search(queries, k, None if where is None else where.filter)

    def positions(self, found: Any) -> list[list[int]]:  # noqa: ANN401
        """The positions of the documents found."""
        return [[int(hit.id) for hit in hits] for hits in found]

    def delete(self, positions: NDArray[np.int64]) -> None:
        """Delete by id."""
        self.index.delete([str(position) for position in positions])

    def upsert(self, positions: NDArray[np.int64], vectors: Float32, data: Collection) -> None:
        """Replace by id."""
        texts = [data.texts[position] for position in positions]
        metadatas = [data.metadatas[position] for position in positions]
        self.index.add(vectors, texts, ids=[str(position) for position in positions], metadatas=metadatas)

    def vector_bytes(self) -> int:
        """Bytes of the FAISS snapshot."""
        return sum(file.stat().st_size for file in self.folder.glob("*.faiss"))


class BareFaiss:
    """The FAISS index that `DocumentIndex` reports as its kind, searched with the same parameters."""

    name = "FAISS"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kind = "Flat"
        self._index: Any = None
        self._parameters: dict[str | None, Any] = {}

    def prepare(self, vectors: Float32) -> Float32:
        """An array is fine."""
        return vectors

    def add(self, vectors: Float32, data: Collection) -> None:  # noqa: ARG002
        """Train and add."""
        self._index = faiss.index_factory(vectors.shape[1], self.kind, faiss.METRIC_INNER_PRODUCT)
        self._index.train(vectors)
        self._index.add(vectors)

    def save(self) -> None:
        """Write the whole index."""
        self.folder.mkdir(parents=True, exist_ok=True)
        faiss.write_index(self._index, str(self.folder / "index.faiss"))

    def close(self) -> None:
        """Free the memory."""
        self._index, self._parameters = None, {}

    def open(self) -> None:
        """Read the whole index."""
        self._index = faiss.read_index(str(self.folder / "index.faiss"))

    def search(self, queries: Float32, k: int, where: Where | None = None) -> Any:  # noqa: ANN401
        """Scores and positions; a filter's bitmap is made at its first use and kept."""
        key = None if where is None else where.key
        if key not in self._parameters:
            kind, selector = Kind.parse(self.kind), None
            if where is not None:
                selector = faiss.IDSelectorBitmap(np.packbits(where.matches, bitorder="little"))
            self._parameters[key] = search_parameters(faiss, kind, selector, kind.probes)
        return self._index.search(queries, k, params=self._parameters[key])

    def positions(self, found: Any) -> list[list[int]]:  # noqa: ANN401
        """The positions of the vectors found."""
        return [[position for position in line if position >= 0] for line in found[1].tolist()]

    def delete(self, positions: NDArray[np.int64]) -> None:
        """Remove by position, which moves those behind."""
        self._index.remove_ids(faiss.IDSelectorBatch(positions))

    def upsert(self, positions: NDArray[np.int64], vectors: Float32, data: Collection) -> None:  # noqa: ARG002
        """Remove and add at the end: FAISS itself has no ids here."""
        self.delete(positions)
        self._index.add(vectors)

    def vector_bytes(self) -> int:
        """Bytes of the one file."""
        return (self.folder / "index.faiss").stat().st_size


class CommunityStore:
    """`langchain_community.vectorstores.FAISS`, inner product: one query at a time, vectors as lists."""

    name = "community FAISS"

    def __init__(self, folder: Path, dimension: int) -> None:
        from langchain_community.vectorstores.faiss import FAISS
        from langchain_community.vectorstores.utils import DistanceStrategy
        from langchain_core.embeddings import FakeEmbeddings

        self.folder = folder
        self._class: Any = FAISS
        self._metric = DistanceStrategy.MAX_INNER_PRODUCT
        self._embeddings = FakeEmbeddings(size=dimension)  # never asked
        self._store: Any = None

    @staticmethod
    def installed() -> bool:
        """Whether langchain-community is there."""
        return find_spec("langchain_community") is not None

    def prepare(self, vectors: Float32) -> list[list[float]]:
        """What an `Embeddings` returns."""
        lists: list[list[float]] = vectors.tolist()
        return lists

    def add(self, vectors: list[list[float]], data: Collection) -> None:
        """Make the store, in memory."""
        self._store = self._class.from_embeddings(
            zip(data.texts, vectors, strict=True),
            self._embeddings,
            metadatas=data.metadatas,
            ids=data.ids,
            distance_strategy=self._metric,
        )

    def save(self) -> None:
        """Write the whole index and a pickle of all documents."""
        self._store.save_local(str(self.folder))

    def close(self) -> None:
        """Free the memory."""
        self._store = None

    def open(self) -> None:
        """Read everything."""
        self._store = self._class.load_local(
            str(self.folder),
            self._embeddings,
            allow_dangerous_deserialization=True,  # the pickle is our own, of a minute ago
            distance_strategy=self._metric,
        )

    def search(self, queries: list[list[float]], k: int, where: Where | None = None) -> Any:  # noqa: ANN401
        """Documents with scores; a filter is applied to the `fetch_k` nearest."""
        search = self._store.similarity_search_with_score_by_vector
        limits = {} if where is None else {"filter": where.filter, "fetch_k": where.fetch_k}
        return [search(query, k, **limits) for query in queries]

    def positions(self, found: Any) -> list[list[int]]:  # noqa: ANN401
        """The positions of the documents found."""
        return [[int(document.id) for document, _ in line] for line in found]

    def delete(self, positions: NDArray[np.int64]) -> None:
        """Delete by id, in memory."""
        self._store.delete([str(position) for position in positions])

    def upsert(self, positions: NDArray[np.int64], vectors: list[list[float]], data: Collection) -> None:
        """Delete and add under the same ids: adding an id that is there is an error."""
        self.delete(positions)
        self._store.add_embeddings(
            zip([data.texts[position] for position in positions], vectors, strict=True),
            metadatas=[data.metadatas[position] for position in positions],
            ids=[str(position) for position in positions],
        )

    def vector_bytes(self) -> int:
        """Bytes of the FAISS file, without the pickle."""
        return (self.folder / "index.faiss").stat().st_size


def remove(store: Store) -> None:
    """Delete a store's folder."""
    shutil.rmtree(store.folder, ignore_errors=True)


def memory(store: Store, queries: Float32) -> dict[str, int] | None:
    """Bytes that opening a closed store and 64 searches add to a fresh process; None where no /proc tells."""
    if not STATUS.is_file():
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_open_and_search, store, queries[:MEMORY_SEARCHES]).result()


def _open_and_search(store: Store, queries: Float32) -> dict[str, int]:
    prepared = store.prepare(queries)
    before = _resident()
    store.open()
    for number in range(MEMORY_SEARCHES):
        position = number % len(queries)
        store.search(prepared[position : position + 1], 10)
    return {name: after - before[name] for name, after in _resident().items()}


def _resident() -> dict[str, int]:
    """Bytes in memory now: the process's own, and those mapped from files, which others may share."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines())
    return {name: 1024 * int(lines[name].split()[0]) for name in ("RssAnon", "RssFile")}
