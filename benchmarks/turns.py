"""Processes that take turns: each does a step when told to and waits while another does, so that several compare fairly
on one machine, each with a memory of its own."""

import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Turns:
    """This process's side of the taking of turns: a step lasts from the other side's word to its report."""

    def __init__(self, pipe: "Connection[Any, Any]", device: torch.device) -> None:
        self._pipe = pipe
        self._device = device

    def ready(self) -> None:
        """Say that all is loaded, and wait for the first turn; from here on memory counts."""
        loaded = memory(self._device, "now")
        reset_peak(self._device)
        self._pipe.send({"memory": loaded})
        self._wait()

    def report(self, values: Mapping[str, Any]) -> None:
        """End a step with what it found, and wait for the next turn."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._start
        worked = time.process_time() - self._worked
        self._pipe.send(
            {
                "seconds": seconds,
                "processor seconds": worked,
                "peak": memory(self._device, "peak"),
                **values,
            }
        )
        self._wait()

    def _wait(self) -> None:
        self._pipe.recv()
        self._start = time.perf_counter()
        self._worked = time.process_time()  # of all threads: tells much on a machine that others use too


def memory(device: torch.device, which: Literal["now", "peak"]) -> int | None:
    """Bytes: of the device's memory on CUDA, else of the process's; None where no /proc tells."""
    if device.type == "cuda":
        return (torch.cuda.memory_allocated if which == "now" else torch.cuda.max_memory_allocated)(device)
    if not STATUS.is_file():
        return None
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines())
    return 1024 * int(lines["VmRSS" if which == "now" else "VmHWM"].split()[0])


def reset_peak(device: torch.device) -> None:
    """Forget how much memory loading took."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif RESET.is_file():
        RESET.write_text("5", encoding="ascii")


class Worker:
    """A process that runs `work(job, pipe)`, which ends a step with every report of its `Turns`."""

    def __init__(self, work: Callable[[Any, "Connection[Any, Any]"], None], job: Any, name: str) -> None:  # noqa: ANN401
        self.job = job
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(job, theirs), daemon=True)
        self._process.start()
        theirs.close()  # or the end of the process would not be the end of the pipe

    def loaded(self) -> dict[str, Any]:
        """Wait until all is loaded: memory."""
        return self._receive()

    def step(self) -> dict[str, Any]:
        """One turn: seconds, peak so far, and what was reported."""
        self._pipe.send("go")
        return self._receive()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Let the process end by itself; end it where something went wrong."""
        if kind is None:
            self._pipe.send("go")
        else:
            self._process.terminate()
        self._process.join()
        self._pipe.close()

    def _receive(self) -> dict[str, Any]:
        try:
            return dict(self._pipe.recv())
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"the process of {self._name} ended with code {self._process.exitcode}; "
                "what went wrong stands above"
            ) from None
