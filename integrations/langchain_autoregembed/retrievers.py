"""AutoRegRetriever: LangChain's vector store retriever, with hybrid search."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStoreRetriever
from pydantic import Field, model_validator


class AutoRegRetriever(VectorStoreRetriever):
    """What `AutoRegVectorStore.as_retriever` returns: a query in, documents out, best first.

    `search_type` says how: "similarity" (the default), "similarity_score_threshold", "mmr", or "hybrid", by
    vectors and words at once. `search_kwargs` are the arguments of that search, those given to `invoke` beside
    the query override them, and `k` is short for search_kwargs={"k": k}. The async methods run in a thread.

        retriever = store.as_retriever(search_type="hybrid", search_kwargs={"k": 5, "weights": (1.0, 0.5)})
        retriever.invoke("Who wrote Faust?", filter={"year": {"$gte": 1800}})

    Raises ValueError (pydantic's ValidationError) for another search type, naming those that exist, for a
    score threshold that is missing or no float, and for options that are unknown or given twice.
    """

    allowed_search_types: ClassVar[Collection[str]] = (*VectorStoreRetriever.allowed_search_types, "hybrid")

    k: int | None = Field(default=None, ge=1, description="How many documents; None: the search's default.")

    @model_validator(mode="before")
    @classmethod
    def validate_options(cls, values: dict[str, Any]) -> Any:
        """Refuse what LangChain's own retriever ignores, such as a filter outside `search_kwargs`."""
        if unknown := sorted(values.keys() - cls.model_fields.keys()):
            raise ValueError(f"unknown options {unknown}: what a search takes goes into search_kwargs")
        if values.get("k") is not None and "k" in values.get("search_kwargs", {}):
            raise ValueError("k is given twice, by itself and in search_kwargs; give it once")
        return values

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002
        **kwargs: Any,
    ) -> list[Document]:
        return self.vectorstore.search(query, self.search_type, **self._options(kwargs))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,  # noqa: ARG002
        **kwargs: Any,
    ) -> list[Document]:
        return await self.vectorstore.asearch(query, self.search_type, **self._options(kwargs))

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        own = {} if self.k is None else {"k": self.k}
        return own | self.search_kwargs | given
