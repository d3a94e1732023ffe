"""The models that a benchmark compares, and their floor: the base LM with its last hidden states averaged."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import torch
import typer
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.decoder import decoder_folder
from autoregembed_rag.loading import load_model, model_arguments
from autoregembed_rag.prompt import TextTokenizer, pad_right

MAX_TOKENS = 512
BATCH_SIZE = 32

Models = Annotated[
    list[str] | None,
    typer.Option(
        help="Bundled name, folder or hub id; may be given again. Default: mini.", show_default=False
    ),
]
Bases = Annotated[
    list[str] | None,
    typer.Option(
        help="Add a causal LM, mean-pooled; a checkpoint stands for its own base LM.", show_default=False
    ),
]


class Encoder(Protocol):
    """The part of `AutoRegEncoder` that benchmarks need; both methods return float32 [n, dimension]."""

    @property
    def dimension(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def encode_queries(
        self, texts: Sequence[str], *, batch_size: int | None = None, show_progress: bool = False
    ) -> np.ndarray: ...
    def encode_documents(
        self, texts: Sequence[str], *, batch_size: int | None = None, show_progress: bool = False
    ) -> np.ndarray: ...


def load_encoders(models: list[str] | None, bases: list[str] | None, **settings: Any) -> dict[str, Encoder]:  # noqa: ANN401
    """The encoders by their names in a report; `settings` go to `AutoRegEncoder.from_pretrained`.

    FileNotFoundError and ValueError, as the loaders raise them, say what is wrong with a name or a setting.
    """
    models, bases = models or ["mini"], bases or []
    encoders: dict[str, Encoder] = {
        label: AutoRegEncoder.from_pretrained(model, **settings) for model, label in _labels(models)
    }
    for base, label in _labels(bases):
        encoders[f"{label}: base LM, mean"] = MeanPooledModel(base)
    return encoders


def _labels(models: list[str]) -> list[tuple[str, str]]:
    """Each model once, with the last part of its path if that tells them apart, else all of it."""
    models = list(dict.fromkeys(models))
    short = [Path(model).name or model for model in models]
    return list(zip(models, short if len(set(short)) == len(models) else models, strict=True))


class MeanPooledModel:
    """A causal LM's body as an embedder: no instruction, `<bos> text`, unit rows."""

    def __init__(self, model: str, *, dtype: str = "auto") -> None:
        """Load `model`: a causal LM (folder or hub id), or a checkpoint, which then stands for its decoder.

        FileNotFoundError lists what would work; ValueError if a checkpoint names no decoder.
        """
        folder = decoder_folder(model)
        self._device, arguments = model_arguments("auto", dtype, "auto", False)
        self._body = load_model(AutoModel, folder, arguments).to(self._device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self._text = TextTokenizer(tokenizer)
        self._prefix = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        longest = getattr(self._body.config, "max_position_embeddings", MAX_TOKENS)
        self._room = min(MAX_TOKENS, longest) - len(self._prefix)
        self.dimension = int(self._body.config.hidden_size)
        self.fingerprint = _hash_folder(folder)

    def encode_documents(
        self, texts: Sequence[str], *, batch_size: int | None = None, show_progress: bool = False
    ) -> np.ndarray:
        """Float32 [n, dimension], in the order of `texts`."""
        size = batch_size or BATCH_SIZE
        rows = [self._prefix + ids[: self._room] for ids in self._text.encode(texts, limit=self._room)]
        rows = [
            row or [0] for row in rows
        ]  # an empty text under a tokenizer without bos still needs one position
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        vectors = np.zeros((len(rows), self.dimension), dtype=np.float32)
        for start in tqdm(range(0, len(order), size), unit="batch", disable=not show_progress):
            batch = order[start : start + size]
            vectors[batch] = self._encode([rows[i] for i in batch])
        return vectors

    encode_queries = encode_documents

    @torch.inference_mode()
    def _encode(self, rows: list[list[int]]) -> np.ndarray:
        ids, lengths = pad_right(rows)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        ids, mask = ids.to(self._device), mask.to(self._device)
        hidden = self._body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()


def _hash_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        digest.update(file.name.encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
