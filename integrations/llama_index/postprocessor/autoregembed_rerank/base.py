"""AutoRegRerank: nodes ranked by what the decoder makes of the query, for LlamaIndex."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr, field_serializer
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from autoregembed_rag.adapters import made_again, name_of

if TYPE_CHECKING:
    from autoregembed_rag.reranking import GenerativeReranker

RETRIEVAL_SCORE = "retrieval_score"


class AutoRegRerank(BaseNodePostprocessor):
    """Rank nodes by log p(node | query), which the checkpoint's own decoder gives, and by the retriever.

        engine = index.as_query_engine(similarity_top_k=50, node_postprocessors=[AutoRegRerank(top_n=3)])

    A node's score becomes that of the decoder's ranking fused by rank with the order in which the nodes came, higher is
    better, or with `weight=None` the decoder's score in nats. The query is encoded once, nodes go through
    the decoder in batches, each with the metadata that LlamaIndex would embed. With `index`, a `DocumentIndex` such as
    `AutoRegVectorStore(...).client`, what does not depend on the query is kept there.

    Pickles hold the arguments: models are opened again by path, and the index to read. Dumps (`to_dict`, `to_json`)
    hold the names of models, not the index, and are refused where a ready encoder or decoder was given.

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
    per_token: bool = Field(frozen=True, default=True, description="Mean over a node's tokens, or their sum.")
    weight: float | None = Field(
        frozen=True,
        default=0.25,
        ge=0,
        description="Of the decoder's ranking beside the retriever's; None: it alone.",
    )
    top_n: int | None = Field(default=3, ge=1, description="How many come back; None: all.")
    score_threshold: float | None = Field(
        default=None, description="Leaves out nodes of a lower log-probability less its prior, in nats."
    )
    batch_size: int = Field(frozen=True, default=32, ge=1, description="Nodes per forward pass.")
    keep_retrieval_score: bool = Field(
        default=False,
        description='Keep the score that a node came with as "retrieval_score" in its metadata.',
    )
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

    @classmethod
    def class_name(cls) -> str:
        """The name LlamaIndex files this class under."""
        return "AutoRegRerank"

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
        """What ranks: its `priors(texts)` fills the index beforehand, with texts as nodes give them in
        MetadataMode.EMBED."""
        return self._reranker

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("AutoRegRerank ranks by a query: give query_bundle or query_str")
        if not nodes:
            return []
        with self.callback_manager.event(
            CBEventType.RERANKING,
            payload={
                EventPayload.NODES: nodes,
                EventPayload.MODEL_NAME: str(self.model),
                EventPayload.QUERY_STR: query_bundle.query_str,
                EventPayload.TOP_K: self.top_n,
            },
        ) as event:
            ranked = self._reranker.rank(
                query_bundle.query_str,
                [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes],
                top_n=self.top_n,
                score_threshold=self.score_threshold,
            )
            best = [self._scored(nodes[place], score) for place, score in ranked]
            event.on_end(payload={EventPayload.NODES: best})
        return best

    def _scored(self, node: NodeWithScore, score: float) -> NodeWithScore:
        if not self.keep_retrieval_score:
            return NodeWithScore(node=node.node, score=score)
        hidden = {
            name: [*getattr(node.node, name), RETRIEVAL_SCORE]
            for name in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys")
        }
        metadata = {**node.node.metadata, RETRIEVAL_SCORE: node.score}
        return NodeWithScore(node=node.node.model_copy(update={"metadata": metadata, **hidden}), score=score)
