"""`CtxCompressor` inside real LangChain objects, on a tiny random model and with fake chat models."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args, get_type_hints

import langchain_ctxcompress
import numpy as np
import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.language_models.fake_chat_models import ParrotFakeChatModel
from langchain_core.load import dumpd, dumps
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough
from langchain_ctxcompress import CtxCompressor
from pydantic import ValidationError

from ctxcompress import AllocatorName, ConfigError, ContextCompressor, InputError, placeholder

QUESTION = "Who discovered penicillin?"
TEXTS = [
    "In 1928 Alexander Fleming discovered penicillin at St Mary's Hospital in London, by chance.",
    "Rome is the capital of Italy and lies on the Tiber. It was founded, they say, in 753 BC.",
    "Photosynthesis turns light into chemical energy; chlorophyll absorbs red and blue light.",
]
ACCOUNT = {"tokens_before", "tokens_after", "ratio", "budget", "score", "share", "rank", "chunks", "mode"}


class Titled(Document):
    """What a careless library might return: a subclass, which does not survive LangChain's serialisation."""

    title: str = ""


def tokens_after(documents: list[Document]) -> int:
    return sum(document.metadata["ctxcompress"]["tokens_after"] for document in documents)


def shares(documents: list[Document]) -> list[float]:
    return [document.metadata["ctxcompress"]["share"] for document in documents]


def test_the_public_names() -> None:
    assert langchain_ctxcompress.__all__ == [
        "ChatCtxCompress",
        "CtxCompressRetriever",
        "CtxCompressor",
        "SoftContextPrompt",
        "create_soft_rag_chain",
    ]


def test_import_and_construction_load_no_model_library() -> None:
    code = """if True:
        import sys
        from langchain_core.runnables import RunnableLambda
        from langchain_ctxcompress import *
        CtxCompressor(budget=9).as_runnable()
        inner, llm = RunnableLambda(list), ChatCtxCompress(base_url="http://localhost:1", adapter="no/such")
        CtxCompressRetriever(retriever=inner, budget=9, mode="soft")
        create_soft_rag_chain(inner, llm, budget=9, prompt=SoftContextPrompt(question_key="input"))
        heavy = {"torch", "transformers", "safetensors", "langchain_classic", "langchain_community", "numpy"}
        print(heavy & set(sys.modules) or "light")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "light"


def test_each_document_keeps_its_place_id_and_metadata(
    compressor: ContextCompressor, documents: list[Document]
) -> None:
    short = CtxCompressor(compressor=compressor, compression_ratio=2).compress_documents(documents, QUESTION)
    assert [document.id for document in short] == ["page-0", "page-1", "page-2"]
    for before, after in zip(documents, short, strict=True):
        account = after.metadata["ctxcompress"]
        assert after.metadata == {**before.metadata, "ctxcompress": account}
        assert account.keys() == ACCOUNT
        assert account["tokens_before"] == compressor.backbone.count(before.page_content)
        assert account["tokens_after"] == compressor.backbone.count(after.page_content) <= account["budget"]
        assert account["ratio"] == account["tokens_before"] / account["tokens_after"] >= 1
        assert set(re.findall(r"\w+", after.page_content)) <= set(re.findall(r"\w+", before.page_content))
    assert sum(shares(short)) == pytest.approx(1)
    assert sorted(document.metadata["ctxcompress"]["rank"] for document in short) == [1, 2, 3]


def test_without_scores_the_place_counts_as_one(
    compressor: ContextCompressor, documents: list[Document]
) -> None:
    settings = CtxCompressor(compressor=compressor, compression_ratio=2)
    placed = [{"text": text, "score": -place} for place, text in enumerate(TEXTS)]
    expected = compressor.compress(placed, QUESTION, compression_ratio=2)
    assert expected.prior == "retriever"
    short = settings.compress_documents(documents, QUESTION)
    assert shares(short) == [document.share for document in expected.documents]
    assert all(document.metadata["ctxcompress"]["score"] is None for document in short)
    turned = settings.compress_documents(documents[::-1], QUESTION)
    assert shares(turned)[::-1] != shares(short)


@pytest.mark.parametrize("query", [QUESTION, "Where is the Tiber?"])
def test_the_texts_are_those_of_the_library(
    compressor: ContextCompressor, documents: list[Document], query: str
) -> None:
    settings = CtxCompressor(compressor=compressor, compression_ratio=2, ranked=False)
    expected = compressor.compress(TEXTS, query, compression_ratio=2).documents
    short = settings.compress_documents(documents, query)
    assert [document.page_content for document in short] == [document.text for document in expected]
    assert shares(short) == [document.share for document in expected]


def test_the_callers_documents_stay_as_they_were(
    compressor: ContextCompressor, documents: list[Document]
) -> None:
    before = copy.deepcopy(documents)
    short = CtxCompressor(compressor=compressor, compression_ratio=3).compress_documents(documents, QUESTION)
    for document in short:
        document.metadata["added"] = True
    assert documents == before


@pytest.mark.parametrize("budget", [3, 10, 41, 60])
def test_a_budget_is_never_exceeded(
    compressor: ContextCompressor, documents: list[Document], budget: int
) -> None:
    short = CtxCompressor(compressor=compressor, budget=budget).compress_documents(documents, QUESTION)
    assert 0 < tokens_after(short) <= budget


@pytest.mark.parametrize("ratio", [1, 1.5, 4])
def test_a_ratio_is_reached(compressor: ContextCompressor, documents: list[Document], ratio: float) -> None:
    short = CtxCompressor(compressor=compressor, compression_ratio=ratio).compress_documents(
        documents, QUESTION
    )
    assert tokens_after(short) * ratio <= sum(compressor.backbone.count(text) for text in TEXTS)
    assert [document.page_content for document in short] == TEXTS or ratio > 1


def test_a_document_without_any_text_left_is_returned(
    compressor: ContextCompressor, documents: list[Document]
) -> None:
    settings = CtxCompressor(compressor=compressor, budget=2, allow_drop=True, allocator="random")
    short = settings.compress_documents(documents, QUESTION)
    assert [document.id for document in short] == ["page-0", "page-1", "page-2"]
    empty = [document.metadata["ctxcompress"] for document in short if not document.page_content]
    assert empty
    assert all(account["tokens_after"] == 0 and account["ratio"] is None for account in empty)


def test_no_documents_need_no_model() -> None:
    assert CtxCompressor(model="no such model", budget=5).compress_documents([], "") == []


@pytest.mark.parametrize("ids", [[None, None, None], ["same", "same", "other"], ["1", None, "0"]])
def test_missing_and_repeated_ids(
    compressor: ContextCompressor, documents: list[Document], ids: list[str | None]
) -> None:
    renamed = [
        document.model_copy(update={"id": name}) for document, name in zip(documents, ids, strict=True)
    ]
    settings = CtxCompressor(compressor=compressor, compression_ratio=3)
    short = settings.compress_documents(renamed, QUESTION)
    assert [document.id for document in short] == ids
    expected = settings.compress_documents(documents, QUESTION)
    assert [document.page_content for document in short] == [document.page_content for document in expected]


def test_results_are_plain_documents_that_serialise(
    compressor: ContextCompressor, documents: list[Document]
) -> None:
    documents[0] = Titled(**{**documents[0].model_dump(), "title": "Penicillin"})
    for document, score in zip(documents, np.array([0.9, 0.2, 0.1], dtype=np.float32), strict=True):
        document.metadata["score"] = score
    settings = CtxCompressor(compressor=compressor, compression_ratio=3, score_key="score")
    for document in settings.compress_documents(documents, QUESTION):
        assert type(document) is Document
        json.dumps(document.metadata["ctxcompress"])
        document.metadata.pop("score")  # the caller's own numpy scalar
        written = json.loads(dumps(document))
        assert written == dumpd(document)
        assert written["id"] == ["langchain", "schema", "document", "Document"]
        assert Document(**written["kwargs"]) == document


def test_scores_take_part_when_every_document_has_one(
    compressor: ContextCompressor, documents: list[Document]
) -> None:
    plain = CtxCompressor(compressor=compressor, compression_ratio=3)
    scored = CtxCompressor(compressor=compressor, compression_ratio=3, score_key="relevance_score")
    unweighed = shares(plain.compress_documents(documents, QUESTION))
    for document, score in zip(documents, [0.1, 0.2, 0.9], strict=True):
        document.metadata["relevance_score"] = score
    assert shares(plain.compress_documents(documents, QUESTION)) == unweighed
    short = scored.compress_documents(documents, QUESTION)
    assert [document.metadata["ctxcompress"]["score"] for document in short] == [0.1, 0.2, 0.9]
    assert shares(short)[2] > unweighed[2]
    del documents[1].metadata["relevance_score"]
    short = scored.compress_documents(documents, QUESTION)
    assert [document.metadata["ctxcompress"]["score"] for document in short] == [0.1, None, 0.9]
    assert shares(short) == unweighed


def test_a_score_that_is_no_number_is_refused(
    compressor: ContextCompressor, documents: list[Document]
) -> None:
    documents[0].metadata["score"] = "high"
    settings = CtxCompressor(compressor=compressor, budget=20, score_key="score")
    with pytest.raises(InputError, match="must be a number, got 'high'"):
        settings.compress_documents(documents, QUESTION)


def test_a_question_is_asked_for_where_the_allocator_needs_one(
    compressor: ContextCompressor, documents: list[Document]
) -> None:
    with pytest.raises(InputError, match="needs a query"):
        CtxCompressor(compressor=compressor, budget=20).compress_documents(documents, "")
    uniform = CtxCompressor(compressor=compressor, budget=20, allocator="uniform")
    assert tokens_after(uniform.compress_documents(documents, "")) <= 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "got neither"),
        ({"budget": 5, "compression_ratio": 2}, "got both"),
        ({"budget": 0}, "budget"),
        ({"compression_ratio": 0.25}, "compression_ratio"),
        ({"compression_ratio": float("inf")}, "compression_ratio"),
        ({"budget": 5, "ratio": 4}, "ratio"),
        ({"budget": 5, "allocator": "best"}, "allocator"),
        ({"budget": 5, "mode": "auto"}, "mode"),
        ({"budget": 5, "placeholders": True}, "placeholders stand for soft tokens, got mode='text'"),
        ({"budget": 5, "compressor": "embedded"}, "must be a ctxcompress.ContextCompressor, got str"),
    ],
)
def test_bad_settings_fail_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CtxCompressor(**settings)


def test_choices_are_those_of_the_library() -> None:
    library = get_type_hints(ContextCompressor.compress)
    fields = CtxCompressor.model_fields
    assert fields["allocator"].annotation == library["allocator"]
    assert {*get_args(fields["mode"].annotation)} <= {*get_args(library["mode"])}


def test_settings_are_frozen_and_copies_share_the_model(
    compressor: ContextCompressor, documents: list[Document]
) -> None:
    settings = CtxCompressor(compressor=compressor, budget=30)
    with pytest.raises(ValidationError, match="frozen"):
        settings.budget = 10
    smaller = settings.model_copy(update={"budget": 10})
    assert smaller.compressor is compressor
    assert tokens_after(smaller.compress_documents(documents, QUESTION)) <= 10
    unloaded = CtxCompressor(budget=30)
    assert pickle.loads(pickle.dumps(unloaded)) == copy.deepcopy(unloaded) == unloaded


def test_the_model_is_loaded_once_and_not_before_it_is_needed(
    tiny_model: Path, documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of its own: compressors are shared by a whole process, other tests too.
    model = shutil.copytree(tiny_model, tmp_path / "model")
    loaded: list[tuple[str, Any]] = []
    load = ContextCompressor.from_pretrained

    def counted(name: str, **settings: Any) -> ContextCompressor:
        loaded.append((name, settings["device"]))
        time.sleep(0.05)  # long enough for the other threads to arrive
        return load(name, **settings)

    monkeypatch.setattr(ContextCompressor, "from_pretrained", counted)
    settings = CtxCompressor(model=str(model), device="cpu", budget=20)
    assert loaded == []
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: settings.compress_documents(documents, QUESTION), range(4)))
    assert loaded == [(str(model), "cpu")]
    assert all(result == results[0] for result in results)


async def test_async_gives_the_same(compressor: ContextCompressor, documents: list[Document]) -> None:
    settings = CtxCompressor(compressor=compressor, compression_ratio=3)
    expected = settings.compress_documents(documents, QUESTION, callbacks=[])
    assert await settings.acompress_documents(documents, QUESTION, callbacks=[]) == expected


async def test_async_leaves_the_event_loop_free(
    compressor: ContextCompressor, documents: list[Document]
) -> None:
    opened = threading.Event()

    class Gate:
        """A compressor that starts only when the event loop, still running, lets it."""

        backbone = compressor.backbone

        def compress(self, *args: Any, **settings: Any) -> Any:
            assert opened.wait(timeout=5), "the event loop was blocked"
            return compressor.compress(*args, **settings)

    settings = CtxCompressor(compressor=Gate(), budget=20)
    asyncio.get_running_loop().call_later(0.01, opened.set)
    assert tokens_after(await settings.acompress_documents(documents, QUESTION)) <= 20
    opened.clear()
    asyncio.get_running_loop().call_later(0.01, opened.set)
    await settings.as_runnable().ainvoke({"context": documents, "question": QUESTION})


async def test_parallel_calls_get_their_own_documents(compressor: ContextCompressor) -> None:
    settings = CtxCompressor(compressor=compressor, compression_ratio=2)
    calls = [
        [Document(id=f"{call}-{place}", page_content=f"{text} {call}") for place, text in enumerate(TEXTS)]
        for call in range(20)
    ]
    results = await asyncio.gather(*(settings.acompress_documents(call, QUESTION) for call in calls))
    assert results == [settings.compress_documents(call, QUESTION) for call in calls]
    assert [[document.id for document in result] for result in results] == [
        [document.id for document in call] for call in calls
    ]


async def test_in_a_contextual_compression_retriever(
    compressor: ContextCompressor, documents: list[Document], retriever: BaseRetriever
) -> None:
    settings = CtxCompressor(compressor=compressor, compression_ratio=2)
    short = ContextualCompressionRetriever(base_compressor=settings, base_retriever=retriever)
    expected = settings.compress_documents(documents, QUESTION)
    assert short.invoke(QUESTION) == expected
    assert await short.ainvoke(QUESTION) == expected
    assert expected != documents


async def test_in_a_chain(
    compressor: ContextCompressor, documents: list[Document], retriever: BaseRetriever
) -> None:
    settings = CtxCompressor(compressor=compressor, compression_ratio=2)
    found = {"context": retriever, "question": RunnablePassthrough()}
    text = RunnablePassthrough.assign(context=lambda x: "\n\n".join(d.page_content for d in x["context"]))
    prompt = ChatPromptTemplate.from_template("{context}\n\nQuestion: {question}")
    chain = found | settings.as_runnable() | text | prompt | ParrotFakeChatModel() | StrOutputParser()
    short = "\n\n".join(
        document.page_content for document in settings.compress_documents(documents, QUESTION)
    )
    expected = f"{short}\n\nQuestion: {QUESTION}"
    assert chain.invoke(QUESTION) == expected
    assert await chain.ainvoke(QUESTION) == expected
    assert "".join(chain.stream(QUESTION)) == expected
    assert chain.batch([QUESTION, QUESTION]) == [expected, expected]


def test_a_runnable_with_other_keys(compressor: ContextCompressor, documents: list[Document]) -> None:
    settings = CtxCompressor(compressor=compressor, budget=20)
    given = {"pages": documents, "input": QUESTION, "history": ["hello"]}
    short = settings.as_runnable(context_key="pages", question_key="input").invoke(given)
    assert short == {**given, "pages": settings.compress_documents(documents, QUESTION)}
    assert given["pages"] is documents
    with pytest.raises(
        InputError, match=r"keys 'context' and 'question', got \['history', 'input', 'pages'\]"
    ):
        settings.as_runnable().invoke(given)


async def test_soft_documents_keep_their_text_and_name_their_soft_tokens(
    soft_compressor: ContextCompressor, documents: list[Document]
) -> None:
    settings = CtxCompressor(compressor=soft_compressor, compression_ratio=4, mode="soft", ranked=False)
    short = settings.compress_documents(documents, QUESTION)
    result = soft_compressor.compress(TEXTS, QUESTION, compression_ratio=4, mode="soft")
    for before, after, expected in zip(documents, short, result.documents, strict=True):
        account = after.metadata["ctxcompress"]
        assert after == before.model_copy(update={"metadata": {**before.metadata, "ctxcompress": account}})
        reference = soft_compressor.references.issue(expected.parts)
        decoder = soft_compressor.soft.fingerprint
        assert account == {**expected.account, "mode": "soft", "ref": reference, "decoder": decoder}
        assert json.loads(json.dumps(account)) == account
    assert tokens_after(short) <= sum(soft_compressor.backbone.count(text) for text in TEXTS) / 4
    assert await settings.acompress_documents(documents, QUESTION) == short


def test_placeholders_take_the_place_of_text(
    soft_compressor: ContextCompressor, documents: list[Document]
) -> None:
    settings = CtxCompressor(compressor=soft_compressor, budget=9, mode="soft", allow_drop=True)
    plain = settings.compress_documents(documents, QUESTION)
    marked = settings.model_copy(update={"placeholders": True}).compress_documents(documents, QUESTION)
    accounts = [document.metadata["ctxcompress"] for document in plain]
    assert [document.metadata["ctxcompress"] for document in marked] == accounts
    assert {account["tokens_after"] == 0 for account in accounts} == {True, False}
    for document, account in zip(marked, accounts, strict=True):
        assert document.page_content == (placeholder(account["ref"]) if account["tokens_after"] else "")
        assert len(soft_compressor.references.resolve(account["ref"])) == (account["tokens_after"] > 0)


@pytest.mark.parametrize("allocator", ["semi_dynamic", "dast+semi_dynamic"])
def test_ratios_from_density_need_soft_mode(
    soft_compressor: ContextCompressor, documents: list[Document], allocator: AllocatorName
) -> None:
    settings = CtxCompressor(compressor=soft_compressor, budget=40, mode="soft", allocator=allocator)
    assert 0 < tokens_after(settings.compress_documents(documents, QUESTION)) <= 40
    pruning = CtxCompressor(compressor=soft_compressor, budget=40, allocator=allocator)
    with pytest.raises(ConfigError, match="got mode 'text'"):
        pruning.compress_documents(documents, QUESTION)


def test_soft_mode_needs_an_adapter(compressor: ContextCompressor, documents: list[Document]) -> None:
    settings = CtxCompressor(compressor=compressor, budget=40, mode="soft")
    with pytest.raises(ConfigError, match="needs a soft-token adapter"):
        settings.compress_documents(documents, QUESTION)


@pytest.mark.parametrize("mode", ["text", "soft"])
def test_empty_pages_and_missing_scores(soft_compressor: ContextCompressor, mode: Any) -> None:
    settings = CtxCompressor(compressor=soft_compressor, compression_ratio=2, mode=mode, score_key="score")
    texts = ["", TEXTS[0], " ", TEXTS[1], ""]
    pages = [Document(text, metadata={"score": None}) for text in texts]
    short = settings.compress_documents(pages, QUESTION)
    accounts = [document.metadata["ctxcompress"] for document in short]
    assert [account["score"] for account in accounts] == [None] * 5
    assert [accounts[place]["tokens_after"] for place in (0, 4)] == [0, 0]
    assert accounts[1]["tokens_after"]
    assert accounts[3]["tokens_after"]
    assert [document.page_content for document in short] == texts or mode == "text"
    nothing = settings.compress_documents([Document("")], QUESTION)
    assert nothing[0].page_content == ""
    assert nothing[0].metadata["ctxcompress"]["tokens_after"] == 0


@pytest.mark.parametrize("mode", ["text", "soft"])
def test_metadata_of_any_kind_is_carried_along(soft_compressor: ContextCompressor, mode: Any) -> None:
    lock, loop = threading.Lock(), [1]
    loop.append(loop)
    metadata = {"lock": lock, "loop": loop, "nan": float("nan"), "array": np.zeros(2), "bytes": b"\xff"}
    settings = CtxCompressor(compressor=soft_compressor, compression_ratio=2, mode=mode)
    (short,) = settings.compress_documents([Document(TEXTS[0], metadata=metadata)], QUESTION)
    for name, value in metadata.items():
        assert short.metadata[name] is value
    json.dumps(short.metadata["ctxcompress"])


@pytest.mark.parametrize("mode", ["text", "soft"])
def test_ten_thousand_documents(soft_compressor: ContextCompressor, mode: Any) -> None:
    pages = [Document(f"Page {place}.") for place in range(10_000)]
    settings = CtxCompressor(
        compressor=soft_compressor, budget=500, mode=mode, allocator="random", allow_drop=True
    )
    short = settings.compress_documents(pages, QUESTION)
    assert len(short) == 10_000
    assert 0 < tokens_after(short) <= 500
