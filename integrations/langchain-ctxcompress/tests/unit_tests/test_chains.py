"""Retrievers, chains and other people's chains, from a question to an answer from soft tokens."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models.fake_chat_models import FakeListChatModel, ParrotFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.tracers.context import collect_runs
from langchain_ctxcompress import (
    ChatCtxCompress,
    CtxCompressor,
    CtxCompressRetriever,
    SoftContextPrompt,
    create_soft_rag_chain,
)
from pydantic import ValidationError

from ctxcompress import ConfigError, ContextCompressor

QUESTION = "Who discovered penicillin?"
TEMPLATE = "Context:\n{context}\n\nQuestion: {input}\nGive a short answer taken from the context."


class Asked(BaseRetriever):
    """Finds one page, and keeps what it was asked and from where."""

    asked: list[Any]

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        self.asked.append((query, kwargs, run_manager.parent_run_id))
        return [Document("In 1928 Alexander Fleming discovered penicillin in London.")]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        self.asked.append((query, kwargs, asyncio.get_running_loop()))
        return [Document("In 1928 Alexander Fleming discovered penicillin in London.")]


async def test_a_retriever_around_a_retriever(wide: ContextCompressor) -> None:
    inner = Asked(asked=[])
    short = CtxCompressRetriever(retriever=inner, compressor=wide, compression_ratio=2, k=4)
    expected = CtxCompressor(compressor=wide, compression_ratio=2).compress_documents(
        inner.invoke(QUESTION), QUESTION
    )
    inner.asked.clear()
    with collect_runs() as collected:
        assert short.invoke(QUESTION) == expected
        assert await short.ainvoke(QUESTION, k=7, other="x") == expected
    outer, _ = collected.traced_runs
    assert inner.asked == [
        (QUESTION, {"k": 4}, outer.id),
        (QUESTION, {"k": 7, "other": "x"}, asyncio.get_running_loop()),
    ]
    assert [run.name for run in outer.child_runs] == ["Asked"]


async def test_nothing_found_is_nothing_returned() -> None:
    nothing = CtxCompressRetriever(retriever=RunnableLambda(lambda _: []), model="no/such/model", budget=5)
    assert nothing.invoke(QUESTION) == await nothing.ainvoke(QUESTION) == []


def test_a_retriever_checks_its_settings(retriever: BaseRetriever) -> None:
    with pytest.raises(ValidationError, match="got neither"):
        CtxCompressRetriever(retriever=retriever)
    with pytest.raises(ValidationError, match="ratio"):
        CtxCompressRetriever(retriever=retriever, ratio=4)
    with pytest.raises(ValidationError, match="frozen"):
        CtxCompressRetriever(retriever=retriever, budget=4).budget = 5


async def test_the_chain_answers_from_soft_tokens(
    wide: ContextCompressor, llm: ChatCtxCompress, retriever: BaseRetriever, documents: list[Document]
) -> None:
    chain = create_soft_rag_chain(retriever, llm, compression_ratio=3)
    texts = [document.page_content for document in documents]
    result = wide.compress(texts, QUESTION, compression_ratio=3, mode="soft")
    done = chain.invoke({"input": QUESTION, "other": 1})
    assert {**done, "context": None} == {
        "input": QUESTION,
        "other": 1,
        "context": None,
        "answer": wide.answer(result, max_new_tokens=12).text,
    }
    assert [document.id for document in done["context"]] == ["page-0", "page-1", "page-2"]
    assert [document.page_content for document in done["context"]] == texts
    assert sum(d.metadata["ctxcompress"]["tokens_after"] for d in done["context"]) == result.tokens_after
    del done["other"]
    assert await chain.ainvoke({"input": QUESTION}) == done
    assert chain.batch([{"input": QUESTION}] * 2) == [done, done]
    for chunks in (
        list(chain.stream({"input": QUESTION})),
        [chunk async for chunk in chain.astream({"input": QUESTION})],
    ):
        pieces = [chunk["answer"] for chunk in chunks if "answer" in chunk]
        assert len(pieces) > 2
        assert "".join(pieces) == done["answer"]
        assert {key for chunk in chunks for key in chunk} == {"input", "context", "answer"}


def test_the_chain_takes_what_its_links_take(
    recording: Any, llm: ChatCtxCompress, documents: list[Document]
) -> None:
    found = RunnableLambda(lambda values: documents[: values["most"]])
    prompt = SoftContextPrompt(question_key="input", system="Be brief.")
    settings = {"budget": 20, "allocator": "uniform", "allow_drop": True}
    chain = create_soft_rag_chain(found, llm.bind(seed=1).with_retry(), prompt=prompt, **settings)
    history = [HumanMessage("Hi."), AIMessage("Hello.")]
    done = chain.invoke({"input": QUESTION, "most": 2, "chat_history": history})
    assert len(done["context"]) == 2
    reply = llm.invoke([*prompt.invoke({**done, "question": QUESTION})], seed=1)
    assert done["answer"] == reply.text
    assert recording.prompts[0] == recording.prompts[1]
    with pytest.raises(ConfigError, match="only ChatCtxCompress reads soft tokens, got FakeListChatModel"):
        create_soft_rag_chain(found, FakeListChatModel(responses=["x"]), budget=20)
    with pytest.raises(ValidationError, match="got neither"):
        create_soft_rag_chain(found, llm)


async def test_fifty_questions_at_once_keep_their_documents(llm: ChatCtxCompress) -> None:
    def pages(question: str) -> list[Document]:
        return [Document(f"{question} Page {page} has {len(question) * page} owls.") for page in range(3)]

    chain = create_soft_rag_chain(RunnableLambda(lambda values: pages(values["input"])), llm, budget=20)
    questions = [f"How many owls has the {place}th forest?" for place in range(50)]
    done = await asyncio.gather(*(chain.ainvoke({"input": question}) for question in questions))
    for question, own in zip(questions, done, strict=True):
        assert own["input"] == question
        assert [document.page_content for document in own["context"]] == [
            document.page_content for document in pages(question)
        ]
    assert [own["answer"] for own in done[::10]] == [
        chain.invoke({"input": question})["answer"] for question in questions[::10]
    ]


def ids(prompt: Any) -> list[Any]:
    """A prompt as token ids and the values of soft tokens."""
    return [part if isinstance(part, tuple) else part.embeddings_MD.tolist() for part in prompt]


@pytest.mark.parametrize("around", [CtxCompressRetriever, ContextualCompressionRetriever])
async def test_chains_that_stuff_text_carry_placeholders(
    recording: Any, documents: list[Document], retriever: BaseRetriever, around: Any
) -> None:
    node = CtxCompressor(compressor=recording, budget=30, mode="soft", placeholders=True)
    found = (
        ContextualCompressionRetriever(base_compressor=node, base_retriever=retriever)
        if around is ContextualCompressionRetriever
        else CtxCompressRetriever(retriever=retriever, **dict(node))
    )
    llm = ChatCtxCompress(compressor=recording, max_tokens=8, placeholders=True)
    stuff = create_stuff_documents_chain(llm, ChatPromptTemplate.from_template(TEMPLATE))
    chain = create_retrieval_chain(found, stuff)
    done = chain.invoke({"input": QUESTION})
    assert all(document.page_content.startswith("[[ctx:") for document in done["context"])
    prompt = SoftContextPrompt(question_key="input", order="original")
    structured = llm.invoke(prompt.invoke({"context": done["context"], "input": QUESTION}))
    first, second = recording.prompts
    assert ids(first) == ids(second)
    assert any(not isinstance(part, tuple) for part in first)
    assert done["answer"] == structured.text
    assert (await chain.ainvoke({"input": QUESTION}))["answer"] == structured.text
    streamed = [chunk["answer"] for chunk in chain.stream({"input": QUESTION}) if "answer" in chunk]
    assert "".join(streamed) == structured.text


def test_a_plain_model_sees_the_original_text(
    wide: ContextCompressor, retriever: BaseRetriever, documents: list[Document]
) -> None:
    found = CtxCompressRetriever(retriever=retriever, compressor=wide, compression_ratio=4, mode="soft")
    stuff = create_stuff_documents_chain(ParrotFakeChatModel(), ChatPromptTemplate.from_template("{context}"))
    answer = create_retrieval_chain(found, stuff).invoke({"input": QUESTION})["answer"]
    assert answer == "\n\n".join(document.page_content for document in documents)


async def test_links_of_a_chain_on_the_core_alone(
    wide: ContextCompressor, llm: ChatCtxCompress, retriever: BaseRetriever
) -> None:
    node = CtxCompressor(compressor=wide, compression_ratio=3, mode="soft").as_runnable()
    found = {"context": retriever, "question": RunnablePassthrough()}
    chain = found | node | SoftContextPrompt() | llm | StrOutputParser()
    expected = create_soft_rag_chain(retriever, llm, compression_ratio=3).invoke({"input": QUESTION})
    assert chain.invoke(QUESTION) == expected["answer"]
    assert await chain.ainvoke(QUESTION) == expected["answer"]
    assert "".join(chain.stream(QUESTION)) == expected["answer"]


def test_traces_of_a_chain_are_plain(llm: ChatCtxCompress, retriever: BaseRetriever) -> None:
    chain = create_soft_rag_chain(retriever, llm, compression_ratio=3)
    with collect_runs() as collected:
        done = chain.invoke({"input": QUESTION})
    runs = [collected.traced_runs[0]]
    for run in runs:
        runs += run.child_runs
    kinds = {run.run_type for run in runs}
    assert {"chain", "retriever", "prompt", "llm"} <= kinds
    text = json.dumps([[run.inputs, run.outputs] for run in runs], default=lambda value: value.model_dump())
    assert "tensor" not in text
    assert all(document.metadata["ctxcompress"]["ref"] in text for document in done["context"])
