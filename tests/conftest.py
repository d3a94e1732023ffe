"""A tokenizer and language models of a few thousand parameters, built on the spot: no download, no network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tiny_models import build_tokenizer, tiny_llama, write_base

from autoregembed_rag import AutoRegEncoder, FrozenDecoder

__all__ = ["build_tokenizer", "tiny_llama"]

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a plain tiny language model."""
    return write_base(tmp_path_factory.mktemp("models") / "base")


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


@pytest.fixture(scope="session")
def decoder(tiny_checkpoint: Path) -> FrozenDecoder:
    """The tiny checkpoint's own decoder."""
    return FrozenDecoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
