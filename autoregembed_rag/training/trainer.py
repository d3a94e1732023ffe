"""What all stages share: transformers' Trainer with the encoder as its model and a loss that may use a decoder beside
it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

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
    get_scheduler,
)
from transformers.trainer import SCHEDULER_NAME

from ..encoder import AutoRegEncoder
from ..passes import compressed_states, is_out_of_memory
from ..prompt import length_groups, pad_right
from .checkpoints import (
    publish,
    saving,
    staging,
    what_is_left,
)
from .distributed import (
    EvenRows,
    alike,
    exact_sharding,
    finite_everywhere,
    is_filler,
    weights_are_sharded,
    without_fillers,
)

if TYPE_CHECKING:
    from .stage import Stage

# Batches of like length are drawn from so many at a time: enough to sort by, few enough to stay random. Small data is
# drawn from in parts, or every epoch would have the same batches.
POOL = 50
PARTS = 4

Batch = dict[str, Any]
Key = TypeVar("Key")


Collate = Callable[[list[tuple[int, Any]]], Batch]
"""Numbered rows -> what `StepLoss` reads, and how many losses it will give."""
StepLoss = Callable[[nn.Module, Batch], Tensor]
"""(compressor, batch) -> every row's part of the loss [rows]; their sum is divided by the entries of "labels" in the
whole global batch."""


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

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Trainer's, less its first rate, which is 0 and trains nothing: w steps of warm-up are at 1/(w+1) to w/(w+1)
        of the peak."""
        warmup = self.args.get_warmup_steps(num_training_steps)
        paced = optimizer or self.optimizer
        if self.lr_scheduler is None and warmup and paced is not None:
            self.lr_scheduler = get_scheduler(
                self.args.lr_scheduler_type, paced, warmup + 1, num_training_steps + 1
            )
            with warnings.catch_warnings():  # no step of the optimizer comes before this one
                warnings.simplefilter("ignore", UserWarning)
                self.lr_scheduler.step()
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Trainer's, with a remedy where memory ran out."""
        try:
            return super().training_step(*args, **kwargs)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
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
        loss = losses.sum() / count * counted
        return (loss, None) if return_outputs else loss

    def _check_finite(self, losses: Tensor, numbers: list[int]) -> None:
        broken = ~torch.isfinite(losses)
        if not broken.any():
            return
        rows = sorted({numbers[row] for row in broken.nonzero()[:, 0].tolist()})
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
        if not finite_everywhere(model.parameters(), self.accelerator):
            raise FloatingPointError(
                f"weights are not finite after step {self.state.global_step}, so they were not saved: lower "
                f"learning_rate; {what_is_left(self.stage.output)}"
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's, but under FSDP without the weights once more, in a pickle."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        schedule: Any = self.lr_scheduler
        if self.args.should_save:
            torch.save(schedule.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        gathered = state_dict and {name.removeprefix("body."): tensor for name, tensor in state_dict.items()}
        folder = output_dir or str(self.args.output_dir)
        self.stage.encoder.save_pretrained(folder, state_dict=gathered, card=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the weights were loaded before Trainer wrapped or sharded the model."""


def wait_for_everyone() -> None:
    """Until every process has come here."""
    PartialState().wait_for_everyone()
