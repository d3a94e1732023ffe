"""What a benchmark compares: checkpoints, the ways to use one, their base LMs, sentence-transformers models."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
import typer
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from autoregembed_rag import AutoRegEncoder
from autoregembed_rag.config import CONFIG_NAME, MODULES_NAME
from autoregembed_rag.loading import decoder_folder, load_model, model_arguments
from autoregembed_rag.prompt import TextTokenizer, pad_right

MAX_TOKENS = 512
BATCH_SIZE = 32
HYBRID = "hybrid"  # the use of an encoder whose ranking is fused with that of the query's words

Models = Annotated[
    list[str] | None,
    typer.Option(
        help="Bundled name, folder or hub id, or the folder of a sentence-transformers model; may be given again. "
        "Default: mini.",
        show_default=False,
    ),
]
Bases = Annotated[
    list[str] | None,
    typer.Option(
        help="Add a causal LM, the mean of its states and the last; a checkpoint stands for its own base LM.",
        show_default=False,
    ),
]
Compares = Annotated[
    list[str] | None,
    typer.Option(
        help="Add a checkpoint in every use: hybrid search, fewer tokens, other pooling.", show_default=False
    ),
]
Average = Literal["mean", "last"]


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


@dataclass(frozen=True)
class Candidate:
    """One row of a report: a model, and the way in which it is used."""

    model: str
    encoder: Encoder
    parameters: int
    use: str = ""

    @property
    def name(self) -> str:
        """Of the row."""
        return f"{self.model}, {self.use}" if self.use else self.model

    @property
    def details(self) -> dict[str, Any]:
        """What a report says of it."""
        return {
            "model": self.model,
            "use": self.use,
            "fingerprint": self.encoder.fingerprint,
            "dimension": self.encoder.dimension,
            "parameters": self.parameters,
        }


def load_candidates(
    models: list[str] | None,
    bases: list[str] | None,
    compares: list[str] | None = None,
    **settings: Any,  # noqa: ANN401
) -> list[Candidate]:
    """The rows of a report; `settings` go to `AutoRegEncoder.from_pretrained`.

    FileNotFoundError and ValueError, as the loaders raise them, say what is wrong with a name or a setting.
    """
    bases, compares = bases or [], compares or []
    found: list[Candidate] = []
    for model, label in _labels([*compares, *(models or ([] if compares else ["mini"]))]):
        if Path(model, MODULES_NAME).is_file() and not Path(model, CONFIG_NAME).is_file():
            if model in compares:
                raise ValueError(
                    f"{model} is a sentence-transformers model, which has one use: give it as --model"
                )
            outside = SentenceTransformerModel(model)
            found.append(Candidate(label, outside, outside.parameters))
            continue
        encoder = AutoRegEncoder.from_pretrained(model, **settings)
        found.append(Candidate(label, encoder, _parameters(encoder.model)))
        if model in compares:
            found += _other_uses(found[-1], encoder)
    for base, label in _labels(bases):
        for average in ("mean", "last"):
            lm = BaseModel(base, average)
            found.append(Candidate(f"{label}: base LM", lm, lm.parameters, average))
    return found


def _other_uses(candidate: Candidate, encoder: AutoRegEncoder) -> list[Candidate]:
    """The same weights with hybrid search, fewer compressed tokens, and their mean instead of all of them."""
    view = partial(AutoRegEncoder, encoder.model, encoder.tokenizer)
    k = encoder.num_compressed_tokens
    views = {HYBRID: encoder}
    for j in range(k, 0, -1):
        if (j, encoder.config.pooling) != (encoder.num_tokens, "flatten"):
            views[f"{j} of {k} tokens"] = view(replace(encoder.config, pooling="flatten"), num_tokens=j)
    if encoder.config.pooling != "mean":
        views["mean pooling"] = view(replace(encoder.config, pooling="mean"))
    return [replace(candidate, use=use, encoder=of_use) for use, of_use in views.items()]


def _parameters(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def _labels(models: list[str]) -> list[tuple[str, str]]:
    """Each model once, with the last part of its path if that tells them apart, else all of it."""
    models = list(dict.fromkeys(models))
    short = [Path(model).name or model for model in models]
    return list(zip(models, short if len(set(short)) == len(models) else models, strict=True))


class SentenceTransformerModel:
    """A sentence-transformers model in a folder, with its own prompts for queries and documents; unit rows."""

    def __init__(self, folder: str) -> None:
        """Load it; ValueError where sentence-transformers is missing."""
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise ValueError(
                f"{folder} is a sentence-transformers model: pip install sentence-transformers"
            ) from None
        self._model = SentenceTransformer(folder)
        self.dimension = int(self._model.encode_document(["a"]).shape[1])
        self.parameters = _parameters(self._model)
        self.fingerprint = _hash_folder(Path(folder))

    def encode_queries(
        self, texts: Sequence[str], *, batch_size: int | None = None, show_progress: bool = False
    ) -> np.ndarray:
        """Float32 [n, dimension], in the order of `texts`."""
        return self._encode(self._model.encode_query, texts, batch_size, show_progress)

    def encode_documents(
        self, texts: Sequence[str], *, batch_size: int | None = None, show_progress: bool = False
    ) -> np.ndarray:
        """Float32 [n, dimension], in the order of `texts`."""
        return self._encode(self._model.encode_document, texts, batch_size, show_progress)

    def _encode(
        self,
        encode: Any,  # noqa: ANN401
        texts: Sequence[str],
        batch_size: int | None,
        show_progress: bool,
    ) -> np.ndarray:
        vectors = encode(
            list(texts),
            batch_size=batch_size or BATCH_SIZE,
            show_progress_bar=show_progress,
            normalize_embeddings=True,
        )
        return np.asarray(vectors, dtype=np.float32)


class BaseModel:
    """A causal LM's body as an embedder: no instruction, `<bos> text`, its states' mean or the last; unit rows."""

    def __init__(self, model: str, average: Average, *, dtype: str = "auto") -> None:
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
        self._average = average
        self.dimension = int(self._body.config.hidden_size)
        self.parameters = _parameters(self._body)
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
        if self._average == "last":
            pooled = hidden[torch.arange(len(rows), device=self._device), mask.sum(1) - 1]
        else:
            pooled = (hidden * mask[..., None]).sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


def _hash_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.json")]):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
