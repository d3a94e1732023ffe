"""A Ray cluster as `encode_shards` sees it: parts go there, and a short record of each comes back.

Ray Data hands the parts to a pool of encoders, which read and write files themselves. An encoder that dies is started
again by Ray, where there is room for it, and its part is encoded again; where that is nowhere, it is once the others
have no more to do.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from .checking import Checked
from .encoding import Job, Loading
from .files import Place, needed
from .manifest import Shard
from .source import Part

logger = logging.getLogger(__name__)

REACH_SECONDS = 5.0
CONNECT_SECONDS = 20.0
START_SECONDS = 120.0  # of a cluster on this machine, which may be busy
END_SECONDS = 20.0
LOOK_SECONDS = 10.0  # between looks at which machines there are
PATIENCE = 60.0  # seconds without a machine that has room for an encoder
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}


class Cluster:
    """A connection to a Ray cluster, closed at the end of a `with` block."""

    def __init__(self, address: str) -> None:
        """Connect to `address`: host:port, or "auto", a cluster on this machine, started if there is none.

        ConnectionError: nothing answers there, within seconds. ImportError: Ray is not installed.
        """
        needed("ray")
        found = (_running_here() if address == "auto" else address) or "local"
        if found != "local":
            _check_reachable(found)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__
        above = str(Path(__file__).parents[2])
        paths = [above, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "autoregembed_rag.sharding.driver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**_ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # or Ctrl-C would end it before this process can
            text=True,
            encoding="utf-8",
        )
        seconds = START_SECONDS if found == "local" else CONNECT_SECONDS
        try:
            self._ask(address=found)
            self._wait(seconds)
            self._next()
        except (OSError, RuntimeError) as error:
            self._process.kill()
            self._close()
            where = "on this machine" if found == "local" else f"at {found}"
            raise ConnectionError(f"no Ray cluster that can be joined {where}: {error}") from error

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.terminate()
        self._close()

    def _close(self) -> None:
        assert self._process.stdin is not None  # noqa: S101
        assert self._process.stdout is not None  # noqa: S101
        try:
            with suppress(OSError):
                self._process.stdin.close()
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            self._process.stdout.close()
            self._said.close()

    def check(self, folder: Place, parts: list[Part]) -> Iterator[Checked]:
        """Read and check parts, in any order; ValueError for a document that cannot be encoded."""
        for record in self._records(work="check", folder=folder.address, parts=parts):
            number, rows, hashes = json.loads(record)
            yield Checked(number, rows, bytes.fromhex(hashes))

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
        by_number = {part.number: part for part in parts}
        places = [job.folder.address, job.output.address]
        fields = [*places, job.name, job.encoder, job.instruction, job.dimension]
        for record in self._records(work="encode", job=fields, loading=loading, cpus=cpus, parts=parts):
            shard = Shard(**json.loads(record))
            on_rows(by_number[shard.part], shard.rows)
            yield shard

    def _ask(self, **request: object) -> None:
        assert self._process.stdin is not None  # noqa: S101
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def _wait(self, seconds: float) -> None:
        """RuntimeError: there is no answer in so many seconds."""
        assert self._process.stdout is not None  # noqa: S101
        if not select.select([self._process.stdout.fileno()], [], [], seconds)[0]:
            raise RuntimeError(f"no answer in {seconds:.0f} seconds")

    def _next(self) -> dict[str, Any]:
        """The next answer; RuntimeError says why there is none."""
        assert self._process.stdout is not None  # noqa: S101
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            said = [one for one in self._said.read().decode(errors="replace").splitlines() if one.strip()]
            raise RuntimeError(
                f"the connection to the Ray cluster is lost ({said[-1] if said else 'it said nothing'}). What is "
                "finished stays, and the same command goes on"
            )
        answer: dict[str, Any] = json.loads(line)
        if "given_up" in answer:
            raise RuntimeError(answer["given_up"])
        return answer

    def _records(self, **request: object) -> Iterator[str]:
        """What the workers report; their first error is raised."""
        self._ask(**request, look=LOOK_SECONDS, patience=PATIENCE)
        while "done" not in (answer := self._next()):
            if answer.get("error"):
                raise ValueError(answer["error"])
            if "record" in answer:
                yield answer["record"]
            else:
                logger.info(
                    "the cluster has %d machines now, and had %d", answer["machines"], answer["before"]
                )


def _running_here() -> str | None:
    """The address of the cluster that `RAY_ADDRESS` names, or that runs on this machine; None if there is none."""
    given = os.environ.get("RAY_ADDRESS", "auto")
    if given not in ("", "auto"):
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
