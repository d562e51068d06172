"""A node postprocessor for LlamaIndex: nodes -> `ctxcompress` -> copies of the nodes with shorter text.

Nothing heavy happens at import or construction: the language model is loaded when the first nodes come.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr, model_validator
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from ctxcompress import AllocatorName, ConfigError

if TYPE_CHECKING:
    from ctxcompress import CompressedDocument, ContextCompressor
else:
    ContextCompressor = Any  # pydantic wants a class at run time, and the real one would bring torch with it

METADATA_KEY = "ctxcompress"
ACCOUNT = ("tokens_before", "tokens_after", "ratio", "budget", "score", "share", "rank")

# One for all instances: with a lock of its own none could be copied or pickled.
_LOADING = threading.Lock()


class CtxCompressPostprocessor(BaseNodePostprocessor):
    """Shortens retrieved nodes to a token budget, each by what it is worth for the query.

    Every node comes out, in its place, as a copy that differs in its text and in one metadata key,
    "ctxcompress", which is shown to neither the LLM nor the embedding model: plain JSON with the node's
    `tokens_before`, `tokens_after`, `ratio` (None when nothing is left), `budget`, `score`, `share` and
    `rank` (both None when everything fitted and nothing had to be weighed). Nodes without text, such as
    images, pass as they are. Scores take part in the allocation when every node with text has one. Calls
    may run in parallel.

    Args:
        compression_ratio: original tokens / compressed tokens, >= 1. Give this or `budget`.
        budget: most tokens of all nodes' text together, >= 1, counted by the compressor's own tokenizer.
            Metadata that a synthesizer puts before the text is neither counted nor shortened.
        allocator: who decides each node's part: "dast", "uniform", "random", "bm25" or "embedding".
        mode: "text" prunes words; "auto" is "text", as what comes out is read by any LLM.
        allow_drop: let worthless nodes lose all their text; they are returned all the same, with "".
        model: "embedded", a local folder or a hub id; loaded at first use.
        device: of the model, such as "cuda:1"; None takes CUDA if there is one.
        compressor: a compressor of your own, used instead of loading one; `model` then takes its model's
            name, by which an instance made from `to_dict` loads it again, with the default settings.

    Raises:
        pydantic.ValidationError: a setting is out of its range, or not exactly one of `compression_ratio` and
            `budget` was given; a `ValueError` like the errors of ctxcompress.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    compression_ratio: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    budget: int | None = Field(default=None, ge=1)
    allocator: AllocatorName = "dast"
    mode: Literal["auto", "text"] = "auto"
    allow_drop: bool = False
    model: str = "embedded"
    device: str | None = None
    compressor: ContextCompressor | None = Field(default=None, exclude=True, repr=False)
    _loaded: ContextCompressor | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _checked(self) -> CtxCompressPostprocessor:
        if (self.budget is None) == (self.compression_ratio is None):
            got = "neither" if self.budget is None else "both"
            raise ConfigError(
                f"give either budget (tokens) or compression_ratio (original / compressed), got {got}"
            )
        if self.compressor is not None:
            self.model = self.compressor.backbone.name
        return self

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "CtxCompressPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """Shorten `nodes` for the query; the base class runs this in a worker thread for async callers.

        Raises:
            ctxcompress.InputError: no query where the allocator needs one, or a budget below the least that
                works.
        """
        texts = {place: text for place, item in enumerate(nodes) if (text := item.node.get_content())}
        if not texts:
            return list(nodes)
        # No ids: the library then numbers documents by position, and a fused retrieval may repeat a node.
        result = self._ready().compress(
            [{"text": text, "score": nodes[place].score} for place, text in texts.items()],
            query_bundle.query_str if query_bundle else None,
            budget=self.budget,
            compression_ratio=self.compression_ratio,
            mode="text",
            allocator=self.allocator,
            allow_drop=self.allow_drop,
        )
        short = dict(zip(texts, result.documents, strict=True))
        return [
            _shortened(item, short[place]) if place in short else item for place, item in enumerate(nodes)
        ]

    def _ready(self) -> ContextCompressor:
        """The compressor, loaded once however many threads ask."""
        ready = self.compressor or self._loaded
        if ready is None:
            from ctxcompress import ContextCompressor

            with _LOADING:
                if self._loaded is None:
                    self._loaded = ContextCompressor.from_pretrained(self.model, device=self.device)
                ready = self._loaded
        return ready


def _shortened(item: NodeWithScore, short: CompressedDocument) -> NodeWithScore:
    """A copy of `item` with the compressed text; a deep one would copy what an IndexNode refers to."""
    node = item.node
    copy = node.model_copy(
        update={
            "metadata": {**node.metadata, METADATA_KEY: {name: getattr(short, name) for name in ACCOUNT}},
            "excluded_llm_metadata_keys": _with_key(node.excluded_llm_metadata_keys),
            "excluded_embed_metadata_keys": _with_key(node.excluded_embed_metadata_keys),
            "relationships": dict(node.relationships),
        }
    )
    copy.set_content(short.text)
    return item.model_copy(update={"node": copy})


def _with_key(keys: list[str]) -> list[str]:
    return [*keys] if METADATA_KEY in keys else [*keys, METADATA_KEY]
