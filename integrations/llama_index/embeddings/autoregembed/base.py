"""AutoRegEmbedding: queries and documents embedded under their own instructions, for LlamaIndex."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import (
    ConfigDict,
    Field,
    PrivateAttr,
    field_serializer,
    field_validator,
)

from autoregembed_rag.adapters import load_encoder, made_again

if TYPE_CHECKING:
    from autoregembed_rag import AutoRegEncoder


class AutoRegEmbedding(BaseEmbedding):
    """Embed queries under I_next ("what answers this?") and documents under I_self ("say this again").

    The same text has two vectors, one as a query and one as a document. LlamaIndex's `embeddings_cache`
    files both under the text alone and would return one for the other, so it is refused here; the cache
    of an `IngestionPipeline` holds documents only and is safe.

    The async methods run in a thread and do not block the event loop.

    Raises:
        ImportError: PyTorch or transformers is missing.
        TypeError: `model` is neither a name, a folder, nor an encoder; a text is not a string.
        ValueError: an option is unknown or given beside a ready encoder, or `embeddings_cache` is given.
    """

    model_config = ConfigDict(extra="forbid")

    model: Any = Field(
        default="mini",
        frozen=True,
        description="A bundled name, a checkpoint folder, a hub id, or a ready AutoRegEncoder.",
    )
    device: str | list[str] = Field(
        default="auto",
        frozen=True,
        description='"cpu", "cuda", "cuda:1", ..., a list of several, or the best one there is.',
    )
    dtype: str = Field(
        default="auto", frozen=True, description='"float32", "bfloat16", ..., or what the device does best.'
    )
    attn_implementation: str = Field(
        default="auto", frozen=True, description='"sdpa", "flash_attention_2", "eager".'
    )
    query_instruction: str | None = Field(
        default=None, frozen=True, description="None: the checkpoint's I_next."
    )
    document_instruction: str | None = Field(
        default=None, frozen=True, description="None: the checkpoint's I_self."
    )
    num_tokens: int | None = Field(
        default=None, frozen=True, description="Keep the first j compressed vectors; None: all."
    )
    pooling: str | None = Field(
        default=None, frozen=True, description='"flatten" or "mean"; None: what is recorded.'
    )
    quantize: str | None = Field(
        default=None, frozen=True, description='"int8" halves the memory of bfloat16 weights.'
    )
    batch_size: int | None = Field(
        default=None, gt=0, description="Texts per forward pass; None: the encoder's."
    )
    # The encoder sorts what it is given by length, so it is given more than one forward pass needs.
    embed_batch_size: int = Field(
        default=512, gt=0, le=2048, description="Texts that LlamaIndex hands over in one call."
    )
    embeddings_cache: Any | None = Field(default=None, frozen=True, description="Always None.")

    _encoder: AutoRegEncoder = PrivateAttr()

    @classmethod
    def class_name(cls) -> str:
        """The name LlamaIndex files this class under."""
        return "AutoRegEmbedding"

    @field_validator("embeddings_cache")
    @classmethod
    def _refuse_cache(cls, cache: Any) -> None:
        if cache is not None:
            raise ValueError(
                "AutoRegEmbedding takes no embeddings_cache: LlamaIndex files a query and a document of the "
                "same text under one key, and their vectors differ. Use the cache of an IngestionPipeline, "
                "which holds documents only"
            )

    @field_serializer("model")
    def _model_as_text(self, model: Any) -> str:
        return str(model) if isinstance(model, str | Path) else repr(model)

    @field_serializer("model_name")
    def _name_with_weights(self, name: str) -> str:
        # The cache of an IngestionPipeline goes by the dumped fields, which must change with the weights.
        return f"{name} {self.fingerprint}"

    def __reduce__(self) -> tuple[Any, ...]:
        # The base class drops what does not pickle, and an unsaved encoder came back as the default model.
        return made_again(self)

    def model_post_init(self, _context: Any, /) -> None:
        """Load the encoder."""
        self._encoder = load_encoder(self.model, self)
        self.model_name = self._model_as_text(self.model)

    @property
    def encoder(self) -> AutoRegEncoder:
        """The encoder behind the embeddings."""
        return self._encoder

    @property
    def dimension(self) -> int:
        """Length of every vector."""
        return self._encoder.dimension

    @property
    def fingerprint(self) -> str:
        """What an index records, so that another encoder's vectors are never mixed in."""
        return self._encoder.fingerprint

    def _get_query_embedding(self, query: str) -> list[float]:
        vector: list[float] = self._encoder.encode_queries([query], batch_size=self.batch_size)[0].tolist()
        return vector

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._encoder.encode_documents(
            texts, batch_size=self.batch_size
        ).tolist()
        return vectors

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

    async def aget_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[list[float]]:
        """Embed documents in a thread, `embed_batch_size` at a time.

        The base class starts all batches at once, which on one device is no faster and takes their memory
        at once; so `num_workers` has no effect here.
        """
        return await asyncio.to_thread(self.get_text_embedding_batch, texts, show_progress, **kwargs)
