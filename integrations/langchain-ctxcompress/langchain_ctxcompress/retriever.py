"""A retriever around a retriever: what the inner one finds, each document as short as it is worth."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, RetrieverLike
from pydantic import Field

from langchain_ctxcompress.compressor import CtxCompressor


class CtxCompressRetriever(CtxCompressor, BaseRetriever):
    """Retrieves with another retriever and shortens what it found, with the settings of `CtxCompressor`.

    The inner retriever's runs are children of this one's; nothing found is nothing returned.

    Args:
        retriever: anything that takes a question and returns documents.
        k: how many documents to ask it for, as its keyword argument `k`; None leaves that to it. All keyword
            arguments of `invoke` are passed on to it, `k` among them.

    Example:
        ```python
        retriever = CtxCompressRetriever(retriever=vectors.as_retriever(), compression_ratio=4)
        documents = retriever.invoke("Who discovered penicillin?")
        ```
    """

    retriever: RetrieverLike
    k: int | None = Field(default=None, ge=1)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        found = self.retriever.invoke(
            query, config={"callbacks": run_manager.get_child()}, **self._asked(kwargs)
        )
        return self.compress_documents(found, query)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        found = await self.retriever.ainvoke(
            query, config={"callbacks": run_manager.get_child()}, **self._asked(kwargs)
        )
        return [*await self.acompress_documents(found, query)] if found else []

    def _asked(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs if self.k is None else {"k": self.k, **kwargs}
