"""Token embeddings from a bag of words, and a first layer that reproduces the bag.

A text's vector is the sum of its tokens' vectors; pairs are pulled together by an in-batch softmax over
cosines. Minutes of this teach the table more about meaning than an hour of language modelling on a CPU.

The warm start then writes the bag into a Llama layer exactly: RMSNorm drops a token vector's length, so the
length moves into the attention instead. One dimension of the table holds log-length, one a constant; a head
whose query reads the constant and whose key reads the log-length attends in proportion to the length, so
that the head's output, a weighted mean of directions, points where the sum of the token vectors points.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.prompt import embed_tokens
from autoregembed_rag.training.data import AlignmentRow

logger = logging.getLogger(__name__)

RESERVED = 2  # dimensions of the table that hold log-length and the constant
LENGTH_SCALE = 0.1  # small, so that they hardly change the row's root mean square
MAX_TOKENS = 128


def _token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.asarray(e.ids[:MAX_TOKENS] or [tokenizer.eos_token_id], dtype=np.int64) for e in encoded]


def train_bag(
    rows: list[AlignmentRow],
    tokenizer: PreTrainedTokenizerFast,
    *,
    dimension: int,
    steps: int,
    batch_size: int,
    seed: int,
    output: Path,
    temperature: float = 0.05,
    learning_rate: float = 5e-3,
) -> None:
    """Train token vectors [vocabulary, dimension] on (query, positive) and save them to `output`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    queries = _token_ids(tokenizer, [row.query for row in rows])
    positives = _token_ids(tokenizer, [row.pos for row in rows])
    table = nn.EmbeddingBag(len(tokenizer), dimension, mode="sum")
    nn.init.normal_(table.weight, std=dimension**-0.5)
    optimizer = torch.optim.Adam(table.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=learning_rate / 20)

    def embed(bags: list[np.ndarray]) -> Tensor:
        offsets = np.cumsum([0] + [len(bag) for bag in bags[:-1]])
        return nn.functional.normalize(
            table(torch.from_numpy(np.concatenate(bags)), torch.from_numpy(offsets)), dim=-1
        )

    progress = tqdm(range(steps), desc="bag", unit="step")
    for _ in progress:
        chosen = rng.choice(len(rows), size=batch_size, replace=False)
        query = embed([queries[i] for i in chosen])
        document = embed([positives[i] for i in chosen])
        scores = query @ document.T / temperature
        target = torch.arange(len(chosen))
        loss = (
            nn.functional.cross_entropy(scores, target) + nn.functional.cross_entropy(scores.T, target)
        ) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    save_file({"vectors": table.weight.detach().contiguous()}, output)


@torch.no_grad()
def warm_start(model: PreTrainedModel, bag: Path, *, silence_later_layers: bool) -> None:
    """Write the bag into a Llama body: its embedding table and its first attention layer.

    `silence_later_layers` zeroes what every other sublayer adds, so that training starts from the bag itself;
    without it they keep their random start, as a language model wants.
    """
    vectors = load_file(bag)["vectors"]
    hidden = model.config.hidden_size
    rows = _table_rows(vectors, hidden)
    model.get_input_embeddings().weight[: len(rows)] = rows
    first = model.base_model.layers[0].self_attn
    head_dim = hidden // model.config.num_attention_heads
    # In the rotary embedding the last pair of a head's dimensions turns slowest: nearly still over 512 tokens.
    still = torch.arange(model.config.num_attention_heads) * head_dim + head_dim - 1
    first.q_proj.weight.zero_()
    first.k_proj.weight.zero_()
    # Both reserved dimensions arrive scaled by sqrt(hidden) * LENGTH_SCALE; scores are divided by sqrt(head_dim).
    gain = head_dim**0.25 / (hidden**0.5 * LENGTH_SCALE)
    first.q_proj.weight[still, hidden - 1] = gain
    first.k_proj.weight[still, hidden - 2] = gain
    first.v_proj.weight.copy_(torch.eye(hidden))
    first.o_proj.weight.copy_(torch.eye(hidden) * (1.0 if silence_later_layers else hidden**-0.5))
    if silence_later_layers:
        for index, layer in enumerate(model.base_model.layers):
            layer.mlp.down_proj.weight.zero_()
            if index > 0:
                layer.self_attn.o_proj.weight.zero_()


@torch.no_grad()
def quieten(encoder: AutoRegEncoder, *, log_length: float = -4.0, scale: float = 0.3) -> None:
    """Keep what is the same in every prompt out of the warm-started encoder's vectors.

    Nobody attends to `<s>` and `<EMBEDi>`, whose own vectors stay small; the instructions' words are attended to
    like the text's, so the first layer's output loses the two directions in which they point.
    """
    body = encoder.trainable()
    table = body.get_input_embeddings().weight
    names = [encoder.tokenizer.bos_token, *embed_tokens(encoder.num_compressed_tokens)]
    rows = encoder.tokenizer.convert_tokens_to_ids(names)
    table[rows] *= scale
    table[rows, -2] = LENGTH_SCALE * log_length
    table[rows, -1] = LENGTH_SCALE
    directions = []
    for instruction in (encoder.config.query_instruction, encoder.config.document_instruction):
        vectors = table[encoder.prompts.build([""], instruction).ids[0]]
        lengths = (vectors[:, -2:-1] / LENGTH_SCALE).exp()
        directions.append((lengths * vectors).sum(dim=0))
    basis, _ = torch.linalg.qr(torch.stack(directions, dim=1))
    first = body.base_model.layers[0].self_attn.o_proj.weight
    first.sub_(basis @ (basis.T @ first))


def _table_rows(vectors: Tensor, hidden: int) -> Tensor:
    """[vocabulary, hidden]: unit direction, scaled log-length, scaled constant."""
    length = vectors.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    log_length = (length / length.median()).log().clamp(-4, 4)
    constant = torch.ones_like(length)
    rows = torch.cat([vectors / length, LENGTH_SCALE * log_length, LENGTH_SCALE * constant], dim=-1)
    if rows.shape[-1] != hidden:
        raise ValueError(f"a bag of {vectors.shape[-1]} dimensions does not fit a hidden size of {hidden}")
    return rows
