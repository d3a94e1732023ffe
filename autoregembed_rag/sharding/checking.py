"""The input, looked at before hours go into encoding it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .documents import read_part
from .files import Place
from .progress import bar
from .repeats import Repeats, hashes_of
from .source import Part, Source


class Checked(NamedTuple):
    """A part that was read: how many documents it has, and the hashes of their ids."""

    part: int
    rows: int
    hashes: bytes


def check_part(folder: Place, part: Part) -> Checked:
    """Read every document of a part; ValueError names the first that cannot be encoded."""
    ids = [document.id for document in read_part(folder, part)]
    return Checked(part.number, len(ids), hashes_of(ids))


def counted(source: Source, parts: list[Part], checks: Iterable[Checked], show_progress: bool) -> list[Part]:
    """The parts with the number of their documents.

    ValueError: an id occurs twice, or there are no documents.
    """

    def ids_at(number: int) -> Iterator[str]:
        return (document.id for document in read_part(source.folder, parts[number]))

    rows = {}
    total = sum(part.size for part in parts)
    with Repeats(total // 512) as repeats, bar(total, "checking", show_progress) as progress:
        for found in checks:
            rows[found.part] = found.rows
            repeats.add(found.part, found.hashes)
            progress.update(parts[found.part].size)
        if (twice := repeats.find(ids_at)) is not None:
            one, *numbers = twice
            places = [f"{parts[number].files[0].name} (part {number})" for number in numbers]
            raise ValueError(
                f"the id {one!r} occurs twice, in {places[0]} and in {places[1]}; ids must be unique"
            )
    if not sum(rows.values()):
        raise ValueError(f"{source.folder} holds no documents")
    return [part._replace(rows=rows[part.number]) for part in parts]
