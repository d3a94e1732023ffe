"""What runs on the machines of a cluster: a part is checked, or encoded, and a short record of it comes back."""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .checking import check_part
from .encoding import Job, Loading, encode_parts, keep_few_shapes
from .files import Info, Place
from .manifest import MANIFEST, record_name
from .source import Part

if TYPE_CHECKING:
    from ..encoder import AutoRegEncoder

# What is wrong with the input or the set-up, not with this program: said without a traceback.
_MENDABLE = (ValueError, OSError, ImportError, MemoryError)


class PartEncoder:
    """One encoder of the pool. It loads its model with its first part, so that what goes wrong then is reported."""

    def __init__(self, job: Job, loading: Loading, threads: int) -> None:
        self._job, self._loading, self._threads = job, loading, threads
        self._encoder: AutoRegEncoder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        return _outcome(batch, self._encode)

    def _encode(self, part: Part) -> str:
        name = record_name(part.number)
        if self._job.output.info(name) is not None:  # by another attempt, whose report was lost
            return json.dumps(self._job.output.read_json(name))
        if self._encoder is None:
            self._encoder = self._loaded()
        (shard,) = encode_parts(self._job, iter([part]), self._encoder, lambda _, __: None)
        return json.dumps(shard._asdict())

    def _loaded(self) -> AutoRegEncoder:
        keep_few_shapes()
        import torch

        output = self._job.output
        if output.info(MANIFEST) is None or output.read_json(MANIFEST).get("job") != self._job.name:
            raise ValueError(
                f"this machine does not see {output}: the output must be on storage that all machines share"
            )
        own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else self._threads
        torch.set_num_threads(min(self._threads, own))
        encoder = self._loading.encoder("cpu" if self._loading.device == "cpu" else "auto")
        if encoder.fingerprint != self._job.encoder:
            raise ValueError(
                f"{self._loading.model!r} is encoder {encoder.fingerprint} on this machine, and {self._job.encoder} "
                "where the command was started: put the same model on all machines"
            )
        return encoder


class PartChecker:
    """Reads a part, as `check_part` does."""

    def __init__(self, folder: Place) -> None:
        self._folder = folder

    def checked(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """The report on a batch of one part."""
        return _outcome(batch, self._check)

    def _check(self, part: Part) -> str:
        checked = check_part(self._folder, part)
        return json.dumps([checked.part, checked.rows, checked.hashes.hex()])


def _outcome(batch: dict[str, Any], work: Callable[[Part], str]) -> dict[str, list[Any]]:
    """What a worker reports of the one part in `batch`: a record, or an error, which names the machine."""
    record = error = ""
    try:
        record = work(to_part(json.loads(batch["part"][0])))
    except _MENDABLE as found:
        error = str(found) if isinstance(found, ValueError) else f"{type(found).__name__}: {found}"
        error = f"{error} (on {socket.gethostname()})"
    except Exception:
        error = f"on {socket.gethostname()}: {traceback.format_exc()}"
    return {"record": [record], "error": [error]}


def to_part(fields: list[Any]) -> Part:
    """A part that went through JSON."""
    number, kind, files, *rest = fields
    return Part(number, kind, tuple(Info(*info) for info in files), *rest)
