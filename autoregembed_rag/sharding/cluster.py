"""Encoding on a Ray cluster: Ray Data hands parts to a pool of encoders, which read and write files themselves.

This process sees one short record of each part. An encoder that dies is started again by Ray, where there is room for
it, and its part is encoded again. Where that can be nowhere, it is once the others have no more to do.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from .checking import Checked, check_part
from .encoding import Job, Loading, encode_parts
from .files import Info, Place, needed
from .manifest import MANIFEST, Shard, record_name
from .source import Part

if TYPE_CHECKING:
    from ..encoder import AutoRegEncoder

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
LOOK_SECONDS = 10.0  # without a record, before the cluster is looked at
PATIENCE = 60.0  # seconds without a machine that has room for an encoder
# Of a part whose encoder dies. Some of them pass while it is not known yet whether a silent machine is dead.
RETRIES = 30
MOST_CPUS = 8  # of one encoder: more threads than these hardly make a small model faster
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # For something else that listens at an address: Ray would try for minutes.
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_py_gcs_connect_timeout_s": "5",
}
# What is wrong with the input or the set-up, not with this program: said without a traceback.
_MENDABLE = (ValueError, OSError, ImportError, MemoryError)


class Room(NamedTuple):
    """What one worker takes of a machine."""

    cpus: int
    gpus: int

    def times(self, resources: dict[str, float]) -> int:
        """How many such workers a machine has room for."""
        found = [int(resources.get("CPU", 0) // self.cpus)] if self.cpus else []
        found += [int(resources.get("GPU", 0) // self.gpus)] if self.gpus else []
        return min(found)

    def __str__(self) -> str:
        gpus = f" and {self.gpus} GPU" if self.gpus else ""
        return f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}{gpus}"


class Cluster:
    """A connection to a Ray cluster, closed at the end of a `with` block."""

    def __init__(self, address: str) -> None:
        """Connect to `address`: host:port, or "auto", a cluster on this machine, started if there is none.

        ConnectionError: nothing answers there, within seconds. ImportError: Ray is not installed.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._ray: Any = needed("ray")
        self._data: Any = needed("ray.data")
        self._own = not self._ray.is_initialized()
        if self._own:
            self._connect(address)
            # Ray prints the last lines of the log of every process that dies; what matters is raised.
            with suppress(ImportError, AttributeError, KeyError):
                self._ray._private.ray_logging.global_worker_stdstream_dispatcher.remove_handler(
                    "ray_print_logs"
                )
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what matters is raised
        context = self._data.DataContext.get_current()
        context.enable_progress_bars = False

    def _connect(self, address: str) -> None:
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        found = _running_here() if address == "auto" else address
        if found in (None, "local"):
            self._ray.init("local", include_dashboard=False, **quiet)
            return
        _check_reachable(found)
        try:
            self._ray.init(found, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConnectionError(f"{found} is no Ray cluster that can be joined: {_line(error)}") from error

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own:
            self._ray.shutdown()

    def check(self, folder: Place, parts: list[Part]) -> Iterator[Checked]:
        """Read and check parts, in any order; ValueError for a document that cannot be encoded."""

        def work(batch: dict[str, Any]) -> dict[str, list[Any]]:
            return _outcome(batch, lambda part: _checked_record(folder, part))

        rows = self._dataset(parts).map_batches(work, batch_size=1, num_cpus=1)
        for record in self._records(rows, Room(1, 0), len(parts)):
            number, count, hashes = json.loads(record)
            yield Checked(number, count, bytes.fromhex(hashes))

    def encode(
        self,
        job: Job,
        parts: list[Part],
        loading: Loading,
        cpus: int | None,
        on_rows: Callable[[Part, int], None],
    ) -> Iterator[Shard]:
        """Encode parts on all machines that there are, in any order; each shard comes once it is on disk.

        ValueError, RuntimeError: a part could not be encoded, or no machine has room for an encoder.
        """
        room, number = self._room(loading.device, cpus)
        pool = self._data.ActorPoolStrategy(size=min(number, len(parts)), max_tasks_in_flight_per_actor=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some releases call the last argument old, and have no other
            rows = self._dataset(parts).map_batches(
                PartEncoder,
                fn_constructor_args=(job, loading, room.cpus),
                batch_size=1,
                compute=pool,
                num_cpus=room.cpus,
                num_gpus=room.gpus or None,
                # Not without end, as is Ray Data's habit: a part may be what kills its encoder.
                ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": RETRIES},
            )
        by_number = {part.number: part for part in parts}
        for record in self._records(rows, room, len(parts)):
            shard = Shard(**json.loads(record))
            on_rows(by_number[shard.part], shard.rows)
            yield shard

    def _dataset(self, parts: list[Part]) -> Any:  # noqa: ANN401
        items = [{"part": json.dumps(part)} for part in parts]
        return self._data.from_items(items, override_num_blocks=len(items))

    def machines(self) -> list[dict[str, float]]:
        """The resources of each machine that is alive."""
        return [dict(node["Resources"]) for node in self._ray.nodes() if node["Alive"]]

    def _room(self, device: str | Sequence[str], cpus: int | None) -> tuple[Room, int]:
        """What an encoder takes, and how many the cluster has room for now."""
        machines = self.machines()
        if device != "cpu" and any(resources.get("GPU", 0) >= 1 for resources in machines):
            room = Room(1, 1)
        else:
            sizes = [int(resources.get("CPU", 0)) for resources in machines]
            room = Room(cpus or min([MOST_CPUS, *(size for size in sizes if size)]), 0)
        number = sum(map(room.times, machines))
        if not number:
            raise RuntimeError(
                f"no machine of the cluster has {room}, which an encoder needs: they have "
                f"{', '.join(str(int(resources.get('CPU', 0))) for resources in machines)} CPUs; give fewer --cpus"
            )
        return room, number

    def _records(self, rows: Any, room: Room, count: int) -> Iterator[str]:  # noqa: ANN401
        """What the workers report, `count` times; their first error is raised.

        RuntimeError: for a minute no machine had room for a worker, or Ray gave up.
        """
        results: queue.Queue[dict[str, str] | BaseException] = queue.Queue(maxsize=64)
        stop = threading.Event()

        def consume() -> None:
            try:
                for row in rows.iter_rows():
                    results.put(row)
                    if stop.is_set():
                        return
            except BaseException as error:
                results.put(error)

        threading.Thread(target=consume, name="ray", daemon=True).start()
        patience = _Patience(self, room)
        try:
            while count:
                patience.look()
                try:
                    found = results.get(timeout=LOOK_SECONDS)
                except queue.Empty:
                    continue
                if isinstance(found, BaseException):
                    raise RuntimeError(_given_up(found)) from found
                if found["error"]:
                    raise ValueError(found["error"])
                count -= 1
                yield found["record"]
        finally:
            stop.set()


class _Patience:
    """Looks at the cluster now and then, and says what has become of it."""

    def __init__(self, cluster: Cluster, room: Room) -> None:
        self._cluster, self._room = cluster, room
        self._seen = len(cluster.machines())
        self._looked = self._roomy = time.monotonic()

    def look(self) -> None:
        """RuntimeError: for a minute no machine had room for a worker."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        machines = self._cluster.machines()
        if len(machines) != self._seen:
            logger.info("the cluster has %d machines now, and had %d", len(machines), self._seen)
            self._seen = len(machines)
        if any(map(self._room.times, machines)):
            self._roomy = now
        elif now - self._roomy > PATIENCE:
            raise RuntimeError(
                f"the cluster has lost every machine that has {self._room}, which an encoder needs; start it again, "
                "and then the same command, which goes on"
            )


class PartEncoder:
    """One encoder of the pool. It loads its model with its first part, so that what goes wrong then is reported."""

    def __init__(self, job: Job, loading: Loading, threads: int) -> None:
        self._job, self._loading, self._threads = job, loading, threads
        self._encoder: AutoRegEncoder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        return _outcome(batch, self._encode)

    def _encode(self, part: Part) -> str:
        if self._encoder is None:
            self._encoder = self._loaded()
        name = record_name(part.number)
        if self._job.output.info(name) is not None:  # by another attempt, whose report was lost
            return json.dumps(self._job.output.read_json(name))
        (shard,) = encode_parts(self._job, iter([part]), self._encoder, lambda _, __: None)
        return json.dumps(shard._asdict())

    def _loaded(self) -> AutoRegEncoder:
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


def _checked_record(folder: Place, part: Part) -> str:
    checked = check_part(folder, part)
    return json.dumps([checked.part, checked.rows, checked.hashes.hex()])


def _outcome(batch: dict[str, Any], work: Callable[[Part], str]) -> dict[str, list[Any]]:
    """What a worker reports of the one part in `batch`: a record, or an error, which names the machine."""
    record = error = ""
    try:
        record = work(_part(batch["part"][0]))
    except _MENDABLE as found:
        error = str(found) if isinstance(found, ValueError) else f"{type(found).__name__}: {found}"
        error = f"{error} (on {socket.gethostname()})"
    except Exception:
        error = f"on {socket.gethostname()}: {traceback.format_exc()}"
    return {"record": [record], "error": [error]}


def _part(text: str) -> Part:
    number, kind, files, *rest = json.loads(text)
    return Part(number, kind, tuple(Info(*info) for info in files), *rest)


def _running_here() -> str | None:
    """The address of the cluster that `RAY_ADDRESS` names, or that runs on this machine; None if there is none."""
    if given := os.environ.get("RAY_ADDRESS"):
        return given
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")  # noqa: S108  # Ray's own place
    try:
        address = note.read_text(encoding="ascii").strip()
        _check_reachable(address)
    except (OSError, ValueError):  # no note, or one of a cluster that is gone
        return None
    return address


def _check_reachable(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConnectionError(
            f"{address!r} is no address of a Ray cluster: give host:port, or none for this machine's"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"no Ray cluster can be reached at {address} ({error}): is it running there (ray start --head), and is "
            "the port open?"
        ) from error


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return re.sub(r"\x1b\[\d+m", "", lines[0]) if lines else type(error).__name__


def _given_up(error: BaseException) -> str:
    """Ray's error in a line."""
    kind = type(error).__name__
    if "Actor" in kind or "WorkerCrashed" in kind or "OutOfMemory" in kind:
        return (
            f"the encoder of one part died {RETRIES + 1} times ({kind}), perhaps for want of memory: give more --cpus, "
            "which makes for fewer encoders on a machine. What is finished stays, and the same command goes on"
        )
    causes = [line for line in str(error).splitlines() if re.match(r"\s*\w*(Error|Exception)\b.*:", line)]
    return f"Ray could not go on ({kind}): {(causes or [_line(error)])[-1].strip()}"
