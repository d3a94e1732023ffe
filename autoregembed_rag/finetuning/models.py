"""The models of a fine-tuning run: a checkpoint or a base language model, whole or with an adapter."""

from __future__ import annotations

from pathlib import Path

from ..config import CONFIG_NAME
from ..decoder import FrozenDecoder
from ..encoder import AutoRegEncoder
from ..loading import load_tokenizer, resolve_folder
from ..training.lora import LoraArguments, lora_pair
from ..weights import is_adapter


def is_base(model: str | Path) -> bool:
    """Is `model` a plain language model, with no compressed tokens?"""
    folder = resolve_folder(model)
    if (folder / CONFIG_NAME).is_file() or is_adapter(folder):
        return False
    return "<EMBED0>" not in load_tokenizer(folder).get_vocab()


def load_encoder(model: str | Path, device: str) -> AutoRegEncoder:
    """The whole encoder, an adapter merged; from a base language model an untrained one."""
    if is_base(model):
        return AutoRegEncoder.from_base(model, device=device, dtype="float32")
    return AutoRegEncoder.from_pretrained(model, device=device, dtype="float32")


def load_pair(
    model: str | Path, device: str, *, lora: int | None, seed: int, decoder: bool
) -> tuple[AutoRegEncoder, FrozenDecoder | None]:
    """The encoder to train, with an adapter of rank `lora` if that is given, and its decoder if asked for."""
    if lora is not None:
        return lora_pair(model, LoraArguments(rank=lora, alpha=2 * lora, seed=seed), device=device)
    return (
        load_encoder(model, device),
        FrozenDecoder.from_pretrained(model, device=device) if decoder else None,
    )
