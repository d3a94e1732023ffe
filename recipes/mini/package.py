"""The checkpoint as it ships: encoder and decoder in bfloat16, one folder, with a model card."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.card import CARD_NAME, model_card
from autoregembed_rag.config import CONFIG_NAME, DECODER_FOLDER

from .bag import DOCUMENTS
from .sizes import Size

MAX_BYTES = 32_000_000


def package(work: Path, stages: list[str], size: Size, seed: int, output: Path) -> None:
    """Write encoder, decoder and card into `output`; ValueError if the weights outgrow the package."""
    encoder = AutoRegEncoder.from_pretrained(work / "aligned", device="cpu", dtype="bfloat16")
    encoder.save_pretrained(output, card=False)
    decoder = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16)
    decoder.save_pretrained(output / DECODER_FOLDER)
    AutoTokenizer.from_pretrained(work / "base").save_pretrained(output / DECODER_FOLDER)
    record = json.loads((output / CONFIG_NAME).read_text())
    (output / CONFIG_NAME).write_text(json.dumps({**record, "decoder": DECODER_FOLDER}, indent=2) + "\n")
    written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    if written > MAX_BYTES:
        raise ValueError(
            f"{output} holds {written:,} bytes, more than the {MAX_BYTES:,} that a package may carry"
        )
    (output / CARD_NAME).write_text(card(work, stages, size, seed, output, decoder), encoding="utf-8")


def card(work: Path, stages: list[str], size: Size, seed: int, output: Path, decoder: PreTrainedModel) -> str:
    """What the checkpoint is, what it saw and what it cannot do."""
    encoder = AutoRegEncoder.from_pretrained(output, device="cpu")
    seconds = {name: int((work / f"{name}.seconds").read_text()) for name in stages}
    minutes = "\n".join(f"| {name.split('.')[0]} | {math.ceil(s / 60)} |" for name, s in seconds.items())
    shape = "\n".join(f"| {name} | {value:,} |" for name, value in asdict(size).items())
    about = ABOUT.format(
        decoder_parameters=_millions(decoder),
        vocabulary=f"{size.vocab_size:,}",
        text_perplexity=decoder.config.held_out_perplexity["text"],
        own_perplexity=decoder.config.held_out_perplexity["own_vectors"],
        others_perplexity=decoder.config.held_out_perplexity["others_vectors"],
        pretrain_tokens=f"{size.pretrain_tokens:,}",
        reading_rows=f"{size.reading_rows:,}",
        bag_pairs=f"{size.bag_steps * size.bag_batch:,}",
        passages=f"{DOCUMENTS:.0%}",
        compress_rows=f"{size.compress_rows:,}",
        align_rows=f"{size.align_rows:,}",
        seed=seed,
        minutes=minutes,
        shape=shape,
    )
    return model_card(encoder, "mini", about=about, license="apache-2.0", language="en")


def _millions(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}"


ABOUT = """It is small and was trained from scratch by `recipes/mini` on public text. It makes `AutoRegEmbeddings()`
work with no download; it is no match for a model of billions of parameters. It reads {vocabulary} byte-level BPE tokens
of lower-cased text; its decoder has {decoder_parameters}M parameters.

## What each weight saw

| stage | objective | data |
|---|---|---|
| token embeddings | in-batch softmax over bags of tokens | {bag_pairs} pairs, {passages} passage and document |
| encoder, start | none: a Llama that computes that bag exactly | |
| decoder (base LM) | next token, of text and from the start's vectors | {pretrain_tokens} tokens, {reading_rows} rows |
| encoder, 1 | information compression, L_IC | {compress_rows} rows |
| encoder, 2 | conditional distribution alignment, L_CDA | {align_rows} rows |

The decoder starts from the same token embeddings. The encoder is not grown from the base LM, as in the paper, but from
the bag of tokens: where there is so little text to learn from, that finds more (recipes/mini/LOG.md). The five
compressed vectors begin alike, so the first of them is nearly as good as all, and queries and documents of the same
words are near each other.

The decoder is a small language model. Perplexity per token, held out: {text_perplexity} of running text; of texts to be
written from their own vectors {own_perplexity}, from another text's {others_perplexity}. What it writes from a vector
names the subject and repeats itself; it is no copy of the text.

Text: the recipe's corpus of public-domain books, arXiv abstracts, open textbooks, technical and government
documentation, medical question-answer pairs, WordNet glosses and public task data, English only; sentences of the
evaluation sets were removed from it by exact match. Every stage ran with seed {seed}.

| stage | minutes on two CPU cores, shared with other work |
|---|---:|
{minutes}

| setting | value |
|---|---:|
{shape}

## Limits

English, lower-cased; general text rather than code; a vocabulary of {vocabulary} tokens, so rare names become many
tokens. Words count nearly without their order, and those of other instructions than the two above like the text's.
A text gets nearly the same vector as a query and as a document. Nobody checked the training text for social bias, so
expect what public text holds.
"""
