"""What the learning benchmark trains on and is judged by: triplets, rows to compress, sentence pairs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoregembed_rag.training.data import (
    AlignmentRow,
    CompressionRow,
    Rows,
    alignment_rows,
    compression_rows,
)
from autoregembed_rag.training.sources import numbered_rows
from benchmarks.beir import BenchmarkDataError
from benchmarks.sts import Pairs, read_pairs

CHARACTERS = (
    300  # of a row to compress: at this size of model, minutes go to more rows rather than longer ones
)
SETS = {"STS-B": "stsb", "SICK-R": "sickr"}


@dataclass(frozen=True)
class Sources:
    """Where the data lie.

    Attributes:
        triplets: JSONL of query, pos, neg.
        source: rows that name a `source` are used only where it starts with this.
        compression: JSONL of context, instruction, output.
        pairs: folder of stsb and sickr, each with dev.tsv and test.tsv.
    """

    triplets: Path
    source: str
    compression: Path
    pairs: Path

    def read_triplets(self) -> list[AlignmentRow]:
        """Rows with a negative, which is the first of those that a row has."""
        return [
            AlignmentRow(row.query, row.pos, row.neg[:1])
            for row in alignment_rows(self._negated(), skip_invalid=True)
        ]

    def read_compression(self) -> list[CompressionRow]:
        """Rows of at most `CHARACTERS` altogether."""
        fields = ("context", "instruction", "output")
        short = (
            record
            for record in _records(self.compression)
            if sum(len(str(record.get(field))) for field in fields) <= CHARACTERS
        )
        return compression_rows(short, skip_invalid=True)[:]

    def read_pairs(self, split: str) -> dict[str, Pairs]:
        """STS-B and SICK-R; of the dev split STS-B alone, by which rates are chosen."""
        names = SETS if split == "test" else {"STS-B": SETS["STS-B"]}
        return {name: read_pairs(self.pairs / folder / f"{split}.tsv") for name, folder in names.items()}

    def _negated(self) -> Iterator[dict[str, Any]]:
        for record in _records(self.triplets):
            if record.get("neg") and str(record.get("source", self.source)).startswith(self.source):
                yield record


def draw_triplets(rows: list[AlignmentRow], count: int, seed: int) -> Rows[AlignmentRow]:
    """`count` of them in an order of their own, no text in two of them: other rows' documents are then as wrong as
    in-batch negatives take them to be. `BenchmarkDataError` if there are too few."""
    seen: set[str] = set()
    chosen = []
    for i in np.random.default_rng(seed).permutation(len(rows)):
        texts = {text.strip().lower() for text in rows[i].texts}
        if not texts & seen:
            chosen.append(rows[i])
            seen |= texts
        if len(chosen) == count:
            return alignment_rows(chosen)
    raise BenchmarkDataError(
        f"the data hold {len(chosen):,} triplets without a common text, not {count:,}: "
        "lower --samples or give more with --data"
    )


def draw_compression(rows: list[CompressionRow], count: int, seed: int) -> Rows[CompressionRow]:
    """`count` of them; `BenchmarkDataError` if there are too few."""
    if len(rows) < count:
        raise BenchmarkDataError(
            f"the data hold {len(rows):,} rows of at most {CHARACTERS} characters to compress, not {count:,}: "
            "lower --compress-samples or give more with --compress-data"
        )
    return compression_rows(
        [rows[i] for i in np.random.default_rng(seed).choice(len(rows), count, replace=False)]
    )


def _records(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        raise BenchmarkDataError(
            f"{file} does not exist: give a JSONL file (.gz, .zst) with --data, --compress-data"
        )
    return (record for _, record in numbered_rows(file))
