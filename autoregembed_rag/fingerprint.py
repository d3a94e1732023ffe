"""What names an encoder: digests of weights, and of everything else that decides what an embedding means."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import AutoRegConfig
from .loading import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS
from .prompt import PromptBuilder
from .weights import adapter_base_folder, is_adapted, is_adapter

PROBE = "Fingerprint probe: Ünïcode, 12345 numbers,\n\ttabs and  spaces; don't they differ? <EMBED0> 你好 🙂"
# What an adapter's settings say about where it came from, not about what it computes.
_PROVENANCE = {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping"}
# peft keeps these in a set, whose order differs from process to process.
_UNORDERED = {"target_modules", "modules_to_save", "exclude_modules"}


class Digest(Protocol):
    """What hashlib makes."""

    def update(self, data: Any, /) -> None: ...  # noqa: ANN401


def encoder_fingerprint(
    weights: Path | nn.Module, vocabulary: dict[str, int], prompts: PromptBuilder, config: AutoRegConfig
) -> str:
    """16 hexadecimal digits over the weights (as stored, or as they are in memory), the tokenizer and the settings."""
    digest = hashlib.sha256()
    _hash_weights(digest, weights)
    settings = {
        "vocabulary": sorted(vocabulary.items()),
        "probe": prompts.build([PROBE], config.query_instruction).ids
        + prompts.build([PROBE], config.document_instruction).ids,
        "pooling": config.pooling,
        "max_length": config.max_length,
        "query_instruction": config.query_instruction,
        "document_instruction": config.document_instruction,
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def weights_digest(source: str | Path | nn.Module) -> str:
    """SHA-256 of a model's weights, 64 hexadecimal digits.

    Args:
        source: a folder, whose weights are taken as stored, however they are spread over files (an adapter's with
            its base), or a model in memory, whose weights are taken as they are now.

    FileNotFoundError: the folder holds no weights.
    """
    digest = hashlib.sha256()
    _hash_weights(digest, source if isinstance(source, nn.Module) else Path(source))
    return digest.hexdigest()


def sound_weights_digest(folder: Path) -> str | None:
    """`weights_digest` of a folder; None if its weights are damaged or gone."""
    try:
        return weights_digest(folder)
    except (SafetensorError, FileNotFoundError):
        return None


def _hash_weights(digest: Digest, source: Path | nn.Module) -> None:
    """Feed names, dtypes, shapes and bytes of all weights to a digest, and an adapter's settings."""
    tensors = _live(source) if isinstance(source, nn.Module) else _stored(source)
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    settings = _adapter_settings(source)
    if settings is not None:
        digest.update(json.dumps(settings, sort_keys=True).encode())


def _live(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in sorted(model.state_dict().items()):
        yield name, tensor.cpu()


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    if is_adapter(folder):
        yield from _stored(adapter_base_folder(folder))
    with ExitStack() as stack:
        files = folder.glob(ADAPTER_WEIGHTS if is_adapter(folder) else WEIGHTS)
        shards = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        homes = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118
        if not homes:
            raise FileNotFoundError(
                f"{folder} holds no weights to tell by which model it is: put {WEIGHTS} back"
            )
        for name in sorted(homes):  # however the weights are spread over files
            yield name, homes[name].get_tensor(name)


def _adapter_settings(source: Path | nn.Module) -> dict[str, Any] | None:
    if isinstance(source, nn.Module):
        if not is_adapted(source):
            return None
        record: dict[str, Any] = cast(Any, source).active_peft_config.to_dict()
    elif is_adapter(source):
        record = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    else:
        return None
    kept = {name: value for name, value in record.items() if name not in _PROVENANCE}
    return {
        name: sorted(value) if name in _UNORDERED and isinstance(value, list | set | tuple) else value
        for name, value in kept.items()
    }
