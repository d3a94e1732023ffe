"""What all stages share: a Trainer whose model is the encoder, a loss that may use a decoder beside it, and a folder
in which a run that was interrupted goes on."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

try:
    from accelerate import PartialState
    from accelerate.utils import save_fsdp_optimizer
except ImportError as error:
    raise ImportError('training needs accelerate: pip install "autoregembed-rag[train]"') from error
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from ..decoder import FrozenDecoder
from ..encoder import AutoRegEncoder, compressed_states
from ..loading import resolve_dtype
from ..prompt import length_groups, pad_right
from .arguments import StageArguments
from .checkpoints import (
    CheckpointError,
    check_no_stranger,
    clean_up,
    newest_checkpoint,
    publish,
    remove_all_but,
    run_of,
    saving,
    sole_writer,
    staging,
    sync_files,
    what_is_left,
    write_json,
)
from .data import Rows
from .distributed import (
    EvenRows,
    alike,
    check_sharding,
    exact_sharding,
    is_filler,
    weights_are_sharded,
    without_fillers,
)

logger = logging.getLogger(__name__)

RECORD = "training.json"
# Batches of like length are drawn from so many at a time: enough to sort by, few enough to stay random. Small data is
# drawn from in parts, or every epoch would have the same batches.
POOL = 50
PARTS = 4

Batch = dict[str, Any]
Key = TypeVar("Key")


class Losses(NamedTuple):
    """What a stage averages over the whole global batch: `values` [m], and the row of the batch that each belongs to,
    `rows` [m]."""

    values: Tensor
    rows: Tensor


Collate = Callable[[list[tuple[int, Any]]], Batch]
"""Numbered rows -> what `StepLoss` reads, and how many losses it will give."""
StepLoss = Callable[[nn.Module, Batch], Losses]
"""(compressor, batch) -> losses."""


class Distinct(Generic[Key], Iterable[Key]):
    """Things, each once, in the order in which they first came."""

    def __init__(self) -> None:
        self._numbers: dict[Key, int] = {}

    def add(self, thing: Key) -> int:
        """The number of `thing` among them."""
        return self._numbers.setdefault(thing, len(self._numbers))

    def __iter__(self) -> Iterator[Key]:
        return iter(self._numbers)


def compressed_prompts(
    body: PreTrainedModel, prompts: Sequence[Sequence[int]], k: int, *, sharded: bool = False
) -> Tensor:
    """Token ids of n prompts -> e_c, [n, k, hidden], computed in groups of like length; in as many on every process
    where the weights are `sharded`."""
    groups = length_groups([len(prompt) for prompt in prompts])
    if sharded:
        groups = alike(groups, body.device)
    states = []
    for group in groups:
        ids, lengths = (tensor.to(body.device) for tensor in pad_right([prompts[i] for i in group]))
        states.append(compressed_states(body, ids, lengths, k))
    order = torch.tensor([i for group in groups for i in group], device=body.device).argsort()
    return torch.cat(states)[order]


class Compressor(nn.Module):
    """The encoder as Trainer sees it: prompts in, compressed vectors out."""

    def __init__(self, encoder: AutoRegEncoder) -> None:
        super().__init__()
        self.body = encoder.trainable()
        self.k = encoder.num_compressed_tokens
        self.sharded = weights_are_sharded()
        # Which layers FSDP makes its units of.
        self._no_split_modules = getattr(self.body, "_no_split_modules", None)
        for weight in self.body.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()

    def forward(self, prompts: list[list[int]]) -> Tensor:
        """Token ids of n prompts -> e_c, [n, k, hidden]."""
        return compressed_prompts(self.body, prompts, self.k, sharded=self.sharded)


class NumberedRows(Dataset[tuple[int, Any]]):
    """Rows with their numbers, by which messages name them."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.rows[index]


class LengthBatches(Sampler[int]):
    """Rows in an order in which a batch's are of like length. It depends on seed and epoch alone, not on how many
    processes share a batch: a run that goes on in the middle of an epoch sees the rows that it would have seen."""

    def __init__(self, lengths: np.ndarray, batch: int, seed: int) -> None:
        self.lengths = lengths
        self.batch = batch
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer as every epoch begins."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        shuffled = rng.permutation(len(self.lengths))
        size = min(POOL, max(1, len(shuffled) // (PARTS * self.batch))) * self.batch
        for start in range(0, len(shuffled), size):
            pool = shuffled[start : start + size]
            pool = pool[np.argsort(-self.lengths[pool], kind="stable")]
            # Whole batches are shuffled; what is left of the last pool stays last.
            whole = len(pool) // self.batch * self.batch
            batches = rng.permutation(pool[:whole].reshape(-1, self.batch))
            yield from batches.ravel().tolist()
            yield from pool[whole:].tolist()


class SafeTrainer(Trainer):
    """A Trainer whose checkpoints count only once they are whole, as `newest_checkpoint` finds them."""

    run: dict[str, Any] = {}  # noqa: RUF012  # what decides the result, recorded in every checkpoint

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """All as Trainer takes it."""
        super().__init__(*args, **kwargs)
        self.add_callback(OwnIntervals())

    def _get_output_dir(self, trial: Any) -> str:  # noqa: ANN401
        return str(staging(Path(super()._get_output_dir(trial))))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ANN401
        output = Path(str(self.args.output_dir))
        with saving(output):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                publish(staging(output) / f"checkpoint-{self.state.global_step}", output, self.run)
        self.accelerator.wait_for_everyone()


class OwnIntervals(TrainerCallback):
    """A run that goes on saves and logs as often as it is told to, not as the checkpoint remembers."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ANN401, ARG002
    ) -> None:
        """Called by Trainer once the state is that of the checkpoint."""
        state.compute_steps(args, state.max_steps)  # type: ignore[no-untyped-call]


class StageTrainer(SafeTrainer):
    """Minimises the mean of `step_loss` over every global batch: all processes, all accumulated batches.

    The decoder is no part of the model, so nothing that Trainer does to its model (train mode, wrapping, saving)
    touches it, and what is saved is the encoder alone.
    """

    def __init__(self, stage: Stage, collate: Collate, step_loss: StepLoss) -> None:
        check_sharding(stage.encoder)
        super().__init__(
            model=Compressor(stage.encoder),
            args=stage.trainer_arguments,
            train_dataset=NumberedRows(stage.rows),
            data_collator=without_fillers(collate),
        )
        if self.is_fsdp_enabled:
            exact_sharding(self.accelerator.state.fsdp_plugin)
        # Trainer then counts the entries of "labels" over the global batch and leaves the division to the loss.
        self.model_accepts_loss_kwargs = True
        self.stage = stage
        self.step_loss = step_loss
        self.run = stage.identity

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:  # noqa: ARG002
        together = self.args.train_batch_size * self.args.world_size
        batch = together * self.args.gradient_accumulation_steps
        order = LengthBatches(self.stage.rows.lengths, batch, self.args.seed)
        return EvenRows(order, together, epoch=lambda: int(self.state.epoch or 0))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Trainer's, with a remedy where memory ran out."""
        try:
            return super().training_step(*args, **kwargs)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise MemoryError(
                f"out of memory in step {self.state.global_step + 1} ({str(error).splitlines()[0]}): lower batch_size "
                "and raise gradient_accumulation_steps as much (the result is the same), set "
                "gradient_checkpointing=True, train a LoRA adapter, or lower max_length"
            ) from error

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401
        """The stage's loss. Gradients are averaged over processes, so each process's sum counts that many times."""
        with self.stage.autocast():
            losses = self.step_loss(model, inputs)
        self._check_finite(losses, inputs["numbers"])
        count = inputs["labels"].numel() if num_items_in_batch is None else num_items_in_batch
        counted = 0 if is_filler(inputs["numbers"]) else self.accelerator.num_processes
        loss = losses.values.sum() / count * counted
        return (loss, None) if return_outputs else loss

    def _check_finite(self, losses: Losses, numbers: list[int]) -> None:
        broken = ~torch.isfinite(losses.values)
        if not broken.any():
            return
        rows = sorted({numbers[row] for row in losses.rows[broken].tolist()})
        places = ", ".join(self.stage.rows.place(row) for row in rows[:5])
        raise FloatingPointError(
            f"the loss is not finite in step {self.state.global_step + 1} for {len(rows)} of {len(numbers)} rows "
            f"({places}{', ...' if len(rows) > 5 else ''}): look at them, or lower learning_rate; "
            f"{what_is_left(self.stage.output)}"
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ANN401
        self.check_weights(model)
        super()._save_checkpoint(model, trial)

    def check_weights(self, model: nn.Module) -> None:
        """FloatingPointError if a weight of `model` is not finite."""
        if not self._weights_are_finite(model):
            raise FloatingPointError(
                f"weights are not finite after step {self.state.global_step}, so they were not saved: lower "
                f"learning_rate; {what_is_left(self.stage.output)}"
            )

    def _weights_are_finite(self, model: nn.Module) -> bool:
        """All of them, on whichever process they are: all must stop, or the others would wait for the one that did."""
        own = [getattr(weight, "_local_tensor", weight) for weight in model.parameters()]
        finite = torch.tensor(all(torch.isfinite(weight).all() for weight in own), device=self.args.device)
        return bool(self.accelerator.gather(finite).all())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's, but under FSDP without the weights once more, in a pickle."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        gathered = state_dict and {name.removeprefix("body."): tensor for name, tensor in state_dict.items()}
        self.stage.encoder.save_pretrained(output_dir or str(self.args.output_dir), state_dict=gathered)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the weights were loaded before Trainer wrapped or sharded the model."""


class Stage:
    """One run of one stage: who is trained on what, and the folder that remembers how far it is."""

    def __init__(
        self,
        name: str,
        encoder: AutoRegEncoder,
        decoder: FrozenDecoder | None,
        rows: Rows[Any],
        output: str | Path,
        arguments: StageArguments,
    ) -> None:
        """Look into `output`.

        Raises:
            ValueError: it holds a run of other rows, another model or other settings, or the decoder cannot read the
                encoder's vectors.
        """
        if decoder is not None:
            check_pair(encoder, decoder)
        self.encoder = encoder
        self.decoder = decoder
        self.rows = rows
        self.output = Path(output)
        self.arguments = arguments
        self._check_output()
        self.bf16 = computes_in_bf16(encoder, arguments)
        self.trainer_arguments = trainer_arguments(arguments, self.output, encoder.model.device, self.bf16)
        place = self.trainer_arguments.device
        encoder.model.to(place)  # type: ignore[arg-type]
        if decoder is not None:
            decoder.to(place)
        self.identity = {
            "stage": name,
            "encoder": encoder.fingerprint,
            "decoder": None if decoder is None else decoder.fingerprint,
            "rows": rows.digest,
            **arguments.identity(),
            "bf16": self.bf16,
            "encoder_dtype": str(encoder.model.dtype),
            "decoder_dtype": None if decoder is None else str(decoder.model.dtype),
            "processes": self.trainer_arguments.world_size,
        }
        self.resumed = newest_checkpoint(self.output)
        self.record = self._record()

    @property
    def finished(self) -> bool:
        """Whether this very run has already ended in `output`."""
        return self.record is not None

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of a step's passes."""
        device = self.trainer_arguments.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.bf16)

    def wait(self) -> None:
        """Until every process has come here."""
        PartialState().wait_for_everyone()

    def result(self) -> AutoRegEncoder:
        """The encoder in `output`."""
        model = self.encoder.model
        return AutoRegEncoder.from_pretrained(
            self.output, device=self.trainer_arguments.device, dtype=model.dtype
        )

    def run(self, collate: Collate, step_loss: StepLoss) -> AutoRegEncoder:
        """Train, going on from the newest complete checkpoint, and leave the encoder and a record in `output`.

        Raises:
            CheckpointError: a save failed, or another run is writing into `output`.
            FloatingPointError: the loss or a weight is not finite.
            ValueError: `output` holds checkpoints of something else.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        with sole_writer(self.output) if self._leads else nullcontext():
            if self._leads:
                self._prepare_output()
            started = time.monotonic()
            if self.resumed is not None:
                logger.info("going on from %s", self.resumed)
                self.encoder.load_weights(self.resumed)
            log = self._log_of_all_steps()
            if log is None:
                log = self._train(collate, step_loss)
            elif self._leads:
                with saving(self.output):
                    self.encoder.save_pretrained(self.output)
            if self._leads:
                with saving(self.output):
                    self._finish(log, time.monotonic() - started)
        self.wait()
        return self.result()

    @property
    def _leads(self) -> bool:
        return bool(self.trainer_arguments.process_index == 0)

    def _check_output(self) -> None:
        """ValueError where the result would take the place of a model that the run needs until its end."""
        for model in (self.encoder._source, self.encoder.config.decoder):
            if model is not None and Path(model).resolve() == self.output.resolve():
                raise ValueError(
                    f"{self.output} is the model to be trained, or its decoder: give another output folder"
                )

    def _prepare_output(self) -> None:
        check_no_stranger(self.output)
        if (self.output / RECORD).exists() or newest_checkpoint(self.output) != self.resumed:
            raise CheckpointError(
                f"another run has written below {self.output} since this one began: run the same command again"
            )
        remove_all_but(self.resumed, self.output)

    def _log_of_all_steps(self) -> list[dict[str, float]] | None:
        """The log in the last checkpoint of all; None if there are steps to go, for Trainer takes one at least."""
        if self.resumed is None:
            return None
        state = TrainerState.load_from_json(str(self.resumed / TRAINER_STATE_NAME))
        return state.log_history if state.global_step >= state.max_steps else None

    def _train(self, collate: Collate, step_loss: StepLoss) -> list[dict[str, float]]:
        """Train and save; Trainer's log."""
        trainer = StageTrainer(self, collate, step_loss)
        recompute = self.arguments.gradient_checkpointing
        body: Any = self.encoder.model
        if recompute:
            body.gradient_checkpointing_enable({"use_reentrant": False})
        self._compile()
        try:
            trainer.train(resume_from_checkpoint=None if self.resumed is None else str(self.resumed))
        finally:
            if recompute:
                body.gradient_checkpointing_disable()
            body.train(False)
        trainer.check_weights(cast(nn.Module, trainer.model))
        with saving(self.output):
            trainer.save_model(str(self.output))
        return trainer.state.log_history

    def _finish(self, log: list[dict[str, float]], seconds: float) -> None:
        sync_files(self.output)
        record = {
            "run": self.identity,
            "rows": len(self.rows),
            "seconds": round(seconds, 1),
            "versions": {name: version(name) for name in ("autoregembed-rag", "torch", "transformers")},
            "losses": [entry for entry in log if "loss" in entry],
        }
        write_json(self.output / RECORD, record)
        remove_all_but(None, self.output)

    def _compile(self) -> None:
        if not self.arguments.torch_compile:
            return
        self.encoder.model.compile(dynamic=True)
        if self.decoder is not None:
            self.decoder.model.base_model.compile(dynamic=True)

    def _record(self) -> dict[str, Any] | None:
        """What a finished run left; ValueError if that, or a checkpoint, is another run's."""
        file = self.output / RECORD
        record = read_record(self.output) if file.exists() else None
        if record is not None:
            self._check_same(record["run"], file)
            if self._leads:
                clean_up(self.output)
        elif self.resumed is not None:
            self._check_same(run_of(self.resumed), self.resumed)
        return record

    def _check_same(self, found: dict[str, Any], where: Path) -> None:
        other = {
            name for name in self.identity.keys() | found.keys() if self.identity.get(name) != found.get(name)
        }
        if other:
            changes = ", ".join(
                f"{name} {found.get(name)!r} -> {self.identity.get(name)!r}" for name in sorted(other)
            )
            raise ValueError(
                f"{where} is of another run ({changes}): give another output folder, go on with the same settings, or "
                "remove it"
            )


def trainer_arguments(
    settings: StageArguments, output: Path, device: torch.device, bf16: bool
) -> TrainingArguments:
    """`settings` in the words of transformers' Trainer."""
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_ratio,
        optim=settings.optim,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=bf16,
        use_cpu=device.type == "cpu",
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to=settings.report_to,
        save_strategy="no" if settings.save_steps is None else "steps",
        save_steps=settings.save_steps or 500,
        ddp_find_unused_parameters=False,
    )
    # One process drives one GPU; `torchrun` or `accelerate launch` start one for each.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def read_record(output: str | Path) -> dict[str, Any]:
    """What a finished stage left in its output folder: settings, rows, seconds, versions, losses."""
    file = Path(output, RECORD)
    record = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not isinstance(record.get("run"), dict):
        raise ValueError(
            f"{file} is no record of a training run: give another output folder, or move it away"
        )
    return record


def computes_in_bf16(encoder: AutoRegEncoder, arguments: StageArguments) -> bool:
    """What `bf16` means on the encoder's device."""
    if arguments.bf16 is not None:
        return arguments.bf16
    return resolve_dtype("auto", encoder.model.device) == torch.bfloat16


def check_pair(encoder: AutoRegEncoder, decoder: FrozenDecoder) -> None:
    """ValueError if the decoder cannot read the encoder's vectors."""
    if encoder.hidden_size != decoder.hidden_size:
        raise ValueError(
            f"the encoder's vectors have {encoder.hidden_size} dimensions and the decoder reads "
            f"{decoder.hidden_size}: use the base model that the encoder was made from"
        )


def _is_out_of_memory(error: BaseException) -> bool:
    # On a CPU it is a RuntimeError like any other, told by its words alone.
    return isinstance(error, torch.OutOfMemoryError) or bool(
        re.search(r"not enough memory|can't allocate memory|out of memory", str(error), re.IGNORECASE)
    )
