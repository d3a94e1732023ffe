"""What a folder of shards says of itself.

`manifest.json` is written before the first shard: what is encoded, by which encoder, in which parts. A part is finished
when `part-000012.json` is there, which names the Parquet file beside it with its size and checksum. At the end the
manifest lists all shards, and so says that it is complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from .files import Info, Place, in_order
from .source import Part

FORMAT = 1
MANIFEST = "manifest.json"
RECORD = re.compile(r"part-\d{6,}\.json")
REMEDY = "give another --output, or go on with what it was begun with"


class Shard(NamedTuple):
    """A finished part: the documents and bytes of its file, how many texts were cut, and whose vectors they are."""

    part: int
    file: str
    rows: int
    bytes: int
    sha256: str
    encoder: str
    cut: int


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds or, while it is not complete, will hold.

    Attributes:
        job: names this folder and no other.
        encoder: the encoder's fingerprint.
        model: the name it was loaded by.
        instruction: in words, what was appended to each text.
        dimension: entries of a vector.
        tokens: compressed tokens of a flattened vector; None for the mean.
        source: where the files lay.
        part_bytes: about how much of the input makes a part.
        files: the input's files, by names relative to its folder.
        parts: in the order of the shards.
        shards: one for each part, once all are finished; else None.
    """

    job: str
    encoder: str
    model: str
    instruction: str
    dimension: int
    tokens: int | None
    source: str
    part_bytes: int
    files: list[Info]
    parts: list[Part]
    shards: list[Shard] | None = None

    @property
    def documents(self) -> int:
        """How many there are in all."""
        return sum(part.rows for part in self.parts)

    def write(self, folder: Place) -> None:
        """Write the manifest of a folder, whole or not at all."""
        numbers = {info: number for number, info in enumerate(self.files)}
        record: dict[str, Any] = {
            **vars(self),
            "format": FORMAT,
            "files": [list(info) for info in self.files],
            "parts": [[part.kind, numbers[part.files[0]], len(part.files), *part[3:]] for part in self.parts],
            "shards": self.shards and [shard._asdict() for shard in self.shards],
            "documents": self.documents,
            "complete": self.shards is not None,
        }
        folder.write_json(MANIFEST, record)


def read_manifest(folder: Place) -> Manifest | None:
    """The manifest of a folder; None if there is none.

    ValueError: it is damaged, or of another format.
    """
    if folder.info(MANIFEST) is None:
        return None
    record = folder.read_json(MANIFEST)
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise ValueError(f"{folder}/{MANIFEST} has the format {found!r}; this release reads {FORMAT}")
    try:
        return _manifest(record)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{folder}/{MANIFEST} is damaged: {type(error).__name__} {error}") from error


def _manifest(record: dict[str, Any]) -> Manifest:
    files = [Info(*info) for info in record["files"]]
    parts = [
        Part(number, kind, tuple(files[first : first + count]), *rest)
        for number, (kind, first, count, *rest) in enumerate(record["parts"])
    ]
    shards = record["shards"] and [Shard(**shard) for shard in record["shards"]]
    if record["complete"] and [shard.part for shard in shards or []] != [part.number for part in parts]:
        raise ValueError("its list of shards is not that of its parts")
    names = Manifest.__dataclass_fields__.keys() - {"files", "parts", "shards"}
    fields = {name: record[name] for name in names}
    return Manifest(**fields, files=files, parts=parts, shards=(shards or []) if record["complete"] else None)


def check_same(found: Manifest, wanted: Manifest, folder: Place) -> None:
    """ValueError says in what the job that was begun in `folder` differs from the one that is wanted."""
    names = {
        "encoder": "the encoder",
        "instruction": "the instruction",
        "tokens": "the number of compressed tokens",
        "dimension": "the dimension",
        "part_bytes": "the bytes of a part",
    }
    for name, what in names.items():
        old, new = getattr(found, name), getattr(wanted, name)
        if old != new:
            raise ValueError(f"{folder} was begun with {what} {old!r}, and this is {new!r}: {REMEDY}")
    if changes := list(_changes(found.files, wanted.files)):
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise ValueError(
            f"the input has changed since {folder} was begun: {', '.join(changes[:5])}{more}; {REMEDY}"
        )


def _changes(old: list[Info], new: list[Info]) -> Iterator[str]:
    before, now = ({info.name: info for info in files} for files in (old, new))
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            yield f"{name} is gone"
        elif name not in before:
            yield f"{name} is new"
        elif before[name] != now[name]:
            yield f"{name} was changed"


def record_name(number: int) -> str:
    """The file that says that a part is finished."""
    return f"part-{number:06}.json"


def finished_shards(folder: Place, manifest: Manifest) -> list[Shard]:
    """The parts that need not be encoded again: their record is there, and their file with its size. Other records are
    taken away."""
    listed = {info.name: info.size for info in folder.files()}
    names = [name for name in listed if RECORD.fullmatch(name)]

    def read(name: str) -> Shard | None:
        try:
            return Shard(**folder.read_json(name))
        except (TypeError, ValueError):
            return None  # damaged: the part is encoded again

    finished = []
    for name, shard in zip(names, in_order(read, names), strict=True):
        if (
            shard is not None
            and shard.part < len(manifest.parts)
            and shard.encoder == manifest.encoder
            and listed.get(shard.file) == shard.bytes
        ):
            finished.append(shard)
        else:
            folder.delete(name)
    return finished


def tidy(folder: Place, shards: list[Shard]) -> None:
    """Take away what killed processes left, once all is finished."""
    kept = {shard.file for shard in shards}
    for info in folder.files():
        if info.name.startswith((".part-", ".manifest")) or (
            info.name.startswith("part-") and info.name.endswith(".parquet") and info.name not in kept
        ):
            folder.delete(info.name)
