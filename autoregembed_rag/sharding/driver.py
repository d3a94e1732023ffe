"""The process that talks to Ray: `python -m autoregembed_rag.sharding.driver`, started by `cluster.Cluster`.

A process of its own, as Ray offers no way to give up a connection or a dataset that no longer moves, and ends a process
whose cluster is gone. It takes requests as lines of JSON and answers with lines of JSON; all else that Ray says goes to
its standard error.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TextIO

from .encoding import Job, Loading
from .files import Place
from .workers import PartChecker, PartEncoder

# Of a part whose encoder dies. Some of them pass while it is not known yet whether a silent machine is dead.
RETRIES = 30
MOST_CPUS = 8  # of one encoder: more threads than these hardly make a small model faster


class ClusterError(Exception):
    """The cluster cannot do the work."""


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


class Driver:
    """Answers requests until there are no more."""

    def __init__(self, answers: TextIO) -> None:
        self._answers = answers
        self.alone = threading.Event()  # nobody wants answers any more

    def answer(self, **fields: object) -> None:
        """One line."""
        self._answers.write(json.dumps(fields) + "\n")
        self._answers.flush()

    def connect(self, address: str) -> None:
        """Join the cluster at `address`; "local" starts one on this machine."""
        import ray
        import ray.data

        self._ray: Any = ray
        own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        ray.init(address, log_to_driver=False, **own)
        ray.data.DataContext.get_current().enable_progress_bars = False
        self.answer(connected=True)

    def check(self, request: dict[str, Any]) -> None:
        """Have parts read and checked."""
        room = Room(1, 0)
        rows = self._dataset(request["parts"]).map_batches(
            PartChecker(Place(request["folder"])).checked, batch_size=1, num_cpus=room.cpus
        )
        self._report(rows, room, request)

    def encode(self, request: dict[str, Any]) -> None:
        """Have parts encoded, by as many encoders as there is room for."""
        loading = Loading(*request["loading"])
        room, number = self._room(loading.device, request["cpus"])
        folder, output, *rest = request["job"]
        job, parts = Job(Place(folder), Place(output), *rest), request["parts"]
        pool = self._ray.data.ActorPoolStrategy(size=min(number, len(parts)), max_tasks_in_flight_per_actor=2)
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
        self._report(rows, room, request)

    def _dataset(self, parts: list[Any]) -> Any:  # noqa: ANN401
        items = [{"part": json.dumps(part)} for part in parts]
        return self._ray.data.from_items(items, override_num_blocks=len(items))

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
            raise ClusterError(
                f"no machine of the cluster has {room}, which an encoder needs: they have "
                f"{', '.join(str(int(resources.get('CPU', 0))) for resources in machines)} CPUs; give fewer --cpus"
            )
        return room, number

    def _report(self, rows: Any, room: Room, request: dict[str, Any]) -> None:  # noqa: ANN401
        """Answer with each record as it comes; ClusterError: no machine had room for a worker for too long."""
        results: queue.Queue[dict[str, str] | BaseException | None] = queue.Queue(maxsize=64)

        def consume() -> None:
            try:
                for row in rows.iter_rows():
                    results.put(row)
                results.put(None)
            except BaseException as error:
                results.put(error)

        threading.Thread(target=consume, name="ray", daemon=True).start()
        patience = _Patience(self, room, request["look"], request["patience"])
        while not self.alone.is_set():
            patience.look()
            try:
                found = results.get(timeout=request["look"])
            except queue.Empty:
                continue
            if found is None:
                self.answer(done=True)
                return
            if isinstance(found, BaseException):
                raise ClusterError(_given_up(found)) from found
            self.answer(**found)


class _Patience:
    """Looks at the cluster now and then, and says what has become of it."""

    def __init__(self, driver: Driver, room: Room, pause: float, patience: float) -> None:
        self._driver, self._room, self._pause, self._patience = driver, room, pause, patience
        self._seen = len(driver.machines())
        self._looked = self._roomy = time.monotonic()

    def look(self) -> None:
        """ClusterError: for so long no machine had room for a worker."""
        now = time.monotonic()
        if now - self._looked < self._pause:
            return
        self._looked = now
        machines = self._driver.machines()
        if len(machines) != self._seen:
            self._driver.answer(machines=len(machines), before=self._seen)
            self._seen = len(machines)
        if any(map(self._room.times, machines)):
            self._roomy = now
        elif now - self._roomy > self._patience:
            raise ClusterError(
                f"the cluster has lost every machine that has {self._room}, which an encoder needs; start it again, "
                "and then the same command, which goes on"
            )


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


def main() -> None:
    """Serve the process that started this one, and end with it."""
    # Ray and what it calls may print; the answers have a line of their own.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    requests: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(line)
        driver.alone.set()
        requests.put("")

    driver = Driver(answers)
    threading.Thread(target=read, name="requests", daemon=True).start()
    handlers: dict[str, Callable[[Any], None]] = {"check": driver.check, "encode": driver.encode}
    try:
        driver.connect(json.loads(requests.get())["address"])
        while line := requests.get():
            request = json.loads(line)
            handlers[request["work"]](request)
    except ClusterError as error:
        driver.answer(given_up=str(error))
    except Exception as error:
        driver.answer(given_up=f"Ray could not go on: {_line(error)}")


if __name__ == "__main__":
    main()
