"""A checkpoint in mteb: `mteb.evaluate(AutoRegMteb("mini"), tasks)`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

try:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
    from mteb.types import PromptType
except ImportError as error:
    raise ImportError('autoregembed_rag.mteb needs mteb: pip install "autoregembed-rag[bench]"') from error

from .encoder import AutoRegEncoder

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import BatchedInput
    from torch.utils.data import DataLoader


class AutoRegMteb(AbsEncoder):
    """An `AutoRegEncoder` as mteb calls it.

    What a task names a query is embedded under I_next, all else under I_self: the documents of retrieval and reranking,
    and both sides of symmetric tasks such as STS, for which mteb names neither.
    """

    def __init__(
        self,
        model_name: str | Path | AutoRegEncoder = "mini",
        revision: str | None = None,
        *,
        device: str | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        """Load a checkpoint, or take a ready encoder.

        `mteb_model_meta` names it autoregembed/FOLDER, and its revision by the fingerprint, with `num_tokens`, `dtype`
        and `quantize` where they are set, so that results which mteb keeps are never those of other weights or
        settings.

        Args:
            model_name: a bundled name, a folder, a hub id, or an encoder.
            revision: what the revision must be; None: whatever it is.
            device, settings: as `AutoRegEncoder.from_pretrained` has them.

        Raises:
            FileNotFoundError, ValueError: as `AutoRegEncoder.from_pretrained` has them, for settings beside a ready
                encoder, and for weights of another revision.
        """
        if isinstance(model_name, AutoRegEncoder):
            if settings or device is not None:
                raise ValueError(
                    "an encoder that is already loaded takes no settings: give its folder instead"
                )
            encoder, name = model_name, "encoder"
        else:
            encoder = AutoRegEncoder.from_pretrained(model_name, device=device or "auto", **settings)
            name = Path(model_name).resolve().name  # of "." too
        self.model = encoder
        own = _revision(encoder)
        if revision not in (None, own):
            raise ValueError(f"{model_name} is revision {own}, not {revision}: leave revision out")
        self.mteb_model_meta = _describe(encoder, name, own)

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,  # noqa: ARG002
        hf_split: str,  # noqa: ARG002
        hf_subset: str,  # noqa: ARG002
        prompt_type: PromptType | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        precision: str | None = None,
        **_: Any,  # noqa: ANN401
    ) -> np.ndarray:
        """Embed the "text" of all batches: float32 [n, dimension], unit rows.

        ValueError: a `precision` other than float32.
        """
        if precision not in (None, "float32"):
            raise ValueError(f"embeddings are float32, not {precision!r}: leave precision out")
        texts = [text for batch in inputs for text in batch["text"]]
        instruction = "next" if prompt_type == PromptType.query else "self"
        encoder: AutoRegEncoder = self.model
        return encoder.encode(texts, instruction, batch_size=batch_size, show_progress=show_progress_bar)


def _revision(encoder: AutoRegEncoder) -> str:
    """The fingerprint, and what was set that it does not cover: the number of vectors where not all are used, a dtype,
    quantization."""
    parts = [encoder.fingerprint]
    if encoder.num_tokens != encoder.num_compressed_tokens:
        parts.append(str(encoder.num_tokens))
    dtype = str(encoder._load_arguments.get("dtype", "auto")).removeprefix("torch.")
    parts += [] if dtype == "auto" else [dtype]
    quantize = encoder._load_arguments.get("quantize")
    parts += [] if quantize is None else [quantize]
    return "-".join(parts)


def _describe(encoder: AutoRegEncoder, name: str, revision: str) -> ModelMeta:
    facts = {
        "name": f"autoregembed/{name}",
        "revision": revision,
        "n_parameters": sum(parameter.numel() for parameter in encoder.model.parameters()),
        "max_tokens": encoder.max_text_tokens,
        "embed_dim": encoder.dimension,
        "open_weights": True,
        "framework": ["PyTorch"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": True,
    }
    return cast(ModelMeta, ModelMeta.create_empty(facts))
