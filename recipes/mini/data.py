"""Reading the training text. Rows are JSON lines, plain or compressed, in the order of the file."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from autoregembed_rag.training.data import AlignmentRow, CompressionRow
from autoregembed_rag.training.sources import read_jsonl

# One source may fill at most this many rows of a sample: dictionary glosses are a third of the pairs. The bag, which
# draws its batches by source, takes them all.
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


def _shuffled(path: Path, seed: int) -> list[dict[str, Any]]:
    rows = list(read_jsonl(path))
    random.Random(seed).shuffle(rows)
    return rows


def _sample(path: Path, seed: int) -> Iterator[dict[str, Any]]:
    taken: dict[str, int] = {}
    for row in _shuffled(path, seed):
        taken[row["source"]] = taken.get(row["source"], 0) + 1
        if taken[row["source"]] <= ROWS_PER_SOURCE:
            yield row


def _pairs_file(folder: Path) -> Path:
    return next(folder.glob("pairs.jsonl*"))


def _is_pair(row: dict[str, Any]) -> bool:
    """Some definitions say no more than the word itself, some negatives no other than the positive."""
    return row["pos"].strip() not in {text.strip() for text in (row["query"], *row.get("neg", ()))}


def pairs(folder: Path, seed: int, limit: int | None = None) -> list[AlignmentRow]:
    """(query, positive, negatives) in random order, no source above its share."""
    rows = filter(_is_pair, _sample(_pairs_file(folder), seed))
    return [AlignmentRow.parse(row) for row in islice(rows, limit)]


def pairs_by_source(folder: Path, seed: int) -> dict[str, list[AlignmentRow]]:
    """All of them, in random order, by where they come from."""
    sources: dict[str, list[AlignmentRow]] = {}
    for row in filter(_is_pair, _shuffled(_pairs_file(folder), seed)):
        sources.setdefault(row["source"], []).append(AlignmentRow.parse(row))
    return sources


def compression_rows(folder: Path, seed: int, limit: int | None = None) -> list[CompressionRow]:
    """(context, instruction, output) in random order, no source above its share."""
    rows = _sample(next(folder.glob("compress.jsonl*")), seed)
    return [CompressionRow.parse(row) for row in islice(rows, limit)]
