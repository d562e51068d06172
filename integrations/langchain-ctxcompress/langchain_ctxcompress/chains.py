"""A whole chain in one call: question -> documents -> soft tokens -> answer."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough

from ctxcompress import ConfigError
from langchain_ctxcompress.chat_models import ChatCtxCompress
from langchain_ctxcompress.compressor import CtxCompressor
from langchain_ctxcompress.prompts import SoftContextPrompt


def create_soft_rag_chain(
    retriever: Runnable[Any, list[Document]],
    llm: Runnable[Any, Any],
    *,
    compression_ratio: float | None = None,
    budget: int | None = None,
    prompt: SoftContextPrompt | None = None,
    **settings: Any,
) -> Runnable[dict[str, Any], dict[str, Any]]:
    """A chain that answers from soft tokens, with the keys of `create_retrieval_chain`.

    It takes {"input": question}, and "chat_history" if there is one, and returns these with "context", the
    compressed documents with their original text, and "answer". Streaming streams the answer.

    Args:
        retriever: a retriever, which gets the question; or another runnable that returns documents, which
            gets the whole input.
        llm: a `ChatCtxCompress`, also with settings bound to it; documents are compressed with its model and
            store.
        compression_ratio: original tokens / compressed tokens, >= 1. Give this or `budget`.
        budget: most tokens of all documents together.
        prompt: makes the messages, from "context" and "input"; None takes `SoftContextPrompt`'s defaults.
        **settings: others of `CtxCompressor`, such as `allocator` or `allow_drop`.

    Raises:
        ctxcompress.ConfigError: `llm` is another chat model.
        pydantic.ValidationError: a setting is out of its range.
    """
    node = CtxCompressor(
        compression_ratio=compression_ratio,
        budget=budget,
        mode="soft",
        **{**_chat_model(llm).model_settings, **settings},
    )
    question: Runnable[dict[str, Any], Any] = RunnableLambda(itemgetter("input"))
    found = question | retriever if isinstance(retriever, BaseRetriever) else retriever
    answer = (prompt or SoftContextPrompt(question_key="input")) | llm | StrOutputParser()
    chain: Runnable[dict[str, Any], dict[str, Any]] = (
        RunnablePassthrough.assign(context=found.with_config(run_name="retrieve_documents"))
        | node.as_runnable(question_key="input")
        | RunnablePassthrough.assign(answer=answer)
    )
    return chain.with_config(run_name="soft_rag_chain")


def _chat_model(llm: Any) -> ChatCtxCompress:
    """The chat model, also behind bindings."""
    bare = llm
    while not isinstance(bare, ChatCtxCompress) and hasattr(bare, "bound"):
        bare = bare.bound
    if not isinstance(bare, ChatCtxCompress):
        raise ConfigError(
            f"only ChatCtxCompress reads soft tokens, got {type(llm).__name__}; use it as llm, or shorten "
            "the documents of a chain of your own with CtxCompressor(mode='text') for any LLM"
        )
    return bare
