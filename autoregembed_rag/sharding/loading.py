"""Shards into an index."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

from numpy.typing import ArrayLike

from ..config import check_num_tokens
from .files import Place
from .manifest import Manifest
from .progress import bar
from .shards import Batch, check_repeats, complete_manifest, read_shard


class Index(Protocol):
    """What takes documents: a `DocumentIndex`, a `MilvusDocumentIndex`."""

    @property
    def dimension(self) -> int | None: ...
    @property
    def encoder(self) -> str | None: ...
    @property
    def tokens(self) -> int | None: ...
    def add(
        self,
        vectors: ArrayLike,
        texts: Sequence[str],
        ids: Sequence[str | None] | None = None,
        metadatas: Sequence[Any] | None = None,
    ) -> list[str]: ...


def from_shards(
    index: Index,
    shards: str | os.PathLike[str],
    *,
    num_tokens: int | None = None,
    show_progress: bool = False,
) -> int:
    """Add the documents of a finished folder of shards to an index, replacing those whose id is there.

    Everything is checked first but the shards' checksums; these are checked shard by shard, each before anything of it
    is added. Calling it again after an interruption ends the same.

    Args:
        index: where to.
        shards: the folder, here or elsewhere.
        num_tokens: load only the first so many compressed tokens of each vector, as if no more had been encoded.
        show_progress: draw a bar.

    Returns:
        How many documents there were.

    Raises:
        FileNotFoundError: there is no folder of shards.
        TypeError: `num_tokens` is no integer.
        ValueError: it is not complete; its vectors have fewer tokens than `num_tokens`, or are means; a shard is
            missing, damaged or of another encoder; an id occurs twice; or the vectors are of another encoder, dimension
            or number of tokens than the index'.
    """
    place = Place(shards)
    manifest = checked_manifest(place, num_tokens)
    add_shards(index, place, manifest, show_progress=show_progress)
    return manifest.documents


def add_shards(index: Index, folder: Place, manifest: Manifest, *, show_progress: bool) -> None:
    """The same, of a manifest that was checked."""
    check_fits(manifest, folder, index.encoder, index.dimension, index.tokens)
    with bar(sum(shard.bytes for shard in manifest.shards or []), "loading", show_progress) as progress:
        for batch, size in _ahead(_batches(folder, manifest)):
            # Of flattened vectors the first tokens are the first entries, and an index scales rows to length 1.
            index.add(batch.vectors[:, : manifest.dimension], batch.texts, batch.ids, batch.metadatas)
            progress.update(size)


def checked_manifest(folder: Place, num_tokens: int | None = None) -> Manifest:
    """The manifest of a folder that is complete, with all files, and with no id twice; with the dimension and number
    of tokens that are to be loaded."""
    manifest = complete_manifest(folder)
    if num_tokens is not None:
        if manifest.tokens is None:
            raise ValueError(
                f"{folder} holds means of all compressed tokens, which cannot be cut to num_tokens={num_tokens}: "
                "leave it out, or encode with flattened vectors"
            )
        few = check_num_tokens(num_tokens, manifest.tokens)
        manifest = replace(manifest, dimension=manifest.dimension // manifest.tokens * few, tokens=few)
    check_repeats(folder, manifest)
    return manifest


def check_fits(
    manifest: Manifest, folder: Place, encoder: str | None, dimension: int | None, tokens: int | None
) -> None:
    """ValueError if an index is of other vectors than these; None on its side is not compared."""
    for what, there, here in (
        ("encoder", encoder, manifest.encoder),
        ("dimension", dimension, manifest.dimension),
        ("compressed tokens", tokens, manifest.tokens),
    ):
        if there is not None and here != there:
            raise ValueError(
                f"{folder} holds vectors of {what} {here}, the index of {what} {there}: load them into another index, "
                "or encode with what this one was made with"
            )


def _batches(folder: Place, manifest: Manifest) -> Iterator[tuple[Batch, float]]:
    """Batches with the bytes they make up."""
    for shard in manifest.shards or []:
        for batch in read_shard(folder, shard):
            yield batch, shard.bytes * len(batch.ids) / shard.rows


def _ahead(batches: Iterator[tuple[Batch, float]]) -> Iterator[tuple[Batch, float]]:
    """The same, the next one read in a thread meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="read") as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch
