"""`CtxCompressPostprocessor` inside real LlamaIndex objects, on a tiny random model and with a mock LLM."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args, get_type_hints

import llama_index.postprocessor.ctxcompress as package
import numpy as np
import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import (
    Document,
    ImageNode,
    IndexNode,
    MetadataMode,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from llama_index.postprocessor.ctxcompress import CtxCompressPostprocessor
from pydantic import ValidationError

from ctxcompress import ContextCompressor, InputError, SoftTokens, placeholder

QUERY = "Who discovered penicillin?"
TEXTS = [
    "In 1928 Alexander Fleming discovered penicillin at St Mary's Hospital in London, by chance.",
    "Rome is the capital of Italy and lies on the Tiber. It was founded, they say, in 753 BC.",
    "Photosynthesis turns light into chemical energy; chlorophyll absorbs red and blue light.",
]
ACCOUNT = {
    "tokens_before",
    "tokens_after",
    "ratio",
    "budget",
    "score",
    "share",
    "rank",
    "chunks",
    "mode",
}


class FixedRetriever(BaseRetriever):
    """Finds the same nodes for every query."""

    def __init__(self, found: list[NodeWithScore]) -> None:
        self.found = found
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self.found


def accounts(nodes: list[NodeWithScore]) -> list[dict[str, Any]]:
    return [item.metadata["ctxcompress"] for item in nodes]


def tokens_after(nodes: list[NodeWithScore]) -> int:
    return sum(account["tokens_after"] for account in accounts(nodes))


def test_the_class_is_what_llama_index_expects() -> None:
    assert package.__all__ == ["CtxCompressPostprocessor"]
    assert CtxCompressPostprocessor.class_name() == "CtxCompressPostprocessor"
    assert "BaseNodePostprocessor" in [base.__name__ for base in CtxCompressPostprocessor.__mro__]


def test_each_node_keeps_all_but_its_text(compressor: ContextCompressor, nodes: list[NodeWithScore]) -> None:
    postprocessor = CtxCompressPostprocessor(compressor=compressor, compression_ratio=4)
    short = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert [(item.node_id, item.score) for item in short] == [
        ("page-0", 0.3),
        ("page-1", 0.2),
        ("page-2", 0.9),
    ]
    changed = {"text", "metadata", "excluded_llm_metadata_keys", "excluded_embed_metadata_keys"}
    for before, after in zip(nodes, short, strict=True):
        assert type(after.node) is TextNode
        assert after.node.model_dump(exclude=changed) == before.node.model_dump(exclude=changed)
        account = after.metadata["ctxcompress"]
        assert after.metadata == {**before.metadata, "ctxcompress": account}
        assert account.keys() == ACCOUNT
        assert account["score"] == before.score
        assert account["tokens_before"] == compressor.backbone.count(before.text)
        assert account["tokens_after"] == compressor.backbone.count(after.text) <= account["budget"]
        assert account["ratio"] == account["tokens_before"] / account["tokens_after"] > 1
        assert set(re.findall(r"\w+", after.text)) <= set(re.findall(r"\w+", before.text))
    assert sum(account["share"] for account in accounts(short)) == pytest.approx(1)
    assert sorted(account["rank"] for account in accounts(short)) == [1, 2, 3]


@pytest.mark.parametrize("query", [QUERY, "Where is the Tiber?"])
def test_the_texts_are_those_of_the_library(
    compressor: ContextCompressor, nodes: list[NodeWithScore], query: str
) -> None:
    postprocessor = CtxCompressPostprocessor(compressor=compressor, compression_ratio=2)
    documents = [{"text": item.text, "score": item.score} for item in nodes]
    expected = compressor.compress(documents, query, compression_ratio=2).documents
    short = postprocessor.postprocess_nodes(nodes, query_str=query)
    assert [item.text for item in short] == [document.text for document in expected]
    assert [account["share"] for account in accounts(short)] == [document.share for document in expected]


def test_the_account_is_hidden_from_models(compressor: ContextCompressor, nodes: list[NodeWithScore]) -> None:
    postprocessor = CtxCompressPostprocessor(compressor=compressor, compression_ratio=2)
    short = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    again = postprocessor.postprocess_nodes(short, query_str=QUERY)
    for item in again:
        assert item.node.excluded_llm_metadata_keys == ["secret", "ctxcompress"]
        assert item.node.excluded_embed_metadata_keys == ["ctxcompress"]
        for mode in (MetadataMode.LLM, MetadataMode.EMBED):
            assert "tokens_before" not in item.get_content(mode)
            assert "source: " in item.get_content(mode)


def test_the_callers_nodes_stay_as_they_were(
    compressor: ContextCompressor, nodes: list[NodeWithScore]
) -> None:
    nodes.append(NodeWithScore(node=Document(id_="book", text=TEXTS[0], metadata={"source": "book"})))
    before = copy.deepcopy(nodes)
    postprocessor = CtxCompressPostprocessor(compressor=compressor, compression_ratio=3)
    for item in postprocessor.postprocess_nodes(nodes, query_str=QUERY):
        item.metadata["added"] = True
        item.node.relationships.clear()
        item.node.excluded_llm_metadata_keys.append("added")
        item.node.excluded_embed_metadata_keys.append("added")
        item.score = 7.0
    assert nodes == before


@pytest.mark.parametrize("budget", [3, 10, 41, 60])
def test_a_budget_is_never_exceeded(
    compressor: ContextCompressor, nodes: list[NodeWithScore], budget: int
) -> None:
    postprocessor = CtxCompressPostprocessor(compressor=compressor, budget=budget)
    assert 0 < tokens_after(postprocessor.postprocess_nodes(nodes, query_str=QUERY)) <= budget


@pytest.mark.parametrize("ratio", [1, 1.5, 4])
def test_a_ratio_is_reached(compressor: ContextCompressor, nodes: list[NodeWithScore], ratio: float) -> None:
    postprocessor = CtxCompressPostprocessor(compressor=compressor, compression_ratio=ratio)
    short = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert tokens_after(short) * ratio <= sum(compressor.backbone.count(text) for text in TEXTS)
    assert [item.text for item in short] == TEXTS or ratio > 1


def test_a_node_without_any_text_left_is_returned(
    compressor: ContextCompressor, nodes: list[NodeWithScore]
) -> None:
    postprocessor = CtxCompressPostprocessor(
        compressor=compressor, budget=2, allow_drop=True, allocator="random"
    )
    short = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert [item.node_id for item in short] == ["page-0", "page-1", "page-2"]
    empty = [item.metadata["ctxcompress"] for item in short if not item.text]
    assert empty
    assert all(account["tokens_after"] == 0 and account["ratio"] is None for account in empty)


def test_no_text_needs_no_model() -> None:
    postprocessor = CtxCompressPostprocessor(model="no such model", budget=5)
    images = [NodeWithScore(node=ImageNode(image_url="https://example.org/rome.png"))]
    assert postprocessor.postprocess_nodes([]) == []
    assert postprocessor.postprocess_nodes(images) == images


def test_repeated_ids(compressor: ContextCompressor, nodes: list[NodeWithScore]) -> None:
    postprocessor = CtxCompressPostprocessor(compressor=compressor, compression_ratio=3)
    expected = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    for item in nodes:
        item.node.id_ = "same"
    short = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert [item.text for item in short] == [item.text for item in expected]
    assert {item.node_id for item in short} == {"same"}


def test_other_kinds_of_nodes(compressor: ContextCompressor, nodes: list[NodeWithScore]) -> None:
    engine = threading.Lock()  # like a query engine: it can be neither copied nor serialised
    image = NodeWithScore(node=ImageNode(image_url="https://example.org/rome.png", metadata={"page": 3}))
    captioned = NodeWithScore(node=ImageNode(image_path="rome.png", text=TEXTS[1]), score=0.5)
    index = NodeWithScore(node=IndexNode(text=TEXTS[0], index_id="books", obj=engine), score=0.7)
    book = NodeWithScore(node=Document(text=TEXTS[2], metadata={"title": "Leaves"}), score=0.1)
    given = [image, captioned, index, book]
    postprocessor = CtxCompressPostprocessor(compressor=compressor, compression_ratio=3)
    short = postprocessor.postprocess_nodes(given, query_str=QUERY)
    assert [type(item.node) for item in short] == [ImageNode, ImageNode, IndexNode, Document]
    assert [item.score for item in short] == [None, 0.5, 0.7, 0.1]
    assert short[0] == image
    assert "ctxcompress" not in short[0].metadata
    assert short[1].node.image_path == "rome.png"
    assert short[2].node.index_id == "books"
    assert short[2].node.obj is engine
    for before, after in zip(given[1:], short[1:], strict=True):
        content = after.get_content()
        assert compressor.backbone.count(content) == after.metadata["ctxcompress"]["tokens_after"]
        assert 0 < len(content) < len(before.get_content())
    # An image without a score does not keep the others' scores from the allocation.
    alone = postprocessor.postprocess_nodes(given[1:], query_str=QUERY)
    assert accounts(alone) == accounts(short[1:])


def test_results_serialise(compressor: ContextCompressor, nodes: list[NodeWithScore]) -> None:
    postprocessor = CtxCompressPostprocessor(compressor=compressor, compression_ratio=3)
    for item in postprocessor.postprocess_nodes(nodes, query_str=QUERY):
        assert TextNode.from_json(item.node.to_json()) == item.node
        assert json.loads(item.to_json())["score"] == item.score


def test_scores_take_part_when_every_node_has_one(
    compressor: ContextCompressor, nodes: list[NodeWithScore]
) -> None:
    def shares(scores: list[float | None]) -> list[float]:
        for item, score in zip(nodes, scores, strict=True):
            item.score = score
        return [account["share"] for account in accounts(postprocessor.postprocess_nodes(nodes, bundle))]

    postprocessor = CtxCompressPostprocessor(compressor=compressor, compression_ratio=3)
    bundle = QueryBundle(QUERY)
    unweighed = shares([None, None, None])
    assert shares([0.1, 0.2, 0.9])[2] > unweighed[2]
    assert shares([0.1, None, 0.9]) == unweighed


def test_a_query_is_asked_for_where_the_allocator_needs_one(
    compressor: ContextCompressor, nodes: list[NodeWithScore]
) -> None:
    postprocessor = CtxCompressPostprocessor(compressor=compressor, budget=20)
    for query in (None, QueryBundle("")):
        with pytest.raises(InputError, match="needs a query"):
            postprocessor.postprocess_nodes(nodes, query)
    uniform = CtxCompressPostprocessor(compressor=compressor, budget=20, allocator="uniform")
    assert tokens_after(uniform.postprocess_nodes(nodes)) <= 20


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
        ({"budget": 5, "placeholders": True}, "placeholders"),
        ({"budget": 5, "mode": "text", "placeholders": True}, "mode='soft'"),
    ],
)
def test_bad_settings_fail_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CtxCompressPostprocessor(**settings)


def test_choices_are_those_of_the_library() -> None:
    library = get_type_hints(ContextCompressor.compress)
    fields = CtxCompressPostprocessor.model_fields
    assert fields["allocator"].annotation == library["allocator"]
    assert {*get_args(fields["mode"].annotation)} <= {*get_args(library["mode"])}


def test_settings_survive_a_round_trip(tiny_model: Path, nodes: list[NodeWithScore]) -> None:
    mine = ContextCompressor.from_pretrained(tiny_model, device="cpu")
    given = CtxCompressPostprocessor(compressor=mine, budget=30, allocator="uniform", allow_drop=True)
    data = given.to_dict()
    assert data == {
        "class_name": "CtxCompressPostprocessor",
        "budget": 30,
        "compression_ratio": None,
        "allocator": "uniform",
        "mode": "text",
        "allow_drop": True,
        "placeholders": False,
        "model": str(tiny_model),
        "adapter": "embedded",
        "device": None,
        "store": None,
    }
    for made in (
        CtxCompressPostprocessor.from_dict(data),
        CtxCompressPostprocessor.from_json(given.to_json()),
        pickle.loads(pickle.dumps(CtxCompressPostprocessor.from_dict(data))),
    ):
        assert made.to_dict() == data
        assert made.postprocess_nodes(nodes) == given.postprocess_nodes(nodes)


def test_the_model_is_loaded_once_and_not_before_it_is_needed(
    tiny_model: Path, tmp_path: Path, nodes: list[NodeWithScore], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, Any]] = []
    load = ContextCompressor.from_pretrained

    def counted(name: str, **settings: Any) -> ContextCompressor:
        loaded.append((name, settings["device"]))
        time.sleep(0.05)  # long enough for the other threads to arrive
        return load(name, **settings)

    monkeypatch.setattr(ContextCompressor, "from_pretrained", counted)
    # The folder of a store makes the settings this test's own.
    postprocessor, other = (
        CtxCompressPostprocessor(model=tiny_model, device="cpu", store=tmp_path, budget=budget)
        for budget in (20, 30)
    )
    assert loaded == []
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: postprocessor.postprocess_nodes(nodes, query_str=QUERY), range(4)))
    other.postprocess_nodes(nodes, query_str=QUERY)
    assert loaded == [(str(tiny_model), "cpu")]
    assert all(result == results[0] for result in results)


async def test_async_gives_the_same(compressor: ContextCompressor, nodes: list[NodeWithScore]) -> None:
    postprocessor = CtxCompressPostprocessor(compressor=compressor, compression_ratio=3)
    expected = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert await postprocessor.apostprocess_nodes(nodes, query_str=QUERY) == expected


async def test_async_leaves_the_event_loop_free(
    compressor: ContextCompressor, nodes: list[NodeWithScore]
) -> None:
    opened = threading.Event()

    class Gate:
        """A compressor that starts only when the event loop, still running, lets it."""

        backbone = compressor.backbone

        def compress(self, *args: Any, **settings: Any) -> Any:
            assert opened.wait(timeout=5), "the event loop was blocked"
            return compressor.compress(*args, **settings)

    postprocessor = CtxCompressPostprocessor(compressor=Gate(), budget=20)
    asyncio.get_running_loop().call_later(0.01, opened.set)
    assert tokens_after(await postprocessor.apostprocess_nodes(nodes, query_str=QUERY)) <= 20


async def test_parallel_calls_get_their_own_nodes(compressor: ContextCompressor) -> None:
    postprocessor = CtxCompressPostprocessor(compressor=compressor, compression_ratio=2)
    calls = [
        [
            NodeWithScore(node=TextNode(id_=f"{call}-{place}", text=f"{text} {call}"), score=place / 3)
            for place, text in enumerate(TEXTS)
        ]
        for call in range(20)
    ]
    results = await asyncio.gather(
        *(postprocessor.apostprocess_nodes(call, query_str=QUERY) for call in calls)
    )
    assert results == [postprocessor.postprocess_nodes(call, query_str=QUERY) for call in calls]
    assert [[item.node_id for item in result] for result in results] == [
        [item.node_id for item in call] for call in calls
    ]


@pytest.mark.parametrize("response_mode", ["compact", "refine", "tree_summarize"])
async def test_in_a_query_engine(
    compressor: ContextCompressor, nodes: list[NodeWithScore], response_mode: str
) -> None:
    postprocessor = CtxCompressPostprocessor(compressor=compressor, compression_ratio=4)
    engine = RetrieverQueryEngine.from_args(
        FixedRetriever(nodes), llm=MockLLM(), node_postprocessors=[postprocessor], response_mode=response_mode
    )
    expected = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    for response in (engine.query(QUERY), await engine.aquery(QUERY)):
        assert response.source_nodes == expected
        prompt = str(response)  # the mock answers with its (last) prompt
        assert expected[-1].text in prompt
        assert TEXTS[-1] not in prompt
        assert "tokens_before" not in prompt


def test_soft_mode_keeps_the_text_and_names_what_is_left(
    soft_compressor: ContextCompressor, nodes: list[NodeWithScore]
) -> None:
    before = copy.deepcopy(nodes)
    postprocessor = CtxCompressPostprocessor(compressor=soft_compressor, mode="soft", compression_ratio=4)
    soft = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert nodes == before
    documents = [{"text": item.text, "score": item.score} for item in nodes]
    result = soft_compressor.compress(documents, QUERY, compression_ratio=4, mode="soft")
    for given, item, document in zip(nodes, soft, result.documents, strict=True):
        assert (item.node_id, item.score, item.text) == (given.node_id, given.score, given.text)
        assert item.node.relationships == given.node.relationships
        account = item.metadata["ctxcompress"]
        assert account.keys() == ACCOUNT | {"ref", "decoder"}
        assert account["decoder"] == soft_compressor.soft.fingerprint
        assert {name: account[name] for name in document.account} == document.account
        parts = soft_compressor.references.resolve(account["ref"])
        assert [part.embeddings_MD.tolist() for part in parts if isinstance(part, SoftTokens)] == [
            part.embeddings_MD.tolist() for part in document.parts if isinstance(part, SoftTokens)
        ]
        assert sum(len(part) for part in parts if isinstance(part, SoftTokens)) == account["tokens_after"]
        assert json.loads(json.dumps(account)) == account
        for mode in (MetadataMode.LLM, MetadataMode.EMBED):
            assert account["ref"] not in item.get_content(mode)
        assert TextNode.from_json(item.node.to_json()) == item.node


def test_placeholders_stand_for_the_text_where_they_are_asked_for(
    soft_compressor: ContextCompressor, nodes: list[NodeWithScore]
) -> None:
    postprocessor = CtxCompressPostprocessor(
        compressor=soft_compressor, mode="soft", budget=6, allow_drop=True, placeholders=True
    )
    soft = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    left = [item for item in soft if item.metadata["ctxcompress"]["tokens_after"]]
    assert 0 < len(left) < len(soft)
    assert all(item.text == "" for item in soft if item not in left)
    for item in left:
        assert item.text == placeholder(item.metadata["ctxcompress"]["ref"])
        assert soft_compressor.references.expand(item.text) == list(
            soft_compressor.references.resolve(item.metadata["ctxcompress"]["ref"])
        )


def test_what_was_dropped_keeps_its_text_too(
    soft_compressor: ContextCompressor, nodes: list[NodeWithScore]
) -> None:
    postprocessor = CtxCompressPostprocessor(
        compressor=soft_compressor, mode="soft", budget=6, allow_drop=True
    )
    soft = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert [item.text for item in soft] == TEXTS
    assert any(not item.metadata["ctxcompress"]["tokens_after"] for item in soft)


def test_events_tell_what_went_in_and_what_came_out(
    soft_compressor: ContextCompressor, nodes: list[NodeWithScore], events: list[Any]
) -> None:
    told = CallbackManager([EndHandler()])
    postprocessor = CtxCompressPostprocessor(
        compressor=soft_compressor, mode="soft", compression_ratio=4, callback_manager=told
    )
    soft = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    start, end = (event for event in events if "ReRank" in event.class_name())
    assert (start.class_name(), end.class_name()) == ("ReRankStartEvent", "ReRankEndEvent")
    assert (start.query.query_str, start.top_n) == (QUERY, 3)
    assert start.model_name == soft_compressor.backbone.name
    assert start.nodes == nodes
    assert end.nodes == soft
    assert "tensor" not in end.model_dump_json()
    assert told.handlers[0].ended[CBEventType.RERANKING][EventPayload.NODES] == soft


class EndHandler(BaseCallbackHandler):
    """Keeps what events end with."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.ended: dict[CBEventType, Any] = {}

    def on_event_start(self, event_type: CBEventType, *args: Any, **kwargs: Any) -> str:
        return ""

    def on_event_end(self, event_type: CBEventType, payload: Any = None, **kwargs: Any) -> None:
        self.ended[event_type] = payload

    def start_trace(self, trace_id: str | None = None) -> None:
        pass

    def end_trace(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_a_pickle_holds_settings_and_no_model(
    compressor: ContextCompressor,
    tiny_model: Path,
    nodes: list[NodeWithScore],
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = CtxCompressPostprocessor(compressor=compressor, budget=30, allocator="uniform", device="cpu")
    pickled = pickle.dumps(given)
    assert len(pickled) < 10_000
    made = pickle.loads(pickled)
    assert made.compressor is None
    assert made.to_dict() == given.to_dict()
    assert made.model == str(tiny_model)
    assert made.postprocess_nodes(nodes) == given.postprocess_nodes(nodes)
    assert not caplog.records


def test_soft_settings_survive_a_round_trip(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path, nodes: list[NodeWithScore]
) -> None:
    given = CtxCompressPostprocessor(
        mode="soft", budget=30, model=tiny_model, adapter=tiny_adapter, store=tmp_path, device="cpu"
    )
    expected = given.postprocess_nodes(nodes, query_str=QUERY)
    for made in (
        CtxCompressPostprocessor.from_dict(given.to_dict()),
        CtxCompressPostprocessor.from_json(given.to_json()),
        pickle.loads(pickle.dumps(given)),
    ):
        assert made.to_dict() == given.to_dict()
        assert made.postprocess_nodes(nodes, query_str=QUERY) == expected


@pytest.mark.parametrize("mode", ["text", "soft"])
def test_metadata_and_scores_of_any_kind(
    soft_compressor: ContextCompressor, nodes: list[NodeWithScore], mode: Any
) -> None:
    lock = threading.Lock()  # can be neither copied nor serialised
    nodes[0].node.metadata["lock"] = lock
    nodes[1].score = None
    nodes[2].node.metadata["ctxcompress"] = ["the user's own"]
    nodes.append(NodeWithScore(node=TextNode(text=" \n ")))
    nodes.append(NodeWithScore(node=TextNode(text="")))
    postprocessor = CtxCompressPostprocessor(compressor=soft_compressor, mode=mode, compression_ratio=2)
    done = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert done[0].metadata["lock"] is lock
    assert [item.score for item in done] == [0.3, None, 0.9, None, None]
    assert done[2].metadata["ctxcompress"].keys() >= ACCOUNT
    assert done[4] == nodes[4]
    assert all(len(item.text) <= len(given.text) for item, given in zip(done, nodes, strict=True))


@pytest.mark.parametrize("mode", ["text", "soft"])
def test_scores_of_numpy_become_plain_numbers(
    soft_compressor: ContextCompressor, nodes: list[NodeWithScore], mode: Any
) -> None:
    for item in nodes:
        item.score = np.float32(item.score)
    postprocessor = CtxCompressPostprocessor(compressor=soft_compressor, mode=mode, compression_ratio=2)
    for item in postprocessor.postprocess_nodes(nodes, query_str=QUERY):
        assert json.loads(item.node.to_json())["metadata"]["ctxcompress"]["score"] == item.score


@pytest.mark.parametrize("mode", ["text", "soft"])
def test_ten_thousand_nodes(soft_compressor: ContextCompressor, mode: Any) -> None:
    nodes = [NodeWithScore(node=TextNode(text=f"Page {place} of Rome.")) for place in range(10_000)]
    postprocessor = CtxCompressPostprocessor(
        compressor=soft_compressor, mode=mode, budget=200, allocator="bm25", allow_drop=True
    )
    done = postprocessor.postprocess_nodes(nodes, query_str="What does page 4711 of Rome say?")
    assert [item.node_id for item in done] == [item.node_id for item in nodes]
    assert 0 < tokens_after(done) <= 200
    assert min(done, key=lambda item: item.metadata["ctxcompress"]["rank"]) == done[4711]
