"""A response synthesizer for LlamaIndex that joins no texts: every node reaches the decoder as it is.

The message is that of ctxcompress' training: the documents, the one worth most last, then the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, TextBlock
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.indices.prompt_helper import ChatPromptHelper, PromptHelper
from llama_index.core.llms.llm import (
    LLM,
    astream_chat_response_to_tokens,
    stream_chat_response_to_tokens,
)
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryType
from llama_index.core.types import RESPONSE_TEXT_TYPE
from llama_index.llms.ctxcompress.base import CtxCompressLLM, SoftBlock
from llama_index.postprocessor.ctxcompress.base import METADATA_KEY

from ctxcompress import ConfigError, Order, arranged


class SoftContextSynthesizer(BaseSynthesizer):
    """Asks the LLM once, with all nodes in one message.

    A node that `CtxCompressPostprocessor(mode="soft")` has seen goes in as a `SoftBlock`, another as its
    text, without metadata. What was dropped stays out. An LLM that cannot read soft tokens sees the original
    text. `response_kwargs` of a call go to the LLM.

    Args:
        llm: None is `CtxCompressLLM()`; LlamaIndex' global default is never asked for.
        order: "score" puts the node worth most last, next to the question; "edges" puts the best ones first
            and last; "original" keeps the order they came in.
        streaming: answer in pieces.
        empty_response: the answer when there are no nodes.
        callback_manager: told about the synthesis.
        output_cls: refused; answers are text.

    Raises:
        ctxcompress.ConfigError: structured output, or an unknown order.
    """

    def __init__(
        self,
        llm: LLM | None = None,
        *,
        order: Order = "score",
        streaming: bool = False,
        empty_response: str | None = None,
        callback_manager: CallbackManager | None = None,
        output_cls: type[BaseModel] | None = None,
    ) -> None:
        if output_cls is not None or isinstance(llm, StructuredLLM):
            raise ConfigError(
                "answers from soft tokens are text, got an output_cls or a structured LLM; leave it out and "
                "parse the answer, or use another response synthesizer"
            )
        arranged([], [], order)
        super().__init__(
            llm=llm or CtxCompressLLM(),
            callback_manager=callback_manager,
            # Nothing is cut to size here. Without these, the base class would load the model to ask its size.
            prompt_helper=PromptHelper(tokenizer=str.split),
            chat_prompt_helper=ChatPromptHelper(tokenizer=str.split),
            streaming=streaming,
            empty_response=empty_response,
        )
        self._order: Order = order

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer `query` from `nodes`."""
        return super().synthesize(query, nodes, additional_source_nodes, documents=nodes, **response_kwargs)

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """`synthesize` for an event loop, which goes on meanwhile."""
        return await super().asynthesize(
            query, nodes, additional_source_nodes, documents=nodes, **response_kwargs
        )

    def get_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        documents: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TEXT_TYPE:
        """Answer `query_str` from `documents`; from `text_chunks` if there are none but texts."""
        messages = self._messages(query_str, text_chunks, documents)
        if self._streaming:
            return stream_chat_response_to_tokens(self._llm.stream_chat(messages, **response_kwargs))
        return self._llm.chat(messages, **response_kwargs).message.content or ""

    async def aget_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        documents: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TEXT_TYPE:
        """`get_response` for an event loop."""
        messages = self._messages(query_str, text_chunks, documents)
        if self._streaming:
            pieces = await self._llm.astream_chat(messages, **response_kwargs)
            return await astream_chat_response_to_tokens(pieces)
        return (await self._llm.achat(messages, **response_kwargs)).message.content or ""

    def _messages(
        self, query: str, texts: Sequence[str], nodes: Sequence[NodeWithScore] | None
    ) -> list[ChatMessage]:
        from ctxcompress import question_content

        documents: list[list[str | TextBlock]] = [[text] for text in texts if text]
        if nodes is not None:
            accounts = [_account(item) for item in nodes]
            documents = arranged(
                [_document(item, account) for item, account in zip(nodes, accounts, strict=True)],
                [_number(account.get("share")) for account in accounts],
                self._order,
            )
        content = question_content(query, documents)
        blocks = [TextBlock(text=part) if isinstance(part, str) else part for part in content]
        # With the LLM's system prompt, as its own `predict` has it.
        return self._llm._extend_messages([ChatMessage(blocks=blocks)])

    def _get_prompts(self) -> PromptDictType:
        """None: an adapter knows the words it was trained with, and no others."""
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        """There are none."""


def _account(item: NodeWithScore) -> dict[str, Any]:
    """What the postprocessor wrote about a node; the key may also hold something of the user's own."""
    account = item.node.metadata.get(METADATA_KEY)
    return account if isinstance(account, dict) else {}


def _number(value: Any) -> float | None:
    return value if isinstance(value, float) else None


def _document(item: NodeWithScore, account: dict[str, Any]) -> list[str | TextBlock]:
    """What the prompt shows of a node: nothing, its text, or a block that stands for it."""
    text = item.node.get_content(MetadataMode.NONE)
    reference = account.get("ref")
    if account.get("tokens_after") == 0:
        return []
    if isinstance(reference, str):
        return [SoftBlock(text=text, ref=reference)]
    return [text] if text else []
