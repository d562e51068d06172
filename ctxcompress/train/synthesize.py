"""Texts -> a teacher's summaries -> labels of the ratio head, through any OpenAI-compatible server.

Semi-dynamic compression (arXiv 2603.25926): how far a text can be compressed is read off how short a strong
model can say it: log2(tokens of the text / tokens of its shortest summary). The paper's prompts are not
published; `INSTRUCTION` is ours.

    OUTPUT   one JSON object a line: id, text, summary, tokens, summary_tokens, log2_ratio, model

Every line is on disk as soon as its reply is there and is not asked for again, so a run that was stopped goes
on when it is started again. Lines are ASCII: no character of a text can end one.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import itertools
import json
import math
import operator
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ctxcompress.errors import ConfigError, InputError, MissingExtraError, ModelError
from ctxcompress.methods.dac import Progress
from ctxcompress.remote import checked_key

if TYPE_CHECKING:
    from httpx import AsyncClient, Response

INSTRUCTION = (
    "Say what the text below says in as few words as possible. Keep every fact somebody may ask about: "
    "names, numbers, dates, causes. Drop repetition, examples and whatever follows from the rest. Write in "
    "the language of the text, and nothing but the summary.\n\nText:\n"
)
KEY_VARIABLE = "OPENAI_API_KEY"
FIRST_WAIT = 1.0  # seconds before the first retry; doubles with each further one
LONGEST_WAIT = 60.0  # seconds; a backoff grows no further
LONGEST_PAUSE = 900.0  # seconds; a server that asks for more (a daily quota) ends the run instead
FAILURES = 10  # texts in a row without a summary after which the fault is not theirs
_QUOTED = 300  # characters of a server's reply that an error repeats
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


def synthesize(
    texts: Iterable[Mapping[str, Any]],
    output: Path,
    *,
    endpoint: str,
    model: str,
    count: Callable[[str], int],
    api_key: str | None = None,
    concurrency: int = 8,
    requests_per_minute: float | None = None,
    timeout: float = 120.0,
    retries: int = 6,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> int:
    """Ask a teacher for the shortest summary of every text that `output` does not hold yet.

    Args:
        texts: objects with "text" and, if wanted, "id", by default a hash of the text; they are read as they
            are needed. The same text under several ids is asked for once, under the first.
        output: JSON lines, appended to.
        endpoint: base URL of the server, such as https://api.openai.com/v1 or http://localhost:8000/v1.
        model: name of the teacher on that server.
        count: tokens of a text for the model that will read soft tokens: its `Backbone.count`.
        api_key: sent as a bearer token; None takes the environment variable OPENAI_API_KEY, or sends none if
            that is not set. It appears in no error.
        concurrency: requests under way at the same time.
        requests_per_minute: most requests started in a minute, evenly spaced; None for no limit.
        timeout: seconds a reply may take.
        retries: further attempts after 429, 5xx, a timeout, a lost connection or an unusable reply.
        options: further fields of the request; the default is {"temperature": 0}.
        progress: told after every text; the total grows with what is done if `texts` has no length.

    Returns:
        Summaries that were added.

    Raises:
        MissingExtraError: httpx is not installed.
        ConfigError: a setting out of its range.
        InputError: a text or `output` is not what it must be; one id with two texts.
        ModelError: the server refuses the key, the address or the model, or gave no summary of some texts.
    """
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise MissingExtraError("httpx", "train") from error
    _check(model, concurrency, requests_per_minute, timeout, retries)
    url = _checked_url(endpoint)
    key = checked_key(os.environ.get(KEY_VARIABLE) if api_key is None else api_key)
    teacher = _Teacher(
        url=url,
        model=model,
        key=key,
        timeout=timeout,
        retries=retries,
        options={"temperature": 0} if options is None else dict(options),
        pace=_Pace(60 / requests_per_minute if requests_per_minute else 0.0),
    )
    total, handled = operator.length_hint(texts), itertools.count(1)

    def report() -> None:
        number = next(handled)
        if progress is not None:
            progress("summarizing", number, max(total, number))

    async def ask_all(stream: BinaryIO) -> int:
        waiting = _fresh(texts, done, report)
        failed, added = _Failed(), 0

        async def work() -> None:
            nonlocal added
            # One iterator for all workers: a text is read when somebody is free to ask for it.
            for name, text in waiting:
                try:
                    summary = await teacher.summary(client, text)
                except _NoSummary as error:
                    failed.add(name, error)
                else:
                    stream.write(_line(name, text, summary, count, model))
                    stream.flush()
                    added += 1
                    failed.in_a_row = 0
                report()

        # Workers and `summary` set the limits; httpx would add its own 100 connections and 5 s.
        async with httpx.AsyncClient(timeout=None, limits=httpx.Limits()) as client:
            await _together([work() for _ in range(concurrency)])
        failed.report(output)
        return added

    with _appending(output) as stream:
        done = _resumed(output, model)
        return asyncio.run(ask_all(stream))


class _NoSummary(Exception):
    """One text got no summary; other texts may."""


@dataclass
class _Failed:
    names: list[str] = field(default_factory=list)
    first: str = ""
    in_a_row: int = 0

    def add(self, name: str, error: _NoSummary) -> None:
        self.names.append(name)
        self.first = self.first or str(error)
        self.in_a_row += 1
        if self.in_a_row >= FAILURES:
            raise ModelError(
                f"{FAILURES} texts in a row got no summary, the first because {self.first}; mend the server "
                "or the settings and run again: what came before is saved"
            )

    def report(self, output: Path) -> None:
        if self.names:
            raise ModelError(
                f"{len(self.names)} texts got no summary ({', '.join(self.names[:5])}), the first because "
                f"{self.first}; all others are in {output}: run again to ask for the missing ones only"
            )


class _Pace:
    """A token bucket that holds one token: requests start evenly, never in a burst a server would refuse.

    Args:
        gap: seconds between starts.
    """

    def __init__(self, gap: float) -> None:
        self._gap = gap
        self._free = 0.0

    async def turn(self) -> None:
        """Wait until a request may start."""
        while (wait := self._free - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        # Nothing is awaited between the test and this line, so no two requests take the same turn.
        self._free = time.monotonic() + self._gap

    def pause(self, seconds: float) -> None:
        """Let no request start for so long."""
        self._free = max(self._free, time.monotonic() + seconds)


@dataclass(frozen=True)
class _Teacher:
    url: str
    model: str
    key: str
    timeout: float
    retries: int
    options: dict[str, Any]
    pace: _Pace

    async def summary(self, client: AsyncClient, text: str) -> str:
        """The teacher's summary of one text.

        Raises:
            _NoSummary: none after all retries, or none for this text.
            ModelError: no text would get one.
        """
        import httpx

        turn = [{"role": "user", "content": INSTRUCTION + text}]
        body = json.dumps({"model": self.model, "messages": turn, **self.options}).encode()
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                longest = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
                await asyncio.sleep(longest * random.uniform(0.5, 1.0))
            await self.pace.turn()
            try:
                # httpx limits the time between bytes; this limits the reply.
                post = client.post(self.url, content=body, headers=headers)
                response = await asyncio.wait_for(post, self.timeout)
            except asyncio.TimeoutError:  # before Python 3.11 not the builtin one
                reason = f"no reply within {self.timeout:g} s"
                continue
            except (httpx.TransportError, httpx.DecodingError) as error:
                reason = f"the request failed: {type(error).__name__} {error}".rstrip()
                continue
            if response.status_code == 200:
                summary, reason = _content(response)
                if summary:
                    return summary
                reason = self._quoted(reason, response)
                continue
            reason = self._quoted(f"the server answered {response.status_code}", response)
            self._refused(response, reason)
        raise _NoSummary(f"{self.retries + 1} attempts failed; the last: {reason}")

    def _refused(self, response: Response, reason: str) -> None:
        """Return if another attempt may help."""
        status = response.status_code
        remedies = {
            401: f"set {KEY_VARIABLE} or api_key to a key of this server",
            403: "use a key that may use this model",
            404: "the endpoint usually ends in /v1, and the model must be one the server lists under /models",
        }
        if status in remedies:
            raise ModelError(f"{self.url}, model {self.model!r}: {reason}; {remedies[status]}")
        if status in {429, 503}:
            seconds = _retry_after(response.headers.get("Retry-After", ""))
            if seconds > LONGEST_PAUSE:
                raise ModelError(
                    f"{self.url} wants no request for {seconds:.0f} s; run again then, the rest is saved"
                )
            self.pace.pause(seconds)
        elif status < 500 and status != 408:
            raise _NoSummary(reason)

    def _quoted(self, reason: str, response: Response) -> str:
        """`reason` with the start of the reply; servers like to repeat the key they refuse."""
        reply = response.text
        if self.key:
            reply = reply.replace(self.key, "<api key>")
        return f"{reason}: {reply[:_QUOTED]!r}"


async def _together(workers: Iterable[Any]) -> None:
    """Run all to their end; the first error stops the others."""
    tasks = [asyncio.ensure_future(worker) for worker in workers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _content(response: Response) -> tuple[str, str]:
    """The summary of a reply, or "" and what is wrong with it.

    Raises:
        _NoSummary: cut off; another attempt would be, too, and half a summary makes a wrong label.
    """
    try:
        choice = response.json()["choices"][0]
        content = choice["message"]["content"]
        if choice.get("finish_reason") in {"length", "content_filter"}:
            raise _NoSummary(f"the reply was cut off: finish_reason {choice['finish_reason']!r}")
        summary: str = _THOUGHTS.sub("", content).strip()
        summary.encode()
    except (ValueError, LookupError, TypeError, AttributeError):
        return "", "the reply has no choices[0].message.content with text"
    return summary, "" if summary else "the summary is empty"


def _retry_after(value: str) -> float:
    """Seconds a Retry-After header asks for, given as such or as a date; 0 if it says nothing."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _fresh(
    texts: Iterable[Mapping[str, Any]], done: dict[str, str], report: Callable[[], None]
) -> Iterator[tuple[str, str]]:
    """Name and text of what is not yet in `done`, which maps names to hashes of texts; they are put there."""
    known = set(done.values())
    for number, record in enumerate(texts, start=1):
        text = record.get("text") if isinstance(record, Mapping) else None
        if not isinstance(text, str) or not text.strip() or not _is_unicode(text):
            raise InputError(
                f'text number {number} must be an object with a "text" that is valid Unicode and not empty, '
                f"got {str(record)[:80]!r}; remove or mend it"
            )
        digest = _digest(text)
        name = digest if record.get("id") is None else str(record["id"])
        if done.get(name, digest) != digest:
            raise InputError(
                f"the id {name!r} of text number {number} belongs to another text, here or in the output; "
                "give every text its own id, or choose another output"
            )
        if digest in known:
            report()
            continue
        known.add(digest)
        done[name] = digest
        yield name, text


def _line(name: str, text: str, summary: str, count: Callable[[str], int], model: str) -> bytes:
    tokens, shorter = count(text), count(summary)
    if tokens < 1 or shorter < 1:
        raise InputError(
            f"count must give >= 1 tokens for a text and its summary, got {tokens} and {shorter} for "
            f"{text[:40]!r} and {summary[:40]!r}; pass Backbone.count"
        )
    record = {
        "id": name,
        "text": text,
        "summary": summary,
        "tokens": tokens,
        "summary_tokens": shorter,
        "log2_ratio": math.log2(tokens / shorter),
        "model": model,
    }
    return json.dumps(record).encode() + b"\n"


def _appending(output: Path) -> BinaryIO:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return output.open("ab")
    except OSError as error:
        raise InputError(f"{output} must be a file this process can write to, got: {error}") from error


def _resumed(output: Path, model: str) -> dict[str, str]:
    """Names and hashes of the texts `output` holds; a last line that was cut off is removed.

    Raises:
        InputError: damaged elsewhere, or with summaries of another model.
    """
    done: dict[str, str] = {}
    with output.open("r+b") as stream:
        good = 0
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                stream.truncate(good)
                break
            good += len(line)
            name, digest, teacher = _known(line, number, output)
            if teacher != model:
                raise InputError(
                    f"line {number} of {output} has a summary by {teacher!r}, got the model {model!r}; "
                    "choose another output: labels of two teachers do not compare"
                )
            done[name] = digest
    return done


def _known(line: bytes, number: int, output: Path) -> tuple[str, str, str]:
    try:
        record = json.loads(line)
        return record["id"], _digest(record["text"]), record["model"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"line {number} of {output} must be an object with id, text and model, got {line[:80]!r}; remove "
            "the line, or choose another output"
        ) from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check(
    model: str, concurrency: int, requests_per_minute: float | None, timeout: float, retries: int
) -> None:
    if not model:
        raise ConfigError('model must name the teacher on the server, got ""; see the server\'s /models')
    if concurrency < 1 or retries < 0:
        raise ConfigError(f"concurrency must be >= 1 and retries >= 0, got {concurrency} and {retries}")
    for name, value in (("requests_per_minute", requests_per_minute), ("timeout", timeout)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} must be > 0 and finite, got {value}")


def _checked_url(endpoint: str) -> str:
    import httpx

    expected = "endpoint must be a URL like http://localhost:8000/v1"
    # It is not repeated: user and password may stand in it.
    if not re.fullmatch(r"https?://[^/@\s?#]+(/[^@\s?#]*)?", endpoint):
        raise ConfigError(f"{expected} without user, password or query; give the key as api_key")
    try:
        port = httpx.URL(endpoint).port or 0
    except httpx.InvalidURL:
        port = -1
    if not 0 <= port < 2**16:
        raise ConfigError(f"{expected}, got {endpoint!r}, which has no valid host and port")
    base = endpoint.rstrip("/")
    return base if base.endswith("/chat/completions") else base + "/chat/completions"
