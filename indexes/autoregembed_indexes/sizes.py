"""How many bytes an index will take, on disk and in memory: arithmetic, checked against real ones by the tests.

What FAISS' codes, a snapshot and SQLite's rows of one length take is known exactly. How full SQLite's other pages are
was measured, and so was the index of words, which `python -m benchmarks.sizes` measures again. Milvus' figures follow
its documentation.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from autoregembed_indexes.kinds import DEFAULT_MEMORY_BUDGET, check_factory, plan
from autoregembed_indexes.settings import at_least_one

PAGE = 16_384
MOST_DATABASE = (2**32 - 2) * PAGE  # SQLite counts pages in 32 bits
MILVUS_DIMENSIONS = 32_768

FACTORIES = ("Flat", "SQfp16", "IVF,SQ8", "IVF,RaBitQ", *(f"IVF,RaBitQ{bits}" for bits in range(2, 10)))
MILVUS_KINDS = ("FLAT", "IVF_SQ8", "HNSW")
HNSW_LINKS = 32

WORDS_SHARE = 0.5  # of the bytes of English texts, after `porter unicode61`
EMPTY_ROWS = 0.56  # rows' places at the end of a page
EMPTY_BYTES = 3_300  # of each row that needs pages of its own
ID_SHARE = 1.15  # of a page, for what is not inserted in its order


@dataclass(frozen=True)
class Documents:
    """What is to be stored: how many documents, of which dimension; bytes of a text, its metadata (JSON) and its id."""

    count: int
    dimension: int
    text: float
    metadata: float = 2
    id: float = 36


class IndexSize(NamedTuple):
    """Bytes of an index: on disk, in memory for search at full speed, and read from memory by one query.

    `read` is 0 where it is not known.
    """

    kind: str
    disk: float
    memory: float
    read: float


def document_index_size(
    documents: Documents, factory: str = "auto", memory_budget: int = DEFAULT_MEMORY_BUDGET
) -> IndexSize:
    """What a `DocumentIndex` of this factory takes. ValueError: a count, dimension or factory that cannot be."""
    count, dimension = _check(documents)
    kind = plan(check_factory(factory), count, dimension, memory_budget)
    vectors = count * kind.bytes_per_vector(dimension)
    lists = 4 * dimension * kind.lists
    share = min(1.0, kind.probes / kind.lists) if kind.lists else 1.0
    return IndexSize(
        str(kind),
        # The lists are in a snapshot twice: as they are searched, and empty for what is added.
        disk=sum(database_bytes(documents).values()) + vectors + 2 * lists,
        memory=vectors + lists,
        read=share * vectors + lists + 2 * dimension * min(count, kind.candidates(10)),
    )


def database_bytes(documents: Documents) -> dict[str, float]:
    """Bytes of the parts of a database: vectors, texts with metadata, ids, words, and what keeps them together."""
    count, dimension = _check(documents)
    row = _varint(count)
    texts = documents.text + documents.metadata + documents.id + 14
    return {
        "vectors": count * _rows_of(2 * dimension + 13, row),
        "texts": count * _row_of_about(texts + row + 4),
        "ids": count * ID_SHARE * (documents.id + row + 5),
        "words": count * WORDS_SHARE * documents.text,
        "versions and lengths": count * (14 + 2 * row),
        "empty pages": 10 * PAGE,
    }


def milvus_size(documents: Documents, kind: str) -> IndexSize:
    """What a Milvus collection takes that holds float32 vectors, with every field loaded, by Milvus' documentation.

    ValueError: a kind that is not among `MILVUS_KINDS`, or more dimensions than Milvus takes.
    """
    count, dimension = _check(documents)
    if dimension > MILVUS_DIMENSIONS:
        raise ValueError(
            f"Milvus takes {MILVUS_DIMENSIONS:,} dimensions at most, not {dimension:,}: use fewer compressed tokens "
            "(num_tokens) or mean pooling"
        )
    if kind not in MILVUS_KINDS:
        raise ValueError(f"kind must be one of {', '.join(MILVUS_KINDS)}, not {kind!r}")
    codes = {
        "FLAT": 4 * dimension,
        "IVF_SQ8": dimension + 8,
        "HNSW": 4 * dimension + 4 * (2 * HNSW_LINKS + 1) + 16,
    }[kind]
    fields = documents.text + documents.metadata + documents.id + 16
    return IndexSize(
        f"Milvus {kind}",
        disk=count
        * (4 * dimension + fields + (0 if kind == "FLAT" else codes)),  # FLAT's are the vectors themselves
        memory=count * (codes + fields),
        read=0,
    )


def _check(documents: Documents) -> tuple[int, int]:
    return at_least_one("count", documents.count), at_least_one("dimension", documents.dimension)


def _varint(number: int) -> int:
    """Bytes of a number as SQLite writes it."""
    return max(1, math.ceil(number.bit_length() / 7))


def _rows_of(payload: int, row: int) -> float:
    """Bytes of a row, each as long as any other: as many as fit share a page, what is too long has pages of its own."""
    local, beyond = payload, 0
    if payload > PAGE - 35:
        least = (PAGE - 12) * 32 // 255 - 23
        local = least + (payload - least) % (PAGE - 4)
        local = local if local <= PAGE - 35 else least
        beyond = math.ceil((payload - local) / (PAGE - 4))
    cell = local + _varint(payload) + row + 2 + (4 if beyond else 0)
    return PAGE / ((PAGE - 8) // cell) + PAGE * beyond


def _row_of_about(cell: float) -> float:
    """Bytes of a row where they differ: of a page, what the next row does not fit into is empty.

    Measured with rows of half to one and a half times the mean, at means of 150 to 200,000 bytes.
    """
    fits = 1 - EMPTY_ROWS * min(cell, PAGE) / PAGE
    return cell + min(cell / fits - cell, EMPTY_BYTES)
