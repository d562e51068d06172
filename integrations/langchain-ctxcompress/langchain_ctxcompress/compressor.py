"""A document compressor for LangChain: documents -> `ctxcompress` -> new documents with an account of each.

Nothing heavy happens at import or construction: the language model is loaded when the first documents come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import Runnable, RunnablePassthrough
from pydantic import ConfigDict, Field, model_validator

from ctxcompress import AllocatorName, ConfigError, InputError
from langchain_ctxcompress.settings import ModelSettings

if TYPE_CHECKING:
    from ctxcompress import CompressedDocument, ContextCompressor

METADATA_KEY = "ctxcompress"


class CtxCompressor(ModelSettings, BaseDocumentCompressor):
    """Shortens retrieved documents to a token budget, each by what it is worth for the query.

    Works in `langchain_classic.retrievers.ContextualCompressionRetriever`, and as a link of a chain on
    langchain-core alone (`as_runnable`, `CtxCompressRetriever`). Every document comes out, in its place, as a
    new `Document` with the caller's id and metadata plus the key "ctxcompress": plain JSON with `mode` and
    the document's `tokens_before`, `tokens_after`, `ratio` (None when nothing is left), `budget`, `score`
    (the retriever's), `share` and `rank` (both None when everything fitted and nothing had to be weighed) and
    `chunks`. Calls may run in parallel.

    In text mode `page_content` is the shortened text, for any LLM. In soft mode it stays the original, and
    the metadata also has `ref`, which names the document's soft tokens for a `ChatCtxCompress` with the same
    model and store, and `decoder`, the fingerprint of the only decoder that can read them.

    Args:
        compression_ratio: original tokens / compressed tokens, >= 1. Give this or `budget`.
        budget: most tokens of all documents together, >= 1, counted by the compressor's own tokenizer.
        mode: "text" prunes words; "soft" makes soft tokens, which needs an adapter.
        allocator: who decides each document's part: "dast", "uniform", "random", "bm25", "embedding"; in soft
            mode also "semi_dynamic" and "dast+semi_dynamic".
        allow_drop: let worthless documents lose everything; they are returned all the same.
        score_key: metadata key of the retriever's score, higher is closer. The scores take part in the
            allocation when every document has one.
        ranked: documents come in order of relevance, as retrievers return them: unless all have a score,
            their places count as scores. Without either, DAST has only its attention to tell them apart.
        placeholders: in soft mode, put a placeholder into `page_content` in place of the original text, for
            chains that join documents to one string ("" for a document that lost everything). Only a
            `ChatCtxCompress` with `placeholders=True` can read it.
        model: "embedded", a local folder or a hub id; loaded at first use.
        device: of the model, such as "cuda:1"; None takes CUDA if there is one.
        adapter: the model's soft-token adapter, a folder or hub id; "embedded" is the one that ships with the
            embedded model.
        store: folder that keeps what was encoded for soft mode; None keeps it in memory.
        compressor: a compressor of your own, used instead of loading `model`.

    Raises:
        pydantic.ValidationError: a setting is out of its range, or not exactly one of `compression_ratio` and
            `budget` was given; a `ValueError` like the errors of ctxcompress.
    """

    # Settings are read at every call but the model only once, so a change after construction could be lost.
    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", frozen=True)

    compression_ratio: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    budget: int | None = Field(default=None, ge=1)
    mode: Literal["text", "soft"] = "text"
    allocator: AllocatorName = "dast"
    allow_drop: bool = False
    score_key: str | None = None
    ranked: bool = True
    placeholders: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> CtxCompressor:
        if (self.budget is None) == (self.compression_ratio is None):
            got = "neither" if self.budget is None else "both"
            raise ConfigError(
                f"give either budget (tokens) or compression_ratio (original / compressed), got {got}"
            )
        if self.placeholders and self.mode != "soft":
            raise ConfigError(
                f"placeholders stand for soft tokens, got mode={self.mode!r}; use mode='soft', or leave "
                "placeholders out"
            )
        return self

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Shorten `documents` for `query`; the async twin `acompress_documents` does it in a worker thread.

        Args:
            documents: any number, with any ids, missing and repeated ones too; never changed.
            query: the question; the allocators "dast", "bm25" and "embedding" need one.
            callbacks: part of the interface; no LangChain model is called that they could follow.

        Returns:
            One new document per document, in order.

        Raises:
            ctxcompress.InputError: an empty query where one is needed, a score that is no number, or a budget
                below the least that works.
            ctxcompress.ConfigError: soft mode without an adapter.
        """
        if not documents:
            return []
        compressor = self._ready()
        # Without ids the library numbers documents by position; a merged retrieval may repeat or lack them.
        result = compressor.compress(
            [
                {"text": document.page_content, "score": score}
                for document, score in zip(documents, self._scores(documents), strict=True)
            ],
            query,
            budget=self.budget,
            compression_ratio=self.compression_ratio,
            mode=self.mode,
            allocator=self.allocator,
            allow_drop=self.allow_drop,
        )
        return [
            self._shortened(compressor, document, short)
            for document, short in zip(documents, result.documents, strict=True)
        ]

    def as_runnable(
        self, *, context_key: str = "context", question_key: str = "question"
    ) -> Runnable[dict[str, Any], dict[str, Any]]:
        """A link for chains: documents and a question in, the same dict with shorter documents out.

        Args:
            context_key: where the list of documents stands, and where the compressed ones will.
            question_key: where the question stands; this and all other keys pass unchanged.

        Example:
            ```python
            found = {"context": retriever, "question": RunnablePassthrough()}
            chain = found | CtxCompressor(budget=500).as_runnable() | answer_from_documents
            ```
        """

        def compressed(values: dict[str, Any]) -> list[Document]:
            check_keys(values, [context_key, question_key], "as_runnable(context_key=..., question_key=...)")
            return self.compress_documents(values[context_key], values[question_key])

        return RunnablePassthrough.assign(**{context_key: compressed})

    def _scores(self, documents: Sequence[Document]) -> list[float | None]:
        """The retriever's scores; LangChain's retrievers drop theirs, then what is left is the order."""
        scores = [self._score(document) for document in documents]
        if self.ranked and None in scores:
            return [-float(place) for place in range(len(documents))]
        return scores

    def _score(self, document: Document) -> float | None:
        score = document.metadata.get(self.score_key) if self.score_key else None
        try:
            # Vector stores give numpy scalars, which are not JSON.
            return None if score is None else float(score)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"metadata[{self.score_key!r}] must be a number, got {score!r}; let score_key name the "
                "retriever's score, or leave it None"
            ) from error

    def _shortened(
        self, compressor: ContextCompressor, document: Document, short: CompressedDocument
    ) -> Document:
        account = {**short.account, "score": self._score(document), "mode": self.mode}
        text = short.text
        if self.mode == "soft":
            account["ref"] = compressor.references.issue(short.parts)
            account["decoder"] = compressor.soft.fingerprint
        if self.placeholders:
            from ctxcompress import placeholder

            text = placeholder(account["ref"]) if short.tokens_after else ""
        return Document(
            id=document.id, page_content=text, metadata={**document.metadata, METADATA_KEY: account}
        )


def check_keys(values: Any, keys: Sequence[str], setting: str) -> None:
    """Refuse an input that lacks one of `keys`; `setting` says how to name others.

    Raises:
        ctxcompress.InputError: it is no dict, or a key is missing.
    """
    if not isinstance(values, dict) or not all(key in values for key in keys):
        got = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise InputError(
            f"the input must have the keys {' and '.join(map(repr, keys))}, got {got}; to name yours: "
            f"{setting}"
        )
