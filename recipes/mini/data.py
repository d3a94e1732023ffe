"""Reading the training text. Rows are JSON lines, plain or compressed, in the order of the file."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from autoregembed_rag.training.data import AlignmentRow, CompressionRow
from autoregembed_rag.training.sources import read_jsonl

# One source may fill at most this many rows of a sample: dictionary glosses are a third of the pairs.
ROWS_PER_SOURCE = 30_000


def documents(folder: Path) -> Iterator[str]:
    """The pre-training documents, shard by shard."""
    for shard in sorted(folder.glob("pretrain-*.jsonl*")):
        for row in read_jsonl(shard):
            yield row["text"]


def documents_up_to(folder: Path, characters: int) -> Iterator[str]:
    """Documents until their lengths sum to `characters`."""
    for text in documents(folder):
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _sample(path: Path, seed: int) -> list[dict[str, Any]]:
    rows = list(read_jsonl(path))
    random.Random(seed).shuffle(rows)
    taken: dict[object, int] = {}
    kept = []
    for row in rows:
        taken[row["source"]] = taken.get(row["source"], 0) + 1
        if taken[row["source"]] <= ROWS_PER_SOURCE:
            kept.append(row)
    return kept


def _pairs(folder: Path, seed: int) -> Iterator[dict[str, Any]]:
    sample = _sample(next(folder.glob("pairs.jsonl*")), seed)
    # Some definitions say no more than the word itself, some negatives no other than the positive.
    return (row for row in sample if row["pos"].strip() not in _others(row))


def _others(row: dict[str, Any]) -> set[str]:
    return {text.strip() for text in (row["query"], *row.get("neg", ()))}


def pairs(folder: Path, seed: int, limit: int | None = None) -> list[AlignmentRow]:
    """(query, positive, negatives) in random order, no source above its share."""
    return [AlignmentRow.parse(row) for row in islice(_pairs(folder, seed), limit)]


def pairs_by_source(folder: Path, seed: int) -> dict[str, list[AlignmentRow]]:
    """The same rows, all of them, by where they come from."""
    sources: dict[str, list[AlignmentRow]] = {}
    for row in _pairs(folder, seed):
        sources.setdefault(str(row["source"]), []).append(AlignmentRow.parse(row))
    return sources


def compression_rows(folder: Path, seed: int, limit: int | None = None) -> list[CompressionRow]:
    """(context, instruction, output) in random order, no source above its share."""
    rows = _sample(next(folder.glob("compress.jsonl*")), seed)
    return [CompressionRow.parse(row) for row in islice(rows, limit)]
