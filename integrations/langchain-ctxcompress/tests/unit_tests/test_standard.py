"""LangChain's standard unit tests, on a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_ctxcompress import ChatCtxCompress
from langchain_tests.unit_tests import ChatModelUnitTests


class TestChatCtxCompress(ChatModelUnitTests):
    @pytest.fixture(autouse=True)
    def _beside_the_models(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # A relative name, which is the same in every snapshot.
        monkeypatch.chdir(models)

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatCtxCompress

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "tiny-chat", "device": "cpu"}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"CTXCOMPRESS_API_KEY": "test"}, {"base_url": "http://localhost:8000"}, {"api_key": "test"}
