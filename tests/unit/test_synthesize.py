"""A teacher over HTTP: a real local server that speaks the protocol, and fails in the ways servers do."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ctxcompress.errors import ConfigError, InputError, MissingExtraError, ModelError
from ctxcompress.train import synthesize as module
from ctxcompress.train.synthesize import INSTRUCTION, synthesize

KEY = "sk-secret-4711"
Reply = tuple[int, dict[str, str], bytes]


def words(text: str) -> int:
    return len(text.split())


def completion(content: Any, finish: str = "stop") -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
    return 200, {}, json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


class Teacher(ThreadingHTTPServer):
    """Answers with the first word of a text, after the replies in `script`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Reply] = []
        self.asked: list[str] = []
        self.times: list[float] = []
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.delay = 0.0
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Teacher
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        teacher = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with teacher.lock:
            teacher.at_once += 1
            teacher.most_at_once = max(teacher.most_at_once, teacher.at_once)
            teacher.times.append(time.monotonic())
            status, headers, content = self.reply(body)
        time.sleep(teacher.delay)
        with teacher.lock:
            teacher.at_once -= 1
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def reply(self, body: dict[str, Any]) -> Reply:
        teacher = self.server
        if self.path != "/v1/chat/completions" or body["model"] != "teacher":
            return 404, {}, b'{"error": {"message": "The model does not exist."}}'
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return 401, {}, f'{{"error": "{self.headers["Authorization"]} is no key"}}'.encode()
        assert self.headers["Content-Type"] == "application/json"
        (turn,) = body["messages"]
        assert turn["role"] == "user"
        assert turn["content"].startswith(INSTRUCTION)
        text = turn["content"].removeprefix(INSTRUCTION)
        teacher.asked.append(text)
        teacher.bodies.append(body)
        return teacher.script.pop(0) if teacher.script else completion(text.split()[0])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def teacher(socket_enabled: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Teacher]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "FIRST_WAIT", 0.02)
    with Teacher() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def ask(teacher: Teacher, tmp_path: Path) -> Callable[..., int]:
    def run(texts: Any, **settings: Any) -> int:
        known = {"endpoint": teacher.endpoint, "model": "teacher", "api_key": KEY, "count": words}
        return synthesize(texts, tmp_path / "labels.jsonl", **(known | settings))

    return run


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "labels.jsonl").read_bytes().split(b"\n")[:-1]]


def records(*texts: str) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def test_one_line_per_text(teacher: Teacher, ask: Callable[..., int], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    # U+2028 ends a line for str.splitlines: it must not stand in the file as it is.
    texts = [{"text": "a b c d e f g h", "id": 7}, *records("Rome\u2028lies here", "a b c d e f g h")]
    assert ask(texts, concurrency=1, progress=lambda _, done, total: seen.append((done, total))) == 2
    first, second = lines(tmp_path)
    # 8 words / 1 word = 2^3; the third text is the first once more.
    assert (first["id"], first["summary"], first["log2_ratio"]) == ("7", "a", 3.0)
    assert (first["tokens"], first["summary_tokens"], first["model"]) == (8, 1, "teacher")
    assert second["text"] == "Rome\u2028lies here"
    assert len((tmp_path / "labels.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert len(second["id"]) == 24
    assert teacher.asked == ["a b c d e f g h", "Rome\u2028lies here"]
    assert teacher.bodies[0]["temperature"] == 0
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_key_from_the_environment_and_own_options(
    teacher: Teacher,
    ask: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert ask(records("a b"), api_key=None, options={"max_tokens": 9}) == 1
    assert teacher.bodies[0]["max_tokens"] == 9
    assert "temperature" not in teacher.bodies[0]
    assert "/v1/chat/completions" in caplog.text
    assert KEY not in caplog.text


def test_a_second_run_asks_for_what_is_missing(
    teacher: Teacher, ask: Callable[..., int], tmp_path: Path
) -> None:
    assert ask(records("a b", "c d", "é f"), concurrency=1) == 3
    whole = (tmp_path / "labels.jsonl").read_bytes()
    # Cut in the middle of the last line, as a crash would.
    (tmp_path / "labels.jsonl").write_bytes(whole[:-20])
    teacher.asked.clear()
    assert ask(records("a b", "c d", "é f")) == 1
    assert teacher.asked == ["é f"]
    assert (tmp_path / "labels.jsonl").read_bytes() == whole
    assert ask(records("a b", "c d", "é f")) == 0


def test_retry_after_is_obeyed_by_all(teacher: Teacher, ask: Callable[..., int]) -> None:
    teacher.script = [(429, {"Retry-After": "1"}, b"slow down")]
    assert ask(records("a b"), concurrency=1) == 1
    first, second = teacher.times
    assert 1.0 <= second - first < 2.5


@pytest.mark.parametrize(
    "bad",
    [
        (500, {}, b"oops"),
        (503, {}, b""),
        (200, {}, b'{"choices": [{"mess'),
        (200, {}, b'{"choices": []}'),
        (200, {}, b"[]"),
        completion(None),
        completion("  "),
        completion("\ud800"),
    ],
)
def test_faults_that_pass_are_tried_again(teacher: Teacher, ask: Callable[..., int], bad: Reply) -> None:
    teacher.script = [bad, bad]
    assert ask(records("a b c d"), retries=2) == 1
    assert len(teacher.asked) == 3


def test_a_slow_reply_is_asked_for_again(teacher: Teacher, ask: Callable[..., int]) -> None:
    teacher.delay = 0.5
    with pytest.raises(ModelError, match=r"2 attempts failed; the last: no reply within 0.05 s"):
        ask(records("a b"), timeout=0.05, retries=1)


def test_waits_grow(teacher: Teacher, ask: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.1)
    teacher.script = [(500, {}, b"")] * 3
    assert ask(records("a b")) == 1
    gaps = [later - earlier for earlier, later in zip(teacher.times, teacher.times[1:], strict=False)]
    # Between half and all of 0.1, 0.2, 0.4 s, and the time of a request.
    assert all(longest / 2 <= gap < longest + 0.5 for gap, longest in zip(gaps, (0.1, 0.2, 0.4), strict=True))


def test_one_text_without_summary_stops_no_other(
    teacher: Teacher, ask: Callable[..., int], tmp_path: Path
) -> None:
    teacher.script = [(400, {}, b"context length exceeded"), completion("x", "length")]
    with pytest.raises(
        ModelError, match=r"2 texts got no summary \(one, two\).*400: 'context length"
    ) as caught:
        ask([{"id": "one", "text": "a"}, {"id": "two", "text": "b"}, *records("c d")], concurrency=1)
    assert KEY not in str(caught.value)
    assert [line["text"] for line in lines(tmp_path)] == ["c d"]
    assert ask([{"id": "one", "text": "a"}, *records("c d")]) == 1


def test_a_dead_server_ends_the_run(teacher: Teacher, ask: Callable[..., int]) -> None:
    teacher.script = [(500, {}, b"dead")] * 100
    with pytest.raises(ModelError, match=r"10 texts in a row .*500: 'dead'"):
        ask((record for record in records(*"abcdefghijklmnop")), concurrency=1, retries=0)
    assert len(teacher.asked) == 10


def test_refusals_end_the_run_and_show_no_key(teacher: Teacher, ask: Callable[..., int]) -> None:
    with pytest.raises(ModelError, match=r"401.*Bearer <api key> is no key.*OPENAI_API_KEY") as caught:
        ask(records("a", "b"), api_key="sk-wrong")
    assert "sk-wrong" not in str(caught.value)
    with pytest.raises(ModelError, match=r"404.*usually ends in /v1"):
        ask(records("a"), endpoint=teacher.endpoint.removesuffix("/v1"))
    with pytest.raises(ModelError, match=r"'other'.*404.*does not exist"):
        ask(records("a"), model="other")
    teacher.script = [(429, {"Retry-After": "86400"}, b"daily limit")]
    with pytest.raises(ModelError, match="no request for 86400 s"):
        ask(records("a"))


def test_no_more_requests_than_allowed(teacher: Teacher, ask: Callable[..., int]) -> None:
    # 600 a minute: one in 0.1 s, though four could run at once.
    assert ask(records(*"abcd"), requests_per_minute=600, concurrency=4) == 4
    assert teacher.times[-1] - teacher.times[0] >= 0.28


def test_requests_run_at_once_up_to_the_limit(teacher: Teacher, ask: Callable[..., int]) -> None:
    teacher.delay = 0.1
    assert ask(records(*"abcdefgh"), concurrency=3) == 8
    assert teacher.most_at_once == 3


def test_thoughts_are_no_part_of_the_summary(
    teacher: Teacher, ask: Callable[..., int], tmp_path: Path
) -> None:
    teacher.script = [completion("<think>\nwell, well\n</think>\n\nRome")]
    assert ask(records("Rome is a city of Italy .")) == 1
    assert lines(tmp_path)[0]["summary"] == "Rome"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([{"text": " "}], "text number 1 .* not empty"),
        ([{"title": "a"}], "text number 1"),
        (["a"], "text number 1"),
        ([{"text": "\ud800"}], "valid Unicode"),
        ([{"text": "a", "id": "x"}, {"text": "b", "id": "x"}], "'x' of text number 2 belongs to another"),
    ],
)
def test_unusable_texts(ask: Callable[..., int], texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ask(texts, concurrency=1)


def test_unusable_output(ask: Callable[..., int], tmp_path: Path) -> None:
    assert ask(records("a")) == 1
    with pytest.raises(InputError, match=r"line 1 of .* by 'teacher', got the model 'other'"):
        ask(records("a"), model="other")
    (tmp_path / "labels.jsonl").write_bytes(b'{"id": 1\n')
    with pytest.raises(InputError, match=r"line 1 of .* must be an object"):
        ask(records("a"))
    (tmp_path / "labels.jsonl").unlink()
    (tmp_path / "labels.jsonl").mkdir()
    with pytest.raises(InputError, match="must be a file"):
        ask(records("a"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"endpoint": "localhost:8000"}, "must be a URL"),
        ({"endpoint": "http://me:hush@host/v1"}, "without user, password"),
        ({"endpoint": "http://host:99999/v1"}, "no valid host and port"),
        ({"endpoint": "http://host:x/v1"}, "no valid host and port"),
        ({"api_key": "sk-hush\nb"}, "printable ASCII"),
        ({"model": ""}, "model"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": 0}, "timeout"),
        ({"requests_per_minute": float("nan")}, "requests_per_minute"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    known = {"endpoint": "http://localhost/v1", "model": "m", "api_key": KEY, "count": words}
    with pytest.raises(ConfigError, match=message) as caught:
        synthesize([], tmp_path / "labels.jsonl", **(known | settings))
    assert "hush" not in str(caught.value)


def test_httpx_is_an_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingExtraError, match=r"httpx.*ctxcompress\[train\]"):
        synthesize([], tmp_path / "labels.jsonl", endpoint="http://localhost/v1", model="m", count=words)
