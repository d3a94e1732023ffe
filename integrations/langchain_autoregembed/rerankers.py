"""AutoRegReranker: documents ranked by what the decoder makes of the query, for LangChain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict, Field, PrivateAttr, field_serializer

from autoregembed_rag.adapters import made_again, name_of

if TYPE_CHECKING:
    from autoregembed_rag.reranking import GenerativeReranker


class AutoRegReranker(BaseDocumentCompressor):
    """Rank documents by log p(document | query), which the checkpoint's own decoder gives, and by the retriever.

    For a `ContextualCompressionRetriever`, or called itself:

        reranker = AutoRegReranker(top_n=3, index=store.index)
        best = reranker.compress_documents(store.similarity_search(query, k=50), query)

    Each document that comes back is a copy with its score as `relevance_score` in the metadata, higher is better: the
    decoder's ranking and the order in which the documents came, fused by rank, or with `weight=None` the decoder's
    score in nats. The query is encoded once, documents go through the decoder in batches. With `index`, what
    does not depend on the query is kept there.

    Pickles hold the arguments: models are opened again by path, and the index to read. Dumps (`model_dump`) hold the
    names of models, not the index, and are refused where a ready encoder or decoder was given.

    Raises:
        FileNotFoundError: the model cannot be loaded, or its decoder; the message says how to name one.
        ValueError: that, or an argument that is wrong, which is said before anything is loaded.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: Any = Field(
        frozen=True, default="mini", description="A checkpoint by name or folder, or a ready AutoRegEncoder."
    )
    decoder: Any = Field(
        frozen=True, default=None, description="None: the decoder that the checkpoint names."
    )
    device: str = Field(
        frozen=True, default="auto", description='"cpu", "cuda", "cuda:1", ..., or the best one there is.'
    )
    dtype: str = Field(
        frozen=True, default="auto", description='"float32", "bfloat16", ..., or what the device does best.'
    )
    prior: str = Field(
        frozen=True, default="unconditional", description='"none", "document" or "unconditional".'
    )
    per_token: bool = Field(
        frozen=True, default=True, description="Mean over a document's tokens, or their sum."
    )
    weight: float | None = Field(
        frozen=True,
        default=0.25,
        ge=0,
        description="Of the decoder's ranking beside the retriever's; None: it alone.",
    )
    top_n: int | None = Field(default=3, ge=1, description="How many come back; None: all.")
    score_threshold: float | None = Field(
        default=None, description="Leaves out documents of a lower log-probability less its prior, in nats."
    )
    batch_size: int = Field(frozen=True, default=32, ge=1, description="Documents per forward pass.")
    index: Any = Field(
        frozen=True,
        default=None,
        exclude=True,
        description="The DocumentIndex where priors are kept; None: nowhere.",
    )

    _reranker: GenerativeReranker = PrivateAttr()

    @field_serializer("model", "decoder")
    def _model_as_text(self, model: Any) -> str | None:
        return name_of(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return made_again(self)

    def model_post_init(self, _context: Any, /) -> None:
        """Load encoder and decoder."""
        from autoregembed_rag.reranking import GenerativeReranker

        self._reranker = GenerativeReranker.from_pretrained(
            self.model,
            self.decoder,
            device=self.device,
            dtype=self.dtype,
            prior=self.prior,  # type: ignore[arg-type]
            per_token=self.per_token,
            weight=self.weight,
            batch_size=self.batch_size,
            cache=self.index,
        )

    @property
    def reranker(self) -> GenerativeReranker:
        """What ranks: its `priors(texts)` fills the index beforehand."""
        return self._reranker

    def compress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,  # noqa: ARG002
    ) -> list[Document]:
        """The best `top_n` documents, best first."""
        ranked = self._reranker.rank(
            query,
            [document.page_content for document in documents],
            top_n=self.top_n,
            score_threshold=self.score_threshold,
        )
        return [
            documents[place].model_copy(
                update={"metadata": {**documents[place].metadata, "relevance_score": score}}
            )
            for place, score in ranked
        ]
