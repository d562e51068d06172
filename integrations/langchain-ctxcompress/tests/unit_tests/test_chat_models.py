"""`ChatCtxCompress`: text and soft tokens in, answers out; whole, streamed, async, cached, traced."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.tracers.context import collect_runs
from langchain_ctxcompress import ChatCtxCompress, CtxCompressor, SoftContextPrompt
from pydantic import ValidationError

from ctxcompress import Backbone, ConfigError, ContextCompressor, InputError, ModelError, SoftTokens

QUESTION = "Who discovered penicillin?"


@pytest.fixture
def soft(wide: ContextCompressor, documents: list[Document]) -> list[Document]:
    """The pages, compressed to soft tokens."""
    settings = CtxCompressor(compressor=wide, compression_ratio=3, mode="soft")
    return settings.compress_documents(documents, QUESTION)


@pytest.fixture
def messages(soft: list[Document]) -> list[BaseMessage]:
    """A question about them."""
    return SoftContextPrompt().invoke({"context": soft, "question": QUESTION})


def joined(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    full = chunks[0]
    for chunk in chunks[1:]:
        full += chunk
    return full


async def test_every_way_to_call_gives_the_same(llm: ChatCtxCompress, messages: list[BaseMessage]) -> None:
    expected = llm.invoke(messages)
    assert expected.text
    streamed = list(llm.stream(messages))
    assert len(streamed) > 2
    assert [chunk.chunk_position for chunk in streamed] == [None] * (len(streamed) - 1) + ["last"]
    replies = [
        joined(streamed),
        await llm.ainvoke(messages),
        joined([chunk async for chunk in llm.astream(messages)]),
        *llm.batch([messages, messages]),
        *await llm.abatch([messages, messages]),
        llm.model_copy(update={"streaming": True}).invoke(messages),
    ]
    for reply in replies:
        assert reply.text == expected.text
        assert reply.usage_metadata == expected.usage_metadata
        assert reply.response_metadata == expected.response_metadata


def test_what_a_call_cost(
    wide: ContextCompressor, llm: ChatCtxCompress, messages: list[BaseMessage], soft: list[Document]
) -> None:
    accounts = [document.metadata["ctxcompress"] for document in soft]
    parts = [part for account in accounts for part in wide.references.resolve(account["ref"])]
    saved = sum(part.tokens - len(part) for part in parts if isinstance(part, SoftTokens))
    reply = llm.invoke(messages, max_tokens=3)
    usage = reply.usage_metadata
    assert usage["input_token_details"] == {
        "soft": sum(len(part) for part in parts if isinstance(part, SoftTokens))
    }
    assert usage["output_tokens"] == 3
    assert usage["total_tokens"] == usage["input_tokens"] + 3
    assert reply.response_metadata == {
        "model_name": llm.model_name,
        "finish_reason": "length",
        "tokens_before": usage["input_tokens"] + saved,
    }
    text = "\n\n".join(document.page_content for document in soft)
    uncompressed = SoftContextPrompt().invoke({"context": [Document(text)], "question": QUESTION})
    assert llm.get_num_tokens_from_messages(uncompressed) - saved == pytest.approx(
        usage["input_tokens"], abs=4
    )


def test_tokens_are_counted_as_the_decoder_counts_them(
    wide: ContextCompressor, llm: ChatCtxCompress, messages: list[BaseMessage]
) -> None:
    conversation = [SystemMessage("Be brief."), HumanMessage("Hi."), AIMessage("Hello."), *messages]
    counted = llm.get_num_tokens_from_messages(conversation)
    assert counted == llm.invoke(conversation).usage_metadata["input_tokens"]
    assert llm.get_num_tokens_from_messages([]) == 0
    assert llm.get_num_tokens("Rome and owls") == wide.backbone.count("Rome and owls") > 0
    assert tuple(llm.get_token_ids("Rome")) == wide.backbone.encode("Rome").ids
    other = ChatCtxCompress(compressor=wide, custom_get_token_ids=lambda text: [7] * len(text))
    assert other.get_num_tokens("Rome") == 4
    with pytest.raises(InputError, match="calls no tools, got 1"):
        llm.get_num_tokens_from_messages(conversation, tools=[print])


def test_the_profile_knows_the_window_once_it_is_known(wide: ContextCompressor, models: Any) -> None:
    assert ChatCtxCompress(compressor=wide).profile["max_input_tokens"] == 2048
    llm = ChatCtxCompress(model=models / "tiny-chat", device="cpu", max_tokens=2)
    assert llm.profile["text_inputs"]
    assert not llm.profile["tool_calling"]
    assert "max_input_tokens" not in llm.profile
    llm.invoke("Hi.")
    assert llm.profile["max_input_tokens"] == 2048
    own = ChatCtxCompress(model=models / "tiny-chat", device="cpu", max_tokens=2, profile={"name": "mine"})
    own.invoke("Hi.")
    assert own.profile == {"name": "mine", "max_input_tokens": 2048}


def test_contents_are_strings_or_blocks_of_text(llm: ChatCtxCompress, recording: Any) -> None:
    for content in ("Hello there.", ["Hello", " there."], [{"type": "text", "text": "Hello"}, " there."]):
        llm.invoke([SystemMessage("Be brief."), HumanMessage(content), AIMessage("Hi."), ("human", "Rome?")])
    first, *others = recording.prompts
    assert others == [first, first]


@pytest.mark.parametrize(
    ("message", "got"),
    [
        (ToolMessage("3", tool_call_id="1"), "a 'tool' message"),
        (ChatMessage("Hi.", role="critic"), "a 'chat' message"),
        (FunctionMessage("3", name="f"), "a 'function' message"),
        (AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}]), "an AI message that calls tools"),
        (HumanMessage([{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]), "type 'image_url'"),
        (HumanMessage([{"type": "non_standard", "value": {"type": "other"}}]), "type 'non_standard'"),
        (HumanMessage([{"type": "text"}]), "type 'text'"),
    ],
)
def test_what_this_model_cannot_read_is_refused(llm: ChatCtxCompress, message: BaseMessage, got: str) -> None:
    with pytest.raises(InputError, match=got):
        llm.invoke([HumanMessage("Hi."), message, HumanMessage("And?")])


def test_stop_strings(llm: ChatCtxCompress, wide: ContextCompressor, messages: list[BaseMessage]) -> None:
    whole = llm.invoke(messages).text
    stop = whole[len(whole) // 2 :][:2]
    until = whole[: whole.index(stop)].strip()
    bound = [
        llm.bind(stop=[stop]),
        ChatCtxCompress(compressor=wide, max_tokens=12, stop=[stop]),
        ChatCtxCompress(compressor=wide, max_tokens=12, stop_sequences=stop),
    ]
    for model in bound:
        reply = model.invoke(messages)
        assert reply.text == until
        assert reply.response_metadata["finish_reason"] == "stop"
        assert "".join(chunk.text for chunk in model.stream(messages)) == until
    assert bound[1].invoke(messages, stop=["\0"]).text == whole


def test_samples_repeat_with_their_seed(llm: ChatCtxCompress, messages: list[BaseMessage]) -> None:
    def answers(**settings: Any) -> list[str]:
        return [llm.invoke(messages, temperature=1.5, seed=seed, **settings).text for seed in (1, 2, 3)]

    assert answers() == answers()
    assert len(set(answers())) > 1
    assert set(answers(top_p=1e-6)) == {llm.invoke(messages).text}


def test_settings_of_a_call(wide: ContextCompressor, messages: list[BaseMessage]) -> None:
    cold = ChatCtxCompress(compressor=wide, max_tokens=12)
    warm = ChatCtxCompress(compressor=wide, max_tokens=9, temperature=1.5, seed=3, top_p=0.9)
    settings = {"max_tokens": 9, "temperature": 1.5, "seed": 3, "top_p": 0.9}
    assert cold.invoke(messages, **settings).text == warm.invoke(messages).text
    assert cold.bind(**settings).invoke(messages).text == warm.invoke(messages).text
    assert warm.invoke(messages, temperature=None).text == warm.invoke(messages).text
    with pytest.raises(ConfigError, match=r"must be among model, .* got logit_bias, n;"):
        cold.invoke(messages, n=2, logit_bias={})
    with pytest.raises(ConfigError, match="max_new_tokens must be"):
        cold.invoke(messages, max_tokens=0)
    with pytest.raises(NotImplementedError):
        cold.bind_tools([print])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"timeout": 0}, "timeout"),
        ({"max_retries": -1}, "max_retries"),
        ({"tempreature": 1}, "tempreature"),
    ],
)
def test_bad_settings_fail_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ChatCtxCompress(**settings)


@pytest.mark.parametrize("name", ["model", "adapter", "store", "base_url", "temperature", "compressor"])
def test_settings_are_frozen(llm: ChatCtxCompress, name: str) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(llm, name, None)


def test_node_and_model_share_what_they_load(models: Any, documents: list[Document]) -> None:
    settings: dict[str, Any] = {"model": models / "tiny-chat", "device": "cpu"}
    llm = ChatCtxCompress(**settings)
    assert llm._ready() is CtxCompressor(budget=9, **settings)._ready()
    assert llm._ready() is not CtxCompressor(budget=9, store=models / "store", **settings)._ready()
    assert CtxCompressor(budget=9, **llm.model_settings)._ready() is llm._ready()
    with pytest.raises(ModelError):
        llm.invoke("Hi.", model="no/such/model")


def test_what_identifies_a_model(llm: ChatCtxCompress, wide: ContextCompressor) -> None:
    found = llm._identifying_params
    assert json.loads(json.dumps(found)) == {**found, "stop": []}
    assert found["backbone"] == wide.backbone.fingerprint
    assert found["adapter"] == wide.soft.fingerprint
    assert found["model"] == wide.backbone.name
    assert found["max_new_tokens"] == 12
    assert ChatCtxCompress(compressor=ContextCompressor(wide.backbone))._identifying_params["adapter"] == ""
    traced = llm._get_ls_params(stop=["."], temperature=0.5)
    assert traced == {
        "ls_provider": "ctxcompress",
        "ls_model_type": "chat",
        "ls_model_name": wide.backbone.name,
        "ls_temperature": 0.5,
        "ls_max_tokens": 12,
        "ls_stop": ["."],
    }


@pytest.fixture
def changed(wide: ContextCompressor) -> Backbone:
    """A model of the same name with other weights."""
    other = Backbone.from_pretrained(wide.backbone.name, device="cpu")
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return other


def test_caches_never_mix_models_adapters_or_settings(
    wide: ContextCompressor, changed: Backbone, messages: list[BaseMessage]
) -> None:
    cache = InMemoryCache()
    settings: list[dict[str, Any]] = [
        {"compressor": wide},
        {"compressor": ContextCompressor(wide.backbone)},
        {"compressor": ContextCompressor(changed)},
        {"compressor": wide, "temperature": 1.0, "seed": 1},
        {"compressor": wide, "temperature": 1.0, "seed": 2},
        {"compressor": wide, "max_tokens": 5},
        {"compressor": wide, "stop": ["a"]},
        {"compressor": wide, "placeholders": True},
    ]
    for own in settings:
        model = ChatCtxCompress(**{"max_tokens": 12, **own}, cache=cache)
        fresh = model.invoke(QUESTION)
        assert "total_cost" not in fresh.usage_metadata  # which LangChain adds to what a cache held
        again = model.invoke(QUESTION)
        assert again.usage_metadata["total_cost"] == 0
        assert again.text == fresh.text
    model = ChatCtxCompress(compressor=wide, max_tokens=12, cache=cache)
    assert "total_cost" not in model.invoke(QUESTION, seed=5).usage_metadata
    assert "total_cost" not in model.invoke(messages).usage_metadata
    assert model.invoke(messages).usage_metadata["total_cost"] == 0


async def test_caches_in_async_calls(wide: ContextCompressor) -> None:
    cache = InMemoryCache()
    for compressor in (wide, ContextCompressor(wide.backbone)):
        model = ChatCtxCompress(compressor=compressor, max_tokens=5, cache=cache)
        assert "total_cost" not in (await model.ainvoke(QUESTION)).usage_metadata
        assert (await model.ainvoke(QUESTION)).usage_metadata["total_cost"] == 0


class Listener(BaseCallbackHandler):
    """Keeps everything it is told."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.tokens: list[str] = []

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        self.heard += [args, kwargs]

    def on_llm_new_token(self, token: Any, *args: Any, **kwargs: Any) -> None:
        self.tokens.append(token)
        self.heard += [args, kwargs]

    def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        self.heard += [args, kwargs]


def within(value: Any, seen: set[int]) -> list[Any]:
    """Everything a value consists of."""
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type(None))):
        return [value]
    seen.add(id(value))
    if isinstance(value, dict):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set)):
        inner = [*value]
    else:
        inner = [*vars(value).values()] if hasattr(value, "__dict__") else []
    return [value, *(part for own in inner for part in within(own, seen))]


def test_callbacks_and_tracers_see_text_and_references_alone(
    llm: ChatCtxCompress, messages: list[BaseMessage], soft: list[Document]
) -> None:
    listener = Listener()
    with collect_runs() as collected:
        reply = llm.invoke(messages, config={"callbacks": [listener]})
        streamed = list(llm.stream(messages, config={"callbacks": [listener]}))
    assert "".join(listener.tokens) == reply.text
    assert len(listener.tokens) == len(streamed)
    runs = [(run.inputs, run.outputs, run.extra, run.serialized) for run in collected.traced_runs]
    assert len(runs) == 2
    told = within([listener.heard, runs], set())
    assert not [part for part in told if isinstance(part, (torch.Tensor, SoftTokens, ContextCompressor))]
    for document in soft:
        assert document.metadata["ctxcompress"]["ref"] in told
    assert reply.text in told


def test_a_key_shows_nowhere(wide: ContextCompressor) -> None:
    llm = ChatCtxCompress(compressor=wide, max_tokens=3, api_key="s3cr3t")
    with collect_runs() as collected:
        reply = llm.invoke("Hi.")
    run = collected.traced_runs[0]
    assert "s3cr3t" not in repr(
        [llm, str(llm), llm._identifying_params, run.inputs, run.extra, run.serialized, reply]
    )


async def test_fifty_at_once(wide: ContextCompressor, llm: ChatCtxCompress) -> None:
    settings = CtxCompressor(compressor=wide, compression_ratio=2, mode="soft")
    prompts = []
    for place in range(50):
        page = Document(f"House number {place} has {place * 7} windows and a red door.")
        found = settings.compress_documents([page], "How many windows?")
        prompts.append(SoftContextPrompt().invoke({"context": found, "question": f"Windows of {place}?"}))
    expected = [llm.invoke(prompt, max_tokens=4).text for prompt in prompts]
    assert len(set(expected)) > 10
    replies = await asyncio.gather(*(llm.ainvoke(prompt, max_tokens=4) for prompt in prompts))
    assert [reply.text for reply in replies] == expected


@pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")
@pytest.mark.parametrize("call", ["ainvoke", "astream", "astream_events"])
async def test_the_event_loop_is_free_while_a_model_loads(
    wide: ContextCompressor, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    opened = threading.Event()

    def shared(*args: Any, **settings: Any) -> ContextCompressor:
        assert opened.wait(timeout=5), "the event loop was blocked"
        return wide

    monkeypatch.setattr(ContextCompressor, "shared", shared)
    llm = ChatCtxCompress(max_tokens=2)
    asyncio.get_running_loop().call_later(0.01, opened.set)
    if call == "ainvoke":
        assert (await llm.ainvoke("Hi.")).usage_metadata
    elif call == "astream":
        assert [chunk async for chunk in llm.astream("Hi.")]
    else:
        stream = await llm.astream_events("Hi.", version="v3")
        assert (await stream.output).usage_metadata


async def test_the_event_loop_is_free_while_a_prompt_is_made(
    recording: Any, llm: ChatCtxCompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, make = threading.Event(), recording.prompt

    def prompt(turns: Any) -> Any:
        assert opened.wait(timeout=5), "the event loop was blocked"
        return make(turns)

    monkeypatch.setattr(recording, "prompt", prompt)
    for call in (llm.ainvoke, lambda text: anext(llm.astream(text))):
        opened.clear()
        asyncio.get_running_loop().call_later(0.01, opened.set)
        await call("Hi.")


@pytest.fixture
def steps(wide: ContextCompressor) -> Any:
    """How many tokens the decoder has computed: a list that grows. No answer ends by itself."""
    done: list[None] = []

    def step(_: Any, __: Any, output: Any) -> None:
        output.logits[..., wide.backbone.tokenizer.eos_token_id] = -torch.inf
        done.append(None)

    hook = wide.soft.decoder.model.register_forward_hook(step)
    yield done
    hook.remove()


async def settled(count: Callable[[], int]) -> int:
    """A count once it has stopped to grow."""
    last = -1
    while last != count():
        last = count()
        await asyncio.sleep(0.5)
    return last


async def test_who_leaves_or_cancels_ends_the_work(llm: ChatCtxCompress, steps: list[None]) -> None:
    endless = llm.bind(max_tokens=500)
    assert endless.invoke("owl").response_metadata["finish_reason"] == "length"
    assert len(steps) == 500

    steps.clear()
    stream = endless.astream("owl")
    await anext(stream)
    await stream.aclose()
    assert 0 < await settled(lambda: len(steps)) < 500

    steps.clear()
    pieces = endless.stream("owl")
    next(pieces)
    pieces.close()
    assert 0 < await settled(lambda: len(steps)) < 500

    steps.clear()
    call = asyncio.create_task(endless.ainvoke("owl"))
    while not steps:
        await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert 0 < await settled(lambda: len(steps)) < 500


def test_a_prompt_that_does_not_fit_says_so(llm: ChatCtxCompress) -> None:
    with pytest.raises(InputError, match="must fit the model's window of 2048 tokens"):
        llm.invoke("owl " * 3000)
