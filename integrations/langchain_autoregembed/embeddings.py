"""AutoRegEmbeddings: queries and documents embedded under their own instructions, for LangChain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.embeddings import Embeddings
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from autoregembed_rag.adapters import load_encoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from autoregembed_rag import AutoRegEncoder


class AutoRegEmbeddings(BaseModel, Embeddings):
    """Embed queries under I_next ("what answers this?") and documents under I_self ("say this again").

    The same text has two vectors, one as a query and one as a document. LangChain's
    `CacheBackedEmbeddings` knows only the text, so `query_embedding_cache=True` returns a document's
    vector for a query. Leave it False (the default), or give queries a store of their own, and let the
    fingerprint keep encoders apart:

        CacheBackedEmbeddings.from_bytes_store(
            embeddings, document_store, namespace=embeddings.fingerprint, query_embedding_cache=query_store
        )

    Nothing here keeps vectors between calls. The async methods run in a thread.

    Raises:
        ImportError: PyTorch or transformers is missing.
        TypeError: `model` is neither a name, a folder, nor an encoder; a text is not a string.
        ValueError: an option is unknown, or given beside a ready encoder (pydantic's ValidationError).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Any = Field(
        default="mini",
        description="A bundled name, a checkpoint folder, a hub id, or a ready AutoRegEncoder.",
    )
    device: str | list[str] = Field(
        default="auto",
        description='"cpu", "cuda", "cuda:1", ..., a list of several, or the best one there is.',
    )
    dtype: str = Field(
        default="auto", description='"float32", "bfloat16", ..., or what the device does best.'
    )
    attn_implementation: str = Field(default="auto", description='"sdpa", "flash_attention_2", "eager".')
    query_instruction: str | None = Field(default=None, description="None: the checkpoint's I_next.")
    document_instruction: str | None = Field(default=None, description="None: the checkpoint's I_self.")
    num_tokens: int | None = Field(
        default=None, description="Keep the first j compressed vectors; None: all."
    )
    pooling: str | None = Field(default=None, description='"flatten" or "mean"; None: what is recorded.')
    quantize: str | None = Field(default=None, description='"int8" halves the memory of bfloat16 weights.')
    batch_size: int | None = Field(default=None, description="Texts per forward pass; None: the encoder's.")
    show_progress: bool = Field(default=False, description="A progress bar while documents are embedded.")

    _encoder: AutoRegEncoder = PrivateAttr()

    def model_post_init(self, _context: Any, /) -> None:
        """Load the encoder."""
        self._encoder = load_encoder(self.model, self)

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

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents under I_self: one unit vector of `dimension` floats per text, in input order."""
        vectors: list[list[float]] = self._embed_documents_array(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Embed one query under I_next: a unit vector of `dimension` floats."""
        vector: list[float] = self._embed_query_array(text).tolist()
        return vector

    def _embed_documents_array(self, texts: list[str]) -> NDArray[np.float32]:
        """float32 [n, dimension], without the detour through Python lists (AutoRegVectorStore uses it)."""
        return self._encoder.encode_documents(
            texts, batch_size=self.batch_size, show_progress=self.show_progress
        )

    def _embed_query_array(self, text: str) -> NDArray[np.float32]:
        """float32 [dimension]."""
        row: NDArray[np.float32] = self._encoder.encode_queries([text], batch_size=self.batch_size)[0]
        return row

    def _index_settings(self) -> dict[str, Any]:
        """What a new index records of the encoder."""
        flat = self._encoder.config.pooling == "flatten"
        return {
            "encoder": self.fingerprint,
            "dimension": self.dimension,
            "tokens": self._encoder.num_tokens if flat else None,
        }
