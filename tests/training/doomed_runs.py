"""Training runs in processes of their own, killed at a chosen moment by the system itself."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.training.alignment import train_alignment
from autoregembed_rag.training.arguments import AlignmentArguments, CompressionArguments, ContrastArguments
from autoregembed_rag.training.compression import train_compression
from autoregembed_rag.training.contrast import train_contrast
from autoregembed_rag.training.data import AlignmentRow, CompressionRow
from autoregembed_rag.training.trainer import StageTrainer

torch.set_num_threads(1)

WORDS = ["fox", "dog", "river", "bank", "text", "vector", "answer", "question", "lemon", "green", "gram"]
COMPRESSION = [
    CompressionRow(f"The {a} and the {b}.", "Say it again.", f"The {a} and the {b}." * (1 + i % 3))
    for i, (a, b) in enumerate(zip(WORDS, reversed(WORDS), strict=True))
]
# A query with two answers: what one batch has computed of it, the next need not.
ALIGNMENT = [
    AlignmentRow(f"Where is the {WORDS[max(i, 1)]}?", f"The {a} is near.", (f"No {a} here, only a fox.",))
    for i, a in enumerate(WORDS)
]

WRITES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "shutil.rmtree",
    "tempfile.mkdtemp",
    "sqlite3.connect",
}


def broken_off(monkeypatch: pytest.MonkeyPatch, after: int, run: Callable[[], object]) -> None:
    """`run` until step `after` is done and saved, if it is to be."""
    step = StageTrainer.training_step

    def breaking(self: StageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step >= after:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", breaking)
        with pytest.raises(KeyboardInterrupt):
            run()


def train(stage: str, base: Path, output: Path, dropout: float = 0.0, **changes: Any) -> None:
    """A short run of a stage, the same every time: 11 rows, batches of 4, in float32."""
    encoder = AutoRegEncoder.from_base(base, 3, device="cpu", dtype="float32")
    for layer in encoder.model.layers:
        layer.self_attn.attention_dropout = dropout
    decoder = FrozenDecoder.from_pretrained(base, device="cpu", dtype="float32")
    settings = {"learning_rate": 3e-3, "batch_size": 4, "bf16": False, "logging_steps": 1, **changes}
    if stage == "compression":
        train_compression(encoder, decoder, COMPRESSION, output, CompressionArguments(**settings))
    elif stage == "alignment":
        train_alignment(encoder, decoder, ALIGNMENT, output, AlignmentArguments(**settings))
    else:
        train_contrast(encoder, ALIGNMENT, output, ContrastArguments(**settings))


def kill_at(operation: str, nth: int, output: Path) -> list[str]:
    """Have the system kill this process before the nth file operation below `output` that starts with `operation`, such
    as "os.rename checkpoint-4"; all operations so far."""
    done: list[str] = []
    below = f"{output}{os.sep}"

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[0]) if arguments else ""
        if event == "open":
            # Files opened to be written, and those opened to be synced.
            counts = path.startswith(below) and (arguments[1] is None or "r" not in arguments[1])
        else:
            # rmtree names what it removes relative to an open folder.
            counts = event in WRITES and (path.startswith(below) or arguments[-1] not in (-1, None))
        if counts:
            done.append(f"{event} {path.removeprefix(below)}")
            if sum(one.startswith(operation) for one in done) == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(listen)
    return done


def limit_files(size: int, kill: bool) -> None:
    """No file may grow beyond `size` bytes (-1: any may): a write that would is an error, or kills this process in its
    middle."""
    sink = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what is captured goes to a file too
        os.dup2(sink, stream)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def apart(target: Callable[..., None], *arguments: Any, **keywords: Any) -> int | None:
    """Run `target` in a process forked from one that has imported everything; its exit code, below 0 if killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11 does not tell the server where to import from.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        process = context.Process(target=target, args=arguments, kwargs=keywords)
        process.start()
    process.join()
    return process.exitcode


def train_and_die(operation: str, nth: int, *run: Any, **settings: Any) -> None:
    """`train(*run, **settings)`, killed before the nth `operation`."""
    kill_at(operation, nth, run[2])
    train(*run, **settings)
