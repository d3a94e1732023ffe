"""Pairs of encoder and decoder over one copy of a tiny base model."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import SENTENCES
from torch import Tensor

from autoregembed_rag import AutoRegEncoder, FrozenDecoder
from autoregembed_rag.training.lora import LoraArguments, lora_pair

TEXTS = SENTENCES[:4]
K = 3
SMALL = LoraArguments(rank=4, alpha=8)
# Tied head, no spare rows; no bos; Conv1D, tied, spare rows; a head of its own.
BASES = ["llama", "qwen2", "gpt2", "mistral"]


def pair(
    base: Path, arguments: LoraArguments | None = SMALL, **changes
) -> tuple[AutoRegEncoder, FrozenDecoder]:
    settings = {"num_compressed_tokens": K, "device": "cpu", "dtype": "float32"}
    return lora_pair(base, arguments, **{**settings, **changes})


def load(folder: Path, **changes) -> AutoRegEncoder:
    return AutoRegEncoder.from_pretrained(folder, **{"device": "cpu", "dtype": "float32", **changes})


def disturb(encoder: AutoRegEncoder, seed: int = 1) -> None:
    """As if trained: every weight of the adapter moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter_weights(encoder).values():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)


def adapter_weights(encoder: AutoRegEncoder) -> dict[str, Tensor]:
    return {name: weight for name, weight in encoder.trainable().named_parameters() if weight.requires_grad}
