"""Prompt -> answer: whole, in batches, or piece by piece; here with a model in this process.

A prompt is token ids and soft tokens, as `ctxcompress.prompt` makes it. What comes out depends on the
arguments alone: of the model's own generation settings only its end tokens count, and sampling draws from
generators of its own, so that neither torch's global random state nor the rest of a batch matters.

Shapes: B rows of a batch, T tokens, M soft tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import math
import queue
import re
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from ctxcompress.backbone import Backbone, Ids, batches, splice
from ctxcompress.errors import CheckpointError, ConfigError, InputError
from ctxcompress.prompt import around_documents, length
from ctxcompress.types import SoftTokens

Prompt = Sequence[Ids | SoftTokens]
COLDEST = 1e-6  # temperatures below are greedy in float32, and would divide by zero there
# SentencePiece spells characters it does not know as bytes; what they mean together is open until they end.
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
BROKEN = "\N{REPLACEMENT CHARACTER}"  # how a character is decoded of which bytes are missing


@dataclass(frozen=True, slots=True)
class Completion:
    """What a decoder returned, and what it cost in tokens.

    Attributes:
        text: without the stop string, and without white space at both ends.
        prompt_tokens: raw and soft.
        completion_tokens: generated ones, with the end token or those of the stop string.
        soft_tokens: those of `prompt_tokens` that were soft.
        finish_reason: "stop" for an end token or a stop string, "length" for `max_new_tokens`.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    soft_tokens: int = 0
    finish_reason: Literal["stop", "length"] = "stop"


@dataclass(frozen=True, slots=True)
class Settings:
    """How to generate; see `Decoder`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]

    def __post_init__(self) -> None:
        if not (_is_whole(self.max_new_tokens) and self.max_new_tokens >= 1):
            raise ConfigError(f"max_new_tokens must be a whole number >= 1, got {self.max_new_tokens!r}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(
                f"temperature must be finite and >= 0, got {self.temperature}; 0 takes the likeliest token"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}; 1 samples from all tokens")
        if self.seed is not None and not (_is_whole(self.seed) and 0 <= self.seed < 2**63):
            raise ConfigError(f"seed must be a whole number from 0 to 2**63 - 1 or None, got {self.seed!r}")
        if not all(isinstance(string, str) and string for string in self.stop):
            raise ConfigError(f"stop strings must be strings that are not empty, got {self.stop!r}")


@dataclass(frozen=True, slots=True)
class CheckedPrompt:
    """A prompt that a decoder can read, and how errors call it."""

    name: str
    parts: list[Ids | Tensor]
    tokens: int
    soft_tokens: int

    def check_window(self, window: int, settings: Settings) -> None:
        """Refuse what does not fit.

        Raises:
            InputError: prompt and completion together exceed `window` tokens.
        """
        if self.tokens + settings.max_new_tokens > window:
            raise InputError(
                f"{self.name} and answer must fit the model's window of {window} tokens, got {self.tokens} + "
                f"{settings.max_new_tokens}; lower the budget or max_new_tokens"
            )


class Decoder(ABC):
    """Continues prompts, wherever the model is; all methods take the same settings.

    - `max_new_tokens`: longest completion, >= 1.
    - `temperature`: 0 takes the likeliest token; higher is more varied.
    - `top_p`: sample from the likeliest tokens that together have this probability, in (0, 1].
    - `seed`: for equal samples every time; every prompt of a batch starts from it. None draws one for each.
    - `stop`: a string or strings to end at, which are not part of the text. They are sought in text without
      control tokens.

    Any number of threads may call it at once.

    Args:
        backbone: with the tokenizer and the token embeddings of the model that generates.
        fingerprint: of the soft tokens that model was trained to read; others are refused.
    """

    def __init__(self, backbone: Backbone, fingerprint: str = "") -> None:
        self._backbone = backbone
        self._fingerprint = fingerprint

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Completion:
        """Continue `prompt` until the model ends its turn; settings as in the class.

        Raises:
            ConfigError: a setting out of its range.
            InputError: the prompt is empty, no prompt at all, holds NaN, or exceeds the model's window
                together with the completion.
            CheckpointError: soft tokens of another decoder.
            ServingError: a server that generates gave no usable answer.
        """
        settings = Settings(max_new_tokens, temperature, top_p, seed, _strings(stop))
        return self._complete(self._checked([prompt], settings), settings)[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> list[Completion]:
        """`generate` for many prompts, several at a time.

        Returns:
            One completion per prompt, in order: those of one by one, up to rounding of the model's dtype.
        """
        settings = Settings(max_new_tokens, temperature, top_p, seed, _strings(stop))
        return self._complete(self._checked(prompts, settings), settings)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        on_end: Callable[[Completion], None] | None = None,
    ) -> Generator[str, None, None]:
        """Pieces of `generate(...).text` as they are sure; joined, they are that text.

        Work begins with the first piece asked for. Closing the iterator ends it. After the last piece,
        `on_end` is told what `generate` would have returned.

        Raises:
            CtxCompressError: as `generate`, before the first piece.
        """
        settings = Settings(max_new_tokens, temperature, top_p, seed, _strings(stop))
        return _told(self._pieces(self._checked([prompt], settings)[0], settings), on_end)

    async def agenerate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Completion:
        """`generate` for an event loop, which goes on meanwhile; cancelling the task ends the work."""
        settings = Settings(max_new_tokens, temperature, top_p, seed, _strings(stop))
        return await self._acomplete(self._checked([prompt], settings)[0], settings)

    def astream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        on_end: Callable[[Completion], None] | None = None,
    ) -> AsyncGenerator[str, None]:
        """`stream` for an event loop; cancelling the task or closing the iterator ends the work."""
        settings = Settings(max_new_tokens, temperature, top_p, seed, _strings(stop))
        return _atold(self._apieces(self._checked([prompt], settings)[0], settings), on_end)

    @abstractmethod
    def _complete(self, prompts: list[CheckedPrompt], settings: Settings) -> list[Completion]:
        """One completion per prompt, in order."""

    @abstractmethod
    def _pieces(self, prompt: CheckedPrompt, settings: Settings) -> Generator[str | Completion, None, None]:
        """Pieces of text, then the whole; a generator function, so that nothing happens before the first."""

    @abstractmethod
    async def _acomplete(self, prompt: CheckedPrompt, settings: Settings) -> Completion:
        """`_complete` of one prompt."""

    @abstractmethod
    def _apieces(self, prompt: CheckedPrompt, settings: Settings) -> AsyncGenerator[str | Completion, None]:
        """`_pieces` for an event loop."""

    def _checked(self, prompts: Sequence[Prompt], settings: Settings) -> list[CheckedPrompt]:
        """The prompts as this decoder reads them.

        Raises:
            InputError: see `generate`.
            CheckpointError: soft tokens of another decoder.
        """
        return [
            self._checked_prompt(prompt, settings, f"prompt {place}" if len(prompts) > 1 else "prompt")
            for place, prompt in enumerate(prompts)
        ]

    def _checked_prompt(self, prompt: Prompt, settings: Settings, name: str) -> CheckedPrompt:
        parts = [self._checked_part(part, name) for part in prompt]
        soft_tokens = sum(len(part) for part in prompt if isinstance(part, SoftTokens))
        checked = CheckedPrompt(name, parts, length(parts), soft_tokens)
        if not checked.tokens:
            raise InputError(f"{name} must have tokens, got none; make it with ctxcompress.prompt")
        checked.check_window(self._backbone.window, settings)
        return checked

    def _checked_part(self, part: Any, name: str) -> Ids | Tensor:
        vocabulary, hidden = self._backbone.model.get_input_embeddings().weight.shape
        if not isinstance(part, SoftTokens):
            if not isinstance(part, (tuple, list)) or not all(
                isinstance(token, int) and 0 <= token < vocabulary for token in part
            ):
                raise InputError(
                    f"{name} must consist of soft tokens and tuples of token ids below {vocabulary}, got "
                    f"{str(part)[:80]!r} ({type(part).__name__}); make it with ctxcompress.prompt"
                )
            return tuple(part)
        if part.fingerprint != self._fingerprint:
            raise CheckpointError(
                f"soft tokens must be made for the decoder {self._fingerprint!r}, got some for "
                f"{part.fingerprint!r}; encode the text again with this decoder's compressor"
            )
        if part.embeddings_MD.shape[1:] != (hidden,):
            raise InputError(
                f"soft tokens of {name} must be of shape (M, {hidden}), got "
                f"{tuple(part.embeddings_MD.shape)}; encode the text again with this decoder's compressor"
            )
        if not torch.isfinite(part.embeddings_MD).all():
            raise InputError(
                f"soft tokens of {name} must be finite, got NaN or infinity; encode the text again"
            )
        return part.embeddings_MD


class LocalDecoder(Decoder):
    """Generates with a backbone's own model: no second copy of the weights.

    A batch runs prompts of similar length together. Streams and `agenerate` run in a thread of their own,
    which ends after the token it is at.
    """

    def __init__(self, backbone: Backbone, fingerprint: str = "") -> None:
        super().__init__(backbone, fingerprint)
        # The same modules without the model's generation settings: transformers would add them to ours.
        self._model = copy.copy(backbone.model)
        self._model.generation_config = GenerationConfig()
        ends = backbone.model.generation_config.eos_token_id
        ends = [*ends] if isinstance(ends, (list, tuple)) else [ends]
        self._ends = {end for end in (*ends, backbone.tokenizer.eos_token_id) if end is not None}

    @functools.cached_property
    def _prefix(self) -> Ids:
        """How every prompt about documents begins."""
        return around_documents(self._backbone, "")[0]

    def _complete(self, prompts: list[CheckedPrompt], settings: Settings) -> list[Completion]:
        done: dict[int, Completion] = {}
        for places in batches([prompt.tokens + settings.max_new_tokens for prompt in prompts]):
            done |= zip(places, self._run([prompts[place] for place in places], settings), strict=True)
        return [done[place] for place in range(len(prompts))]

    async def _acomplete(self, prompt: CheckedPrompt, settings: Settings) -> Completion:
        listener = _Listener()
        try:
            return (await asyncio.to_thread(self._run, [prompt], settings, listener))[0]
        finally:
            listener.gone.set()

    def _pieces(self, prompt: CheckedPrompt, settings: Settings) -> Generator[str | Completion, None, None]:
        news: queue.SimpleQueue[_News] = queue.SimpleQueue()
        gone = self._in_thread(prompt, settings, news.put)
        try:
            while isinstance(piece := _piece(news.get()), str):
                yield piece
            yield piece
        finally:
            gone.set()

    async def _apieces(
        self, prompt: CheckedPrompt, settings: Settings
    ) -> AsyncGenerator[str | Completion, None]:
        news: asyncio.Queue[_News] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(item: _News) -> None:
            # A loop that was closed in the meantime has no one left to tell.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(news.put_nowait, item)

        gone = self._in_thread(prompt, settings, put)
        try:
            while isinstance(piece := _piece(await news.get()), str):
                yield piece
            yield piece
        finally:
            gone.set()

    def _in_thread(
        self, prompt: CheckedPrompt, settings: Settings, put: Callable[[_News], None]
    ) -> threading.Event:
        """Start a generation that puts its pieces, then the whole or the error that ended it.

        Returns:
            What to set when nobody listens any more.
        """
        listener = _Listener(put)

        def work() -> None:
            try:
                put(self._run([prompt], settings, listener)[0])
            except BaseException as error:
                # Whatever it is, the reader waits for it.
                put(error)

        threading.Thread(target=work, name="ctxcompress-stream").start()
        return listener.gone

    @torch.inference_mode()
    def _run(
        self, prompts: list[CheckedPrompt], settings: Settings, listener: _Listener | None = None
    ) -> list[Completion]:
        """One batch, which the caller has cut to size."""
        embed = self._model.get_input_embeddings()
        rows = [splice(prompt.parts, embed) for prompt in prompts]
        alike = all(_begins_with(prompt, self._prefix) for prompt in prompts)
        cache, known = self._backbone.prefix_cache(self._prefix if alike else (), len(prompts))
        # Padding stands before what rows do not share, so that all continue at one place; positions follow
        # from the mask.
        rest_BTD = torch.nn.utils.rnn.pad_sequence(
            [row[known:] for row in rows], batch_first=True, padding_side="left"
        )
        embeds_BTD = torch.cat([torch.stack([row[:known] for row in rows]), rest_BTD], dim=1)
        lengths_B = torch.tensor([len(row) for row in rows], device=embeds_BTD.device)
        places_T = torch.arange(embeds_BTD.shape[1], 0, -1, device=embeds_BTD.device)
        shown_BT = places_T <= lengths_B[:, None] - known
        shown_BT[:, :known] = True
        answers = [_Answer(self._backbone.tokenizer, self._ends, settings, listener) for _ in prompts]
        self._model.generate(
            inputs_embeds=embeds_BTD,
            attention_mask=shown_BT.long(),
            past_key_values=cache,
            generation_config=GenerationConfig(max_new_tokens=settings.max_new_tokens, do_sample=False),
            logits_processor=[_Sampler(settings, len(rows))] if settings.temperature else [],
            stopping_criteria=[_Follower(answers, listener)],
        )
        return [
            Completion(answer.text, prompt.tokens, answer.tokens, prompt.soft_tokens, answer.finish_reason)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


_News = str | Completion | BaseException
"""A piece of text, the whole after its last piece, or the error that ended a generation."""


class _Listener:
    """Who waits for a generation.

    Args:
        put: takes pieces of text; None if only the whole counts.
    """

    def __init__(self, put: Callable[[str], None] | None = None) -> None:
        self.put = put
        self.gone = threading.Event()


class _Answer:
    """One row's answer as it grows token by token."""

    def __init__(
        self, tokenizer: Any, ends: set[int], settings: Settings, listener: _Listener | None
    ) -> None:
        self._tokenizer = tokenizer
        self._ends = ends
        self._most = settings.max_new_tokens
        self._stop = settings.stop
        self._stop_pattern = re.compile("|".join(map(re.escape, settings.stop))) if settings.stop else None
        self._put = listener.put if listener else None
        self._ids: list[int] = []
        self._put_length = 0
        self.tokens = 0
        self.done = False
        self.text = ""
        self.finish_reason: Literal["stop", "length"] = "length"

    def add(self, token: int) -> None:
        """Take the next token; `done` tells whether it was the last, and then the rest is set."""
        self.tokens += 1
        ended = token in self._ends
        if not ended:
            self._ids.append(token)
        cut = self._stop_place()
        self.done = ended or cut is not None or self.tokens == self._most
        if self.done:
            self.text = self._decoded(self._ids)[:cut].strip()
            self.finish_reason = "length" if cut is None and not ended else "stop"
        self._tell()

    def _stop_place(self) -> int | None:
        """Where the first stop string begins."""
        if self._stop_pattern is None:
            return None
        found = self._stop_pattern.search(self._decoded(self._ids))
        return found.start() if found else None

    def _tell(self) -> None:
        """Put what has become sure since the last token."""
        if self._put is None:
            return
        text = self.text if self.done else self._sure()
        if len(text) > self._put_length:
            self._put(text[self._put_length :])
            self._put_length = len(text)

    def _sure(self) -> str:
        """The part of the text that no later token can change."""
        count = len(self._ids)
        while count and BYTE_TOKEN.fullmatch(
            self._tokenizer.convert_ids_to_tokens(self._ids[count - 1]) or ""
        ):
            count -= 1
        text = self._decoded(self._ids[:count]).rstrip(BROKEN)
        # The end may be the beginning of a stop string, and white space may be the last.
        held = [size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])]
        return text[: len(text) - max(held, default=0)].strip()

    def _decoded(self, ids: list[int]) -> str:
        # "Cleaning up" would remove spaces the model wrote, and change text that was already put.
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class _Follower:
    """A stopping criterion of transformers: hands each new token to its row and ends rows that are done."""

    def __init__(self, answers: list[_Answer], listener: _Listener | None) -> None:
        self._answers = answers
        self._listener = listener

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B,) bool: which rows are done; all once nobody listens."""
        for answer, token in zip(self._answers, input_ids[:, -1].tolist(), strict=True):
            # Rows that are done go on as padding until the last one is.
            if not answer.done:
                answer.add(token)
        gone = self._listener is not None and self._listener.gone.is_set()
        return torch.tensor([gone or answer.done for answer in self._answers], device=input_ids.device)


class _Sampler:
    """A logits processor of transformers after which the largest score is a sample (Gumbel-max).

    argmax(log p + G) with independent standard Gumbel G is distributed as p, and -log E is such a G for a
    standard exponential E. Each row draws from its own generator, on the CPU: neither the other rows nor the
    device matter.
    """

    def __init__(self, settings: Settings, rows: int) -> None:
        self._temperature = max(settings.temperature, COLDEST)
        self._top_p = settings.top_p
        self._generators = [
            torch.Generator().manual_seed(secrets.randbits(63) if settings.seed is None else settings.seed)
            for _ in range(rows)
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) float32 logits -> logits at the temperature, -inf outside top-p, plus noise."""
        # With 0 as the largest, dividing by a small temperature cannot overflow upwards.
        logits_BV = (scores - scores.amax(dim=-1, keepdim=True)) / self._temperature
        if self._top_p < 1:
            p_BV, order_BV = logits_BV.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
            beyond_BV = p_BV.cumsum(dim=-1) - p_BV >= self._top_p
            logits_BV = logits_BV.masked_fill(beyond_BV.scatter(-1, order_BV, beyond_BV), -torch.inf)
        noise_BV = torch.stack(
            [
                torch.empty(scores.shape[-1]).exponential_(generator=generator)
                for generator in self._generators
            ]
        )
        return logits_BV - noise_BV.log_().to(logits_BV)


def _told(
    pieces: Generator[str | Completion, None, None], on_end: Callable[[Completion], None] | None
) -> Generator[str, None, None]:
    with contextlib.closing(pieces):
        for piece in pieces:
            if isinstance(piece, str):
                yield piece
            elif on_end is not None:
                on_end(piece)


async def _atold(
    pieces: AsyncGenerator[str | Completion, None], on_end: Callable[[Completion], None] | None
) -> AsyncGenerator[str, None]:
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, str):
                yield piece
            elif on_end is not None:
                on_end(piece)


def _piece(news: _News) -> str | Completion:
    if isinstance(news, BaseException):
        raise news
    return news


def _begins_with(prompt: CheckedPrompt, ids: Ids) -> bool:
    first = prompt.parts[0]
    return not isinstance(first, Tensor) and first[: len(ids)] == ids


def _strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)
