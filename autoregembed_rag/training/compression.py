"""Stage 1, information compression (section 3.2): k vectors from which a frozen decoder writes the target."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..decoder import FrozenDecoder
from ..encoder import AutoRegEncoder
from .arguments import CompressionArguments
from .data import CompressionRow, Rows, compression_rows
from .sources import RowSource
from .stage import Stage
from .trainer import Batch


def train_compression(
    encoder: AutoRegEncoder,
    decoder: FrozenDecoder,
    rows: RowSource,
    output: str | Path,
    arguments: CompressionArguments | None = None,
    *,
    merge_adapter: bool = False,
) -> AutoRegEncoder:
    """Minimise L_IC over `rows` and save the encoder to `output`.

    The context is the text of the prompt, the row's instruction its instruction, the output the target.
    A run that was interrupted goes on from its newest checkpoint below `output`; one that has ended there is loaded.

    Args:
        encoder: trained in place, its trained weights in float32.
        decoder: the base language model, never changed.
        rows: what to compress and what to write from it: anything that `compression_rows` takes.
        output: folder for the checkpoint, new or empty; loads with `AutoRegEncoder.from_pretrained`.
        arguments: hyperparameters, by default the paper's.
        merge_adapter: leave a whole model in `output`, where the encoder has a LoRA adapter, instead of that alone.

    Returns:
        The trained encoder, loaded from `output`.

    Raises:
        ValueError: rows that cannot be trained on, named by file and line; `output` holds another run, or no run.
        FloatingPointError: the loss is no longer finite; its rows are named.
        MemoryError: out of memory; the message says what to lower.
        CheckpointError: `output` or a checkpoint could not be written; the one before it is intact.
    """
    rows = compression_rows(rows)
    arguments = arguments or CompressionArguments()
    stage = Stage("compression", encoder, decoder, rows, output, arguments, merge_adapter=merge_adapter)
    if stage.finished:
        return stage.result()
    _check_rows(rows, encoder, decoder)

    def collate(batch: list[tuple[int, CompressionRow]]) -> Batch:
        targets = decoder.target_ids([row.output for _, row in batch])
        return {
            "numbers": [number for number, _ in batch],
            "prompts": stage.prompts([(row.context, row.instruction) for _, row in batch]),
            "targets": targets,
            "labels": torch.ones(1, sum(map(len, targets)), dtype=torch.long),
        }

    def step_loss(compressor: nn.Module, batch: Batch) -> Tensor:
        return -decoder.target_log_probs(compressor(batch["prompts"]), batch["targets"])

    return stage.run(collate, step_loss)


def _check_rows(rows: Rows[CompressionRow], encoder: AutoRegEncoder, decoder: FrozenDecoder) -> None:
    """ValueError for an instruction that fills the prompt, and for an output of which no token is left."""
    fitting: set[str] = set()

    def examine(row: CompressionRow) -> None:
        if row.instruction not in fitting:
            encoder.prompts.max_text_tokens(row.instruction)
            fitting.add(row.instruction)
        decoder.check_target(row.output)

    rows.check(examine)
