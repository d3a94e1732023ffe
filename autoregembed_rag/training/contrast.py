"""A third stage that the paper does not have: an in-batch softmax over the cosines that retrieval will use.

The paper's two stages train what the decoder makes of the compressed vectors, never their cosines. This one does, and
needs no decoder: it fits an encoder to the texts that it will search.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..encoder import AutoRegEncoder
from ..pooling import pool
from .arguments import ContrastArguments
from .data import AlignmentRow, Rows, alignment_rows
from .sources import RowSource
from .stage import Stage
from .trainer import Batch, Distinct

# Documents that share so many of their words are taken for the same in a batch.
SAME_WORDS = 0.7


def train_contrast(
    encoder: AutoRegEncoder, rows: RowSource, output: str | Path, arguments: ContrastArguments | None = None
) -> AutoRegEncoder:
    """Queries under I_next against documents under I_self: each must prefer its own among the batch's, and each
    document its query.

    Args:
        encoder: trained in place, its trained weights in float32; its pooling is the one that is trained.
        rows: queries with a positive, and negatives where there are any: anything that `alignment_rows` takes.
        output: folder for the checkpoint, new or empty; loads with `AutoRegEncoder.from_pretrained`.
        arguments: hyperparameters.

    Returns:
        The trained encoder, loaded from `output`.

    Raises:
        ValueError, FloatingPointError, MemoryError, CheckpointError: as `train_compression` does.
    """
    rows = alignment_rows(rows)
    arguments = arguments or ContrastArguments()
    stage = Stage("contrast", encoder, None, rows, output, arguments)
    if stage.finished:
        return stage.result()
    _check_rows(rows)

    def collate(batch: list[tuple[int, AlignmentRow]]) -> Batch:
        documents: Distinct[str] = Distinct()
        queries = [row.query for _, row in batch]
        targets = [documents.add(row.pos) for _, row in batch]
        for _, row in batch:
            for text in row.neg:
                documents.add(text)
        texts = list(documents)
        also = _answers([row for _, row in batch], texts)
        words = encoder.config
        prompts = [(query, words.query_instruction) for query in queries]
        prompts += [(text, words.document_instruction) for text in texts]
        return {
            "numbers": [number for number, _ in batch],
            "prompts": stage.prompts(prompts),
            "targets": torch.tensor(targets),
            "answers": torch.tensor(also),
            "labels": torch.ones(1, len(batch), dtype=torch.long),
        }

    def step_loss(compressor: nn.Module, batch: Batch) -> Tensor:
        size, targets = len(batch["targets"]), batch["targets"]
        vectors = pool(compressor(batch["prompts"]), encoder.config.pooling)
        return contrast_loss(vectors[:size], vectors[size:], targets, batch["answers"], arguments.temperature)

    return stage.run(collate, step_loss)


def _check_rows(rows: Rows[AlignmentRow]) -> None:
    """ValueError for rows among which no query has a document, and no document a query, to be told apart from."""
    first = rows[0]
    other_query = other_positive = False
    for row in rows:
        other_query |= row.query != first.query
        other_positive |= row.pos != first.pos
        if row.neg or (other_query and other_positive):
            return
    same = "positive" if other_query else "query"
    raise ValueError(
        f"all rows have the same {same} and none a negative, so there is nothing to tell apart: add negatives, or rows "
        "with other queries and positives"
    )


def _answers(rows: list[AlignmentRow], documents: list[str]) -> list[list[bool]]:
    """Which documents answer which row's query: positives of the same query, and what says nearly the same as its own
    positive (the same passage but for a sentence). A negative of the row's own never does."""
    answers = {(row.query, row.pos) for row in rows}
    words = {text: set(text.lower().split()) for text in documents}
    return [
        [
            (row.query, text) in answers
            or (text not in row.neg and _overlap(words[row.pos], words[text]) >= SAME_WORDS)
            for text in documents
        ]
        for row in rows
    ]


def _overlap(one: set[str], other: set[str]) -> float:
    """The share of the words of both that both have."""
    shared = len(one & other)
    return shared / max(1, len(one) + len(other) - shared)


def contrast_loss(
    queries: Tensor, documents: Tensor, targets: Tensor, answers: Tensor, temperature: float
) -> Tensor:
    """Half the cross entropy of each query over the documents, half that of its document over the queries: [B].

    Args:
        queries: unit rows, [B, d].
        documents: unit rows, [D, d].
        targets: the column of each query's own document, [B].
        answers: which documents answer which query, [B, D]: another answer than its own is left out.
        temperature: of the softmax.
    """
    scores = queries @ documents.T / temperature
    own = F.one_hot(targets, len(documents)).bool()
    forward = F.cross_entropy(scores.masked_fill(answers & ~own, -torch.inf), targets, reduction="none")
    # Backwards, another query that the same document answers is left out.
    itself = torch.arange(len(targets), device=scores.device)
    others = answers[:, targets].T & (itself != itself[:, None])
    backward = F.cross_entropy(scores[:, targets].T.masked_fill(others, -torch.inf), itself, reduction="none")
    return (forward + backward) / 2
