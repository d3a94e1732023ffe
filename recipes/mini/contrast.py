"""A last stage that the paper does not have: an in-batch softmax over the cosines that retrieval will use.

At a few million parameters the paper's two stages alone leave the flattened vectors worse than a bag of words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.encoder import pool
from autoregembed_rag.training.arguments import StageArguments
from autoregembed_rag.training.data import AlignmentRow
from autoregembed_rag.training.trainer import Batch, StageTrainer, prompt_batch, run_stage

TEMPERATURE = 0.05


def train_contrast(
    encoder: AutoRegEncoder, rows: Sequence[AlignmentRow], arguments: StageArguments, output: Path
) -> AutoRegEncoder:
    """Queries under I_next against documents under I_self: each must prefer its own among the batch's."""

    def collate(batch: list[AlignmentRow]) -> Batch:
        queries = encoder.prompts.build([row.query for row in batch], encoder.config.query_instruction)
        documents = encoder.prompts.build([row.pos for row in batch], encoder.config.document_instruction)
        return {"queries": prompt_batch(queries.ids), "documents": prompt_batch(documents.ids)}

    def step_loss(compressor: nn.Module, batch: Batch, _: Tensor | int | None) -> Tensor:
        query = pool(compressor(**batch["queries"]), "flatten")
        document = pool(compressor(**batch["documents"]), "flatten")
        scores = query @ document.T / TEMPERATURE
        target = torch.arange(len(scores), device=scores.device)
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2

    trainer = StageTrainer(
        encoder,
        rows=rows,
        lengths=[len(row.pos) for row in rows],
        collate=collate,
        step_loss=step_loss,
        arguments=arguments,
        output=output,
    )
    return run_stage(trainer, output)
