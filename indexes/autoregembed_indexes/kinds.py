"""How vectors are searched: flat or in inverted lists (IVF), whole or quantised, and when to change.

A kind is written as FAISS' index factory writes it. "IVF,SQ8" leaves the number of lists to the number of
documents, "auto" leaves everything to it. Until there are enough vectors to train lists on, they are flat.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from autoregembed_indexes.vectors import Float32

# FAISS has no types.
Faiss = Any
FaissIndex = Any

DEFAULT_MEMORY_BUDGET = 2**30
TRAINING_BYTES = 2**28
VECTORS_PER_LIST = 39  # FAISS warns below this when it trains
MIN_LISTS = 16
MAX_LISTS = 16_384
LEAST_PROBES = 64

# FAISS' cosines of unit vectors are off by less than this, in float32 and after rounding to float16.
FLOAT_MARGIN = 2e-6
HALF_MARGIN = 6e-4

_FACTORY = re.compile(r"(?:(IVF)(\d*),)?(Flat|SQfp16|SQ8|RaBitQ([2-9]?))", re.IGNORECASE)
_CODES = {"flat": "Flat", "sqfp16": "SQfp16", "sq8": "SQ8", "rabitq": "RaBitQ"}
_EXAMPLES = "'auto', 'Flat', 'SQfp16', 'IVF1024,Flat', 'IVF,SQ8', 'IVF,RaBitQ'"


@dataclass(frozen=True)
class Kind:
    """One FAISS index type; `lists` is 0 for a flat one."""

    code: str
    lists: int = 0

    def __str__(self) -> str:
        return f"IVF{self.lists},{self.code}" if self.lists else self.code

    @classmethod
    def parse(cls, text: str) -> "Kind":
        """Read what `str(kind)` wrote."""
        lists, _, code = text.rpartition(",")
        return cls(code, int(lists[3:] or 0))

    @property
    def margin(self) -> float:
        """How far FAISS' scores can be from the cosines; infinity where candidates may be missed."""
        if self.lists:
            return math.inf
        return {"Flat": FLOAT_MARGIN, "SQfp16": HALF_MARGIN}[self.code]

    def candidates(self, k: int) -> int:
        """How many candidates to rank exactly for the best k."""
        if self.code.startswith("RaBitQ"):
            return max(200, 20 * k)
        return max(k + 16, 4 * k) if self.lists else k + 8

    @property
    def crowd(self) -> int:
        """How many candidates to rank at most where a great many are as near as makes no difference."""
        return 1_024 if self.code == "Flat" else 16_384

    @property
    def probes(self) -> int:
        """How many lists a search visits when nothing is filtered."""
        return max(LEAST_PROBES, self.lists // 4)

    def bytes_per_vector(self, dimension: int) -> float:
        """Memory of a vector and its row number, with lists also of its number there, without their centroids."""
        bits = {"Flat": 32, "SQfp16": 16, "SQ8": 8}.get(self.code) or int(self.code[6:] or 1)
        factors = (8 if bits == 1 else 20) if self.code.startswith("RaBitQ") else 0
        return dimension * bits / 8 + factors + 8 + (8 if self.lists else 0)


EXACT = Kind("SQfp16")


def search_parameters(faiss: Faiss, kind: Kind, selector: FaissIndex | None, probes: int) -> FaissIndex:
    """Make FAISS' parameters for one search; `selector` is a FAISS selector of positions, or None."""
    if not kind.lists:
        return faiss.SearchParameters(sel=selector)
    if kind.code.startswith("RaBitQ"):
        parameters = faiss.IVFRaBitQSearchParameters(sel=selector, nprobe=probes)
        parameters.qb = 8  # 0, the default, compares with the query in float32, some hundred times slower
        return parameters
    return faiss.SearchParametersIVF(sel=selector, nprobe=probes)


def check_factory(factory: str) -> str:
    """Return `factory` in its usual spelling; ValueError for one that the index cannot keep."""
    if not isinstance(factory, str):
        raise TypeError(f"factory must be a str, got {type(factory).__name__}")
    compact = factory.replace(" ", "")
    if compact.lower() == "auto":
        return "auto"
    found = _FACTORY.fullmatch(compact)
    if not found or (not found[1] and found[3].lower() not in ("flat", "sqfp16")):
        raise ValueError(
            f"factory {factory!r} is not supported: an index must add and delete by id; use one of {_EXAMPLES}"
        )
    code = _CODES[found[3].rstrip("23456789").lower() if found[4] else found[3].lower()] + (found[4] or "")
    if not found[1]:
        return code
    if found[2] and not 1 <= int(found[2]) <= 2**20:
        raise ValueError(f"factory {factory!r} asks for {found[2]} lists; use 1 to {2**20}")
    return f"IVF{found[2]},{code}"


def plan(factory: str, count: int, dimension: int, memory_budget: int) -> Kind:
    """Choose the kind for `count` vectors: what `factory` asks for, exact until there are enough to train.

    "auto" is exact while that fits `memory_budget` bytes, then has lists with 8 bits, and at last 1 bit, per
    dimension. Exact is float16, which FAISS scans several times faster than float32 for one query.
    """
    if factory == "auto":
        for choice in ("SQfp16", "IVF,SQ8", "IVF,RaBitQ"):
            factory = choice
            if count * Kind(choice.rpartition(",")[2]).bytes_per_vector(dimension) <= memory_budget:
                break
    lists, _, code = factory.rpartition(",")
    if not lists:
        return Kind(code)
    if wanted := int(lists[3:] or 0):
        return Kind(code, wanted) if count >= VECTORS_PER_LIST * wanted else EXACT
    most = min(2 * math.sqrt(count), MAX_LISTS, training_size(count, dimension) / VECTORS_PER_LIST)
    # A power of two: retraining waits for a real growth.
    return Kind(code, 2 ** int(math.log2(most))) if most >= MIN_LISTS else EXACT


def training_size(count: int, dimension: int, lists: int = MIN_LISTS) -> int:
    """How many vectors lists are trained on."""
    return min(count, max(VECTORS_PER_LIST * lists, TRAINING_BYTES // (4 * dimension)))


def train(faiss: Faiss, kind: Kind, sample: Float32) -> FaissIndex:
    """Make an empty FAISS index of `kind` that has learned its lists and codes from unit vectors [n, d]."""
    index = faiss.index_factory(sample.shape[1], str(kind), faiss.METRIC_INNER_PRODUCT)
    if kind.lists:
        index.train(sample)
    index.is_trained = True  # float16 codes have nothing to learn
    return index
