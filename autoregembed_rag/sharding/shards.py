"""Shards, read back: what is there is checked before it is given."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .files import Place, needed
from .manifest import MANIFEST, Manifest, Shard, read_manifest
from .repeats import Repeats, hashes_of

REMEDY = "copy it again, or encode into another folder"


class Batch(NamedTuple):
    """Documents of a shard: ids, texts, metadata and their vectors, float16 [n, dimension]."""

    ids: list[str]
    texts: list[str]
    metadatas: list[dict[str, Any]]
    vectors: NDArray[np.float16]


def read_shards(folder: str | os.PathLike[str]) -> Iterator[Batch]:
    """The documents of a finished folder of shards, in the order of the input, about 16 MiB at a time.

    Raises:
        FileNotFoundError: there is no folder of shards.
        ValueError: it is not complete, or a shard is missing or damaged; nothing of such a shard is given.
    """
    place = Place(folder)
    manifest = complete_manifest(place)
    for shard in manifest.shards or []:
        yield from read_shard(place, shard)


def complete_manifest(folder: Place) -> Manifest:
    """The manifest of a folder whose shards are all there, with their sizes."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(
            f"{folder} holds no {MANIFEST}: give a folder that autoregembed encode has written"
        )
    if manifest.shards is None:
        raise ValueError(f"{folder} is not complete: run its autoregembed encode again, which goes on")
    sizes = {info.name: info.size for info in folder.files()}
    for shard in manifest.shards:
        if (size := sizes.get(shard.file)) is None:
            raise ValueError(f"the shard {folder}/{shard.file} is missing: {REMEDY}")
        if size != shard.bytes:
            raise ValueError(
                f"the shard {folder}/{shard.file} is damaged, it has {size:,} bytes and not {shard.bytes:,}: "
                f"{REMEDY}"
            )
        if shard.encoder != manifest.encoder:
            raise ValueError(
                f"the shard {folder}/{shard.file} is of encoder {shard.encoder}, the others of {manifest.encoder}: "
                f"{REMEDY}"
            )
    return manifest


def read_shard(folder: Place, shard: Shard) -> Iterator[Batch]:
    """The documents of one shard, once its checksum was found right; ValueError if it is not."""
    parquet = needed("pyarrow.parquet")
    place = folder / shard.file
    if place.sha256() != shard.sha256:
        raise ValueError(f"the shard {place} is damaged, it does not have its checksum: {REMEDY}")
    with place.opened() as file:
        table = parquet.ParquetFile(file)
        for number in range(table.metadata.num_row_groups):
            columns = table.read_row_group(number).combine_chunks()
            ids, texts, metadatas = (columns[name].to_pylist() for name in ("id", "text", "metadata"))
            vectors = columns["vector"].combine_chunks().flatten().to_numpy().reshape(len(ids), -1)
            yield Batch(ids, texts, json.loads(f"[{','.join(metadatas)}]"), vectors)  # faster than one by one


def check_repeats(folder: Place, manifest: Manifest) -> None:
    """ValueError names an id that is in a folder's shards twice, and the shards."""
    parquet = needed("pyarrow.parquet")
    shards = manifest.shards or []

    def ids_at(number: int) -> list[str]:
        with (folder / shards[number].file).opened() as file:
            ids: list[str] = parquet.read_table(file, columns=["id"])["id"].to_pylist()
        return ids

    with Repeats(manifest.documents) as repeats:
        for number in range(len(shards)):
            repeats.add(number, hashes_of(ids_at(number)))
        if (twice := repeats.find(ids_at)) is not None:
            one, first, second = twice
            raise ValueError(
                f"the id {one!r} is in the shards {shards[first].file} and {shards[second].file}: ids must be unique"
            )
