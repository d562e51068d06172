"""An LLM for LlamaIndex: messages with references -> `ctxcompress` -> an answer from soft tokens and text.

What a reference names goes straight into the prompt, at the place of the block or placeholder. Tensors never
appear in messages, events or callbacks. Nothing heavy happens at import or construction: the model is loaded
at the first call.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.generic_utils import (
    astream_chat_response_to_completion_response,
    chat_response_to_completion_response,
    prompt_to_messages,
    stream_chat_response_to_completion_response,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr, SecretStr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM
from llama_index.postprocessor.ctxcompress.settings import CompressorSettings

from ctxcompress import ConfigError, InputError

if TYPE_CHECKING:
    from ctxcompress import Completion, ContextCompressor, Decoder, SoftTokens, VLLMDecoder

PER_CALL = ("temperature", "top_p", "seed", "max_tokens", "stop")


class SoftBlock(TextBlock):
    """A document in a message: its text, and the reference to what is left of it.

    `CtxCompressLLM` reads what the reference names. Every other LLM sees a `TextBlock` with the text, and so
    does whoever reads a message that was serialised.
    """

    ref: str

    @property
    def templatable_attributes(self) -> list[str]:
        """None: braces in a document are no variables."""
        return []


class CtxCompressLLM(CompressorSettings, LLM):
    """A local or served model that reads soft tokens where messages hold `SoftBlock`s.

    Messages may be of the system, the user and the assistant, of `TextBlock`s and `SoftBlock`s, which follow
    each other without a gap. Their text is plain text to the model, whatever control strings it contains.
    Async calls leave the event loop free, and cancelling them ends the work.

    `raw["usage"]` and `additional_kwargs` of an answer hold `prompt_tokens`, `completion_tokens`,
    `total_tokens`, `soft_tokens` (those of the prompt that were soft) and `tokens_before` (what the prompt
    would have had with the text that soft tokens stand for). In a stream they come with the last piece. The
    settings `temperature` to `stop` may also be given to each call.

    Args:
        temperature: 0 takes the likeliest token; higher is more varied.
        top_p: sample from the likeliest tokens that together have this probability, in (0, 1].
        seed: for equal samples every time.
        max_tokens: longest answer.
        stop: strings to end at, which are not part of the answer.
        placeholders: also read placeholders in text, which `CtxCompressPostprocessor(placeholders=True)`
            puts there; text that only looks like one stays text.
        base_url: of a vLLM server that generates, like http://localhost:8000; None generates here. The model
            is needed here too, for its tokenizer and token embeddings.
        served_model: the model's name on the server; None takes the first one the server lists.
        api_key: the server's; never shown or serialised, but part of a pickle.
        timeout: seconds the server may be silent.
        max_retries: further attempts after 429, 5xx or a lost connection.
        model: see `CompressorSettings`, as for the four below; they must be those of the postprocessor, for
            references belong to a store.
        adapter: needed for soft tokens.
        device: of the model.
        store: whose references are read.
        compressor: one of your own.

    Raises:
        pydantic.ValidationError: a setting is out of its range or unknown.
    """

    # Errors would show all settings, the key among them.
    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", hide_input_in_errors=True)

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0)
    max_tokens: int = Field(default=256, ge=1)
    stop: list[str] = Field(default_factory=list)
    placeholders: bool = False
    base_url: str | None = None
    served_model: str | None = None
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    timeout: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    max_retries: int = Field(default=2, ge=0)
    _remote: VLLMDecoder | None = PrivateAttr(default=None)

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "CtxCompressLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """The model's window and name; loads the model, which knows its window."""
        return LLMMetadata(
            context_window=self.get_compressor().backbone.window,
            num_output=self.max_tokens,
            is_chat_model=True,
            model_name=self.model,
        )

    def to_payload(self) -> dict[str, Any]:
        """What events tell about this LLM: `metadata` without the window, for which nothing is loaded."""
        return {
            "class_name": self.class_name(),
            "model_name": self.model,
            "num_output": self.max_tokens,
            "is_chat_model": True,
            "temperature": self.temperature,
        }

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer `messages`.

        Args:
            messages: the conversation so far.
            kwargs: `temperature`, `top_p`, `seed`, `max_tokens` and `stop`, for this call.

        Raises:
            ctxcompress.InputError: a role or block that cannot be shown to the model, a reference that names
                nothing here, or a prompt that does not fit the model's window together with the answer.
            ctxcompress.ConfigError: an unknown setting, or one out of its range.
            ctxcompress.CheckpointError: soft tokens of another decoder.
            ctxcompress.ServingError: the server gave no usable answer.
        """
        return self._chat(messages, kwargs)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`chat` with `prompt` as the turn of a user."""
        return chat_response_to_completion_response(self._chat(prompt_to_messages(prompt), kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """`chat` in pieces; closing the iterator ends the work."""
        return self._pieces(self._call(messages, kwargs))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """`stream_chat` with `prompt` as the turn of a user."""
        pieces = self._pieces(self._call(prompt_to_messages(prompt), kwargs))
        return stream_chat_response_to_completion_response(pieces)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` for an event loop, which goes on meanwhile; cancelling the task ends the work."""
        return await self._achat(messages, kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`achat` with `prompt` as the turn of a user."""
        return chat_response_to_completion_response(await self._achat(prompt_to_messages(prompt), kwargs))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """`stream_chat` for an event loop; cancelling the task or closing the iterator ends the work."""
        return self._apieces(await asyncio.to_thread(self._call, messages, kwargs))

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """`astream_chat` with `prompt` as the turn of a user."""
        pieces = self._apieces(await asyncio.to_thread(self._call, prompt_to_messages(prompt), kwargs))
        return astream_chat_response_to_completion_response(pieces)

    def _chat(self, messages: Sequence[ChatMessage], given: dict[str, Any]) -> ChatResponse:
        call = self._call(messages, given)
        done = call.decoder.generate(call.prompt, **call.settings)
        return self._whole(call, done)

    async def _achat(self, messages: Sequence[ChatMessage], given: dict[str, Any]) -> ChatResponse:
        # The first call loads the model, and long prompts take their time to be encoded.
        call = await asyncio.to_thread(self._call, messages, given)
        done = await call.decoder.agenerate(call.prompt, **call.settings)
        return self._whole(call, done)

    def _pieces(self, call: _Call) -> Generator[ChatResponse, None, None]:
        text = ""
        done: list[Completion] = []
        stream = call.decoder.stream(call.prompt, **call.settings, on_end=done.append)
        with contextlib.closing(stream) as pieces:
            for piece in pieces:
                text += piece
                yield ChatResponse(message=_answer(text), delta=piece)
        yield self._whole(call, done[0]).model_copy(update={"delta": ""})

    async def _apieces(self, call: _Call) -> AsyncGenerator[ChatResponse, None]:
        text = ""
        done: list[Completion] = []
        stream = call.decoder.astream(call.prompt, **call.settings, on_end=done.append)
        async with contextlib.aclosing(stream) as pieces:
            async for piece in pieces:
                text += piece
                yield ChatResponse(message=_answer(text), delta=piece)
        yield self._whole(call, done[0]).model_copy(update={"delta": ""})

    def _call(self, messages: Sequence[ChatMessage], given: dict[str, Any]) -> _Call:
        """Everything that is checked, loaded and encoded before the first token."""
        settings = self._settings(given)
        compressor = self.get_compressor()
        turns = [(message.role.value, self._content(message, compressor)) for message in messages]
        return _Call(compressor, self._decoder(compressor), compressor.prompt(turns), settings)

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(set(given) - set(PER_CALL))
        if unknown:
            raise ConfigError(
                f"a call may set {', '.join(PER_CALL)}, got {', '.join(unknown)}; leave others out"
            )
        settings = {name: given.get(name, getattr(self, name)) for name in PER_CALL}
        return {"max_new_tokens": settings.pop("max_tokens"), **settings, "stop": settings["stop"] or ()}

    def _content(self, message: ChatMessage, compressor: ContextCompressor) -> list[str | SoftTokens]:
        """A message's texts, and soft tokens in the places of references."""
        references = compressor.references
        content: list[str | SoftTokens] = []
        for block in message.blocks:
            if isinstance(block, SoftBlock):
                content += references.resolve(block.ref)
            elif isinstance(block, TextBlock):
                content += references.expand(block.text) if self.placeholders else [block.text]
            else:
                raise InputError(
                    f"messages must consist of TextBlock and SoftBlock, got {type(block).__name__}; leave it "
                    "out, or put its content into words"
                )
        return content

    def _decoder(self, compressor: ContextCompressor) -> Decoder:
        if self.base_url is None:
            return compressor.decoder()
        # One for all calls: it remembers what the server said about its models.
        remote = self._remote or compressor.remote_decoder(
            self.base_url,
            model=self.served_model,
            api_key=None if self.api_key is None else self.api_key.get_secret_value(),
            timeout=self.timeout,
            max_retries=self.max_retries,
        )
        self._remote = remote
        return remote

    def _whole(self, call: _Call, done: Completion) -> ChatResponse:
        usage = call.usage(done.completion_tokens)
        return ChatResponse(
            message=_answer(done.text),
            raw={"model": self.model, "finish_reason": done.finish_reason, "usage": usage},
            additional_kwargs=usage,
        )


@dataclass(frozen=True, slots=True)
class _Call:
    """One question to a decoder."""

    compressor: ContextCompressor
    decoder: Decoder
    prompt: Sequence[tuple[int, ...] | SoftTokens]
    settings: dict[str, Any]

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """What the call cost in tokens; see `CtxCompressLLM`."""
        soft = [part for part in self.prompt if not isinstance(part, tuple)]
        prompt_tokens = sum(map(len, self.prompt))
        soft_tokens = sum(map(len, soft))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "soft_tokens": soft_tokens,
            "tokens_before": prompt_tokens - soft_tokens + sum(part.tokens for part in soft),
        }


def _answer(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.ASSISTANT, content=text)
