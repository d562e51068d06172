"""Soft tokens in messages: a content block with a reference stands for what is left of a document.

The block is LangChain's `non_standard` one, so that templates, caches, tracers and serialisation carry it
unchanged. Tensors never enter a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from ctxcompress import InputError

if TYPE_CHECKING:
    from ctxcompress import ContextCompressor, SoftTokens

KIND = "ctxcompress"
_ROLES = {SystemMessage: "system", HumanMessage: "user", AIMessage: "assistant"}


def soft_block(reference: str, num_tokens: int | None) -> dict[str, Any]:
    """A content block that stands for what `reference` names; `num_tokens` is for readers, never trusted."""
    return {"type": "non_standard", "value": {"type": KIND, "ref": reference, "num_tokens": num_tokens}}


def content(parts: Sequence[str | dict[str, Any]]) -> str | list[str | dict[str, Any]]:
    """Content of a message: plain text if all parts are, else text blocks and soft ones."""
    blocks: list[str | dict[str, Any]] = []
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
        else:
            blocks += [*_text_block(text), part]
            text = ""
    return [*blocks, *_text_block(text)] if blocks else text


def turns(
    messages: Sequence[BaseMessage], compressor: ContextCompressor, *, placeholders: bool
) -> list[tuple[str, list[str | SoftTokens]]]:
    """Messages as the turns `ContextCompressor.prompt` takes.

    Args:
        messages: of the system, the user and the assistant.
        compressor: whose references count.
        placeholders: also expand placeholders in text of the system and the user.

    Raises:
        ctxcompress.InputError: another role, a content block that is neither text nor ours, a tool call, or a
            reference that this compressor's store does not hold.
    """
    expand = compressor.references.expand

    def split(text: str, role: str) -> list[str | SoftTokens]:
        return expand(text) if placeholders and role != "assistant" else [text]

    return [_turn(message, compressor, split) for message in messages]


def _turn(
    message: BaseMessage, compressor: ContextCompressor, split: Callable[[str, str], list[str | SoftTokens]]
) -> tuple[str, list[str | SoftTokens]]:
    role = next((role for kind, role in _ROLES.items() if isinstance(message, kind)), None)
    if role is None or getattr(message, "tool_calls", None):
        got = f"a {message.type!r} message" if role is None else "an AI message that calls tools"
        raise InputError(
            f"messages must be system, human or AI messages without tool calls, got {got}; this model knows "
            "no tools and no other roles, leave it out or pass its text as a human message"
        )
    blocks = [message.content] if isinstance(message.content, str) else message.content
    parts: list[str | SoftTokens] = []
    for block in blocks:
        text = _text(block)
        parts += compressor.references.resolve(_reference(block)) if text is None else split(text, role)
    return role, parts


def _text(block: str | dict[Any, Any]) -> str | None:
    """The text of a block, None for a block that holds none."""
    if isinstance(block, str):
        return block
    return block["text"] if block.get("type") == "text" and isinstance(block.get("text"), str) else None


def _reference(block: str | dict[Any, Any]) -> str:
    """What a block of ours refers to; whether it names anything is for the store to say."""
    value = block.get("value") if isinstance(block, dict) and block.get("type") == "non_standard" else None
    if not isinstance(value, dict) or value.get("type") != KIND:
        kind = block.get("type") if isinstance(block, dict) else type(block).__name__
        raise InputError(
            "content must be text, text blocks and soft blocks as SoftContextPrompt makes them, got a block "
            f"of type {kind!r}; this model reads text only, leave the block out"
        )
    return cast(str, value.get("ref"))


def _text_block(text: str) -> list[str | dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []
