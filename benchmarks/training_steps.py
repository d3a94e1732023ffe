"""One training step at a time, in a process of its own that steps when told to: the stages' own and the plain ones.

A process that has done its step waits while another does, so two that are compared take turns on one machine.
"""

import multiprocessing
import tempfile
import time
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
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers import logging as transformers_logging

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.decoder import decoder_folder
from autoregembed_rag.training import stage
from autoregembed_rag.training.alignment import train_alignment
from autoregembed_rag.training.arguments import AlignmentArguments, CompressionArguments
from autoregembed_rag.training.compression import train_compression
from autoregembed_rag.training.data import AlignmentRow, CompressionRow
from autoregembed_rag.training.trainer import StageTrainer
from benchmarks.plain_training import PlainPasses

OURS, PLAIN = "autoregembed-rag", "plain passes"
# AdamW moves every weight by about this much a step, whatever its gradient: float32 hardly notices.
LEARNING_RATE = 1e-9
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Row = AlignmentRow | CompressionRow
T = TypeVar("T")


@dataclass(frozen=True)
class Shape:
    """A random Llama over the tokenizer of `mini`, whose vocabulary is filled up with tokens that no text has."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    batch_size: int

    def write(self, folder: Path) -> Path:
        """Make the folder of a base language model: input and output embeddings apart, seed 0."""
        tokenizer = AutoTokenizer.from_pretrained(decoder_folder("mini"))
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=max(self.vocabulary, len(tokenizer)),
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder


SHAPES = {
    "58m": Shape(hidden=512, layers=8, heads=8, intermediate=1376, vocabulary=32_000, batch_size=32),
    "tiny": Shape(hidden=32, layers=2, heads=4, intermediate=64, vocabulary=0, batch_size=4),
}


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

    def report(self, loss: float, gradient_norm: float) -> None:
        """End a step, and wait for the next turn."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._start
        worked = time.process_time() - self._worked
        self._pipe.send(
            {
                "seconds": seconds,
                "processor seconds": worked,
                "peak": memory(self._device, "peak"),
                "loss": loss,
                "gradient norm": gradient_norm,
            }
        )
        self._wait()

    def _wait(self) -> None:
        self._pipe.recv()
        self._start = time.perf_counter()
        self._worked = time.process_time()  # of all threads: tells much on a machine that others use too


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
            self.turns.report(logs["loss"], logs["grad_norm"])


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
        turns.report(loss.item(), norm.item())


def in_batches(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Neighbours together, `size` at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


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
    """A process that steps when told to."""

    def __init__(self, job: Job) -> None:
        self.job = job
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=take_steps, args=(job, theirs), daemon=True)
        self._process.start()
        theirs.close()  # or the end of the process would not be the end of the pipe

    def loaded(self) -> dict[str, Any]:
        """Wait until all is loaded: memory."""
        return self._receive()

    def step(self) -> dict[str, Any]:
        """One turn: seconds, peak so far, loss and gradient norm."""
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
                f"the process of {self.job.system}, {self.job.stage}, ended with code {self._process.exitcode}; "
                "what went wrong stands above"
            ) from None
