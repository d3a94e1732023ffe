"""Stage 2, conditional distribution alignment (section 3.3, equation 2)."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..decoder import FrozenDecoder
from ..encoder import AutoRegEncoder, compressed_states
from ..losses import conditional_distribution_alignment_loss
from .arguments import AlignmentArguments
from .data import AlignmentRow
from .trainer import Batch, StageTrainer, check_pair, computes_in_bf16, prompt_batch, run_stage

REFERENCE_FILE = "reference.safetensors"


def train_alignment(
    encoder: AutoRegEncoder,
    decoder: FrozenDecoder,
    rows: Sequence[AlignmentRow],
    output: str | Path,
    arguments: AlignmentArguments | None = None,
) -> AutoRegEncoder:
    """Minimise L_CDA over `rows` and save the encoder to `output`.

    Reference scores are computed once, by the model as it starts, and kept in `output` with a key of that model
    and the rows: a run that was interrupted goes on from its newest checkpoint and the same reference.

    Args:
        encoder: the result of stage 1; trained in place, in float32.
        decoder: the base language model, never changed.
        rows: queries with a positive and, where there are any, negatives.
        output: folder for the checkpoint; loads with `AutoRegEncoder.from_pretrained`.
        arguments: hyperparameters, by default the paper's.

    Returns:
        `encoder`, trained.
    """
    check_pair(encoder, decoder)
    arguments = arguments or AlignmentArguments()
    output = Path(output)
    rows = with_negatives(rows, arguments.num_negatives, arguments.seed)
    key = _reference_key(encoder, rows)
    file = output / REFERENCE_FILE
    reference = _load_reference(file, key)
    if reference is None:
        # In the precision of the steps, so that at the first of them model and reference agree.
        with torch.autocast(encoder.model.device.type, torch.bfloat16, computes_in_bf16(encoder, arguments)):
            reference = reference_scores(encoder, decoder, rows, batch_size=arguments.batch_size)
        _save_reference(file, key, reference)

    def collate(batch: list[tuple[AlignmentRow, Tensor]]) -> Batch:
        chosen = [row for row, _ in batch]
        queries = encoder.prompts.build([row.query for row in chosen], encoder.config.query_instruction)
        selves = encoder.prompts.build([row.pos for row in chosen], encoder.config.document_instruction)
        positives = decoder.target_ids([row.pos for row in chosen])
        negatives = decoder.target_ids([text for row in chosen for text in row.neg])
        return {
            **prompt_batch(queries.ids + selves.ids),
            "targets": positives + positives + negatives,
            "reference": torch.stack([scores for _, scores in batch]),
        }

    def step_loss(compressor: nn.Module, batch: Batch, _: Tensor | int | None) -> Tensor:
        size, n = len(batch["reference"]), arguments.num_negatives
        # One encoder pass over queries and positives, one decoder pass over all (2 + N) pairs of every row.
        encoded: Tensor = compressor(batch["ids"], batch["lengths"])
        states = torch.cat([encoded, encoded[:size].repeat_interleave(n, dim=0)])
        scores = decoder.token_log_probs(states, batch["targets"]).summed(len(states))
        query_pos, self_pos, query_neg = scores[:size], scores[size : 2 * size], scores[2 * size :]
        return conditional_distribution_alignment_loss(
            query_pos,
            self_pos,
            query_neg.view(size, n),
            batch["reference"][:, 0],
            batch["reference"][:, 1:],
            beta=arguments.beta,
            temperature=arguments.temperature,
            similarity=arguments.similarity,
        )

    trainer = StageTrainer(
        encoder,
        rows=list(zip(rows, reference, strict=True)),
        lengths=[_length(row) for row in rows],
        collate=collate,
        step_loss=step_loss,
        arguments=arguments,
        output=output,
    )
    trained = run_stage(trainer, output)
    file.unlink()
    return trained


def with_negatives(rows: Sequence[AlignmentRow], n: int, seed: int) -> list[AlignmentRow]:
    """Rows of exactly `n` negatives: their own first, then positives of other rows, chosen by `seed`.

    ValueError if a row lacks negatives and no other row can lend one.
    """
    if not rows:
        raise ValueError("no rows to train on")
    rng = random.Random(seed)
    lenders = [row.pos for row in rows]
    if len(set(lenders)) < 2 and any(len(row.neg) < n for row in rows):
        raise ValueError("rows without negatives need other rows with other positives to borrow from")
    complete = []
    for row in rows:
        negatives = list(row.neg[:n])
        while len(negatives) < n:
            candidate = rng.choice(lenders)
            if candidate != row.pos:
                negatives.append(candidate)
        complete.append(replace(row, neg=tuple(negatives)))
    return complete


@torch.inference_mode()
def reference_scores(
    encoder: AutoRegEncoder, decoder: FrozenDecoder, rows: Sequence[AlignmentRow], *, batch_size: int = 32
) -> Tensor:
    """log p_ref of the positive and the negatives of every row under e_q,next: float32 [rows, 1 + N]."""
    width = 1 + len(rows[0].neg)
    scores = torch.empty(len(rows), width)
    # Neighbours in length share batches, which saves padding; results go back to their rows.
    order = sorted(range(len(rows)), key=lambda i: _length(rows[i]))
    with tqdm(total=len(rows), desc="reference scores", unit="row") as progress:
        for batch in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
            queries = [rows[i].query for i in batch]
            prompts = encoder.prompts.build(queries, encoder.config.query_instruction)
            tensors = {name: t.to(encoder.model.device) for name, t in prompt_batch(prompts.ids).items()}
            states = compressed_states(encoder.model, **tensors, k=encoder.num_compressed_tokens)
            targets = decoder.target_ids([text for i in batch for text in (rows[i].pos, *rows[i].neg)])
            log_probs = decoder.token_log_probs(states.repeat_interleave(width, dim=0), targets)
            scores[batch] = log_probs.summed(len(targets)).view(len(batch), width).cpu()
            progress.update(len(batch))
    return scores


def _length(row: AlignmentRow) -> int:
    return sum(map(len, (row.query, row.pos, *row.neg)))


def _reference_key(encoder: AutoRegEncoder, rows: Sequence[AlignmentRow]) -> str:
    """Changes with the starting model and with any text of any row."""
    digest = hashlib.sha256(encoder.fingerprint.encode())
    for row in rows:
        digest.update(json.dumps([row.query, row.pos, row.neg]).encode())
    return digest.hexdigest()


def _load_reference(file: Path, key: str) -> Tensor | None:
    if not file.exists():
        return None
    with safe_open(file, framework="pt") as stored:
        found = (stored.metadata() or {}).get("key")
        return stored.get_tensor("scores") if found == key else None


def _save_reference(file: Path, key: str, scores: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".tmp")
    save_file({"scores": scores}, beside, metadata={"key": key})
    beside.replace(file)
