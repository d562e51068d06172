"""`ChatCtxCompress(base_url=...)`: the same model class in front of a server that speaks vLLM's protocol."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langchain_ctxcompress import ChatCtxCompress, CtxCompressor, SoftContextPrompt

from ctxcompress import ConfigError, ContextCompressor, ServingError

KEY = "sk-secret-4711"
QUESTION = "Who discovered penicillin?"
PIECES = ["Alex", "ander", " Fleming"]


class Server(ThreadingHTTPServer):
    """Answers every prompt alike and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send({"data": [{"id": "tiny", "max_model_len": 512}, {"id": "other", "max_model_len": 512}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self.send({"error": "wrong key"}, 401)
        elif body["stream"]:
            self.send_response(200)
            self.end_headers()
            for place, text in enumerate(PIECES):
                choice = {"text": text, "finish_reason": "stop" if place == len(PIECES) - 1 else None}
                self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            choice = {"text": "".join(PIECES), "finish_reason": "stop"}
            self.send({"choices": [choice], "usage": {"completion_tokens": 3}})

    def send(self, content: dict[str, Any], status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(socket_enabled: None) -> Iterator[Server]:
    """The server, on a port of its own."""
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def served(server: Server, wide: ContextCompressor) -> ChatCtxCompress:
    """A chat model in front of it."""
    url = f"http://127.0.0.1:{server.server_port}"
    return ChatCtxCompress(compressor=wide, base_url=url, served_model="other", api_key=KEY, max_retries=0)


@pytest.fixture
def messages(wide: ContextCompressor, documents: list[Document]) -> list[BaseMessage]:
    """A question about soft tokens."""
    settings = CtxCompressor(compressor=wide, compression_ratio=3, mode="soft")
    found = settings.compress_documents(documents, QUESTION)
    return SoftContextPrompt().invoke({"context": found, "question": QUESTION})


async def test_every_way_to_call(
    server: Server, served: ChatCtxCompress, messages: list[BaseMessage]
) -> None:
    replies = [
        served.invoke(messages).text,
        (await served.ainvoke(messages)).text,
        "".join(chunk.text for chunk in served.stream(messages)),
        "".join([chunk.text async for chunk in served.astream(messages)]),
        served.batch([messages])[0].text,
    ]
    assert replies == ["Alexander Fleming"] * 5
    assert server.asked == ["/v1/models"]
    prompts = {body["prompt_embeds"] for body in server.bodies}
    (saved,) = prompts
    rows_TD = torch.load(io.BytesIO(base64.b64decode(saved)), weights_only=True)
    assert len(rows_TD) == served.get_num_tokens_from_messages(messages)


def test_settings_reach_the_server(server: Server, served: ChatCtxCompress) -> None:
    reply = served.invoke("Hi.", temperature=0.5, top_p=0.9, seed=4, max_tokens=7, stop=["."])
    (body,) = server.bodies
    assert {name: body[name] for name in ("model", "temperature", "top_p", "seed", "max_tokens", "stop")} == {
        "model": "other",
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 4,
        "max_tokens": 7,
        "stop": ["."],
    }
    assert len(body["prompt"]) == reply.usage_metadata["input_tokens"]
    assert reply.usage_metadata["output_tokens"] == 3
    assert served._identifying_params["base_url"] == served.base_url
    assert served._get_llm_string() != ChatCtxCompress(compressor=served.compressor)._get_llm_string()


def test_the_key_shows_in_no_error(served: ChatCtxCompress) -> None:
    wrong = ChatCtxCompress(
        compressor=served.compressor, base_url=served.base_url, api_key="sk-wrong", max_retries=0
    )
    with pytest.raises(ServingError, match="got 401") as caught:
        wrong.invoke("Hi.")
    assert "sk-wrong" not in str(caught.value) + repr(wrong)


def test_what_is_served_is_fixed(served: ChatCtxCompress) -> None:
    with pytest.raises(ConfigError, match="must be the one that is served"):
        served.invoke("Hi.", model="tiny-other")
    with pytest.raises(ConfigError, match="base_url must be like"):
        ChatCtxCompress(compressor=served.compressor, base_url="http://me:pw@host").invoke("Hi.")
