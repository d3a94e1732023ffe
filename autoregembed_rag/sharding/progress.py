"""How far encoding and loading are, how fast they go, and how long they will take."""

from __future__ import annotations

import sys

from tqdm import tqdm

from .source import Part


class Progress:
    """A bar over the bytes of the input, which tell the time left better than documents do, with documents/s."""

    def __init__(self, parts: list[Part], done: set[int], show: bool) -> None:
        size = sum(part.size for part in parts)
        before = sum(part.size for part in parts if part.number in done)
        self._bar = bar(size, "encoding", show, initial=before)
        self._documents = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def encoded(self, part: Part, rows: int) -> None:
        """So many more documents of a part are encoded."""
        self._documents += rows
        elapsed = self._bar.format_dict["elapsed"]
        self._bar.set_postfix_str(f"{self._documents / max(elapsed, 1e-9):,.0f} documents/s", refresh=False)
        self._bar.update(part.size * rows / part.rows)


def bar(total: int, what: str, show: bool, **more: float) -> tqdm[None]:
    """A bar over bytes."""
    seconds = 0.5 if sys.stderr.isatty() else 30  # a log gets a line now and then
    return tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        disable=not show,
        mininterval=seconds,
        maxinterval=10 * seconds,
        bar_format="{desc}: {percentage:3.0f}% of {total_fmt}B{postfix}, {elapsed} so far, {remaining} left",
        **more,
    )
