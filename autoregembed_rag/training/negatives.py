"""Which documents a query is told apart from: its row's own, borrowed ones where those are too few, its batch's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain

from .arguments import AlignmentArguments
from .data import AlignmentRow

# Draws after which every row is looked at for one to borrow from.
TRIES = 100


class Negatives:
    """N negatives for every row, and M for every row of a batch; what is drawn depends on the seed and the rows."""

    def __init__(self, rows: Sequence[AlignmentRow], arguments: AlignmentArguments) -> None:
        self._rows = rows
        self._n = arguments.num_negatives
        self._m = arguments.in_batch_negatives
        self._seed = arguments.seed

    def check(self, row: AlignmentRow) -> None:
        """ValueError if the row's own negatives are too few and no other query can lend one."""
        if len(row.neg) < self._n or self._m:
            self._borrow(row, random.Random(self._seed))

    def own(self, batch: Sequence[tuple[int, AlignmentRow]]) -> list[list[str]]:
        """N for each numbered row: its own first, then positives of other queries, the same in every epoch."""
        return [self._own(number, row) for number, row in batch]

    def in_batch(self, batch: Sequence[tuple[int, AlignmentRow]]) -> list[list[str]]:
        """M for each row: positives of other queries of the batch, at random; of any where it has too few."""
        if not self._m:
            return [[] for _ in batch]
        rng = random.Random(f"{self._seed} {[number for number, _ in batch]}")
        answers = {(row.query, row.pos) for _, row in batch}
        positives = dict.fromkeys(row.pos for _, row in batch)
        candidates = [
            [text for text in positives if (row.query, text) not in answers and _may_be_negative(text, row)]
            for _, row in batch
        ]
        return [self._others(row, texts, rng) for (_, row), texts in zip(batch, candidates, strict=True)]

    def _others(self, row: AlignmentRow, candidates: list[str], rng: random.Random) -> list[str]:
        chosen = rng.sample(candidates, min(self._m, len(candidates)))
        return chosen + [self._borrow(row, rng) for _ in range(self._m - len(chosen))]

    def _own(self, number: int, row: AlignmentRow) -> list[str]:
        rng = random.Random(f"{self._seed} {number}")
        own = list(row.neg[: self._n])
        return own + [self._borrow(row, rng) for _ in range(self._n - len(own))]

    def _borrow(self, row: AlignmentRow, rng: random.Random) -> str:
        size = len(self._rows)
        drawn = (rng.randrange(size) for _ in range(TRIES))
        for number in chain(drawn, range(size)):
            other = self._rows[number]
            # Another positive of the same query is no negative of it.
            if other.query != row.query and _may_be_negative(other.pos, row):
                return other.pos
        raise ValueError(
            f"the query {row.query!r} has too few negatives, and no other query has another positive to lend: add "
            "negatives, or rows with other positives"
        )


def _may_be_negative(text: str, row: AlignmentRow) -> bool:
    return text not in (row.pos, row.query, *row.neg)
