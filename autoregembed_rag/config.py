"""What a checkpoint records beside the weights: `autoregembed.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

QUERY_INSTRUCTION = "Find documents that can answer this question."
"""I_next: what follows the text (paper, section 3.3)."""

DOCUMENT_INSTRUCTION = "Find sentences that are semantically similar to this text."
"""I_self: the text again (paper, section 3.3)."""

Pooling = Literal["flatten", "mean"]

CONFIG_NAME = "autoregembed.json"
DECODER_FOLDER = "decoder"
"""Where a checkpoint that carries its decoder has it."""
FORMAT_VERSION = 1
# What sentence-transformers reads: the class that opens the folder, and the prompts by name.
MODULES_NAME = "modules.json"
PROMPTS_NAME = "config_sentence_transformers.json"
MODULE_CLASS = "autoregembed_rag.sentence_transformers.AutoRegModule"

# The file comes from outside: a number in quotes or a missing instruction must not become part of a prompt.
_KINDS = {
    "num_compressed_tokens": int,
    "max_length": int,
    "query_instruction": str,
    "document_instruction": str,
}


@dataclass(frozen=True)
class AutoRegConfig:
    """How texts become embeddings.

    Attributes:
        num_compressed_tokens: k, the number of `<EMBEDi>` tokens and of vectors per text.
        max_length: tokens of a whole prompt; longer texts are cut, never the instruction.
        pooling: "flatten" concatenates the k vectors, "mean" averages them (the paper's evaluation).
        query_instruction: I_next, appended to queries.
        document_instruction: I_self, appended to documents.
        decoder: the frozen base LM: a hub id, or a folder, relative to the checkpoint's own; None: unknown.
    """

    num_compressed_tokens: int = 5
    max_length: int = 512
    pooling: Pooling = "flatten"
    query_instruction: str = QUERY_INSTRUCTION
    document_instruction: str = DOCUMENT_INSTRUCTION
    decoder: str | None = None

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            if type(value := getattr(self, name)) is not kind:
                raise TypeError(f"{name} must be {kind.__name__}, not {type(value).__name__} {value!r}")
        if self.num_compressed_tokens < 1:
            raise ValueError(f"num_compressed_tokens must be at least 1, not {self.num_compressed_tokens}")
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}, not {self.pooling!r}")
        if self.max_length <= self.num_compressed_tokens:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for text beside "
                f"{self.num_compressed_tokens} compressed tokens"
            )

    def save(self, folder: str | Path) -> None:
        """Write `autoregembed.json` into `folder`, and the two files by which sentence-transformers opens it."""
        records = {
            CONFIG_NAME: {"format_version": FORMAT_VERSION, **asdict(self)},
            MODULES_NAME: [{"idx": 0, "name": "0", "path": "", "type": MODULE_CLASS}],
            PROMPTS_NAME: {
                "model_type": "SentenceTransformer",
                "prompts": {"query": self.query_instruction, "document": self.document_instruction},
                "default_prompt_name": "document",
                "similarity_fn_name": "cosine",
            },
        }
        for name, record in records.items():
            Path(folder, name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> AutoRegConfig:
        """Read an `autoregembed.json`, a decoder inside its folder by its full path.

        ValueError names an unknown format or field.
        """
        try:
            record: dict[str, Any] = dict(json.loads(Path(file).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is not a JSON object of settings: {error}") from error
        version = record.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{file} has format_version {version!r}; this release of autoregembed-rag reads "
                f"{FORMAT_VERSION}: upgrade the package or save the checkpoint again"
            )
        known = {field.name for field in fields(cls)}
        if unknown := sorted(record.keys() - known):
            raise ValueError(f"{file} has unknown fields {unknown}; known are {sorted(known)}")
        config = cls(**record)
        inside = None if config.decoder is None else Path(file).parent / config.decoder
        return replace(config, decoder=str(inside.resolve())) if inside and inside.is_dir() else config

    def relative_to(self, folder: Path) -> AutoRegConfig:
        """With a decoder inside `folder` named relative to it, so that the folder can move."""
        if self.decoder is None or not Path(self.decoder).is_relative_to(folder.resolve()):
            return self
        return replace(self, decoder=Path(self.decoder).relative_to(folder.resolve()).as_posix())


def recorded_config(folder: Path, vocabulary: Mapping[str, int]) -> AutoRegConfig:
    """What the checkpoint in `folder` records.

    Without an `autoregembed.json` (the paper's own checkpoints): the defaults, and k by the `<EMBEDi>` in the
    vocabulary; ValueError if there are none.
    """
    file = folder / CONFIG_NAME
    if file.exists():
        return AutoRegConfig.load(file)
    k = next(i for i in range(len(vocabulary) + 1) if f"<EMBED{i}>" not in vocabulary)
    if k == 0:
        raise ValueError(
            f"{folder} is not an AutoRegEmbed checkpoint: it has neither {CONFIG_NAME} nor <EMBEDi> tokens. "
            "To start from a plain language model use AutoRegEncoder.from_base(...) and train it"
        )
    return AutoRegConfig(num_compressed_tokens=k)


def check_num_tokens(num_tokens: int, tokens: int) -> int:
    """`num_tokens`, where it can be a number of the first of `tokens`.

    Raises:
        TypeError: it is no integer.
        ValueError: it is not between 1 and `tokens`.
    """
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, Integral):
        raise TypeError(f"num_tokens must be an integer between 1 and {tokens}, not {num_tokens!r}")
    if not 1 <= num_tokens <= tokens:
        raise ValueError(f"num_tokens must be between 1 and {tokens}, not {num_tokens}")
    return int(num_tokens)
