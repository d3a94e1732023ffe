"""Search on GPUs: a copy, on one or several of them, of a FAISS index that stays in main memory.

A copy on a GPU cannot forget a vector, be written to a file, or find more than 2048, and most builds of FAISS
ignore selectors there. So it answers what it can, and the index in main memory answers the rest.
"""

import functools
import logging
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoregembed_indexes.kinds import HALF_MARGIN, Faiss, FaissIndex, Kind, search_parameters
from autoregembed_indexes.store import Rows
from autoregembed_indexes.vectors import Float32

MOST_FOUND = 2_048  # FAISS' own limit, for vectors found and for lists visited
MOST_BURIED = 1_024
WORTHWHILE = 2**22  # numbers in an index: a CPU scores as many in about a millisecond

# A GPU rounds vectors and queries to float16, and either moves a cosine by less than HALF_MARGIN. Twice that: once
# candidates are scored exactly, the last of them may have been rounded up and the first left out rounded down.
GPU_MARGIN = 2 * (HALF_MARGIN + HALF_MARGIN)

_DEVICE = re.compile(r"auto|cpu|cuda(?::(\d+))?")

logger = logging.getLogger(__name__)


class Gpus:
    """The GPUs that `device` means: "cpu" none, "cuda:1" one, "cuda" all that FAISS sees, "auto" likewise.

    Raises ValueError for another text, and for a number that no GPU has. Where FAISS has no support for GPUs or
    sees none there are none, which "auto" expects and "cuda" logs as a warning.
    """

    def __init__(self, faiss: Faiss, device: str) -> None:
        self.device = device
        self._faiss = faiss
        self._numbers = _numbers(faiss, device)

    def suit(self, index: FaissIndex) -> bool:
        """Tell whether there are GPUs, and enough in the index for them to be faster."""
        return bool(self._numbers) and index.ntotal * index.d >= WORTHWHILE

    def upload(self, index: FaissIndex, kind: Kind) -> "GpuIndex | None":
        """Copy an index of `kind`; None, with a line in the log, where FAISS cannot or memory lacks."""
        try:
            # Only flat indexes are probed, and cuVS, which may obey selectors, does not know every other kind.
            selective = str(kind) == "Flat" and _obeys_selectors(self._faiss, self._numbers)
            copy, resources = _clone(self._faiss, self._numbers, index, kind)
        except (RuntimeError, MemoryError) as error:
            level = logging.INFO if self.device == "auto" else logging.WARNING
            logger.log(level, "%s vectors (%s) stay on the CPU: %s", index.ntotal, kind, str(error))
            return None
        logger.info("%s vectors (%s) are searched on %s", index.ntotal, kind, self.device)
        return GpuIndex(self._faiss, kind, copy, resources, selective=selective)


class GpuIndex:
    """A copy of a FAISS index in the memory of GPUs, with FAISS' resources, which must live as long."""

    def __init__(
        self, faiss: Faiss, kind: Kind, copy: FaissIndex, resources: list[Any], *, selective: bool
    ) -> None:
        self._faiss = faiss
        self._kind = kind
        self._copy = copy
        self._resources = resources
        self._selective = selective

    @property
    def lost(self) -> bool:
        """Whether a search failed, after which the copy is gone."""
        return self._copy is None

    def search(
        self, queries: Float32, k: int, chosen: NDArray[np.bool_] | None, probes: int
    ) -> tuple[Float32, Rows] | None:
        """Find the k nearest of the positions marked in `chosen`, or of all; None when the CPU has to.

        Returns FAISS' scores and positions, both [n, k], positions -1 where there are fewer. Vectors that are not
        chosen are found and dropped, unless FAISS obeys selectors here.
        """
        hidden = 0 if chosen is None else len(chosen) - int(np.count_nonzero(chosen))
        selector = None
        if self._selective and chosen is not None:
            selector = self._faiss.IDSelectorBitmap(np.packbits(chosen, bitorder="little"))
        fetch = k if selector is not None else k + hidden
        probes = min(probes, max(1, self._kind.lists))
        if self.lost or max(fetch, probes) > MOST_FOUND:
            return None
        parameters = search_parameters(self._faiss, self._kind, selector, probes)
        try:
            scores, positions = self._copy.search(queries, fetch, params=parameters)
        except (RuntimeError, MemoryError) as error:
            logger.warning("searching on the CPU from now on, since the GPU failed: %s", str(error))
            self._copy, self._resources = None, []
            return None
        if chosen is not None:
            dropped = (positions < 0) | ~chosen[positions]
            order = np.argsort(dropped, axis=1, kind="stable")[:, :k]
            positions = np.take_along_axis(np.where(dropped, -1, positions), order, axis=1)
            scores = np.take_along_axis(scores, order, axis=1)
        return scores, positions


def _numbers(faiss: Faiss, device: str) -> tuple[int, ...]:
    found = _DEVICE.fullmatch(device) if isinstance(device, str) else None
    if found is None:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:0' (any number), got {device!r}")
    if device == "cpu":
        return ()
    count = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if not count and device != "auto":
        logger.warning("device %r: FAISS sees no GPU, so the CPU searches (faiss-cpu never sees one)", device)
    if not count or found[1] is None:
        return tuple(range(count))
    if int(found[1]) >= count:
        raise ValueError(f"device {device!r} is not there: FAISS sees {count}, numbered from 0")
    return (int(found[1]),)


def _clone(
    faiss: Faiss, numbers: tuple[int, ...], index: FaissIndex, kind: Kind
) -> tuple[FaissIndex, list[Any]]:
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True
    options.shard = True
    options.use_cuvs = options.use_cuvs and str(kind) == "Flat"
    if kind.code not in ("Flat", "SQ8"):
        numbers = numbers[:1]  # for several GPUs FAISS would make a copy in main memory, and not say so
    resources = [faiss.StandardGpuResources() for _ in numbers]
    return faiss.index_cpu_to_gpu_multiple_py(resources, index, options, list(numbers)), resources


@functools.cache
def _obeys_selectors(faiss: Faiss, numbers: tuple[int, ...]) -> bool:
    """Try whether a flat index on these GPUs finds only what a selector allows."""
    vectors = np.eye(8, dtype=np.float32)
    index = faiss.IndexFlatIP(8)
    index.add(vectors)
    allowed = faiss.IDSelectorBitmap(np.packbits(np.arange(8) == 7, bitorder="little"))
    try:
        copy, _resources = _clone(faiss, numbers, index, Kind("Flat"))
        _, positions = copy.search(vectors[:1], 2, params=faiss.SearchParameters(sel=allowed))
    except Exception:  # whatever it is, the answer is no
        return False
    return bool(positions.tolist() == [[7, -1]])
