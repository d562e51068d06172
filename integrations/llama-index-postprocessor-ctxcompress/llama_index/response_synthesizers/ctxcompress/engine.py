"""One call from an index to a query engine that answers from soft tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.indices.base import BaseIndex
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.llms.ctxcompress.base import CtxCompressLLM
from llama_index.postprocessor.ctxcompress.base import CtxCompressPostprocessor
from llama_index.response_synthesizers.ctxcompress.base import SoftContextSynthesizer

from ctxcompress import AllocatorName, ConfigError, Order


def query_engine(
    index: BaseIndex[Any],
    *,
    llm: CtxCompressLLM | None = None,
    compression_ratio: float | None = None,
    budget: int | None = None,
    allocator: AllocatorName = "dast",
    allow_drop: bool = False,
    order: Order = "score",
    similarity_top_k: int = 10,
    streaming: bool = False,
    node_postprocessors: Sequence[BaseNodePostprocessor] = (),
    **retriever: Any,
) -> RetrieverQueryEngine:
    """Retrieve, compress to soft tokens, answer: all with the model and the store of one LLM.

    The index brings its own embedding model; LlamaIndex' global LLM is never asked for.

    Args:
        index: what is searched.
        llm: None is `CtxCompressLLM()`.
        compression_ratio: original tokens / compressed tokens, >= 1. Give this or `budget`.
        budget: most tokens of all nodes together, >= 1.
        allocator: who decides each node's part.
        allow_drop: let worthless nodes lose all their tokens.
        order: of the nodes in the prompt, see `SoftContextSynthesizer`.
        similarity_top_k: number of nodes to retrieve.
        streaming: answer in pieces.
        node_postprocessors: run before the compression, such as a reranker.
        retriever: further settings of `index.as_retriever`, such as `filters`.

    Raises:
        ctxcompress.ConfigError: another LLM.
        pydantic.ValidationError: a setting of `CtxCompressPostprocessor` is out of its range.
    """
    llm = CtxCompressLLM() if llm is None else llm
    if not isinstance(llm, CtxCompressLLM):
        raise ConfigError(
            f"llm must be a CtxCompressLLM, which reads soft tokens, got {type(llm).__name__}; for others "
            "use index.as_query_engine(llm=..., node_postprocessors=[CtxCompressPostprocessor(...)])"
        )
    compress = CtxCompressPostprocessor(
        mode="soft",
        compression_ratio=compression_ratio,
        budget=budget,
        allocator=allocator,
        allow_drop=allow_drop,
        model=llm.model,
        adapter=llm.adapter,
        device=llm.device,
        store=llm.store,
        compressor=llm.compressor,
    )
    return RetrieverQueryEngine(
        retriever=index.as_retriever(similarity_top_k=similarity_top_k, **retriever),
        response_synthesizer=SoftContextSynthesizer(llm, order=order, streaming=streaming),
        node_postprocessors=[*node_postprocessors, compress],
    )
