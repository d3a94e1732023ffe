"""One training step at a time, in a process of its own that steps when told to: the stages' own and the plain ones.

A process that has done its step waits while another does, so two that are compared take turns on one machine.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers import logging as transformers_logging

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.training import stage
from autoregembed_rag.training.alignment import train_alignment
from autoregembed_rag.training.arguments import AlignmentArguments, CompressionArguments
from autoregembed_rag.training.compression import train_compression
from autoregembed_rag.training.data import AlignmentRow, CompressionRow
from autoregembed_rag.training.trainer import StageTrainer
from benchmarks.plain_training import PlainPasses
from benchmarks.turns import Turns

OURS, PLAIN = "autoregembed-rag", "plain passes"
# AdamW moves every weight by about this much a step, whatever its gradient: float32 hardly notices.
LEARNING_RATE = 1e-9

Row = AlignmentRow | CompressionRow
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What one process does: the steps of a stage, a batch of `rows` each."""

    system: str
    stage: Literal["alignment", "compression"]
    checkpointing: bool
    base: Path
    rows: tuple[Row, ...]
    batch_size: int
    device: str
    bf16: bool
    threads: int

    @property
    def arguments(self) -> AlignmentArguments | CompressionArguments:
        """The stage's hyperparameters, the same for both systems."""
        kind = AlignmentArguments if self.stage == "alignment" else CompressionArguments
        return kind(
            learning_rate=LEARNING_RATE,
            batch_size=self.batch_size,
            epochs=1.0,
            bf16=self.bf16,
            logging_steps=1,
            save_steps=None,
            gradient_checkpointing=self.checkpointing,
        )

    def load(self) -> tuple[AutoRegEncoder, FrozenDecoder]:
        """An encoder in float32 and a decoder in the precision of the steps."""
        dtype = "bfloat16" if self.bf16 else "float32"
        encoder = AutoRegEncoder.from_base(self.base, device=self.device, dtype="float32")
        return encoder, FrozenDecoder.from_pretrained(self.base, device=self.device, dtype=dtype)


class TurnTaking(TrainerCallback):
    """Ends a turn where Trainer logs a step, which is the last that it does for one."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401, ARG002
        """The first turn."""
        self.turns.ready()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ANN401, ARG002
        """A step is done; what Trainer logs once all are is no step."""
        if "loss" in logs:
            self.turns.report({"loss": logs["loss"], "gradient norm": logs["grad_norm"]})


def take_steps(job: Job, pipe: "Connection[Any, Any]") -> None:
    """What a process runs: load, and step when told to."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(job.threads)
    encoder, decoder = job.load()
    steps = plain_steps if job.system == PLAIN else our_steps
    steps(job, encoder, decoder, Turns(pipe, encoder.model.device))


def our_steps(job: Job, encoder: AutoRegEncoder, decoder: FrozenDecoder, turns: Turns) -> None:
    """The stage as anyone runs it, but with turns to take and the rows in the order given."""

    class TurnTakingTrainer(StageTrainer):
        def __init__(self, *arguments: Any) -> None:  # noqa: ANN401
            super().__init__(*arguments)
            self.remove_callback(PrinterCallback)
            self.remove_callback(ProgressCallback)
            self.add_callback(TurnTaking(turns))

        def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
            return SequentialSampler(train_dataset or job.rows)

    train = {"alignment": train_alignment, "compression": train_compression}[job.stage]
    with tempfile.TemporaryDirectory() as output, patch.object(stage, "StageTrainer", TurnTakingTrainer):
        train(encoder, decoder, job.rows, output, job.arguments)


def plain_steps(job: Job, encoder: AutoRegEncoder, decoder: FrozenDecoder, turns: Turns) -> None:
    """The plain passes in a plain loop, with the optimizer and the clipping that the stage's trainer has."""
    passes = PlainPasses(encoder, decoder, checkpointing=job.checkpointing)
    device = encoder.model.device
    arguments = job.arguments
    settings = TrainingArguments(
        optim=arguments.optim, learning_rate=arguments.learning_rate, weight_decay=arguments.weight_decay
    )
    kind, options = Trainer.get_optimizer_cls_and_kwargs(settings)
    optimizer = kind(passes.body.parameters(), **options)
    batches = list(in_batches(job.rows, job.batch_size))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=job.bf16)
    references = []
    if job.stage == "alignment":
        with autocast:
            references = [passes.reference(batch) for batch in batches]
    turns.ready()
    for number, batch in enumerate(batches):
        with autocast:
            if job.stage == "compression":
                loss = passes.compression_loss(batch)
            else:
                loss = passes.alignment_loss(
                    batch, references[number], beta=arguments.beta, temperature=arguments.temperature
                )
        loss.backward()
        norm = nn.utils.clip_grad_norm_(passes.body.parameters(), arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        turns.report({"loss": loss.item(), "gradient norm": norm.item()})


def in_batches(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Neighbours together, `size` at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
