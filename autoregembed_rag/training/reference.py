"""Scores of the model as stage 2 starts, computed once and kept on disk.

A score is found by its content: the starting model, the decoder, the precision, the query and the text. So a partial
file goes on where it stopped, rows may be added or put in another order, and another model never reads them.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from .checkpoints import CheckpointError


class Pair(NamedTuple):
    """A query, read under I_next, and a text to be produced from it."""

    query: str
    target: str


class ReferenceStore:
    """log p_ref(target | e_query,next) and, where asked for, e_query,next itself.

    Every process writes a file of its own below `folder` and reads those of all. What is missing is missing in its own:
    whether another process has come to the same pair yet is chance, and what is computed together differs in the last
    bits from what is computed apart.

    Every method raises CheckpointError if a file cannot be read or written; what was added before stays good.
    """

    def __init__(self, folder: Path, key: str, *, process: int = 0) -> None:
        """Open `folder`, whose entries count only if they were written under `key`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._key = key.encode()
        self._own = folder / f"scores-{process}.sqlite"
        with self._connect(self._own) as connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS scores (pair BLOB PRIMARY KEY, value REAL) WITHOUT ROWID"
            )
            connection.execute("CREATE TABLE IF NOT EXISTS states (query BLOB PRIMARY KEY, value BLOB)")

    def missing(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Those of `pairs`, each once, that this process has not scored yet."""
        distinct = list(dict.fromkeys(pairs))
        known = self._read("scores", "pair", [self._digest(*pair) for pair in distinct], [self._own])
        return [pair for pair in distinct if self._digest(*pair) not in known]

    def without_state(self, queries: Iterable[str]) -> list[str]:
        """Those of `queries`, each once, whose e_query,next this process has not kept yet."""
        distinct = list(dict.fromkeys(queries))
        known = self._read("states", "query", [self._digest(query) for query in distinct], [self._own])
        return [query for query in distinct if self._digest(query) not in known]

    def add(self, pairs: Sequence[Pair], scores: Tensor) -> None:
        """Keep the scores of some pairs; they are on the disk when this returns."""
        values = (
            (self._digest(*pair), float(score)) for pair, score in zip(pairs, scores.tolist(), strict=True)
        )
        with self._connect(self._own) as connection:
            connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", values)

    def add_states(self, queries: Sequence[str], states: Tensor) -> None:
        """Keep e_query,next of some queries, [n, k, hidden]."""
        rows = states.float().cpu().numpy()
        values = ((self._digest(query), row.tobytes()) for query, row in zip(queries, rows, strict=True))
        with self._connect(self._own) as connection:
            connection.executemany("INSERT OR REPLACE INTO states VALUES (?, ?)", values)

    def scores(self, pairs: Sequence[Pair]) -> Tensor:
        """float32 [n]; KeyError if one was never computed."""
        digests = [self._digest(*pair) for pair in pairs]
        found = self._read("scores", "pair", digests, self._all)
        return torch.tensor([found[digest] for digest in digests], dtype=torch.float32)

    def states(self, queries: Sequence[str], k: int) -> Tensor:
        """float32 [n, k, hidden]; KeyError if one was never computed."""
        digests = [self._digest(query) for query in queries]
        found = self._read("states", "query", digests, self._all)
        flat = np.stack([np.frombuffer(cast(bytes, found[digest]), dtype=np.float32) for digest in digests])
        return torch.from_numpy(flat).view(len(queries), k, -1)

    @property
    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("scores-*.sqlite"))

    def _read(
        self, table: str, column: str, digests: Sequence[bytes], files: Sequence[Path]
    ) -> dict[bytes, float | bytes]:
        found: dict[bytes, float | bytes] = {}
        for file in files:
            with self._connect(file) as connection:
                for start in range(0, len(digests), 500):
                    part = digests[start : start + 500]
                    marks = ",".join("?" * len(part))
                    query = f"SELECT {column}, value FROM {table} WHERE {column} IN ({marks})"  # noqa: S608  # our names
                    found.update(connection.execute(query, part))
        return found

    def _digest(self, *texts: str) -> bytes:
        digest = hashlib.blake2b(self._key, digest_size=16)
        for text in texts:
            content = text.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.digest()

    @staticmethod
    @contextmanager
    def _connect(file: Path) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are on the disk after the block."""
        try:
            with closing(sqlite3.connect(file, timeout=60)) as connection, connection:
                yield connection
        except sqlite3.Error as error:
            raise CheckpointError(
                f"reference scores cannot be read from or written to {file} ({error}): what was written stays good; "
                "make room or mend the disk and run the same command again, or remove the file to compute them anew"
            ) from error
