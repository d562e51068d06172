"""Documents and a question -> messages, in the words that decoders of soft tokens are trained with."""

from __future__ import annotations

from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage, convert_to_messages
from langchain_core.runnables import RunnableConfig, RunnableSerializable
from pydantic import ConfigDict

from ctxcompress import InputError, Order, arranged
from langchain_ctxcompress.compressor import METADATA_KEY, check_keys
from langchain_ctxcompress.messages import content, soft_block


class SoftContextPrompt(RunnableSerializable[dict[str, Any], list[BaseMessage]]):
    """Asks a question about documents: {"context": documents, "question": text} -> messages.

    A document that `CtxCompressor` compressed in soft mode becomes a content block with its reference, any
    other its text; documents with nothing left are left out. If all are text, so is the message, and any chat
    model can read it. Blocks are for `ChatCtxCompress` alone: hand another LLM the documents, which have
    their text, not these messages.

    Args:
        order: of the documents: "score" puts the one worth most last, next to the question; "edges" the best
            first and last; "original" keeps the order they come in.
        system: opens the conversation.
        context_key: where the list of documents stands.
        question_key: where the question stands.
        history_key: where the messages of the conversation so far stand, if the input has them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    order: Order = "score"
    system: str | None = None
    context_key: str = "context"
    question_key: str = "question"
    history_key: str = "chat_history"

    def invoke(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> list[BaseMessage]:
        """The messages; the async twin `ainvoke` makes them in a worker thread.

        Args:
            input: with documents and question, and perhaps a history; other keys are ignored.
            config: of the run.
            **kwargs: none are known.

        Raises:
            ctxcompress.InputError: a key is missing, or what stands there is no documents or no question.
        """
        return self._call_with_config(self._messages, input, config, run_type="prompt", **kwargs)

    def _messages(self, values: dict[str, Any]) -> list[BaseMessage]:
        from ctxcompress import question_content

        setting = "SoftContextPrompt(context_key=..., question_key=...)"
        check_keys(values, [self.context_key, self.question_key], setting)
        question = values[self.question_key]
        if not isinstance(question, str):
            raise InputError(
                f"the question must be a string, got {type(question).__name__}; pass the text alone"
            )
        asked = question_content(question, self._parts(values[self.context_key]))
        opening = [SystemMessage(self.system)] if self.system else []
        history = convert_to_messages(values.get(self.history_key) or [])
        return [*opening, *history, HumanMessage(content(asked))]

    def _parts(self, documents: Any) -> list[list[str | dict[str, Any]]]:
        """What is left of each document, in order for the prompt."""
        if not isinstance(documents, (list, tuple)) or not all(isinstance(d, Document) for d in documents):
            raise InputError(
                f"the context must be a list of documents, got {type(documents).__name__}; pass them before "
                "they are joined to text"
            )
        accounts = [_account(document) for document in documents]
        left = [_left(document, account) for document, account in zip(documents, accounts, strict=True)]
        present = [place for place, parts in enumerate(left) if parts]
        return arranged(
            [left[place] for place in present],
            [accounts[place].get("share") for place in present],
            self.order,
        )


def _account(document: Document) -> dict[str, Any]:
    account = document.metadata.get(METADATA_KEY)
    return account if isinstance(account, dict) else {}


def _left(document: Document, account: dict[str, Any]) -> list[str | dict[str, Any]]:
    if "ref" not in account:
        return [document.page_content] if document.page_content else []
    tokens = account.get("tokens_after")
    return [] if tokens == 0 else [soft_block(account["ref"], tokens)]
