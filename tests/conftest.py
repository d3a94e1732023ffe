"""A tokenizer and language models of a few thousand parameters, built on the spot: no download, no network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from autoregembed_rag import AutoRegEncoder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

SENTENCES = [
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "Find documents that can answer this question.",
    "Find sentences that are semantically similar to this text.",
    "A compressed vector is a condition for a language model; it can be read back.",
    "Retrieval finds the passages that answer a question, and a reader writes the answer.",
    "Vitamin C is found in oranges, lemons and green peppers, 100 grams at a time.",
]


def build_tokenizer(
    *,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    padding_side: str = "right",
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 400 tokens."""
    special = [token for token in dict.fromkeys((bos, eos, pad)) if token is not None]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES * 2,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, padding_side=padding_side
    )


def tiny_llama(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama: hidden 32, 2 layers, 128 positions."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
            tie_word_embeddings=True,
        )
    ).eval()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a plain tiny language model."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = build_tokenizer()
    tiny_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_checkpoint(tiny_base: Path) -> Callable[..., Path]:
    """Writes an untrained checkpoint with its decoder inside: `make_checkpoint(folder, num_compressed_tokens=5)`."""

    def make(folder: Path, num_compressed_tokens: int = 5) -> Path:
        decoder = folder / "decoder"
        decoder.mkdir(parents=True)
        for file in tiny_base.iterdir():
            (decoder / file.name).write_bytes(file.read_bytes())
        AutoRegEncoder.from_base(decoder, num_compressed_tokens, dtype="float32").save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained AutoRegEncoder checkpoint with its decoder: k = 5, hidden 32, 160 dimensions."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def encoder(tiny_checkpoint: Path) -> AutoRegEncoder:
    """The tiny encoder on the CPU in float32."""
    return AutoRegEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
