"""Fine-tuning from LlamaIndex: `AutoRegFinetuneEngine(nodes, output).finetune()`.

LlamaIndex' own base class, `BaseEmbeddingFinetuneEngine`, lives in llama-index-finetuning, which is no longer kept up
and installs the packages of several cloud services. Where it is installed the engine is a subclass; everywhere else it
has the same two methods.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from llama_index.core.schema import BaseNode, MetadataMode

from autoregembed_rag.finetuning.documents import Document, plain_document
from autoregembed_rag.finetuning.judged import Judged
from autoregembed_rag.finetuning.report import FinetuneReport
from autoregembed_rag.finetuning.run import FinetuneArguments, finetune
from llama_index.embeddings.autoregembed.base import AutoRegEmbedding

if TYPE_CHECKING:
    _Base = object
else:
    try:
        from llama_index.finetuning.types import BaseEmbeddingFinetuneEngine as _Base
    except ImportError:
        _Base = object

logger = logging.getLogger(__name__)


@runtime_checkable
class QADataset(Protocol):
    """Questions with the nodes that answer them, as LlamaIndex' `EmbeddingQAFinetuneDataset` holds them."""

    queries: Mapping[str, str]
    corpus: Mapping[str, str]
    relevant_docs: Mapping[str, Sequence[str]]


class AutoRegFinetuneEngine(_Base):
    """Fit an AutoRegEmbed model to documents, with or without questions, and measure whether it became better.

    Raises:
        TypeError: `dataset` is nothing that can be trained on.
    """

    def __init__(
        self,
        dataset: str | Path | Sequence[BaseNode] | QADataset,
        output: str | Path,
        model: str | Path = "mini",
        arguments: FinetuneArguments | None = None,
        *,
        device: str = "auto",
        announce: Callable[[str], object] = logger.info,
    ) -> None:
        """Name data, model and output; nothing is read yet.

        Args:
            dataset: LlamaIndex nodes or Documents (`title` in their metadata is the title), a path of documents as
                `autoregembed finetune` takes it, or an object with `queries`, `corpus` and `relevant_docs`.
            output: folder for the checkpoint and its report; an interrupted run goes on there.
            model: a checkpoint or base language model: a bundled name, a folder or a hub id.
            arguments: what to train and how long.
            device: "auto", "cpu", "cuda", "cuda:1", "mps"; of the finished model too.
            announce: is given the plan as text, before anything is trained.
        """
        self.source = _source(dataset)
        self.output = Path(output)
        self.model = model
        self.arguments = arguments
        self.device = device
        self.announce = announce
        self.report: FinetuneReport | None = None

    def finetune(self, **train_kwargs: Any) -> None:
        """Train and measure; `report` then holds what came of it. A warning says so if the model is not better.

        Raises:
            TypeError: keyword arguments, which the base class allows, are given: settings are `arguments`.
            ValueError, OSError, ImportError: as `autoregembed_rag.finetuning.run.finetune` does.
        """
        if train_kwargs:
            raise TypeError(
                f"finetune takes no {sorted(train_kwargs)}: give arguments=FinetuneArguments(...)"
            )
        self.report = finetune(
            self.source, self.output, self.model, self.arguments, device=self.device, announce=self.announce
        )
        if not self.report.better:
            logger.warning("the fine-tuned model is not better than %s:\n%s", self.model, self.report)

    def get_finetuned_model(self, **model_kwargs: Any) -> AutoRegEmbedding:
        """The embedding in `output`, better or not: `report.better` says which.

        Args:
            model_kwargs: as `AutoRegEmbedding` takes them.

        Raises:
            RuntimeError: `finetune` has not ended.
        """
        if self.report is None:
            raise RuntimeError("there is no fine-tuned model yet: call finetune() first")
        return AutoRegEmbedding(model=self.output, **{"device": self.device, **model_kwargs})


def _source(dataset: object) -> str | Path | list[Document] | Judged:
    if isinstance(dataset, str | Path):
        return dataset
    if isinstance(dataset, QADataset):
        relevant = {query: dict.fromkeys(found, 1) for query, found in dataset.relevant_docs.items()}
        return Judged(dataset.corpus, dataset.queries, relevant, {})
    if isinstance(dataset, Sequence) and all(isinstance(node, BaseNode) for node in dataset):
        return [document for document in map(_document, dataset) if document.sections]
    raise TypeError(
        f"dataset must be nodes or Documents, a path, or have queries, corpus and relevant_docs, not "
        f"{type(dataset).__name__}"
    )


def _document(node: BaseNode) -> Document:
    title = node.metadata.get("title", "")
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    return plain_document(node.node_id, title if isinstance(title, str) else "", text)
