"""A checkpoint as a model of sentence-transformers: `SentenceTransformer(folder, trust_remote_code=True)`.

`modules.json` in every checkpoint names `AutoRegModule`, which does everything from text to embedding. What
sentence-transformers calls a prompt is an instruction here: it follows the text, and never precedes it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

try:
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise ImportError(
        "autoregembed_rag.sentence_transformers needs sentence-transformers: "
        'pip install "autoregembed-rag[sentence-transformers]"'
    ) from error

from .config import PROMPTS_NAME
from .encoder import AutoRegEncoder
from .loading import check_positions, resolve_device, resolve_dtype, resolve_folder
from .passes import FLASH, compressed_states
from .pooling import pool
from .prompt import check_texts, pad_right
from .weights import write_checkpoint

logger = logging.getLogger(__name__)


class AutoRegModule(InputModule):
    """The one module of a checkpoint: preprocessing, forward pass and pooling.

    Without a checkpoint's folder, `SentenceTransformer(modules=[AutoRegModule.load("mini")])` is the same model.
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(self, encoder: AutoRegEncoder) -> None:
        """Share `encoder`'s body, which may be trained from now on (`encoder.trainable()`), and its tokenizer.

        ValueError: the weights are quantized.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._told_of_cuts = False
        self.model = encoder.trainable()
        self.tokenizer = encoder.tokenizer
        self._prompts = encoder.prompts
        self._config = encoder.config
        self._num_tokens = encoder.num_tokens
        self._dimension = encoder.dimension

    @classmethod
    def load(
        cls,
        model_name_or_path: str = "mini",
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        *,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **other: Any,  # noqa: ANN401
    ) -> AutoRegModule:
        """Open a checkpoint, as `SentenceTransformer` does.

        Args:
            model_name_or_path: a bundled name, a folder, or a hub id.
            subfolder, token, cache_folder, revision, local_files_only: where in the hub, and how it is asked.
            trust_remote_code: run Python code that comes with the model.
            model_kwargs: `dtype` ("auto": what the best device computes in), `attn_implementation` ("sdpa"),
                `device_map` (one device to load to).
            backend: "torch".
            init_defaults, other: what else sentence-transformers passes, which must be empty.

        Raises:
            FileNotFoundError, ValueError: as `AutoRegEncoder.from_pretrained` has them, and for an option that is not
                taken.
        """
        if backend != "torch":
            raise ValueError(f'an AutoRegEmbed checkpoint runs with backend="torch" alone, not {backend!r}')
        options = {name: value for name, value in (model_kwargs or {}).items() if value is not None}
        dtype = options.pop("dtype", options.pop("torch_dtype", "auto"))
        attention = options.pop("attn_implementation", "sdpa")
        place = options.pop("device_map", None)
        if unknown := [*options, *(name for name, value in other.items() if value), *(init_defaults or {})]:
            raise ValueError(
                f"an AutoRegEmbed checkpoint takes no {', '.join(unknown)}: model_kwargs may hold dtype, "
                "attn_implementation and device_map, other settings are the checkpoint's own"
            )
        if not isinstance(place, str | torch.device | None):
            raise ValueError(f"device_map names one device here, such as 'cuda:1', and is not {place!r}")
        folder = resolve_folder(
            model_name_or_path,
            token=token,
            cache_dir=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        encoder = AutoRegEncoder.from_pretrained(
            folder / subfolder,
            # sentence-transformers moves the model to its device; FlashAttention runs on no CPU, even for a check.
            device=place or ("auto" if attention == FLASH else "cpu"),
            dtype=resolve_dtype(dtype, resolve_device(place or "auto")),
            attn_implementation=attention,
            token=token,
            trust_remote_code=trust_remote_code,
        )
        return cls(encoder)

    def on_model_ready(self, model: Any) -> None:  # noqa: ANN401
        """Give a model without prompts the checkpoint's own."""
        own = {"query": self._config.query_instruction, "document": self._config.document_instruction}
        model.prompts = {**model.prompts, **{name: model.prompts.get(name) or own[name] for name in own}}

    @property
    def max_seq_length(self) -> int:
        """Tokens of a whole prompt; longer texts are cut, never the instruction."""
        return self._config.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        config = replace(self._config, max_length=value)
        check_positions(self.model, value)
        prompts = self._prompts.with_max_length(value)
        for instruction in (config.query_instruction, config.document_instruction):
            prompts.max_text_tokens(instruction)  # raises if it fills the prompt
        self._config, self._prompts = config, prompts

    def get_embedding_dimension(self) -> int:
        """Dimensions of an embedding."""
        return self._dimension

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        max_length: int | None = None,
        **_: Any,  # noqa: ANN401
    ) -> dict[str, Tensor]:
        """Prompts of texts, padded on the right.

        Args:
            inputs: the texts.
            prompt: the instruction; None or "" is the document instruction.
            max_length: refused; it is `max_seq_length` of the model.

        Returns:
            input_ids and attention_mask, [n, longest].
        """
        if max_length is not None:
            raise ValueError(f"set model.max_seq_length = {max_length} instead of max_length={max_length}")
        texts = check_texts(inputs)
        instruction = prompt or self._config.document_instruction
        rows, cut = self._prompts.build(texts, instruction)
        if cut and not self._told_of_cuts:
            self._told_of_cuts = True
            logger.warning(
                "%d of %d texts of a batch were cut to %d tokens (said once for this model): split long texts, or "
                "raise max_seq_length",
                len(cut),
                len(texts),
                self._prompts.max_text_tokens(instruction),
            )
        ids, lengths = pad_right(rows)
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """Add `sentence_embedding`, float32 [n, dimension], unit rows."""
        lengths = features["attention_mask"].sum(dim=1)
        states = compressed_states(
            self.model, features["input_ids"], lengths, self._config.num_compressed_tokens
        )
        features["sentence_embedding"] = pool(states[:, : self._num_tokens], self._config.pooling)
        return features

    def save(self, output_path: str, *_: Any, safe_serialization: bool = True, **__: Any) -> None:  # noqa: ANN401
        """Write the checkpoint, all k vectors of it, as `AutoRegEncoder.save_pretrained` does.

        Prompts that were set on the model become the instructions, so that `AutoRegEncoder` gives the same vectors.

        ValueError: pickled weights are asked for, or there is an adapter that sentence-transformers added.
        """
        if not safe_serialization:
            raise ValueError("weights are saved as safetensors, never pickled: leave safe_serialization=True")
        if getattr(self.model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "an adapter that was added to the model cannot be saved with a checkpoint: train with LoRA by "
                "`autoregembed train ... --lora`"
            )
        # sentence-transformers has just written this, with all that is set on the model.
        theirs = Path(output_path, PROMPTS_NAME)
        record = theirs.read_bytes() if theirs.is_file() else b"{}"
        prompts = json.loads(record).get("prompts", {})
        config = replace(
            self._config,
            query_instruction=prompts.get("query") or self._config.query_instruction,
            document_instruction=prompts.get("document") or self._config.document_instruction,
        )
        write_checkpoint(Path(output_path), self.model, self.tokenizer, config, None)
        if prompts:
            theirs.write_bytes(record)
