"""The remote decoder against a real local server, which speaks vLLM's protocol by running the tiny model."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import logging
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ctxcompress import (
    Backbone,
    CheckpointError,
    Completion,
    ConfigError,
    InputError,
    LocalDecoder,
    MissingExtraError,
    ServingError,
    SoftTokens,
    VLLMDecoder,
    checkpoint,
    remote,
)
from ctxcompress.cli import app
from ctxcompress.config import SoftConfig
from ctxcompress.prompt import chat_prompt, question_prompt
from ctxcompress.soft import SoftCompressor

KEY = "sk-secret-4711"
FINGERPRINT = "abc"
Reply = tuple[int, dict[str, str], bytes]
LOST = (0, {}, b"")  # instead of a reply, the connection ends


class Server(ThreadingHTTPServer):
    """Generates greedily, after the replies in `script`.

    Attributes:
        bodies: of all completion requests.
        left: clients that closed their connection before the end of their answer.
    """

    daemon_threads = True
    # A batch connects all at once.
    request_queue_size = 64

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.backbone = backbone
        self.models: list[dict[str, Any]] = [{"id": "tiny", "max_model_len": 256}, {"id": "other"}]
        self.script: list[Reply] = []
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = self.left = 0
        self.free: int | None = None  # pieces of a stream before the gate
        self.gate = threading.Event()
        self.fragment = 1 << 16  # bytes sent at a time
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path != "/v1/models":
            self.send(404, {}, b'{"detail":"Not Found"}')
        elif self.authorized():
            self.send(200, {}, json.dumps({"object": "list", "data": self.server.models}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append(self.path)
            server.bodies.append(body)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            reply = server.script.pop(0) if server.script else None
        try:
            if reply == LOST:
                self.close_connection = True
            elif reply:
                self.send(*reply)
            elif self.authorized():
                assert self.path == "/v1/completions"
                self.complete(body)
        except ConnectionError:
            with server.lock:
                server.left += 1
        finally:
            with server.lock:
                server.at_once -= 1

    def authorized(self) -> bool:
        if self.headers["Authorization"] == f"Bearer {KEY}":
            return True
        self.send(401, {}, json.dumps({"error": f"{self.headers['Authorization']} is wrong"}).encode())
        return False

    def complete(self, body: dict[str, Any]) -> None:
        try:
            rows_TD = embeddings(self.server.backbone, body)
        except ValueError as error:
            return self.send(400, {}, json.dumps({"error": {"message": str(error)}}).encode())
        pieces = generated(self.server.backbone, rows_TD, body)
        if body["stream"]:
            return self.stream(pieces, body)
        if self.server.free is not None:
            self.wait()
        texts, reasons = zip(*pieces, strict=True)
        choice = {"index": 0, "text": "".join(texts), "finish_reason": reasons[-1]}
        usage = {"prompt_tokens": len(rows_TD), "completion_tokens": len(texts)}
        return self.send(200, {}, json.dumps({"choices": [choice], "usage": usage}).encode())

    def stream(self, pieces: Iterator[tuple[str, str | None]], body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        sent = 0
        for count, (text, reason) in enumerate(pieces):
            if count == self.server.free and not self.wait():
                return
            sent += 1
            self.write(event({"choices": [{"index": 0, "text": text, "finish_reason": reason}]}))
        if body["stream_options"] == {"include_usage": True}:
            self.write(event({"choices": [], "usage": {"completion_tokens": sent}}))
        self.write(b"data: [DONE]\n\n")

    def wait(self) -> bool:
        """Whether the client is still there when the gate is open."""
        while not self.server.gate.wait(0.01):
            if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(
                1, socket.MSG_PEEK
            ):
                with self.server.lock:
                    self.server.left += 1
                return False
        return True

    def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.write(content)

    def write(self, content: bytes) -> None:
        for start in range(0, len(content), self.server.fragment):
            self.wfile.write(content[start : start + self.server.fragment])

    def log_message(self, format: str, *args: Any) -> None:
        pass


def event(value: dict[str, Any]) -> bytes:
    # Characters stand in it as they are: pydantic, and so vLLM, escapes none.
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def embeddings(backbone: Backbone, body: dict[str, Any]) -> torch.Tensor:
    """The prompt as vLLM reads it: one of two fields, a tensor of two dimensions and the right size."""
    assert ("prompt" in body) != ("prompt_embeds" in body)
    embed = backbone.model.get_input_embeddings()
    if "prompt" in body:
        assert all(isinstance(token, int) for token in body["prompt"])
        return embed(torch.tensor(body["prompt"])).detach()
    payload = base64.b64decode(body["prompt_embeds"], validate=True)
    tensor = torch.load(io.BytesIO(payload), weights_only=True)
    assert tensor.ndim == 2
    assert tensor.is_floating_point()
    if tensor.shape[1] != embed.weight.shape[1]:
        raise ValueError(f"`prompt_embeds` hidden_size {tensor.shape[1]} does not match")
    return tensor.to(embed.weight)


@torch.inference_mode()
def generated(
    backbone: Backbone, rows_TD: torch.Tensor, body: dict[str, Any]
) -> Iterator[tuple[str, str | None]]:
    """New text with each token, and at the end why it ended; what may begin a stop string is held back."""
    assert len(rows_TD) + body["max_tokens"] <= 256
    embed, stop = backbone.model.get_input_embeddings(), body["stop"]
    held, ids, sent = max(map(len, stop), default=1) - 1, [], 0
    for _ in range(body["max_tokens"]):
        token = int(backbone.model(inputs_embeds=rows_TD[None]).logits[0, -1].argmax())
        rows_TD = torch.cat([rows_TD, embed(torch.tensor([token]))])
        ended = token == backbone.tokenizer.eos_token_id
        ids += [] if ended else [token]
        text = backbone.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        cut = min((text.find(string) for string in stop if string in text), default=None)
        if ended or cut is not None:
            yield text[sent:cut], "stop"
            return
        if len(ids) == body["max_tokens"]:
            yield text[sent:], "length"
            return
        # Bytes at the end may still become a character.
        sure = max(len(text.rstrip("\ufffd")) - held, sent)
        yield text[sent:sure], None
        sent = sure


def serve(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.gate.set()
    server.shutdown()
    thread.join()


@pytest.fixture
def server(backbone: Backbone, socket_enabled: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    with Server(backbone) as server:
        yield from serve(server)


@pytest.fixture
def decoder(backbone: Backbone, server: Server) -> VLLMDecoder:
    return VLLMDecoder(backbone, server.url, fingerprint=FINGERPRINT, api_key=KEY)


@pytest.fixture
def local(backbone: Backbone) -> LocalDecoder:
    return LocalDecoder(backbone, FINGERPRINT)


def soft(rows: int, seed: int = 0) -> SoftTokens:
    values = torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))
    return SoftTokens(values, 4 * rows, ratio=4, fingerprint=FINGERPRINT)


@pytest.fixture
def prompts(backbone: Backbone) -> dict[str, Any]:
    # Rows of a large tensor: what lies around them must not be sent.
    view = dataclasses.replace(soft(1), embeddings_MD=soft(5000, 3).embeddings_MD[10:16])
    question = "Where is Rome?"
    return {
        "text": question_prompt(backbone, question, [["Rome is in Italy."]]),
        "soft": [soft(7, 1)],
        "mixed": question_prompt(backbone, question, [[soft(5), " and Tiber"], ["Owls fly."], [view]]),
        "one document": chat_prompt(backbone, ["The fox: ", soft(9, 5), "\nWho jumps?"]),
    }


SETTINGS: list[dict[str, Any]] = [
    {"max_new_tokens": 1},
    {"max_new_tokens": 24},
    {"max_new_tokens": 24, "seed": 3, "top_p": 0.5},
    {"max_new_tokens": 24, "stop": ["e", "zz", "a\n"]},
    {"max_new_tokens": 24, "stop": "q"},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["text", "soft", "mixed", "one document"])
def test_answers_equal_the_local_decoders(
    decoder: VLLMDecoder,
    local: LocalDecoder,
    server: Server,
    prompts: dict[str, Any],
    kind: str,
    settings: dict[str, Any],
) -> None:
    expected = local.generate(prompts[kind], **settings)
    assert decoder.generate(prompts[kind], **settings) == expected
    server.fragment = 5
    pieces = list(decoder.stream(prompts[kind], **settings))
    assert "".join(pieces) == expected.text
    assert all(pieces)
    first, second = server.bodies
    assert (first["stream"], second["stream"]) == (False, True)
    if kind == "text":
        assert first["prompt"] == list(prompts["text"][0])
    else:
        # 32 float32 a row as base64, and what torch.save writes around them.
        assert len(first["prompt_embeds"]) < 4 / 3 * (expected.prompt_tokens * 32 * 4 + 2000)


def test_some_answers_stop_early(local: LocalDecoder, prompts: dict[str, Any]) -> None:
    stopped = [local.generate(prompt, **SETTINGS[3]) for prompt in prompts.values()]
    assert {answer.finish_reason for answer in stopped} >= {"stop"}


def test_a_stream_does_not_wait_for_the_end(
    decoder: VLLMDecoder, local: LocalDecoder, server: Server, prompts: dict[str, Any]
) -> None:
    server.free = 20
    stream = decoder.stream(prompts["mixed"], max_new_tokens=30)
    first = next(stream)
    assert server.at_once == 1
    server.gate.set()
    assert first + "".join(stream) == local.generate(prompts["mixed"], max_new_tokens=30).text


def test_nothing_of_the_models_own_settings_counts(decoder: VLLMDecoder, server: Server) -> None:
    decoder.generate([(1, 2)], temperature=0.5, top_p=0.9, seed=7, stop="x", max_new_tokens=3)
    (body,) = server.bodies
    assert body == {
        "model": "tiny",
        "prompt": [1, 2],
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["x"],
        "stream": False,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def test_a_batch_keeps_its_order(
    decoder: VLLMDecoder, local: LocalDecoder, server: Server, prompts: dict[str, Any]
) -> None:
    assert decoder.generate_batch([]) == []
    assert not server.asked
    many = [*prompts.values()] * 5
    expected = [local.generate(prompt, max_new_tokens=12) for prompt in many]
    assert decoder.generate_batch(many, max_new_tokens=12) == expected
    assert 1 < server.most_at_once <= remote.CONCURRENCY
    assert len(server.bodies) == len(many)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda prompt: decoder.generate(prompt, max_new_tokens=12), many)) == expected


def test_one_failure_ends_a_batch(decoder: VLLMDecoder, server: Server, prompts: dict[str, Any]) -> None:
    server.script = [(400, {}, b"no")]
    with pytest.raises(ServingError, match="got 400: 'no'"):
        decoder.generate_batch([prompts["soft"]] * 40, max_new_tokens=8)
    assert len(server.bodies) < 40


async def test_async_equals_sync(decoder: VLLMDecoder, local: LocalDecoder, prompts: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 20, "stop": ["zz"]}
    expected = [local.generate(prompt, **settings) for prompt in prompts.values()]
    whole = [decoder.agenerate(prompt, **settings) for prompt in prompts.values()]
    assert await asyncio.gather(*whole) == expected
    for prompt, answer in zip(prompts.values(), expected, strict=True):
        assert "".join([piece async for piece in decoder.astream(prompt, **settings)]) == answer.text


def test_any_event_loop_will_do(decoder: VLLMDecoder, local: LocalDecoder, prompts: dict[str, Any]) -> None:
    expected = local.generate(prompts["mixed"], max_new_tokens=8)

    async def ask() -> list[Completion]:
        return await asyncio.gather(
            *(decoder.agenerate(prompts["mixed"], max_new_tokens=8) for _ in range(3))
        )

    assert asyncio.run(ask()) == [expected] * 3
    with ThreadPoolExecutor(2) as pool:
        for answers in pool.map(lambda _: asyncio.run(ask()), range(2)):
            assert answers == [expected] * 3


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("streaming", [False, True])
async def test_cancelling_a_task_leaves_the_server(
    decoder: VLLMDecoder, server: Server, prompts: dict[str, Any], streaming: bool
) -> None:
    server.free = 3
    heard: list[str] = []

    async def read() -> None:
        if streaming:
            async for piece in decoder.astream(prompts["mixed"], max_new_tokens=60):
                heard.append(piece)
        else:
            await decoder.agenerate(prompts["mixed"], max_new_tokens=60)

    task = asyncio.create_task(read())
    await until(lambda: len(server.bodies) == 1)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: server.left == 1)


async def test_closing_a_stream_leaves_the_server(
    decoder: VLLMDecoder, server: Server, prompts: dict[str, Any]
) -> None:
    server.free = 20
    sync = decoder.stream(prompts["mixed"], max_new_tokens=60)
    assert not server.asked
    assert await asyncio.to_thread(next, sync)
    sync.close()
    await until(lambda: server.left == 1)
    stream = decoder.astream(prompts["mixed"], max_new_tokens=60)
    assert await anext(stream)
    await stream.aclose()
    await until(lambda: server.left == 2)


def test_line_separators_are_text(decoder: VLLMDecoder, server: Server) -> None:
    texts = [" \u2028a\x85", "b\x0b\x0c\u2029", "\x1cc", "d\n", " \n"]
    stream = b": a comment\r\n\r\n" + b"".join(
        event({"choices": [{"text": text, "finish_reason": "stop" if place == 4 else None}]})
        for place, text in enumerate(texts)
    )
    server.fragment = 3
    server.script = [(200, {}, stream), (200, {}, stream.replace(b"\n", b"\r\n"))]
    for _ in range(2):
        assert "".join(decoder.stream([(1, 2)])) == "".join(texts).strip()


# --------------------------------------------------------------------------------------- what is refused


def test_the_servers_window_counts(decoder: VLLMDecoder, backbone: Backbone, server: Server) -> None:
    server.models = [{"id": "tiny", "max_model_len": 40}]
    for method in (decoder.generate, lambda *args, **kw: list(decoder.stream(*args, **kw))):
        with pytest.raises(InputError, match=r"window of 40 tokens, got 31 \+ 10; lower the budget"):
            method([(1,) * 31], max_new_tokens=10)
    assert decoder.generate([(1,) * 30], max_new_tokens=10).prompt_tokens == 30
    assert server.asked == ["/v1/models", "/v1/completions"]
    server.models = [{"id": "tiny", "max_model_len": 100_000}]
    wide = VLLMDecoder(backbone, server.url, api_key=KEY)
    with pytest.raises(InputError, match="window of 256 tokens"):
        wide.generate([(1,) * 250], max_new_tokens=10)
    with pytest.raises(InputError, match="prompt 1 and answer must fit"):
        decoder.generate_batch([[(1,)], [(1,) * 31]], max_new_tokens=10)
    assert len(server.bodies) == 1


def test_the_model_may_be_named(backbone: Backbone, server: Server) -> None:
    named = VLLMDecoder(backbone, server.url, model="other", api_key=KEY)
    assert named.generate([(1, 2)], max_new_tokens=2).completion_tokens == 2
    assert server.bodies[0]["model"] == "other"
    with pytest.raises(ServingError, match=r"the model 'x', got \['other', 'tiny'\]; pass one of them"):
        VLLMDecoder(backbone, server.url, model="x", api_key=KEY).generate([(1, 2)])
    server.models = []
    with pytest.raises(ServingError, match=r"got \[\]"):
        VLLMDecoder(backbone, server.url, api_key=KEY).generate([(1, 2)])


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        (dataclasses.replace(soft(2), fingerprint="xyz"), CheckpointError, "'abc', got some for 'xyz'"),
        (
            dataclasses.replace(soft(2), embeddings_MD=torch.zeros(2, 31)),
            InputError,
            r"\(M, 32\), got \(2, 31\)",
        ),
        (dataclasses.replace(soft(2), embeddings_MD=torch.zeros(1, 2, 32)), InputError, r"got \(1, 2, 32\)"),
        (
            dataclasses.replace(soft(2), embeddings_MD=torch.full((2, 32), torch.nan)),
            InputError,
            "must be finite",
        ),
    ],
)
async def test_what_a_server_would_choke_on_is_not_sent(
    decoder: VLLMDecoder, server: Server, part: SoftTokens, error: type[Exception], message: str
) -> None:
    for method in (decoder.generate, decoder.stream, decoder.astream):
        with pytest.raises(error, match=message):
            method([(1, 2), part])
    with pytest.raises(error, match=message):
        await decoder.agenerate([part])
    with pytest.raises(error, match=message):
        decoder.generate_batch([[(1, 2)], [part]])
    assert not server.asked


async def asked(decoder: VLLMDecoder, how: str, **settings: Any) -> str:
    prompt = [soft(3)]
    if how == "generate":
        return (await asyncio.to_thread(decoder.generate, prompt, **settings)).text
    if how == "agenerate":
        return (await decoder.agenerate(prompt, **settings)).text
    if how == "stream":
        return "".join(await asyncio.to_thread(lambda: list(decoder.stream(prompt, **settings))))
    return "".join([piece async for piece in decoder.astream(prompt, **settings)])


HOW = ["generate", "agenerate", "stream", "astream"]
DISABLED = (
    b'{"error":{"message":"You must set `--enable-prompt-embeds` to input `prompt_embeds`.","code":400}}'
)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((400, {}, DISABLED), r"got 400: .*; serve the folder .* --enable-prompt-embeds$"),
        ((422, {}, b'{"detail":"prompt is missing"}'), r"got 422: .*; serve the folder"),
        ((400, {}, b"temperature must be in [0, 2]"), "got 400: .*; mend what it names"),
        ((401, {}, b'{"error":"Unauthorized"}'), "got 401: .*; pass the key the server was started with"),
        ((403, {}, b""), "got 403: ''; pass a key that may"),
        ((404, {}, b"?"), "completions must answer 200, got 404: .*; check base_url, and model"),
        ((413, {}, b"<html>"), "got 413: .*; raise the limit on request bodies"),
        ((307, {"Location": "http://127.0.0.1/"}, b""), "got 307: ''; see the server's log"),
        ((200, {"Content-Encoding": "gzip"}, b"no gzip"), "a whole answer, got DecodingError"),
    ],
)
async def test_refusals_are_explained_and_not_repeated(
    decoder: VLLMDecoder, server: Server, how: str, reply: Reply, message: str
) -> None:
    server.script = [reply] * 3
    with pytest.raises(ServingError, match=message):
        await asked(decoder, how)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("fault", [(500, {}, b"oops"), (503, {}, b""), (429, {}, b"slow down"), LOST])
async def test_faults_that_pass_are_tried_again(
    decoder: VLLMDecoder, local: LocalDecoder, server: Server, how: str, fault: Reply
) -> None:
    expected = local.generate([soft(3)], max_new_tokens=6).text
    server.script = [fault] * 2
    assert await asked(decoder, how, max_new_tokens=6) == expected
    assert len(server.bodies) == 3
    server.script = [fault] * 3
    reason = "ReadError|RemoteProtocolError" if fault is LOST else f"got {fault[0]}"
    with pytest.raises(ServingError, match=reason):
        await asked(decoder, how, max_new_tokens=6)
    assert len(server.bodies) == 6


def test_the_server_may_ask_for_time(decoder: VLLMDecoder, server: Server) -> None:
    server.script = [(429, {"Retry-After": "1"}, b""), (503, {"Retry-After": "Wed, 21 Oct 2026"}, b"")]
    started = time.monotonic()
    decoder.generate([(1, 2)], max_new_tokens=1)
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize("how", HOW)
async def test_slow_answers_are_not_asked_for_again(backbone: Backbone, server: Server, how: str) -> None:
    decoder = VLLMDecoder(backbone, server.url, fingerprint=FINGERPRINT, api_key=KEY, timeout=1)
    server.free = 0
    with pytest.raises(ServingError, match=r"an answer in time, got ReadTimeout.*; raise timeout, or lower"):
        await asked(decoder, how)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("how", HOW)
async def test_nobody_there(backbone: Backbone, server: Server, how: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        decoder = VLLMDecoder(backbone, url, fingerprint=FINGERPRINT, api_key=KEY)
        message = rf"{url}/v1 must give an answer, got ConnectError.*; check base_url, or serve the folder"
        with pytest.raises(ServingError, match=message):
            await asked(decoder, how)


def reply(**changes: Any) -> Reply:
    choice = {"text": "x", "finish_reason": "stop"}
    content = {"choices": [choice], "usage": {"completion_tokens": 1}, **changes}
    return 200, {}, json.dumps(content).encode()


@pytest.mark.parametrize("how", ["generate", "agenerate"])
@pytest.mark.parametrize(
    "bad",
    [
        (200, {}, b""),
        (200, {}, b"<html>\xff a proxy's page</html>"),
        (200, {}, b'{"choices": [{"te'),
        (200, {}, b"[]"),
        (200, {}, b"7"),
        reply(choices=[]),
        reply(choices=[{"text": None, "finish_reason": "stop"}]),
        reply(choices=[{"text": "x", "finish_reason": None}]),
        reply(choices=[{"text": "x", "finish_reason": "abort"}]),
        reply(usage=None),
        reply(usage={}),
    ],
)
async def test_malformed_answers(decoder: VLLMDecoder, server: Server, how: str, bad: Reply) -> None:
    server.script = [bad]
    with pytest.raises(ServingError, match=r"must answer as OpenAI's completions do, got .*; check base_url"):
        await asked(decoder, how)


@pytest.mark.parametrize("how", ["stream", "astream"])
@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"data: [DONE]\n\n",
        event({"choices": [{"text": "x", "finish_reason": None}]}) + b"data: [DONE]\n\n",
        event({"choices": [{"text": "x", "finish_reason": None}]}) + event({"error": {"message": "dead"}}),
        event({"choices": [{"text": "x", "finish_reason": "abort"}]}),
        b'data: {"choices": [\n\n',
        b"<html></html>",
    ],
)
async def test_malformed_streams(decoder: VLLMDecoder, server: Server, how: str, bad: bytes) -> None:
    server.script = [(200, {}, bad)]
    with pytest.raises(ServingError, match="must answer as OpenAI's completions do, got "):
        await asked(decoder, how)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("how", ["stream", "astream"])
async def test_a_stream_that_breaks_off_is_not_asked_for_again(
    decoder: VLLMDecoder, server: Server, how: str
) -> None:
    start = event({"choices": [{"text": "x", "finish_reason": None}]})
    # It ends before the length it announced.
    server.script = [(200, {"Content-Length": "999", "Connection": "close"}, start)]
    with pytest.raises(ServingError, match="a whole answer, got RemoteProtocolError"):
        await asked(decoder, how)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "data", [b"<html>", b'{"data": 3}', b'{"data": [{"id": "a", "max_model_len": "x"}]}', b"[]"]
)
def test_malformed_models(
    decoder: VLLMDecoder, server: Server, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send(200, {}, data))
    with pytest.raises(ServingError, match="must answer as OpenAI's completions do"):
        decoder.generate([(1, 2)])


@pytest.mark.parametrize("how", HOW)
async def test_the_key_is_sent_and_never_told(
    backbone: Backbone, server: Server, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    known = {"fingerprint": FINGERPRINT, "max_retries": 0}
    right = VLLMDecoder(backbone, server.url, api_key=f" {KEY}\n", **known)
    await asked(right, how, max_new_tokens=3)
    wrong = VLLMDecoder(backbone, server.url, api_key="sk-wrong", **known)
    with pytest.raises(ServingError, match=r"401: .*Bearer <api key> is wrong") as caught:
        await asked(wrong, how)
    told = [str(caught.value)]
    for bad in (
        (500, {}, KEY.encode()),
        (200, {}, b'data: {"key": "' + KEY.encode() + b'"}\n'),
        reply(choices=[{"text": "x", "finish_reason": KEY}]),
        (403, {}, b"a" * 290 + KEY.encode()),
    ):
        server.script = [bad]
        with pytest.raises(ServingError) as caught:
            await asked(right, how)
        told.append(str(caught.value))
    with pytest.raises(ServingError, match="None is wrong"):
        await asked(VLLMDecoder(backbone, server.url, **known), how)
    assert not any(
        "sk-" in text for text in (*told, caplog.text, repr(right), str(vars(right).get("_served")))
    )


def test_a_proxy_is_not_asked_for_this_machine(
    backbone: Backbone, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for host in ("127.0.0.1", "localhost"):
        url = f"http://{host}:{server.server_port}"
        assert VLLMDecoder(backbone, url, api_key=KEY).generate([(1, 2)], max_new_tokens=1)
    # Another machine is reached through the proxy, and there is none.
    far = VLLMDecoder(backbone, "http://vllm.example", max_retries=0)
    with pytest.raises(ServingError, match=r"ConnectError.*refused"):
        far.generate([(1, 2)])


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_base_urls(backbone: Backbone, server: Server, path: str) -> None:
    assert VLLMDecoder(backbone, server.url + path, api_key=KEY).generate([(1, 2)], max_new_tokens=1)
    assert server.asked == ["/v1/models", "/v1/completions"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url must be like http://localhost:8000"),
        ({"base_url": "http://"}, "base_url must be"),
        ({"base_url": "http://host:99999"}, "base_url must be"),
        ({"base_url": "http://host:x"}, "base_url must be"),
        ({"base_url": "ftp://host"}, "base_url must be"),
        ({"base_url": None}, "base_url must be"),
        ({"base_url": "http://me:sk-1@host"}, "base_url must be"),
        ({"base_url": "http://host/v1?key=sk-1"}, "base_url must be"),
        ({"base_url": "http://host/#v1"}, "base_url must be"),
        ({"api_key": "sk-1\nx"}, "api_key must be printable ASCII"),
        ({"api_key": "sk-ü"}, "api_key must be printable ASCII"),
        ({"timeout": 0}, "timeout must be > 0"),
        ({"timeout": float("inf")}, "timeout must be > 0"),
        ({"timeout": float("nan")}, "timeout must be > 0"),
        ({"max_retries": -1}, "max_retries >= 0, got 60.0 and -1"),
    ],
)
def test_settings_are_checked(backbone: Backbone, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        VLLMDecoder(backbone, **({"base_url": "http://host"} | settings))
    assert "sk-" not in str(caught.value)


def test_nothing_happens_at_construction(backbone: Backbone) -> None:
    VLLMDecoder(backbone, "https://vllm.example:8000/llm/", api_key=KEY)


def test_httpx_is_an_extra(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingExtraError, match=r'"httpx".*"ctxcompress\[vllm\]"'):
        VLLMDecoder(backbone, "http://localhost:8000")


# ---------------------------------------------------------------------------------------- what is served


def test_export_writes_what_can_be_served(tiny_model: Path, tmp_path: Path) -> None:
    base = Backbone.from_pretrained(tiny_model, device="cpu", dtype=torch.float32)
    torch.manual_seed(0)
    compressor = SoftCompressor(base, SoftConfig(converter_size=16, encoder_rank=2, decoder_rank=4))
    for name, parameter in compressor.trained():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    compressor.finish()
    checkpoint.save(compressor, tmp_path / "adapter")
    command = ["export", tmp_path / "plain", "--adapter", tmp_path / "adapter", "--model", tiny_model]
    outcome = CliRunner().invoke(app, [*map(str, command), "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    assert json.loads(outcome.stdout) == {
        "folder": str(tmp_path / "plain"),
        "fingerprint": compressor.fingerprint,
    }
    outcome = CliRunner().invoke(app, [*map(str, command)])
    assert f"reads soft tokens of {compressor.fingerprint}" in outcome.stdout
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        wanted, bare = compressor.decoder.model(ids).logits, base.model(ids).logits
        # The command loads the model in the machine's own dtype.
        assert (plain(ids).logits - wanted).abs().max() < 0.1 * (bare - wanted).abs().max()
    # Soft tokens are made of the base's table: exporting must not change it.
    table = plain.get_input_embeddings().weight
    torch.testing.assert_close(table, base.model.get_input_embeddings().weight, rtol=0.01, atol=0.01)


def test_export_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    outcome = CliRunner().invoke(app, ["export", str(tmp_path / "file")])
    assert outcome.exit_code == 2
    assert (tmp_path / "file").read_text(encoding="utf-8") == ""


def test_a_stream_ends_with_what_generate_returns(
    decoder: VLLMDecoder, local: LocalDecoder, prompts: dict[str, Any]
) -> None:
    for prompt in prompts.values():
        ends: list[Completion] = []
        text = "".join(decoder.stream(prompt, max_new_tokens=6, on_end=ends.append))
        assert ends == [local.generate(prompt, max_new_tokens=6)]
        assert ends[0].text == text
