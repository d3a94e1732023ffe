"""Encoding in shards: check the input, encode what is not encoded yet, on this machine or on a cluster, and finish."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .checking import Checked, check_part, counted
from .cluster import Cluster
from .encoding import Job, Loading, encode_parts
from .files import Place, needed
from .manifest import Manifest, Shard, check_same, finished_shards, read_manifest, tidy
from .progress import Progress
from .shards import check_repeats
from .source import Source, default_part_bytes, find_source, plan

if TYPE_CHECKING:
    from ..config import Pooling
    from ..encoder import AutoRegEncoder

logger = logging.getLogger(__name__)


def encode_shards(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: str | Path | AutoRegEncoder = "mini",
    instruction: str = "document",
    num_tokens: int | None = None,
    pooling: Pooling | None = None,
    device: str | Sequence[str] = "auto",
    dtype: str = "auto",
    ray: str | None = None,
    cpus: int | None = None,
    part_bytes: int | None = None,
    show_progress: bool = False,
) -> Manifest:
    """Encode documents into a folder of Parquet shards; the same call goes on with what was interrupted.

    Args:
        source: JSONL (also .gz, .zst, .bz2), Parquet or text, a file or a folder of these; a path or a URI (s3://,
            gs://).
        output: a folder that is new or empty, or of the same job; on a cluster one that all its machines share.
        model: the encoder: bundled name, folder or hub id; without Ray also one that is loaded, which is used as it
            is.
        instruction: "document" (I_self), "query" (I_next) or an instruction in words.
        num_tokens: keep only the first so many compressed vectors.
        pooling: None is what the checkpoint records.
        device: where to encode; "auto" is all GPUs of this machine, or its CPU. On a cluster "auto" or "cpu".
        dtype: as `AutoRegEncoder.from_pretrained` has it.
        ray: address of a Ray cluster; "auto" is the one on this machine, started if there is none; None: no Ray.
        cpus: of each encoder on a cluster without GPUs; None divides the smallest machine sensibly.
        part_bytes: about how much input makes a shard; None: 16 MiB, or more for more than 20,000 of these. An
            interruption loses at most a part of each encoder.
        show_progress: draw a bar, with documents/s and the time left.

    Returns:
        The manifest of the finished folder.

    Raises:
        FileNotFoundError: there is no input. ImportError: pyarrow or Ray is missing.
        ValueError: a document cannot be encoded (its place is named), an id occurs twice, or `output` was begun with
            another encoder, instruction, number of tokens or input.
        ConnectionError: the cluster cannot be reached. RuntimeError: it cannot do the work.
    """
    if part_bytes is not None and part_bytes < 1:
        raise ValueError(f"part_bytes must be at least 1, not {part_bytes}")
    needed("pyarrow.parquet")
    out = Place(output)
    _check_apart(Place(source), out)
    found = find_source(os.fspath(source))
    given = None if isinstance(model, str | Path) else model
    if given is not None and ray is not None:
        raise ValueError("on a cluster every machine loads the model: give its name or folder")
    name = _name(model) if isinstance(model, str | Path) else repr(model)
    loading = Loading(name, num_tokens, pooling, device, dtype)
    with ExitStack() as stack:
        cluster = None if ray is None else stack.enter_context(Cluster(ray))
        encoder = given or _load(loading, "cpu" if cluster else device)
        wanted = _wanted(encoder, name, instruction, found, part_bytes or default_part_bytes(found))
        manifest = _begun(out, found, wanted, cluster, show_progress)
        if manifest.shards is not None:
            logger.info("%s is complete, nothing is left to encode", out)
            return manifest
        shards = finished_shards(out, manifest)
        if shards:
            logger.info("going on: %d of %d parts are encoded", len(shards), len(manifest.parts))
        done = {shard.part for shard in shards}
        left = [part for part in manifest.parts if part.number not in done]
        job = Job.of(manifest, found.folder, out)
        with Progress(manifest.parts, done, show_progress) as progress:
            if cluster is None:
                shards += encode_parts(job, iter(left), encoder, progress.encoded)
            elif left:
                shards += cluster.encode(job, left, loading, cpus, progress.encoded)
        return _finish(out, manifest, shards)


def _name(model: str | Path) -> str:
    """By which other machines load it too: a folder's full path."""
    from ..loading import resolve_folder

    return str(Path(model).absolute()) if resolve_folder(model) == Path(model) else str(model)


def _load(loading: Loading, device: str | Sequence[str]) -> AutoRegEncoder:
    import torch

    if device == "auto" and torch.cuda.device_count() > 1:
        device = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return loading.encoder(device)


def _wanted(
    encoder: AutoRegEncoder, model: str, instruction: str, found: Source, part_bytes: int
) -> Manifest:
    known = {"document": encoder.config.document_instruction, "query": encoder.config.query_instruction}
    words = known.get(instruction, instruction)
    encoder.prompts.max_text_tokens(words)  # raises now for an instruction that leaves no room
    return Manifest(
        job=uuid.uuid4().hex,
        encoder=encoder.fingerprint,
        model=model,
        instruction=words,
        dimension=encoder.dimension,
        tokens=None if encoder.config.pooling == "mean" else encoder.num_tokens,
        source=str(found.folder),
        part_bytes=part_bytes,
        files=found.files,
        parts=[],
    )


def _check_apart(source: Place, out: Place) -> None:
    if f"{out}/".startswith(f"{source}/"):
        raise ValueError(
            f"the output {out} is inside the input, which would then hold it: give another --output"
        )


def _begun(
    out: Place, found: Source, wanted: Manifest, cluster: Cluster | None, show_progress: bool
) -> Manifest:
    """The manifest in `out` if it is of the same job, else a new one, once the whole input was looked at."""
    there = read_manifest(out)
    if there is not None:
        check_same(there, wanted, out)
        return there
    if out.kind == "file" or any(not info.name.startswith(".manifest") for info in out.files()):
        raise FileExistsError(f"{out} holds something else: give a new or empty folder as --output")
    parts = plan(found, wanted.part_bytes)
    if cluster is None:
        checks: Iterable[Checked] = (check_part(found.folder, part) for part in parts)
    else:
        checks = cluster.check(found.folder, parts)
    parts = counted(found, parts, checks, show_progress)
    manifest = replace(wanted, parts=parts)
    out.make_folder()
    manifest.write(out)
    return manifest


def _finish(out: Place, manifest: Manifest, shards: Iterable[Shard]) -> Manifest:
    latest = {shard.part: shard for shard in shards}
    complete = replace(manifest, shards=[latest[part.number] for part in manifest.parts])
    check_repeats(out, complete)
    complete.write(out)
    tidy(out, list(latest.values()))
    if cut := sum(shard.cut for shard in latest.values()):
        logger.warning(
            "%d of %d texts were cut: split long texts, or use a model of a larger max_length",
            cut,
            complete.documents,
        )
    return complete
