"""LangChain's standard integration tests, offline: the model is a tiny random one in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models import BaseChatModel
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_ctxcompress import ChatCtxCompress, CtxCompressRetriever
from langchain_tests.integration_tests import ChatModelIntegrationTests, RetrieversIntegrationTests

from ctxcompress import ContextCompressor

pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")


class TestChatCtxCompress(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _beside_the_models(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(models)

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatCtxCompress

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "tiny-chat", "device": "cpu"}

    @property
    def model_override_value(self) -> str:
        return "tiny-other"

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False


class TestCtxCompressRetriever(RetrieversIntegrationTests):
    mode = "text"

    @pytest.fixture(autouse=True)
    def _inner(self, wide: ContextCompressor) -> None:
        vectors = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
        vectors.add_documents([Document(f"Page {place} is about owls.") for place in range(9)])
        self._params = {"retriever": vectors.as_retriever(), "compressor": wide}

    @property
    def retriever_constructor(self) -> Callable[..., CtxCompressRetriever]:
        return CtxCompressRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {**self._params, "mode": self.mode, "compression_ratio": 2}

    @property
    def retriever_query_example(self) -> str:
        return "What are owls?"


class TestCtxCompressRetrieverWithSoftTokens(TestCtxCompressRetriever):
    mode = "soft"
