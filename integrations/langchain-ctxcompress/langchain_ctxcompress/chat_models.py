"""A chat model that reads soft tokens: messages with references -> prompt -> a decoder here or behind vLLM.

Nothing heavy happens at import or construction: the language model is loaded at the first call, and an event
loop goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.utils import secret_from_env
from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field, SecretStr

from ctxcompress import ConfigError, InputError
from langchain_ctxcompress.messages import turns
from langchain_ctxcompress.settings import ModelSettings

if TYPE_CHECKING:
    from ctxcompress import Completion, ContextCompressor, Decoder

_PER_CALL = ("model", "temperature", "top_p", "seed", "max_tokens", "stop", "timeout", "max_retries")
_TEXT_ONLY: ModelProfile = {
    "text_inputs": True,
    "text_outputs": True,
    "image_inputs": False,
    "audio_inputs": False,
    "video_inputs": False,
    "tool_calling": False,
    "structured_output": False,
}


class ChatCtxCompress(ModelSettings, BaseChatModel):
    """Chats with a model that reads text and soft tokens, in this process or served by vLLM.

    Messages are the system's, the user's and the assistant's, of text and of the blocks `SoftContextPrompt`
    makes. Calls may run in parallel, and cancelling an async call ends its work. `usage_metadata` counts what
    reached the model, soft tokens also apart (`input_token_details["soft"]`); `response_metadata` has
    `model_name`, `finish_reason` and `tokens_before`, the tokens of the prompt if its soft tokens were the
    text they stand for. Caches tell models, adapters and settings apart. Settings cannot be changed after
    construction, but `model`, `temperature`, `top_p`, `seed`, `max_tokens`, `stop`, `timeout` and
    `max_retries` can be given to each call (`invoke(..., seed=1)`, `bind(seed=1)`).

    Args:
        model: "embedded", a local folder or a hub id; loaded at first use. Also with `base_url`: prompts are
            made here.
        device: of the model, such as "cuda:1"; None takes CUDA if there is one.
        adapter: the soft-token adapter, a folder or hub id; "embedded" is the one that ships with the
            embedded model.
        store: folder of encoded documents. A reference is known only with the model, device, adapter and
            store of the `CtxCompressor` that issued it.
        compressor: a compressor of your own, used instead of loading `model`.
        base_url: of a vLLM server that serves what `ctxcompress export` writes; None generates here.
        served_model: the model's name on the server; None takes the first it lists.
        api_key: for the server; None reads CTXCOMPRESS_API_KEY.
        timeout: seconds the server may be silent.
        max_retries: further attempts after a lost connection or an overloaded server.
        temperature: 0 takes the likeliest token; higher is more varied.
        top_p: sample from the likeliest tokens that together have this probability, in (0, 1].
        seed: for equal samples every time.
        max_tokens: longest answer, >= 1.
        stop: strings to end at, which are not part of the answer.
        streaming: generate by streaming in `invoke` too, for callbacks that follow tokens.
        placeholders: expand placeholders of `CtxCompressor(placeholders=True)` in text of the system and the
            user. Off, they are plain text.

    Raises:
        pydantic.ValidationError: a setting is unknown or out of its range; a `ValueError`.

    Example:
        ```python
        llm = ChatCtxCompress()
        chain = create_soft_rag_chain(retriever, llm, compression_ratio=8)
        chain.invoke({"input": "Who discovered penicillin?"})["answer"]
        ```
    """

    # The base class sets fields of its own after construction: ours alone are frozen.
    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    base_url: str | None = Field(default=None, frozen=True)
    served_model: str | None = Field(default=None, frozen=True)
    api_key: SecretStr | None = Field(
        default_factory=secret_from_env("CTXCOMPRESS_API_KEY", default=None), frozen=True
    )
    timeout: float = Field(default=60.0, gt=0, allow_inf_nan=False, frozen=True)
    max_retries: int = Field(default=2, ge=0, frozen=True)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False, frozen=True)
    top_p: float = Field(default=1.0, gt=0, le=1, frozen=True)
    seed: int | None = Field(default=None, ge=0, lt=2**63, frozen=True)
    max_tokens: int = Field(default=256, ge=1, frozen=True)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    ] = Field(default=None, frozen=True, validation_alias=AliasChoices("stop", "stop_sequences"))
    streaming: bool = Field(default=False, frozen=True)
    placeholders: bool = Field(default=False, frozen=True)

    @property
    def model_name(self) -> str:
        """The model, as it was named."""
        return self.model

    @property
    def _llm_type(self) -> str:
        return "ctxcompress-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What answers depend on, for traces; loads the model, whose fingerprint is part of it."""
        return self._called(None, {}).identity

    def get_token_ids(self, text: str) -> list[int]:
        """Ids of the model's tokens of `text`, or what `custom_get_token_ids` says."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return list(self._loaded().backbone.encode(text).ids)

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Tokens of the whole prompt, raw and soft, as the decoder will count them.

        Args:
            messages: of a conversation; none have no tokens.
            tools: must be none; this model calls none.

        Raises:
            ctxcompress.InputError: tools, or messages the model cannot be given.
        """
        if tools:
            raise InputError(f"this model calls no tools, got {len(tools)}; leave them out")
        if not messages:
            return 0
        return sum(map(len, self._prompt(self._loaded(), messages)))

    async def agenerate(self, *args: Any, **kwargs: Any) -> LLMResult:
        """As the base class, which asks for fingerprints on the event loop: by then the model is loaded."""
        await asyncio.to_thread(self._loaded, kwargs.get("model"))
        return await super().agenerate(*args, **kwargs)

    async def astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[AIMessageChunk]:
        """As the base class, which asks for fingerprints on the event loop: by then the model is loaded."""
        await asyncio.to_thread(self._loaded, kwargs.get("model"))
        stream = cast(AsyncGenerator[AIMessageChunk, None], super().astream(*args, **kwargs))
        async with contextlib.aclosing(stream) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _achat_model_stream_v3(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.to_thread(self._loaded, kwargs.get("model"))
        return await super()._achat_model_stream_v3(*args, **kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call, prompt = self._prepared(messages, stop, kwargs)
        return _result(call, prompt, call.decoder.generate(prompt, **call.sampling))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call, prompt = await asyncio.to_thread(self._prepared, messages, stop, kwargs)
        return _result(call, prompt, await call.decoder.agenerate(prompt, **call.sampling))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call, prompt = self._prepared(messages, stop, kwargs)
        done: list[Completion] = []
        stream = call.decoder.stream(prompt, **call.sampling, on_end=done.append)
        with contextlib.closing(stream) as pieces:
            for piece in pieces:
                chunk = _piece(piece)
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
        last = _last(call, prompt, done[0])
        if run_manager:
            run_manager.on_llm_new_token("", chunk=last)
        yield last

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call, prompt = await asyncio.to_thread(self._prepared, messages, stop, kwargs)
        done: list[Completion] = []
        stream = call.decoder.astream(prompt, **call.sampling, on_end=done.append)
        async with contextlib.aclosing(stream) as pieces:
            async for piece in pieces:
                chunk = _piece(piece)
                if run_manager:
                    await run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
        last = _last(call, prompt, done[0])
        if run_manager:
            await run_manager.on_llm_new_token("", chunk=last)
        yield last

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return {**super()._get_ls_params(stop or self.stop, **kwargs), "ls_provider": "ctxcompress"}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        # The key of caches. The base class would take another model's name from a call, but not its weights.
        return json.dumps(self._called(stop, kwargs).identity, sort_keys=True)

    def _resolve_model_profile(self) -> ModelProfile:
        if self.compressor is None:
            return _TEXT_ONLY
        return {**_TEXT_ONLY, "max_input_tokens": self.compressor.backbone.window}

    def _loaded(self, model: str | None = None) -> ContextCompressor:
        """The compressor of this model or another one; once it is there, the profile knows its window."""
        compressor = self._ready(model)
        if model in {None, self.model}:
            window: ModelProfile = {"max_input_tokens": compressor.backbone.window}
            self.profile = {**window, **(self.profile or _TEXT_ONLY)}
        return compressor

    def _called(self, stop: list[str] | None, kwargs: dict[str, Any]) -> _Call:
        """The settings of a call: this object's, and over them the call's own.

        Raises:
            ctxcompress.ConfigError: an unknown setting, or another model than the one that is served.
        """
        # Drivers of LangChain say with "stream" what they have decided already.
        unknown = sorted(kwargs.keys() - {*_PER_CALL, "stream"})
        if unknown:
            raise ConfigError(
                f"settings of a call must be among {', '.join(_PER_CALL)}, got {', '.join(unknown)}; this "
                "model knows no others and calls no tools, leave them out"
            )
        given = {
            name: value
            for name, value in {**kwargs, "stop": stop or kwargs.get("stop")}.items()
            if value is not None
        }
        asked = {name: given.get(name, getattr(self, name)) for name in _PER_CALL}
        if self.base_url is not None and asked["model"] != self.model:
            raise ConfigError(
                f"the model must be the one that is served, {self.model!r}, got {asked['model']!r}; make a "
                "ChatCtxCompress for the other one"
            )
        compressor = self._loaded(asked["model"])
        return _Call(
            model=asked["model"],
            compressor=compressor,
            decoder=self._decoder(compressor, asked["timeout"], asked["max_retries"]),
            sampling={
                "max_new_tokens": asked["max_tokens"],
                "temperature": asked["temperature"],
                "top_p": asked["top_p"],
                "seed": asked["seed"],
                "stop": tuple(asked["stop"] or ()),
            },
            surroundings={
                "base_url": self.base_url,
                "served_model": self.served_model,
                "placeholders": self.placeholders,
            },
        )

    def _decoder(self, compressor: ContextCompressor, timeout: float, max_retries: int) -> Decoder:
        if self.base_url is None:
            return compressor.decoder()
        key = self.api_key.get_secret_value() if self.api_key else None
        return _served(compressor, self.base_url, self.served_model, key, timeout, max_retries)

    def _prepared(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> tuple[_Call, Sequence[Any]]:
        call = self._called(stop, kwargs)
        return call, self._prompt(call.compressor, messages)

    def _prompt(self, compressor: ContextCompressor, messages: Sequence[BaseMessage]) -> Sequence[Any]:
        return compressor.prompt(turns(messages, compressor, placeholders=self.placeholders))


@dataclass(frozen=True, slots=True)
class _Call:
    """One call: who generates, and how."""

    model: str
    compressor: ContextCompressor
    decoder: Decoder
    sampling: dict[str, Any]
    surroundings: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What the answer depends on, plain JSON."""
        return {
            "model": self.model,
            "backbone": self.compressor.backbone.fingerprint,
            "adapter": _adapter_fingerprint(self.compressor),
            **self.surroundings,
            **self.sampling,
        }


@functools.lru_cache(maxsize=8)
def _served(
    compressor: ContextCompressor,
    base_url: str,
    served_model: str | None,
    api_key: str | None,
    timeout: float,
    max_retries: int,
) -> Decoder:
    """A decoder behind a server; made once, as it asks the server what it serves."""
    return compressor.remote_decoder(
        base_url, model=served_model, api_key=api_key, timeout=timeout, max_retries=max_retries
    )


def _adapter_fingerprint(compressor: ContextCompressor) -> str:
    try:
        return compressor.soft.fingerprint
    except ConfigError:  # there is no adapter: text only
        return ""


def _result(call: _Call, prompt: Sequence[Any], completion: Completion) -> ChatResult:
    message = AIMessage(
        completion.text,
        usage_metadata=_usage(prompt, completion.completion_tokens),
        response_metadata=_response(call, prompt, completion.finish_reason),
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


def _piece(text: str) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(content=text))


def _last(call: _Call, prompt: Sequence[Any], completion: Completion) -> ChatGenerationChunk:
    message = AIMessageChunk(
        content="",
        usage_metadata=_usage(prompt, completion.completion_tokens),
        response_metadata=_response(call, prompt, completion.finish_reason),
        chunk_position="last",
    )
    return ChatGenerationChunk(message=message)


def _usage(prompt: Sequence[Any], generated: int) -> UsageMetadata:
    given = sum(map(len, prompt))
    soft = sum(len(part) for part in prompt if not isinstance(part, tuple))
    return UsageMetadata(
        input_tokens=given,
        output_tokens=generated,
        total_tokens=given + generated,
        input_token_details=cast(InputTokenDetails, {"soft": soft}),
    )


def _response(call: _Call, prompt: Sequence[Any], finish_reason: str) -> dict[str, Any]:
    before = sum(len(part) if isinstance(part, tuple) else part.tokens for part in prompt)
    return {"model_name": call.model, "finish_reason": finish_reason, "tokens_before": before}
