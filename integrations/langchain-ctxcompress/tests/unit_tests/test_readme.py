"""What the README shows is what runs here."""

from __future__ import annotations

import difflib
import functools
import re
from pathlib import Path
from typing import Any

import langchain_ctxcompress
import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models.fake_chat_models import ParrotFakeChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_ctxcompress import ChatCtxCompress, CtxCompressor, CtxCompressRetriever

from ctxcompress import SoftTokens

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BEFORE = """\
retriever = vectors.as_retriever()
llm = init_chat_model("openai:gpt-4.1-mini")
prompt = ChatPromptTemplate.from_template("Context:\\n{context}\\n\\nQuestion: {input}")
chain = create_retrieval_chain(retriever, create_stuff_documents_chain(llm, prompt))
answer = chain.invoke({"input": "Who discovered penicillin?"})["answer"]
""".splitlines()
AFTER = """\
retriever = CtxCompressRetriever(retriever=vectors.as_retriever(), budget=500, mode="soft", placeholders=True)
llm = ChatCtxCompress(placeholders=True)
prompt = ChatPromptTemplate.from_template("Context:\\n{context}\\n\\nQuestion: {input}")
chain = create_retrieval_chain(retriever, create_stuff_documents_chain(llm, prompt))
answer = chain.invoke({"input": "Who discovered penicillin?"})["answer"]
""".splitlines()


@pytest.fixture
def names(recording: Any, documents: list[Document]) -> dict[str, Any]:
    """What the README's code takes for given: a vector store with pages, and our classes on a tiny model."""
    vectors = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    vectors.add_documents(documents)
    small = {"compressor": recording, "max_tokens": 8}
    return {
        **vars(langchain_ctxcompress),
        "CtxCompressor": functools.partial(CtxCompressor, compressor=recording),
        "CtxCompressRetriever": functools.partial(CtxCompressRetriever, compressor=recording),
        "ChatCtxCompress": functools.partial(ChatCtxCompress, **small),
        "ChatPromptTemplate": ChatPromptTemplate,
        "ContextualCompressionRetriever": ContextualCompressionRetriever,
        "RunnablePassthrough": RunnablePassthrough,
        "StrOutputParser": StrOutputParser,
        "create_retrieval_chain": create_retrieval_chain,
        "create_stuff_documents_chain": create_stuff_documents_chain,
        "any_llm": ParrotFakeChatModel(),
        "init_chat_model": lambda name: ParrotFakeChatModel(),
        "prompt": ChatPromptTemplate.from_template("{context}\n\nQuestion: {question}"),
        "retriever": vectors.as_retriever(),
        "vectors": vectors,
    }


def test_two_lines_of_five_change(names: dict[str, Any], recording: Any) -> None:
    changed = [place for place, lines in enumerate(zip(BEFORE, AFTER, strict=True)) if len({*lines}) > 1]
    assert (len(BEFORE), len(changed)) == (5, 2)
    exec("\n".join(BEFORE), names)
    assert "Alexander Fleming" in names["answer"]
    assert not recording.prompts
    exec("\n".join(AFTER).replace("budget=500", "budget=30"), names)
    assert names["answer"]
    assert any(isinstance(part, SoftTokens) for part in recording.prompts[0])


def test_the_readme_shows_these_lines() -> None:
    (shown,) = re.findall(r"```diff\n(.*?)```", README, flags=re.DOTALL)
    _, _, _, *lines = difflib.unified_diff(BEFORE, AFTER, lineterm="")
    assert shown.splitlines() == lines


def test_the_readme_runs(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    assert names["done"]["answer"] == capsys.readouterr().out
    assert names["documents"][0].metadata["ctxcompress"]["tokens_after"]
