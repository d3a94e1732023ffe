"""Stage 1, information compression (section 3.2): k vectors from which a frozen decoder writes the target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..decoder import FrozenDecoder
from ..encoder import AutoRegEncoder
from ..losses import information_compression_loss
from .arguments import CompressionArguments
from .data import CompressionRow
from .trainer import Batch, StageTrainer, check_pair, prompt_batch, run_stage


def train_compression(
    encoder: AutoRegEncoder,
    decoder: FrozenDecoder,
    rows: Sequence[CompressionRow],
    output: str | Path,
    arguments: CompressionArguments | None = None,
) -> AutoRegEncoder:
    """Minimise L_IC over `rows` and save the encoder to `output`.

    The context is the text of the prompt, the row's instruction its instruction, the output the target.
    A run that was interrupted goes on from its newest checkpoint below `output`.

    Args:
        encoder: trained in place, in float32.
        decoder: the base language model, never changed.
        rows: what to compress and what to write from it.
        output: folder for the checkpoint; loads with `AutoRegEncoder.from_pretrained`.
        arguments: hyperparameters, by default the paper's.

    Returns:
        `encoder`, trained.
    """
    if not rows:
        raise ValueError("no rows to train on")
    check_pair(encoder, decoder)
    for number, row in enumerate(rows, start=1):
        try:
            encoder.prompts.max_text_tokens(row.instruction)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None

    def collate(batch: list[CompressionRow]) -> Batch:
        # Instructions differ from row to row, so each prompt is built on its own.
        prompts = [encoder.prompts.build([row.context], row.instruction).ids[0] for row in batch]
        targets = decoder.target_ids([row.output for row in batch])
        counted = torch.ones(1, sum(len(target) for target in targets), dtype=torch.long)
        # Trainer counts the entries of "labels" over all accumulated batches.
        return {**prompt_batch(prompts), "targets": targets, "labels": counted}

    def step_loss(compressor: nn.Module, batch: Batch, num_tokens: Tensor | int | None) -> Tensor:
        states = compressor(batch["ids"], batch["lengths"])
        log_probs = decoder.token_log_probs(states, batch["targets"])
        return information_compression_loss(log_probs.values, num_tokens)

    trainer = StageTrainer(
        encoder,
        rows=rows,
        lengths=[len(row.context) + len(row.instruction) + len(row.output) for row in rows],
        collate=collate,
        step_loss=step_loss,
        arguments=arguments or CompressionArguments(),
        output=Path(output),
        counts_targets=True,
    )
    return run_stage(trainer, Path(output))
