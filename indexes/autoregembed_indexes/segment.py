"""Some of an index's vectors in one FAISS index, in the order in which they were added."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoregembed_indexes.gpu import GpuIndex, Gpus
from autoregembed_indexes.kinds import Faiss, FaissIndex, Kind, search_parameters
from autoregembed_indexes.store import Rows
from autoregembed_indexes.vectors import Float32


class Segment:
    """A FAISS index whose position i holds the vector of row `rows[i]`, and which of them still count.

    FAISS indexes are never asked to remove: a vector that is deleted or replaced is buried, that is, left out of
    every search, until the segment is built anew. A segment over a mapped snapshot, or with a copy on a GPU, can
    be buried in, not appended to.
    """

    def __init__(
        self,
        faiss: Faiss,
        kind: Kind,
        index: FaissIndex,
        rows: Rows | None = None,
        *,
        mapped: bool = False,
    ) -> None:
        self.kind = kind
        self.index = index
        self.mapped = mapped
        self.rows: Rows = np.empty(0, dtype=np.int64) if rows is None else rows
        self._faiss = faiss
        self._alive: NDArray[np.bool_] | None = None  # None: all of them
        self._ascending = True
        self._offered = False
        self._gpu: GpuIndex | None = None

    def __len__(self) -> int:
        """Count the vectors that are not buried."""
        return len(self.rows) if self._alive is None else int(np.count_nonzero(self._alive))

    @property
    def exact(self) -> bool:
        """Whether scores are exact, since the segment holds the vectors themselves."""
        return str(self.kind) == "Flat"

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU holds a copy of the vectors."""
        return self._gpu is not None and not self._gpu.lost

    def upload(self, gpus: Gpus) -> None:
        """Copy the vectors to the GPUs, once, if there are some and they would be faster."""
        if not self._offered and gpus.suit(self.index):
            self._offered = True
            self._gpu = gpus.upload(self.index, self.kind)

    @property
    def buried(self) -> int:
        """Count the vectors that are left out."""
        return len(self.rows) - len(self)

    @property
    def whole(self) -> bool:
        """Whether the segment could stand for the index as it is: nothing buried, rows ascending."""
        return self._ascending and self.buried == 0

    def reserve(self, count: int) -> None:
        """Make room for `count` more vectors at once, where FAISS keeps them in one array."""
        if not self.kind.lists:
            size = self.index.codes.size()
            self.index.codes.resize(size + count * self.index.code_size)
            self.index.codes.resize(size)  # which keeps the room

    def append(self, rows: Rows, unit: Float32) -> None:
        """Add unit vectors [n, width] of ascending rows that no living vector of the segment has."""
        self.index.add(unit)
        if len(rows) and len(self.rows):
            self._ascending &= bool(rows[0] > self.rows[-1])
        self.rows = np.concatenate([self.rows, rows])
        if self._alive is not None:
            self._alive = np.concatenate([self._alive, np.ones(len(rows), dtype=bool)])

    def bury(self, rows: Rows) -> None:
        """Leave the vectors of ascending `rows` out from now on; rows that are not here are fine."""
        if len(rows) == 0 or len(self.rows) == 0 or (self._ascending and rows[0] > self.rows[-1]):
            return
        self._alive = self._living() & ~self._positions(rows)

    def keep(self, rows: Rows) -> None:
        """Bury every vector that is not of one of the ascending `rows`."""
        kept = self._positions(rows)
        if not kept.all():
            self._alive = self._living() & kept

    def search(
        self, queries: Float32, k: int, among: Rows | None, probes: int, *, gpu: bool = True
    ) -> tuple[Float32, Rows]:
        """Find the k nearest of `queries` [n, width]: scores and rows, both [n, k], best first.

        `among`, ascending, limits the search to some rows, `gpu` False to the CPU. Where fewer are found, rows are
        -1 and scores -infinity. Equal scores come in the order of their rows.
        """
        chosen = self._alive
        if among is not None:
            chosen = self._positions(among) if chosen is None else chosen & self._positions(among)
        available = len(self.rows) if chosen is None else int(np.count_nonzero(chosen))
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        if fetch := min(k, available):
            found, positions = self._find(queries, fetch, chosen, probes, gpu=gpu)
            there = positions >= 0
            found = self._exactly(queries, positions) if self.exact else found
            scores[:, :fetch] = np.where(there, found, -np.inf)
            rows[:, :fetch] = np.where(there, self.rows[positions], -1)
        return best(scores, rows, k)

    def _find(
        self, queries: Float32, k: int, chosen: NDArray[np.bool_] | None, probes: int, *, gpu: bool
    ) -> tuple[Float32, Rows]:
        found = self._gpu.search(queries, k, chosen, probes) if gpu and self._gpu else None
        if found is None:
            found = self.index.search(queries, k, params=self._parameters(chosen, probes))
        return found

    def _exactly(self, queries: Float32, positions: Rows) -> Float32:
        """Score again in float64: FAISS' sums depend, in their last digits, on where a vector lies."""
        found = np.empty(positions.shape, dtype=np.float32)
        for line, (query, places) in enumerate(zip(queries, positions, strict=True)):
            found[line] = dot(self._vectors[places], query)
        return found

    @property
    def _vectors(self) -> Float32:
        """FAISS' own memory as an array [n, width]; valid until the index next changes size."""
        shape = (len(self.rows), self.index.d)
        flat: Float32 = self._faiss.rev_swig_ptr(self.index.get_xb(), shape[0] * shape[1])
        return flat.reshape(shape)

    def _parameters(self, chosen: NDArray[np.bool_] | None, probes: int) -> FaissIndex:
        selector = None
        if chosen is not None:
            selector = self._faiss.IDSelectorBitmap(np.packbits(chosen, bitorder="little"))
        return search_parameters(self._faiss, self.kind, selector, min(probes, max(1, self.kind.lists)))

    def _living(self) -> NDArray[np.bool_]:
        return np.ones(len(self.rows), dtype=bool) if self._alive is None else self._alive

    def _positions(self, rows: Rows) -> NDArray[np.bool_]:
        """Mark the positions of ascending `rows`."""
        if self._ascending and len(rows) < len(self.rows):
            marked = np.zeros(len(self.rows), dtype=bool)
            places, there = locate(self.rows, rows)
            marked[places[there]] = True
            return marked
        return locate(rows, self.rows)[1]


def locate(rows: Rows, wanted: Rows) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Find each of `wanted` [any shape] in ascending `rows`: at which place, and whether it is there at all."""
    if len(rows) == 0:
        return np.zeros(wanted.shape, dtype=np.intp), np.zeros(wanted.shape, dtype=bool)
    places = np.searchsorted(rows, wanted)
    places[places == len(rows)] = 0
    return places, rows[places] == wanted


def dot(vectors: NDArray[np.floating[Any]], query: Float32) -> Float32:
    """Inner products of `vectors` [n, d] with a query [d], summed in float64 so that equal vectors score alike."""
    product: Float32 = (vectors.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
    return product


def best(scores: Float32, rows: Rows, k: int) -> tuple[Float32, Rows]:
    """The k best of each line, best first; equal scores in the order of their rows."""
    order = np.lexsort((rows, -scores))[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
