"""Token embeddings from a bag of words, and a transformer that begins as that bag.

A text's vector is the weighted sum of its tokens' vectors; pairs are pulled together by an in-batch softmax over
cosines. Minutes of this teach the table more about meaning than an hour of language modelling on a CPU. A token weighs
more at the beginning of a text than far behind, where documents ramble: exp(AHEAD * (share - 1)) with
share = REACH / (REACH + position).

`write_bag` makes a Llama compute the same. RMSNorm drops a token vector's length, so that one dimension of the table
holds its logarithm and another a constant. In the first layer a head looks at `<s>` with the weight of REACH tokens:
its share falls with the position, and is added to the log-length. In the last layer the compressed tokens, who have a
direction in common, attend by that sum: to each token as the bag weighs it. What comes out is the mean direction.
Nothing else adds anything, until it is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.prompt import embed_tokens
from autoregembed_rag.training.data import AlignmentRow

RESERVED = 2  # dimensions of the table: log-length and constant
SCALE = 0.05  # of both, small, so that they hardly change a row's root mean square
AHEAD, REACH = 5.0, 300.0
SILENT = -6.0  # log-length of tokens that nobody should attend to
SILENT_LENGTH = math.sqrt(1 + (SCALE * SILENT) ** 2)  # of their rows, by which RMSNorm divides
MAX_TOKENS = 160
CHUNK = 4096  # texts tokenised at once

DOCUMENTS = 0.3  # of all batches pair a passage with the beginning of its document,
ONE_SOURCE = 0.8  # and of the others so many come from one source: harder to tell apart
PASSAGE = (6, 40)  # tokens

Bag = np.ndarray
"""Token ids of a text."""


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int = MAX_TOKENS) -> list[Bag]:
    """Token ids of each text, at most `limit`; of an empty text `</s>`."""
    bags: list[Bag] = []
    for start in range(0, len(texts), CHUNK):
        cut = [text[: 8 * limit] for text in texts[start : start + CHUNK]]
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(cut, add_special_tokens=False)
        bags += [np.asarray(e.ids[:limit] or [tokenizer.eos_token_id], dtype=np.int64) for e in encoded]
    return bags


def weights(tokens: int) -> np.ndarray:
    """What the tokens of a text weigh by their positions: float32 [tokens], 1 at the beginning."""
    share = REACH / (REACH + np.arange(tokens))
    return np.exp(AHEAD * (share - 1)).astype(np.float32)


def embed(table: nn.EmbeddingBag, bags: Sequence[Bag]) -> Tensor:
    """Unit vectors of texts, [n, dimension]."""
    offsets = np.cumsum([0] + [len(bag) for bag in bags[:-1]])
    weighed = np.concatenate([weights(len(bag)) for bag in bags])
    return nn.functional.normalize(
        table(torch.from_numpy(np.concatenate(bags)), torch.from_numpy(offsets), torch.from_numpy(weighed)),
        dim=-1,
    )


def batches(
    sources: Mapping[str, Sequence[AlignmentRow]],
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    size: int,
    seed: int,
) -> Iterator[list[tuple[Bag, Bag]]]:
    """Endless batches of (query, positive)."""
    rng = np.random.default_rng(seed)
    pairs: list[tuple[Bag, Bag]] = []
    places: list[range] = []
    for rows in sources.values():
        places.append(range(len(pairs), len(pairs) + len(rows)))
        queries, positives = (tokens_of(tokenizer, [getattr(r, f) for r in rows]) for f in ("query", "pos"))
        pairs += zip(queries, positives, strict=True)
    whole = [bag for bag in tokens_of(tokenizer, documents, 4 * MAX_TOKENS) if len(bag) >= 10 * PASSAGE[0]]
    large = [place for place in places if len(place) >= size]
    shares = np.array([len(place) for place in large]) / max(1, sum(len(place) for place in large))
    while True:
        if len(whole) >= size and rng.random() < DOCUMENTS:
            chosen = rng.choice(len(whole), size, replace=False)
            yield [_passage(whole[i], rng) for i in chosen]
            continue
        one = bool(large) and rng.random() < ONE_SOURCE
        among = large[rng.choice(len(large), p=shares)] if one else range(len(pairs))
        yield [pairs[among[i]] for i in rng.choice(len(among), min(size, len(among)), replace=False)]


def _passage(document: Bag, rng: np.random.Generator) -> tuple[Bag, Bag]:
    """A passage from beyond the first quarter, and what the document begins with, the passage not in it."""
    length = min(len(document) // 3, int(rng.integers(*PASSAGE)))
    start = int(rng.integers(len(document) // 4, len(document) - length + 1))
    return document[start : start + length], document[: min(start, MAX_TOKENS)]


def train_bag(
    stream: Iterator[list[tuple[Bag, Bag]]],
    vocabulary: int,
    *,
    dimension: int,
    steps: int,
    seed: int,
    output: Path,
    temperature: float = 0.05,
    learning_rate: float = 5e-3,
) -> None:
    """Train token vectors [vocabulary, dimension] on `steps` batches and save them to `output`."""
    torch.manual_seed(seed)
    table = nn.EmbeddingBag(vocabulary, dimension, mode="sum")
    nn.init.normal_(table.weight, std=dimension**-0.5)
    optimizer = torch.optim.Adam(table.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=learning_rate / 20)
    progress = tqdm(range(steps), desc="bag", unit="step")
    for _ in progress:
        queries, positives = zip(*next(stream), strict=True)
        scores = embed(table, queries) @ embed(table, positives).T / temperature
        target = torch.arange(len(scores))
        loss = (
            nn.functional.cross_entropy(scores, target) + nn.functional.cross_entropy(scores.T, target)
        ) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    save_file({"vectors": table.weight.detach().contiguous()}, output)


def table_rows(vectors: Tensor) -> Tensor:
    """[vocabulary, dimension] -> [vocabulary, dimension + 2]: unit direction, scaled log-length, scaled constant."""
    length = vectors.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    log_length = (length / length.median()).log().clamp(-4, 4)
    return torch.cat([vectors / length, SCALE * log_length, torch.full_like(length, SCALE)], dim=-1)


@torch.no_grad()
def write_bag(encoder: AutoRegEncoder, bag: Path) -> None:
    """Make an untrained encoder compute the bag saved in `bag`.

    Its hidden size is the bag's dimension and `RESERVED` more; it has two layers or more.
    """
    body = encoder.trainable()
    vectors = load_file(bag)["vectors"]
    hidden, head = body.config.hidden_size, body.config.head_dim
    if vectors.shape[-1] + RESERVED != hidden:
        raise ValueError(
            f"a bag of {vectors.shape[-1]} dimensions does not fit a hidden size of {hidden}: "
            f"it needs {hidden - RESERVED}"
        )
    start, others, compressed = _silent_tokens(encoder)
    # Random directions: of so many dimensions they are nearly at right angles to all others.
    drawn = torch.randn(2 + len(compressed), hidden - RESERVED, generator=torch.Generator().manual_seed(0))
    at_start, common, *own = nn.functional.normalize(drawn, dim=-1)
    table = body.get_input_embeddings().weight
    table[: len(vectors)] = table_rows(vectors)
    table[start, :-RESERVED] = at_start
    table[compressed, :-RESERVED] = torch.stack([(common + direction) / 2**0.5 for direction in own])
    table[compressed, -1] = 0
    table[[start, *others, *compressed], -2] = SCALE * SILENT
    table[compressed] *= 0.1  # their own vectors would be common to all texts
    for layer in body.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    _look_at_start(body.layers[0].self_attn, at_start, head)
    _gather(body.layers[-1].self_attn, common, head)


def _silent_tokens(encoder: AutoRegEncoder) -> tuple[int, list[int], list[int]]:
    """`<s>`, the tokens of both instructions and the breaks around them, and the compressed tokens."""
    tokenizer = encoder.tokenizer
    compressed = tokenizer.convert_tokens_to_ids(embed_tokens(encoder.num_compressed_tokens))
    prompts = [
        encoder.prompts.build([""], instruction).ids[0]
        for instruction in (encoder.config.query_instruction, encoder.config.document_instruction)
    ]
    start = tokenizer.bos_token_id
    return start, sorted({*prompts[0], *prompts[1]} - {start, *compressed}), compressed


def _look_at_start(attention: nn.Module, start: Tensor, head: int) -> None:
    """One head's share of `<s>`, times AHEAD, onto the log-length of every token that has the constant."""
    root = attention.q_proj.in_features**0.5  # the length of what RMSNorm lets in
    # A rotary embedding turns the last pair of a head's dimensions slowest: nearly still over 512 tokens.
    still = head - 1
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight[:head] = 0
    attention.q_proj.weight[still, -1] = 1 / (root * SCALE)
    attention.k_proj.weight[still, :-RESERVED] = start * math.log(REACH) * head**0.5 / root * SILENT_LENGTH
    attention.v_proj.weight[0, :-RESERVED] = start / root * SILENT_LENGTH
    attention.o_proj.weight[-2, 0] = AHEAD * SCALE


def _gather(attention: nn.Module, common: Tensor, head: int) -> None:
    """Who has the direction `common` attends by the log-length, and what it attends to comes out as it is."""
    hidden = attention.q_proj.in_features
    root = hidden**0.5
    still = torch.arange(hidden // head) * head + head - 1
    attention.q_proj.weight.zero_()
    attention.k_proj.weight.zero_()
    attention.q_proj.weight[still, :-RESERVED] = common * 2**0.5 / root * SILENT_LENGTH
    attention.k_proj.weight[still, -2] = head**0.5 / (root * SCALE)
    directions = torch.eye(hidden)
    directions[-RESERVED:] = 0
    attention.v_proj.weight.copy_(directions)
    attention.o_proj.weight.copy_(torch.eye(hidden))
