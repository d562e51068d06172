"""Documents, and tiny models with windows as large as LangChain's own tests need them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_ctxcompress import ChatCtxCompress

from ctxcompress import Backbone, ContextCompressor

TEXTS = [
    "In 1928 Alexander Fleming discovered penicillin at St Mary's Hospital in London, by chance.",
    "Rome is the capital of Italy and lies on the Tiber. It was founded, they say, in 753 BC.",
    "Photosynthesis turns light into chemical energy; chlorophyll absorbs red and blue light.",
]


class FixedRetriever(BaseRetriever):
    """Finds the same documents for every question."""

    found: list[Document]

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        return self.found


class Recording:
    """A compressor that also keeps the prompts it makes."""

    def __init__(self, compressor: ContextCompressor) -> None:
        self._compressor = compressor
        self.prompts: list[Sequence[Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compressor, name)

    def prompt(self, turns: Sequence[Any]) -> Sequence[Any]:
        self.prompts.append(self._compressor.prompt(turns))
        return self.prompts[-1]


@pytest.fixture
def documents() -> list[Document]:
    """Three pages with ids and metadata."""
    return [
        Document(
            id=f"page-{place}",
            page_content=text,
            metadata={"source": f"{place}.txt", "nested": {"n": [place]}},
        )
        for place, text in enumerate(TEXTS)
    ]


@pytest.fixture
def retriever(documents: list[Document]) -> FixedRetriever:
    """Finds them, whatever is asked."""
    return FixedRetriever(found=documents)


@pytest.fixture(scope="session")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two models with the tiny one's weights and a window of 2,048 tokens."""
    home = tmp_path_factory.mktemp("models")
    for name in ("tiny-chat", "tiny-other"):
        shutil.copytree(tiny_model, home / name)
        config = json.loads((home / name / "config.json").read_text(encoding="utf-8"))
        # Its positions are rotary: nothing else depends on the window.
        config["max_position_embeddings"] = 2048
        (home / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return home


@pytest.fixture
def wide(models: Path, tiny_adapter: Path) -> ContextCompressor:
    """A compressor with an adapter, a large window, and a store of its own."""
    backbone = Backbone.from_pretrained(models / "tiny-chat", device="cpu")
    return ContextCompressor(backbone, adapter=tiny_adapter)


@pytest.fixture
def recording(wide: ContextCompressor) -> Recording:
    """The same, which keeps the prompts it makes."""
    return Recording(wide)


@pytest.fixture
def llm(recording: Recording) -> ChatCtxCompress:
    """A chat model around it, with short answers."""
    return ChatCtxCompress(compressor=recording, max_tokens=12)
