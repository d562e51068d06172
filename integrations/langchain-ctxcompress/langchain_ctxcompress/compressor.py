"""A document compressor for LangChain: documents -> `ctxcompress` -> new documents with an account of each.

Nothing heavy happens at import or construction: the language model is loaded when the first documents come.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import Runnable, RunnablePassthrough
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from ctxcompress import AllocatorName, ConfigError, InputError

if TYPE_CHECKING:
    from ctxcompress import CompressedDocument, ContextCompressor
else:
    ContextCompressor = Any  # pydantic wants a class at run time, and the real one would bring torch with it

METADATA_KEY = "ctxcompress"
ACCOUNT = ("tokens_before", "tokens_after", "ratio", "budget", "score", "share", "rank")

# One for all instances: with a lock of its own none could be copied or pickled.
_LOADING = threading.Lock()


class CtxCompressor(BaseDocumentCompressor):
    """Shortens retrieved documents to a token budget, each by what it is worth for the query.

    Works in `langchain_classic.retrievers.ContextualCompressionRetriever`, and as a link of a chain on
    langchain-core alone (`as_runnable`). Every document comes out, in its place, as a new `Document` with the
    caller's id and metadata plus the key "ctxcompress": plain JSON with the document's `tokens_before`,
    `tokens_after`, `ratio` (None when nothing is left), `budget`, `score` (the retriever's), `share` and
    `rank` (both None when everything fitted and nothing had to be weighed). Calls may run in parallel.

    Args:
        compression_ratio: original tokens / compressed tokens, >= 1. Give this or `budget`.
        budget: most tokens of all documents together, >= 1, counted by the compressor's own tokenizer.
        allocator: who decides each document's part: "dast", "uniform", "random", "bm25" or "embedding".
        mode: "text" prunes words; "auto" is "text", as what comes out is read by any LLM.
        allow_drop: let worthless documents lose all their text; they are returned all the same, with "".
        score_key: metadata key of the retriever's score, higher is closer. The scores take part in the
            allocation when every document has one.
        model: "embedded", a local folder or a hub id; loaded at first use.
        device: of the model, such as "cuda:1"; None takes CUDA if there is one.
        compressor: a compressor of your own, used instead of loading `model`.

    Raises:
        pydantic.ValidationError: a setting is out of its range, or not exactly one of `compression_ratio` and
            `budget` was given; a `ValueError` like the errors of ctxcompress.
    """

    # Settings are read at every call but the model only once, so a change after construction could be lost.
    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", frozen=True)

    compression_ratio: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    budget: int | None = Field(default=None, ge=1)
    allocator: AllocatorName = "dast"
    mode: Literal["auto", "text"] = "auto"
    allow_drop: bool = False
    score_key: str | None = None
    model: str = "embedded"
    device: str | None = None
    compressor: ContextCompressor | None = Field(default=None, exclude=True, repr=False)
    _loaded: ContextCompressor | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _one_target(self) -> CtxCompressor:
        if (self.budget is None) == (self.compression_ratio is None):
            got = "neither" if self.budget is None else "both"
            raise ConfigError(
                f"give either budget (tokens) or compression_ratio (original / compressed), got {got}"
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
        """
        if not documents:
            return []
        # Without ids the library numbers documents by position; a merged retrieval may repeat or lack them.
        result = self._ready().compress(
            [{"text": document.page_content, "score": self._score(document)} for document in documents],
            query,
            budget=self.budget,
            compression_ratio=self.compression_ratio,
            mode="text",
            allocator=self.allocator,
            allow_drop=self.allow_drop,
        )
        return [
            Document(
                id=document.id,
                page_content=short.text,
                metadata={**document.metadata, METADATA_KEY: _account(short)},
            )
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
            missing = [key for key in (context_key, question_key) if key not in values]
            if missing:
                raise InputError(
                    f"the input must have the keys {context_key!r} and {question_key!r}, got "
                    f"{sorted(values)}; to name yours: as_runnable(context_key=..., question_key=...)"
                )
            return self.compress_documents(values[context_key], values[question_key])

        return RunnablePassthrough.assign(**{context_key: compressed})

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


def _account(short: CompressedDocument) -> dict[str, Any]:
    return {name: getattr(short, name) for name in ACCOUNT}
