"""What encodes in the encoding benchmark: this library, sentence-transformers, and the plain loop over transformers.

All get the same strings, the whole prompts, cut where the encoder cuts them, and so the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel, AutoTokenizer
from transformers import logging as transformers_logging

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.prompt import embed_tokens
from benchmarks.turns import Turns

OURS, LIBRARY, LOOP = "autoregembed-rag", "sentence-transformers", "plain loop"
BATCH_SIZE = 32  # of the plain loop, and sentence-transformers' default
COMPARED = 64  # texts whose vectors are sent back, to see that all compute the same

Encode = Callable[[Sequence[str]], np.ndarray]
"""Texts -> unit rows, float32 [n, hidden]: the last compressed token's state."""


@dataclass(frozen=True)
class Job:
    """What one process does: encode `texts`, `rounds` times."""

    system: str
    model: Path
    texts: tuple[str, ...]
    rounds: int
    device: str
    dtype: str
    threads: int


def prompt_ending(encoder: AutoRegEncoder) -> str:
    """What follows a document in its prompt, as a string."""
    return f"\n{encoder.config.document_instruction}\n{''.join(embed_tokens(encoder.num_compressed_tokens))}"


def fitting(encoder: AutoRegEncoder, texts: Sequence[str]) -> list[str]:
    """Texts cut to the characters that the encoder reads."""
    backend = encoder.tokenizer.backend_tokenizer
    room = encoder.max_text_tokens
    found = backend.encode_batch(list(texts), add_special_tokens=False)
    return [
        text if len(one.ids) <= room else text[: one.offsets[room - 1][1]]
        for text, one in zip(texts, found, strict=True)
    ]


def our_encoder(job: Job) -> Encode:
    """As anyone uses it."""
    encoder = AutoRegEncoder.from_pretrained(job.model, device=job.device, dtype=job.dtype)
    width = encoder.hidden_size

    def encode(texts: Sequence[str]) -> np.ndarray:
        vectors = encoder.encode_documents(texts)[:, -width:]
        return np.asarray(vectors * encoder.num_compressed_tokens**0.5)

    return encode


def library_encoder(job: Job) -> Encode:
    """sentence-transformers' own way to embed by the last token."""
    ending = prompt_ending(AutoRegEncoder.from_pretrained(job.model, device="cpu"))
    body = Transformer(str(job.model), max_seq_length=None, model_kwargs={"dtype": getattr(torch, job.dtype)})
    pooling = Pooling(body.get_embedding_dimension(), "lasttoken")
    model = SentenceTransformer(modules=[body, pooling], device=job.device)
    start = _start(model.tokenizer)

    def encode(texts: Sequence[str]) -> np.ndarray:
        whole = [f"{start}{text}{ending}" for text in texts]
        return np.asarray(model.encode(whole, normalize_embeddings=True, batch_size=BATCH_SIZE))

    return encode


@torch.inference_mode()
def _plain(model: Any, tokenizer: Any, texts: Sequence[str]) -> np.ndarray:  # noqa: ANN401
    inputs = tokenizer(list(texts), padding="longest", return_tensors="pt").to(model.device)
    states = model(**inputs).last_hidden_state
    last = inputs["attention_mask"].sum(dim=1) - 1
    vectors = torch.nn.functional.normalize(states[torch.arange(len(texts)), last].float(), dim=-1)
    return np.asarray(vectors.cpu().numpy())


def loop_encoder(job: Job) -> Encode:
    """Batches of 32 in the order given, padded to the longest, with a mask."""
    ending = prompt_ending(AutoRegEncoder.from_pretrained(job.model, device="cpu"))
    tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="right")
    model = AutoModel.from_pretrained(job.model, dtype=getattr(torch, job.dtype)).to(job.device).eval()
    start = _start(tokenizer)

    def encode(texts: Sequence[str]) -> np.ndarray:
        whole = [f"{start}{text}{ending}" for text in texts]
        batches = (whole[i : i + BATCH_SIZE] for i in range(0, len(whole), BATCH_SIZE))
        return np.concatenate([_plain(model, tokenizer, batch) for batch in batches])

    return encode


def _start(tokenizer: Any) -> str:  # noqa: ANN401
    """The first token, for tokenizers that do not add it."""
    start = tokenizer.bos_token or ""
    return "" if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else start


ENCODERS = {OURS: our_encoder, LIBRARY: library_encoder, LOOP: loop_encoder}


def take_turns(job: Job, pipe: Connection[Any, Any]) -> None:
    """What a process runs: load, encode a few texts to warm up, and all of them when told to."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(job.threads)
    encode = ENCODERS[job.system](job)
    encode(job.texts[:BATCH_SIZE])
    turns = Turns(pipe, torch.device(job.device))
    turns.ready()
    for _ in range(job.rounds):
        vectors = encode(job.texts)
        turns.report({"vectors": vectors[:COMPARED]})
