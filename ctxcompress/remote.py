"""Prompt -> answer with a model that vLLM serves, on this machine or another.

    GET  /v1/models         which model, and how long its window is
    POST /v1/completions    prompt         token ids, if the prompt has no soft tokens
                            prompt_embeds  base64 of torch.save of (T, D) embeddings, if it has some

Token ids beside soft tokens become embeddings here: adapters change no table, so the base model's own serves.
Every call opens connections of its own and closes them: there is nothing to close afterwards, and any event
loop will do.

Shapes: T tokens of a prompt, D hidden.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import ipaddress
import json
import math
import random
import re
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from ctxcompress.backbone import Backbone, splice
from ctxcompress.decoder import CheckedPrompt, Completion, Decoder, Settings
from ctxcompress.errors import ConfigError, MissingExtraError, ServingError

if TYPE_CHECKING:
    from httpx import URL, AsyncClient, Client, RequestError, Response

CONCURRENCY = 8  # requests of a batch under way at the same time
FIRST_WAIT = 0.5  # seconds before the first retry; doubles with each further one
LONGEST_WAIT = 30.0  # seconds; waits grow no further, also if the server asks for more
_QUOTED = 300  # characters of a server's reply that an error repeats
_SERVE = (
    "serve the folder `ctxcompress export` writes: python -m vllm.entrypoints.openai.api_server --model "
    "FOLDER --enable-prompt-embeds"
)
_REMEDIES = {
    401: "pass the key the server was started with as api_key",
    403: "pass a key that may use this model as api_key",
    404: "check base_url, and model against the server's /v1/models",
    413: "raise the limit on request bodies of the proxy in front of the server, or lower the budget",
    429: "ask for less at a time, or raise max_retries",
}


class VLLMDecoder(Decoder):
    """Generates with a model that vLLM serves, from the same prompts as `LocalDecoder`.

    Greedy answers are those of a `LocalDecoder` up to rounding; samples differ, for vLLM draws its own. The
    server needs --enable-prompt-embeds for prompts with soft tokens, and reads tensors that clients send: let
    only clients you trust reach it.

    Args:
        backbone: the base of the served model, here: its token embeddings and tokenizer are used.
        base_url: of the server, like http://localhost:8000, with or without /v1.
        fingerprint: of the soft tokens the served model reads; others are refused.
        model: its name on the server; None takes the first one the server lists. Serve it under the
            fingerprint (--served-model-name) and name that here: then the export of another adapter shows.
        api_key: sent as a bearer token; it appears in no error.
        timeout: seconds the server may be silent: before a whole answer, or between pieces of a stream.
        max_retries: further attempts after 429, 5xx or a lost connection, as long as no answer has begun.

    Raises:
        ConfigError: a setting that cannot be used.
        MissingExtraError: httpx is not installed.
    """

    def __init__(
        self,
        backbone: Backbone,
        base_url: str,
        *,
        fingerprint: str = "",
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 2,
    ) -> None:
        try:
            import httpx
        except ModuleNotFoundError as error:
            raise MissingExtraError("httpx", "vllm") from error
        super().__init__(backbone, fingerprint)
        if not 0 < timeout < math.inf or max_retries < 0:
            raise ConfigError(
                f"timeout must be > 0 and finite, and max_retries >= 0, got {timeout} and {max_retries}"
            )
        self._server = _Server(_checked_url(base_url), checked_key(api_key), max_retries)
        self._model = model
        self._served: _Served | None = None
        self._options: dict[str, Any] = {
            "timeout": timeout,
            # A proxy from the environment cannot reach this machine's own addresses.
            "trust_env": not _is_here(self._server.url.host),
            # httpx would read all certificates again for every client.
            "verify": httpx.create_ssl_context(),
        }

    def _complete(self, prompts: list[CheckedPrompt], settings: Settings) -> list[Completion]:
        import httpx

        if not prompts:
            return []
        with httpx.Client(**self._options) as client:
            served = self._served or self._learned(b"".join(self._received(client, "models")))
            for prompt in prompts:
                prompt.check_window(served.window, settings)

            def completed(prompt: CheckedPrompt) -> Completion:
                body = self._body(prompt, settings, served)
                return self._completion(b"".join(self._received(client, "completions", body)), prompt)

            if len(prompts) == 1:
                return [completed(prompts[0])]
            with ThreadPoolExecutor(CONCURRENCY) as pool:
                return list(pool.map(completed, prompts))

    def _pieces(self, prompt: CheckedPrompt, settings: Settings) -> Generator[str | Completion, None, None]:
        import httpx

        with httpx.Client(**self._options) as client:
            served = self._served or self._learned(b"".join(self._received(client, "models")))
            prompt.check_window(served.window, settings)
            streamed = _Streamed()
            body = self._body(prompt, settings, served, stream=True)
            with contextlib.closing(self._received(client, "completions", body)) as chunks:
                for data in chunks:
                    with self._server.readable(data):
                        piece = streamed.add(data)
                    if piece:
                        yield piece
            with self._server.readable(b""):
                whole = streamed.completion(prompt, self._backbone)
            yield whole

    async def _acomplete(self, prompt: CheckedPrompt, settings: Settings) -> Completion:
        import httpx

        async with httpx.AsyncClient(**self._options) as client:
            served = self._served or self._learned(await _joined(self._areceived(client, "models")))
            prompt.check_window(served.window, settings)
            body = self._body(prompt, settings, served)
            data = await _joined(self._areceived(client, "completions", body))
        return self._completion(data, prompt)

    async def _apieces(
        self, prompt: CheckedPrompt, settings: Settings
    ) -> AsyncGenerator[str | Completion, None]:
        import httpx

        async with httpx.AsyncClient(**self._options) as client:
            served = self._served or self._learned(await _joined(self._areceived(client, "models")))
            prompt.check_window(served.window, settings)
            streamed = _Streamed()
            body = self._body(prompt, settings, served, stream=True)
            async with contextlib.aclosing(self._areceived(client, "completions", body)) as chunks:
                async for data in chunks:
                    with self._server.readable(data):
                        piece = streamed.add(data)
                    if piece:
                        yield piece
            with self._server.readable(b""):
                whole = streamed.completion(prompt, self._backbone)
            yield whole

    def _received(self, client: Client, path: str, body: bytes | None = None) -> Generator[bytes, None, None]:
        """The answer as it comes; until it begins, the request is sent again where that may help.

        Raises:
            ServingError: there is no answer, or it breaks off.
        """
        import httpx

        attempts = _Attempts(self._server)
        while True:
            try:
                with client.stream(**self._server.request(path, body)) as response:
                    if response.status_code == 200:
                        for data in response.iter_bytes():
                            attempts.answered = True
                            yield data
                        return
                    response.read()
                    wait = attempts.refused(response)
            except httpx.RequestError as error:
                wait = attempts.lost(error)
            time.sleep(wait)

    async def _areceived(
        self, client: AsyncClient, path: str, body: bytes | None = None
    ) -> AsyncGenerator[bytes, None]:
        """`_received` for an event loop."""
        import httpx

        attempts = _Attempts(self._server)
        while True:
            try:
                async with client.stream(**self._server.request(path, body)) as response:
                    if response.status_code == 200:
                        async for data in response.aiter_bytes():
                            attempts.answered = True
                            yield data
                        return
                    await response.aread()
                    wait = attempts.refused(response)
            except httpx.RequestError as error:
                wait = attempts.lost(error)
            await asyncio.sleep(wait)

    def _learned(self, data: bytes) -> _Served:
        """What the server says about its models; it is asked once."""
        with self._server.readable(data):
            # Servers other than vLLM may not tell their windows.
            windows = {
                entry["id"]: int(entry.get("max_model_len") or self._backbone.window)
                for entry in json.loads(data)["data"]
            }
            name = self._model or next(iter(windows), "")
        if name not in windows:
            raise ServingError(
                f"the server must serve the model {name!r}, got {sorted(windows)}; pass one of them as "
                "model, or None for the first"
            )
        self._served = _Served(name, windows[name])
        return self._served

    def _body(
        self, prompt: CheckedPrompt, settings: Settings, served: _Served, *, stream: bool = False
    ) -> bytes:
        request: dict[str, Any] = {
            "model": served.model,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": settings.seed,
            "stop": settings.stop,
            "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
            # What is not said, vLLM takes from the model's generation settings.
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        if prompt.soft_tokens:
            request["prompt_embeds"] = self._embedded(prompt)
        else:
            request["prompt"] = [token for part in prompt.parts for token in part]
        return json.dumps(request).encode()

    @torch.inference_mode()
    def _embedded(self, prompt: CheckedPrompt) -> str:
        # `splice` makes a tensor of its own: torch.save would also write what lies around a view.
        rows_TD = splice(prompt.parts, self._backbone.model.get_input_embeddings())
        saved = io.BytesIO()
        torch.save(rows_TD.cpu(), saved)
        return base64.b64encode(saved.getvalue()).decode()

    def _completion(self, data: bytes, prompt: CheckedPrompt) -> Completion:
        with self._server.readable(data):
            reply = json.loads(data)
            (choice,) = reply["choices"]
            text, tokens = choice["text"].strip(), int(reply["usage"]["completion_tokens"])
            return Completion(text, prompt.tokens, tokens, prompt.soft_tokens, _finish_reason(choice))


@dataclass(frozen=True, slots=True)
class _Served:
    """The model that answers.

    Attributes:
        model: its name.
        window: most tokens of prompt and completion.
    """

    model: str
    window: int


@dataclass(frozen=True, slots=True)
class _Server:
    """Where requests go.

    Attributes:
        url: the base, with /v1.
        key: "" for none.
        retries: further attempts of each request.
    """

    url: URL
    key: str
    retries: int

    def request(self, path: str, body: bytes | None) -> dict[str, Any]:
        """Arguments of a request of httpx."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        method = "GET" if body is None else "POST"
        return {"method": method, "url": f"{self.url}/{path}", "content": body, "headers": headers}

    def quoted(self, reply: str) -> str:
        """The start of what a server said; servers like to repeat the key they refuse."""
        return repr((reply.replace(self.key, "<api key>") if self.key else reply)[:_QUOTED])

    @contextlib.contextmanager
    def readable(self, reply: bytes) -> Iterator[None]:
        """Turns the errors of reading a reply that is not what it must be into ours.

        Raises:
            ServingError: the reply has another form.
        """
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ServingError(
                f"{self.url} must answer as OpenAI's completions do, got "
                f"{self.quoted(reply.decode(errors='replace'))} ({type(error).__name__}: "
                f"{self.quoted(str(error))}); check base_url, and see the server's log"
            ) from error


class _Attempts:
    """Decides after a failed request: wait and ask again, or give up and say why.

    Attributes:
        answered: whether an answer has begun; nothing is asked again then.
    """

    def __init__(self, server: _Server) -> None:
        self.answered = False
        self._server = server
        self._left = server.retries
        self._wait = FIRST_WAIT

    def refused(self, response: Response) -> float:
        """Seconds to wait after an answer that is not 200.

        Raises:
            ServingError: another attempt cannot help, or none is left.
        """
        status = response.status_code
        if (status == 429 or status >= 500) and self._left:
            asked = response.headers.get("Retry-After", "")
            return max(self._backoff(), min(float(asked) if asked.isdecimal() else 0.0, LONGEST_WAIT))
        reply = self._server.quoted(response.text)
        remedy = _REMEDIES.get(status, "see the server's log")
        if status in {400, 422}:
            # Servers that know no prompt_embeds miss a prompt.
            remedy = _SERVE if "prompt" in reply else "mend what it names"
        raise ServingError(f"{response.url} must answer 200, got {status}: {reply}; {remedy}")

    def lost(self, error: RequestError) -> float:
        """Seconds to wait after a request that got no answer.

        Raises:
            ServingError: another attempt cannot help, or none is left.
        """
        import httpx

        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            expected, remedy = "an answer in time", "raise timeout, or lower max_new_tokens"
        elif self.answered or not isinstance(error, httpx.TransportError):
            expected, remedy = "a whole answer", "ask again, or see the server's log"
        elif self._left:
            return self._backoff()
        else:
            expected, remedy = "an answer", f"check base_url, or {_SERVE}"
        got = f"{type(error).__name__} {error}".rstrip()
        raise ServingError(f"{self._server.url} must give {expected}, got {got}; {remedy}") from error

    def _backoff(self) -> float:
        self._left -= 1
        longest, self._wait = self._wait, min(2 * self._wait, LONGEST_WAIT)
        return longest * random.uniform(0.5, 1.0)


class _Streamed:
    """The text of an answer that comes as server-sent events, in pieces of any length."""

    def __init__(self) -> None:
        self._line = b""
        self._text = ""
        self._put_length = 0
        self._reason: Literal["stop", "length"] | None = None
        self._tokens: int | None = None

    def add(self, data: bytes) -> str:
        """What has become sure with `data`; white space at the ends of the whole is never put."""
        # JSON may hold other characters that str.splitlines, and thus httpx, would end a line at.
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (event := line.removeprefix(b"data:").strip()) != b"[DONE]":
                self._read(json.loads(event))
        text = self._text.strip()
        piece, self._put_length = text[self._put_length :], len(text)
        return piece

    def completion(self, prompt: CheckedPrompt, backbone: Backbone) -> Completion:
        """The whole; a stream that ended too early is refused."""
        if self._reason is None:
            raise ValueError("the stream ended before the answer")
        text = self._text.strip()
        # Servers other than vLLM may not tell the usage of a stream.
        tokens = backbone.count(text) if self._tokens is None else self._tokens
        return Completion(text, prompt.tokens, tokens, prompt.soft_tokens, self._reason)

    def _read(self, event: dict[str, Any]) -> None:
        if event.get("usage"):
            self._tokens = int(event["usage"]["completion_tokens"])
        # An event with the usage alone has no choices.
        for choice in event["choices"]:
            self._text += choice["text"]
            if choice["finish_reason"] is not None:
                self._reason = _finish_reason(choice)


async def _joined(chunks: AsyncGenerator[bytes, None]) -> bytes:
    async with contextlib.aclosing(chunks):
        return b"".join([data async for data in chunks])


def _finish_reason(choice: dict[str, Any]) -> Literal["stop", "length"]:
    reason = choice["finish_reason"]
    if reason not in {"stop", "length"}:
        raise ValueError(f"finish_reason {reason!r}")
    return cast(Literal["stop", "length"], reason)


def _checked_url(base_url: str) -> URL:
    """The URL with /v1."""
    import httpx

    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, TypeError):
        url = httpx.URL()
    if (
        url.scheme not in {"http", "https"}
        or not (url.host and 0 <= (url.port or 0) < 2**16)
        or url.userinfo
        or url.query
        or url.fragment
    ):
        # It is not repeated: a password may stand in it.
        raise ConfigError(
            "base_url must be like http://localhost:8000, without user, password or query; give the key as "
            "api_key"
        )
    path = url.path.rstrip("/")
    return url.copy_with(path=path if path.endswith("/v1") else f"{path}/v1")


def checked_key(api_key: str | None) -> str:
    """The key without surrounding space; one that no header can carry would stand in the error of httpx.

    Raises:
        ConfigError: characters that no header can carry.
    """
    key = (api_key or "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigError(
            "api_key must be printable ASCII without spaces, got other characters; copy it again"
        )
    return key


def _is_here(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified
