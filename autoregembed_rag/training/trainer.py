"""What both stages share: a Trainer whose model is the encoder, with the frozen decoder beside it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    import accelerate  # noqa: F401
except ImportError as error:
    raise ImportError('training needs accelerate: pip install "autoregembed-rag[train]"') from error
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import AutoModel, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..decoder import FrozenDecoder
from ..encoder import AutoRegEncoder, compressed_states
from ..loading import load_model, resolve_dtype
from ..prompt import pad_right
from .arguments import StageArguments, newest_checkpoint

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
StepLoss = Callable[[nn.Module, Batch, Tensor | int | None], Tensor]
"""(compressor, batch, targets to divide by or None) -> loss."""


class Compressor(nn.Module):
    """The encoder as Trainer sees it: prompts in, compressed vectors out."""

    def __init__(self, encoder: AutoRegEncoder, *, accepts_loss_kwargs: bool) -> None:
        super().__init__()
        self.body = encoder.trainable().to(torch.float32)  # type: ignore[arg-type]
        self.k = encoder.num_compressed_tokens
        # True: Trainer counts the targets of all accumulated batches and leaves the division to the loss.
        # False: the loss is the mean of its batch, and Trainer divides by the number of accumulated batches.
        self.accepts_loss_kwargs = accepts_loss_kwargs

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """[n, longest] and [n] -> e_c, [n, k, hidden]."""
        return compressed_states(self.body, ids, lengths, self.k)


class Rows(Dataset[Any]):
    """A list as a dataset."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401
        return self.rows[index]


class SeededLengthSampler(LengthGroupedSampler):
    """Batches of like length, in an order that depends on seed and epoch alone: a run that goes on in the middle
    of an epoch sees the rows that it would have seen."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer as every epoch begins."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return iter(super().__iter__())  # type: ignore[no-untyped-call]


class StageTrainer(Trainer):
    """Minimises `step_loss`, which may use a decoder of its own.

    The decoder is no part of the model, so nothing that Trainer does to its model (train mode, wrapping, saving)
    touches it, and what is saved is the encoder alone.
    """

    def __init__(
        self,
        encoder: AutoRegEncoder,
        *,
        rows: Sequence[Any],
        lengths: list[int],
        collate: Callable[[list[Any]], Batch],
        step_loss: StepLoss,
        arguments: StageArguments,
        output: Path,
        counts_targets: bool = False,
    ) -> None:
        """Rows of like `lengths` (in any unit) share batches, which saves padding.

        `counts_targets`: batches hold `labels`, one entry per target, and `step_loss` divides by their number over
        all accumulated batches; otherwise it is a mean over the rows of its batch.
        """
        super().__init__(
            model=Compressor(encoder, accepts_loss_kwargs=counts_targets),
            args=arguments.for_trainer(output, encoder.model.device, computes_in_bf16(encoder, arguments)),
            train_dataset=Rows(rows),
            data_collator=collate,
        )
        self.encoder = encoder
        self.step_loss = step_loss
        self.lengths = lengths

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:  # noqa: ARG002
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return SeededLengthSampler(size, self.lengths, self.args.seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401
        """The stage's loss; gradients are averaged over processes, so a global sum counts once for each."""
        loss = self.step_loss(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ANN401, ARG002
        self.encoder.save_pretrained(output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:  # noqa: ARG002
        saved = load_model(AutoModel, Path(resume_from_checkpoint), {"dtype": torch.float32})
        self.encoder.model.load_state_dict(saved.state_dict())


def computes_in_bf16(encoder: AutoRegEncoder, arguments: StageArguments) -> bool:
    """What `bf16` means on the encoder's device."""
    if arguments.bf16 is not None:
        return arguments.bf16
    return resolve_dtype("auto", encoder.model.device) == torch.bfloat16


def run_stage(trainer: StageTrainer, output: Path) -> AutoRegEncoder:
    """Train, going on from the newest complete checkpoint below `output`, and save the encoder to `output`."""
    resumed = newest_checkpoint(output)
    if resumed:
        logger.info("going on from %s", resumed)
    trainer.train(resume_from_checkpoint=resumed)
    encoder = trainer.encoder
    encoder.model.train(False)
    encoder.save_pretrained(output)
    for leftover in output.glob("checkpoint-*"):
        shutil.rmtree(leftover)
    return encoder


def check_pair(encoder: AutoRegEncoder, decoder: FrozenDecoder) -> None:
    """ValueError if the decoder cannot read the encoder's vectors."""
    if encoder.hidden_size != decoder.hidden_size:
        raise ValueError(
            f"the encoder's vectors have {encoder.hidden_size} dimensions and the decoder reads "
            f"{decoder.hidden_size}: use the base model that the encoder was made from"
        )


def prompt_batch(prompts: Sequence[Sequence[int]]) -> Batch:
    """Prompts as tensors: `ids` [n, longest], `lengths` [n]."""
    ids, lengths = pad_right(prompts)
    return {"ids": ids, "lengths": lengths}
