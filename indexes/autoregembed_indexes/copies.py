"""The fast copy of a store's vectors: what FAISS searches, kept up with the database.

A copy is a main segment, which is mapped from a snapshot where there is a folder, and a small one in memory
with what came since. `fold` makes both into a new main segment.
"""

import logging
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from autoregembed_indexes.gpu import GPU_MARGIN, MOST_BURIED, MOST_FOUND, Gpus
from autoregembed_indexes.kinds import Faiss, FaissIndex, Kind, plan, train, training_size
from autoregembed_indexes.scoring import score
from autoregembed_indexes.segment import Segment, best
from autoregembed_indexes.settings import State
from autoregembed_indexes.snapshot import (
    Snapshot,
    SnapshotError,
    read_snapshot,
    snapshot_path,
    write_snapshot,
)
from autoregembed_indexes.store import DocumentStore, Rows
from autoregembed_indexes.vectors import CHUNK_BYTES, Float16, Float32, normalise, stored_to_unit

EXACT_LIMIT = 20_000
SAMPLE = 100
FOLD_SHARE = 0.05
FOLD_VECTORS = 1_000
REGROW = 1.25

logger = logging.getLogger(__name__)


def import_faiss() -> Faiss:
    """Import FAISS, or say how to install it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError('DocumentIndex needs FAISS: pip install "autoregembed-rag[faiss]"') from error
    return faiss


class VectorCopy:
    """The first `width` entries of every vector of a store of `dimension`, each row scaled to unit length.

    After an error in a method that changes it, a copy is unusable and must be dropped.
    """

    def __init__(
        self, state: State, dimension: int, width: int, folder: Path | None, gpus: Gpus, *, read_only: bool
    ) -> None:
        self._faiss = import_faiss()
        self._gpus = gpus
        self._name, self._factory, self._budget = state.name, state.factory, state.memory_budget
        self._dimension = dimension
        self._width = width
        self._path = None if folder is None else snapshot_path(folder, width)
        self._read_only = read_only
        self._reset()

    def _reset(self) -> None:
        self.version = 0
        self.kind = self._plan(0)
        self.snapshot: Snapshot | None = None
        self._unchecked = False
        self._template: FaissIndex | None = None
        self._folded = 0
        self._unsaved = False
        self._segments: list[Segment] = []

    def __len__(self) -> int:
        return sum(len(segment) for segment in self._segments)

    @property
    def on_gpu(self) -> bool:
        """Whether the main segment is searched on a GPU; one that is large enough is, from the first search on."""
        return bool(self._segments) and self._segments[0].on_gpu

    @property
    def pending(self) -> int:
        """How many vectors the snapshot lacks or should no longer have."""
        return sum(segment.buried if segment.mapped else len(segment.rows) for segment in self._segments)

    def catch_up(self, store: DocumentStore, state: State) -> None:
        """Bring the copy to the `state` of `store`, from a snapshot where there is a newer one."""
        if state.version == self.version:
            return
        changed = store.rows_since(self.version)
        if (self.version == 0 or len(changed) > FOLD_VECTORS) and self._map_newer(state.version):
            changed = store.rows_since(self.version)
        if state.deleted > self.version and self._segments:
            living = store.rows_where(None)
            for segment in self._segments:
                segment.keep(living)
            if not len(living):
                self._reset()
        self._bury(changed)
        if not self._rebuilt(store, len(self) + len(changed)):
            self._extend(store, changed if self.version else None, len(changed))
        self.version = state.version
        if len(self) != store.count():
            raise store.damage("there are documents without a vector, or vectors without a document")

    def take_up(self, store: DocumentStore, state: State, rows: Rows, stored: Float16 | None) -> None:
        """Take up vectors that were just stored, without reading them back; None means `rows` were deleted."""
        order = np.argsort(rows)
        self._bury(rows[order])
        self.version = state.version
        if stored is not None and not self._rebuilt(store, len(self) + len(rows)):
            step = max(1, CHUNK_BYTES // (4 * self._width))
            self._tail().reserve(len(rows))
            for start in range(0, len(order), step):
                part = order[start : start + step]
                self._tail().append(rows[part], stored_to_unit(stored[part], self._width))

    def search(
        self, store: DocumentStore, queries: Float32, k: int, among: Rows | None, fetch: int = 0
    ) -> tuple[Float32, Rows]:
        """Find the k best rows for unit `queries` [n, width]: scores and rows, both [n, <= k], best first.

        `among`, ascending rows of the store, limits the search. Equal scores come in the order of their rows.
        Where queries are wider than the copy, their first entries find `fetch` rows, and all of them rank these.
        """
        self._check_snapshot(store)
        available = len(self) if among is None else len(among)
        k = min(k, available)
        if k == 0 or len(queries) == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        wider = queries.shape[1] > self._width
        few = EXACT_LIMIT if among is not None and self.kind.lists else 0
        if available <= max(few, fetch if wider else 0):
            scores, rows = score(store, self._dimension, queries, k, among)
        elif not wider:
            scores, rows = self._widening(store, queries, k, among, available)
        else:
            fetch = min(available, max(fetch, self.kind.candidates(k)) if self.kind.lists else fetch)
            names = [f"query vectors[{place}][:{self._width}]" for place in range(len(queries))]
            first = normalise(queries[:, : self._width], names)
            _, found = self._widening(store, first, fetch, among, available, roughly=bool(self.kind.lists))
            scores, rows = score(store, self._dimension, queries, k, np.unique(found), found)
        return np.clip(scores, -1, 1), rows

    def _widening(
        self,
        store: DocumentStore,
        queries: Float32,
        k: int,
        among: Rows | None,
        available: int,
        *,
        roughly: bool = False,
    ) -> tuple[Float32, Rows]:
        """Rank more candidates than asked for by their exact cosines, and ask for more until they are enough.

        Where rounding is the only error, they are enough once no other vector can belong to the best k (or, among
        a great many equal ones, could change much). A GPU, which rounds more, leaves those crowds to the CPU. With
        lists, a filter leaves fewer vectors in each, so more lists are visited for the same work and recall.
        `roughly` takes FAISS' own scores for exact.
        """
        self._segments[0].upload(self._gpus)
        if self.on_gpu and self._gpus.device != "auto" and among is None and k > MOST_FOUND:
            raise ValueError(
                f"FAISS on a GPU finds at most {MOST_FOUND} vectors, not {k}: ask for fewer, or open the index "
                "with device='cpu' (num_tokens asks for fetch_k)"
            )
        fetch = k if roughly else self.kind.candidates(k)
        probes = math.ceil(self.kind.probes * len(self) / available)
        most = max(4 * k, self.kind.crowd)
        gpu = self.on_gpu
        scores = np.empty((len(queries), k), np.float32)
        rows = np.empty((len(queries), k), np.int64)
        lines = np.arange(len(queries))  # those that are not finished
        while len(lines):
            fetch = min(fetch, available)
            rough, candidates = self._candidates(queries[lines], fetch, among, probes, gpu=gpu)
            margin = GPU_MARGIN if gpu else self.kind.margin
            possible = rough >= rough[:, k - 1 : k] - 2 * margin  # for the best k, if no score is off by more
            if roughly or all(segment.exact for segment in self._segments):
                ranked = rough[:, :k], candidates[:, :k]
            else:
                likely = np.where(possible, candidates, -1)
                read = np.unique(likely[likely >= 0])
                ranked = score(store, self._dimension, queries[lines], k, read, likely)
            scores[lines], rows[lines] = ranked
            if self.kind.lists:
                enough = (candidates >= 0).all(axis=1) | (probes >= self.kind.lists)
            else:
                enough = ranked[0][:, -1] > rough[:, -1] + margin
                enough |= fetch == available or (fetch >= most and not gpu)
            lines = lines[~enough]
            gpu = gpu and fetch < most
            fetch, probes = 4 * fetch, 4 * probes
        return scores, rows

    def _candidates(
        self, queries: Float32, k: int, among: Rows | None, probes: int, *, gpu: bool
    ) -> tuple[Float32, Rows]:
        found = [segment.search(queries, k, among, probes, gpu=gpu) for segment in self._segments]
        if len(found) == 1:
            return found[0]
        scores, rows = zip(*found, strict=True)
        return best(np.hstack(scores), np.hstack(rows), k)

    def fold_if_worth_it(self, store: DocumentStore, *, closing: bool) -> None:
        """Fold when another kind has become right, when most is buried, or when opening would take long."""
        if self._read_only:
            return
        count = len(self)
        stale = self._plan(count) != self.kind if closing else self._unsaved
        wasteful = sum(segment.buried for segment in self._segments) > max(FOLD_VECTORS, count)
        slow_to_open = closing and self._path and self.pending > max(FOLD_VECTORS, FOLD_SHARE * count)
        if stale or wasteful or slow_to_open or (self._gpu_lags() and not closing):
            try:
                self.fold(store)
            except SnapshotError as error:
                logger.warning("%s", error)  # the vectors are in memory and in the database

    def _gpu_lags(self) -> bool:
        """Whether too much of what a GPU holds is buried, or more has come since than it holds."""
        main = self._segments[0] if self.on_gpu else None
        return main is not None and (main.buried > MOST_BURIED or len(self) > 2 * len(main.rows))

    def fold(self, store: DocumentStore) -> None:
        """Make one main segment of all vectors, of the kind that is right for them, and write its snapshot.

        Raises SnapshotError when the snapshot cannot be written; the copy is whole then.
        """
        self._check_snapshot(store)
        kind = self._plan(len(self))
        if kind != self.kind or len(self._segments) != 1 or not self._segments[0].whole:
            self._rebuild(store, kind)
        self._folded, self._unsaved = len(self), False
        if self._path and not self._segments:
            self._path.unlink(missing_ok=True)
        elif self._path:
            template = self._faiss.serialize_index(self._new_index()).tobytes() if kind.lists else b""
            segment = self._segments[0]
            snapshot = write_snapshot(
                self._path,
                self._faiss,
                segment.index,
                segment.rows,
                template,
                name=self._name,
                version=self.version,
                kind=kind,
            )
            self._use(snapshot)
            self._unchecked = False

    def problems(self, store: DocumentStore) -> list[str]:
        """Check the snapshot's checksums, and whether a sample of vectors is found; say what is wrong."""
        if self.snapshot is not None:
            try:
                self.snapshot.check()
            except SnapshotError as error:
                return [str(error)]
        rows = store.rows_where(None)
        sample = np.sort(np.random.default_rng(0).choice(rows, min(SAMPLE, len(rows)), replace=False))
        found = []
        for part, unit in store.vectors(self._dimension, self._width, sample):
            scores, _ = self.search(store, unit, 1, None)
            # The first entries of a vector may be zeros, which have no cosine with anything.
            empty = ~unit.any(axis=1) & (self._width < self._dimension)
            found += [
                f"the vector in row {row} is not found by itself"
                for row in part[(scores[:, 0] < 1 - 1e-3) & ~empty]
            ]
        return found

    def _plan(self, count: int) -> Kind:
        return plan(self._factory, count, self._width, self._budget)

    def _rebuilt(self, store: DocumentStore, count: int) -> bool:
        """Build all anew where `count` vectors, much more than at the last fold, ask for another kind."""
        kind = self._plan(count)
        if kind == self.kind or count < REGROW * self._folded or self._read_only:
            return False
        self._rebuild(store, kind)
        self._folded, self._unsaved = count, True
        return True

    def _rebuild(self, store: DocumentStore, kind: Kind) -> None:
        if kind != self.kind:
            self.kind, self._template = kind, None
            if kind.lists:
                rows = store.rows_where(None)
                size = training_size(len(rows), self._width, kind.lists)
                sample = np.sort(np.random.default_rng(0).choice(rows, size, replace=False))
                parts = [unit for _, unit in store.vectors(self._dimension, self._width, sample)]
                self._template = train(self._faiss, kind, np.concatenate(parts))
        elif kind.lists:
            self._template = self._new_index()  # read from the snapshot while it is there
        self.snapshot, self._segments = None, []  # what is old goes first: memory holds one
        self._extend(store, None, store.count())

    def _extend(self, store: DocumentStore, among: Rows | None, count: int) -> None:
        """Append the stored vectors of `among`, or all."""
        if not count:
            return
        self._tail().reserve(count)
        with tqdm(
            total=count, desc="loading vectors", unit="doc", delay=2, leave=False, disable=None
        ) as progress:
            for rows, unit in store.vectors(self._dimension, self._width, among):
                self._tail().append(rows, unit)
                progress.update(len(rows))

    def _map_newer(self, version: int) -> bool:
        """Use the snapshot in the folder if it is newer than this copy and belongs to the index."""
        if self._path is None or not self._path.exists():
            return False
        try:
            snapshot = read_snapshot(self._path)
            if (snapshot.name, snapshot.width) != (self._name, self._width):
                raise SnapshotError(f"{self._path}: it belongs to another index")
            if snapshot.version > version and not self._read_only:
                raise SnapshotError(f"{self._path}: it is newer than the database")
            if not self.version < snapshot.version <= version:
                return False
            snapshot.check(*(() if snapshot.kind.lists else ("rows",)))
            self._use(snapshot)
        except SnapshotError as error:
            self._discard(error)
            return False
        return True

    def _use(self, snapshot: Snapshot) -> None:
        index, rows = snapshot.map(self._faiss)
        self._segments = [Segment(self._faiss, snapshot.kind, index, rows, mapped=True)]
        self.snapshot, self.kind, self.version = snapshot, snapshot.kind, snapshot.version
        self._template, self._folded, self._unchecked = None, snapshot.count, not snapshot.kind.lists
        self._unsaved = False

    def _check_snapshot(self, store: DocumentStore) -> None:
        """Read a flat snapshot through before its first search, which reads it all anyway."""
        if not self._unchecked or self.snapshot is None:
            return
        try:
            self.snapshot.check()
            self._unchecked = False
        except SnapshotError as error:
            self._discard(error)
            self.catch_up(store, store.state())

    def _discard(self, error: SnapshotError) -> None:
        logger.warning("%s; the vectors are loaded from the database", error)
        if self._path and not self._read_only:
            with suppress(OSError):
                self._path.unlink()
        self._path = None if self._read_only else self._path
        self._reset()

    def _tail(self) -> Segment:
        """The segment in memory, which takes what is new."""
        if not self._segments or self._segments[-1].mapped or self._segments[-1].on_gpu:
            self._segments.append(Segment(self._faiss, self.kind, self._new_index()))
        return self._segments[-1]

    def _new_index(self) -> FaissIndex:
        """A trained, empty FAISS index of the copy's kind."""
        if not self.kind.lists:
            return train(self._faiss, self.kind, np.empty((0, self._width), np.float32))
        if self._template is None and self.snapshot is not None:
            self._template = self.snapshot.read_template(self._faiss)
        return self._faiss.clone_index(self._template)

    def _bury(self, rows: Rows) -> None:
        for segment in self._segments:
            segment.bury(rows)
