"""A node postprocessor for LlamaIndex: nodes -> `ctxcompress` -> copies of the nodes, each with its budget.

In text mode a node's text becomes shorter. In soft mode it stays, and a reference in the node's metadata
names the soft tokens that stand for it; `llama_index.llms.ctxcompress` reads them.

Nothing heavy happens at import or construction: the language model is loaded when the first nodes come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.bridge.pydantic import ConfigDict, Field, model_validator
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.postprocessor.ctxcompress.settings import CompressorSettings

from ctxcompress import AllocatorName, ConfigError

if TYPE_CHECKING:
    from ctxcompress import CompressedDocument, ContextCompressor

METADATA_KEY = "ctxcompress"

dispatcher = get_dispatcher(__name__)


class CtxCompressPostprocessor(CompressorSettings, BaseNodePostprocessor):
    """Fits retrieved nodes into a token budget, each by what it is worth for the query.

    Every node comes out, in its place, as a copy that differs in one metadata key, "ctxcompress", which is
    shown to neither the LLM nor the embedding model, and in text mode in its text. The key holds plain JSON:
    the node's `tokens_before`, `tokens_after`, `ratio` (None when nothing is left), `budget`, `score`,
    `share` and `rank` (both None when everything fitted and nothing had to be weighed), `chunks` and `mode`;
    in soft mode also `ref`, which names what is left of the node, and `decoder`, the fingerprint of the model
    that reads it. Nodes without text, such as images, pass as they are. Scores take part in the allocation
    when every node with text has one. Calls may run in parallel.

    Args:
        compression_ratio: original tokens / compressed tokens, >= 1. Give this or `budget`.
        budget: most tokens of all nodes together, >= 1, counted by the compressor's own tokenizer. Metadata
            that a synthesizer puts before the text is neither counted nor shortened.
        allocator: who decides each node's part: "dast", "uniform", "random", "bm25" or "embedding"; in soft
            mode also "semi_dynamic" and "dast+semi_dynamic".
        mode: "text" prunes words, for any LLM; "soft" makes soft tokens, for `CtxCompressLLM`; another LLM
            then sees the original text.
        allow_drop: let worthless nodes lose all their tokens; they are returned all the same, in text mode
            with "".
        placeholders: in soft mode, put a placeholder in place of the text, for synthesizers that join texts;
            only a `CtxCompressLLM(placeholders=True)` can read it.
        model: see `CompressorSettings`, as for the four below.
        adapter: needed in soft mode.
        device: of the model.
        store: where soft mode keeps what it encoded.
        compressor: one of your own.

    Raises:
        pydantic.ValidationError: a setting is out of its range, or not exactly one of `compression_ratio` and
            `budget` was given; a `ValueError` like the errors of ctxcompress.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    compression_ratio: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    budget: int | None = Field(default=None, ge=1)
    allocator: AllocatorName = "dast"
    mode: Literal["text", "soft"] = "text"
    allow_drop: bool = False
    placeholders: bool = False

    @model_validator(mode="after")
    def _checked(self) -> CtxCompressPostprocessor:
        if (self.budget is None) == (self.compression_ratio is None):
            got = "neither" if self.budget is None else "both"
            raise ConfigError(
                f"give either budget (tokens) or compression_ratio (original / compressed), got {got}"
            )
        if self.placeholders and self.mode == "text":
            raise ConfigError(
                "placeholders stand for soft tokens, got mode 'text', whose nodes hold shorter text; pass "
                "mode='soft', or leave placeholders out"
            )
        return self

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "CtxCompressPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """Compress `nodes` for the query; the base class runs this in a worker thread for async callers.

        Raises:
            ctxcompress.InputError: no query where the allocator needs one, or a budget below the least that
                works.
        """
        query = query_bundle.query_str if query_bundle else None
        dispatcher.event(
            ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=len(nodes), model_name=self.model)
        )
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: query,
            EventPayload.TOP_K: len(nodes),
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            compressed = self._compressed(nodes, query)
            event.on_end(payload={EventPayload.NODES: compressed})
        dispatcher.event(ReRankEndEvent(nodes=compressed))
        return compressed

    def _compressed(self, nodes: list[NodeWithScore], query: str | None) -> list[NodeWithScore]:
        texts = {place: text for place, item in enumerate(nodes) if (text := item.node.get_content())}
        if not texts:
            return list(nodes)
        compressor = self.get_compressor()
        # No ids: the library then numbers documents by position, and a fused retrieval may repeat a node.
        result = compressor.compress(
            [{"text": text, "score": _plain(nodes[place].score)} for place, text in texts.items()],
            query,
            budget=self.budget,
            compression_ratio=self.compression_ratio,
            mode=self.mode,
            allocator=self.allocator,
            allow_drop=self.allow_drop,
        )
        compressed = list(nodes)
        for place, document in zip(texts, result.documents, strict=True):
            compressed[place] = self._copy(nodes[place], document, compressor)
        return compressed

    def _copy(
        self, item: NodeWithScore, document: CompressedDocument, compressor: ContextCompressor
    ) -> NodeWithScore:
        """A copy of `item` as compressed; a deep one would copy what an IndexNode refers to."""
        node = item.node
        account = {**document.account, "mode": self.mode}
        text = document.text
        if self.mode == "soft":
            from ctxcompress import placeholder

            account["ref"] = compressor.references.issue(document.parts)
            account["decoder"] = compressor.soft.fingerprint
            text = document.original
            if self.placeholders:
                text = placeholder(account["ref"]) if document.tokens_after else ""
        copy = node.model_copy(
            update={
                "metadata": {**node.metadata, METADATA_KEY: account},
                "excluded_llm_metadata_keys": _with_key(node.excluded_llm_metadata_keys),
                "excluded_embed_metadata_keys": _with_key(node.excluded_embed_metadata_keys),
                "relationships": dict(node.relationships),
            }
        )
        copy.set_content(text)
        return item.model_copy(update={"node": copy})


def _with_key(keys: list[str]) -> list[str]:
    return [*keys] if METADATA_KEY in keys else [*keys, METADATA_KEY]


def _plain(score: float | None) -> float | None:
    # FAISS hands out scores as numpy's numbers, which JSON does not know.
    return None if score is None else float(score)
