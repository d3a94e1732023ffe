"""Ids that occur twice among more than memory holds: their hashes go to disk, and what is alike there is looked up."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from hashlib import blake2b
from types import TracebackType

import numpy as np

ROWS = 1 << 21  # of a file, which is sorted in memory
FILES = 256
_ENTRY = np.dtype([("hash", "<u8"), ("place", "<u4")])


class Repeats:
    """Takes the ids of each place, and says whether one occurs twice. Needs 12 bytes of temporary disk for an id."""

    def __init__(self, total: int) -> None:
        """`total` is about how many ids will come."""
        count = min(FILES, 1 + total // ROWS)
        self._files = [tempfile.TemporaryFile() for _ in range(count)]  # noqa: SIM115  # closed by __exit__

    def __enter__(self) -> Repeats:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def add(self, place: int, ids: bytes) -> None:
        """Take some of the ids that are at `place`, as `hashes_of` gives them."""
        hashes = np.frombuffer(ids, dtype="<u8")
        entries = np.empty(len(hashes), dtype=_ENTRY)
        entries["hash"], entries["place"] = hashes, place
        homes = hashes % np.uint64(len(self._files))
        for number in range(len(self._files)) if len(self._files) > 1 else ():
            self._files[number].write(entries[homes == number].tobytes())
        if len(self._files) == 1:
            self._files[0].write(entries.tobytes())

    def find(self, ids_at: Callable[[int], Iterable[str]]) -> tuple[str, int, int] | None:
        """An id that occurs twice, and its two places; `ids_at` reads the ids of a place again."""
        for file in self._files:
            file.seek(0)
            entries = np.frombuffer(file.read(), dtype=_ENTRY)
            entries = entries[np.argsort(entries["hash"], kind="stable")]
            for row in np.flatnonzero(entries["hash"][1:] == entries["hash"][:-1]):
                hashed = entries["hash"][row].tobytes()
                seen: dict[str, int] = {}
                for place in dict.fromkeys(entries["place"][row : row + 2].tolist()):
                    for one in ids_at(place):
                        if _hash(one) == hashed:
                            if one in seen:
                                return one, seen[one], place
                            seen[one] = place
        return None


def hashes_of(ids: Iterable[str]) -> bytes:
    """8 bytes of each id."""
    return b"".join(map(_hash, ids))


def _hash(one: str) -> bytes:
    return blake2b(one.encode(), digest_size=8).digest()
