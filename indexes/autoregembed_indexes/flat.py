"""The fast copy: the vectors of a store, in memory, searched exactly by FAISS.

Rows stay in ascending order, whatever order they were written in. So the copy of a reopened index is equal to
the one that grew by upserts and deletes, and gives the same results.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from autoregembed_indexes.store import DocumentStore, Rows
from autoregembed_indexes.vectors import Float32


def import_faiss() -> Any:  # noqa: ANN401 - FAISS has no types
    """Import FAISS, or say how to install it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError('DocumentIndex needs FAISS: pip install "autoregembed-rag[faiss]"') from error
    return faiss


class FlatCopy:
    """The first `width` entries of every vector of a store of `dimension`, each row scaled to unit length."""

    def __init__(self, dimension: int, width: int) -> None:
        self._faiss = import_faiss()
        self._flat = self._faiss.IndexFlatIP(width)
        self._dimension = dimension
        self._width = width
        self._rows: Rows = np.empty(0, dtype=np.int64)
        self._version = 0

    def catch_up(self, store: DocumentStore) -> None:
        """Bring the copy to the state of `store`. After an error the copy is unusable and must be dropped."""
        state = store.state()
        if state.version == self._version:
            return
        if state.deleted > self._version and len(self._rows):
            self._keep(np.isin(self._rows, store.rows_where(None), assume_unique=True))
        changed = store.rows_since(self._version)
        last = self._rows[-1] if len(self._rows) else 0
        self._rows = np.concatenate([self._rows, changed[changed > last]])
        if len(self._rows) != store.count():
            raise store.damage("there are documents without a vector, or vectors without a document")
        self._flat.codes.resize(4 * self._width * len(self._rows))
        self._flat.ntotal = len(self._rows)
        vectors = self._vectors()
        progress = tqdm(
            total=len(changed), desc="loading vectors", unit="doc", delay=2, leave=False, disable=None
        )
        with progress:
            for rows, unit in store.vectors_since(self._version, self._dimension, self._width):
                positions = np.searchsorted(self._rows, rows)
                if positions.max() >= len(self._rows) or (self._rows[positions] != rows).any():
                    raise store.damage("its table of vectors does not agree with the table's own index")
                vectors[positions] = unit
                progress.update(len(rows))
        self._version = state.version

    def search(self, queries: Float32, k: int, among: Rows | None) -> tuple[Float32, Rows]:
        """Find the k best rows for unit `queries` [n, width]: scores and rows, both [n, <= k], best first.

        `among`, ascending, limits the search to some rows. Equal scores come in the order of their rows.
        """
        parameters, available = None, len(self._rows)
        if among is not None:
            chosen = np.zeros(len(self._rows), dtype=bool)
            chosen[np.searchsorted(self._rows, among)] = True
            selector = self._selector(chosen)
            parameters, available = self._faiss.SearchParameters(sel=selector), len(among)
        k = min(k, available)
        if k == 0 or len(queries) == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        scores, positions = self._flat.search(np.ascontiguousarray(queries), k, params=parameters)
        order = np.lexsort((positions, -scores))
        scores = np.take_along_axis(scores, order, axis=1)
        positions = np.take_along_axis(positions, order, axis=1)
        return np.clip(scores, -1, 1), self._rows[positions]

    def _keep(self, kept: NDArray[np.bool_]) -> None:
        self._flat.remove_ids(self._selector(~kept))
        self._rows = self._rows[kept]

    def _selector(self, chosen: NDArray[np.bool_]) -> Any:  # noqa: ANN401
        return self._faiss.IDSelectorBitmap(np.packbits(chosen, bitorder="little"))

    def _vectors(self) -> Float32:
        """FAISS' own memory as an array [n, width]; valid until the index next changes size."""
        size = len(self._rows)
        if size == 0:
            return np.empty((0, self._width), np.float32)
        flat: Float32 = self._faiss.rev_swig_ptr(self._flat.get_xb(), size * self._width)
        return flat.reshape(size, self._width)
