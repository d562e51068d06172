"""What travels between the stages: frozen values that keep ids, metadata, scores and character spans."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ctxcompress.config import one_of
from ctxcompress.display import BudgetTable
from ctxcompress.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Span = tuple[int, int]
"""Half-open range of character positions in a document's original text."""
Order = Literal["score", "edges", "original"]
"""How documents stand in a prompt: see `arranged`."""
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Document:
    """One retrieved unit of text.

    Args:
        text: the words; may be empty.
        id: unique among the documents of one call; "" stands for the position ("0", "1", ...).
        score: the retriever's similarity, higher is closer; None when there is none.
        metadata: anything of the caller's; carried along untouched. `metadata["source"]` is shown in tables.
    """

    text: str
    id: str = ""
    score: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SoftTokens:
    """Embeddings that stand for many tokens, for one decoder.

    Attributes:
        embeddings_MD: (M, D) float; M soft tokens, in place of token embeddings.
        tokens: original tokens they stand for.
        ratio: compression ratio they were made at.
        fingerprint: of the decoder that can read them; another one refuses them.
    """

    embeddings_MD: Tensor
    tokens: int
    ratio: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.embeddings_MD)

    def __repr__(self) -> str:
        return f"SoftTokens({len(self)} for {self.tokens} tokens, decoder {self.fingerprint!r})"


@dataclass(frozen=True, slots=True)
class CompressedChunk:
    """A run of a document's text with a ratio of its own, in soft mode.

    Attributes:
        span: characters of the document's original text.
        tokens_before: original tokens.
        tokens_after: soft tokens; as many as before means raw text, none that the chunk was dropped.
        share: the allocator's view of its worth; None when nothing had to be weighed.
        soft: what stands for the text, unless it is raw or dropped.
    """

    span: Span
    tokens_before: int
    tokens_after: int
    share: float | None
    soft: SoftTokens | None = field(default=None, compare=False)

    @property
    def ratio(self) -> float | None:
        """Original tokens / soft tokens, >= 1; None when nothing is left."""
        return self.tokens_before / self.tokens_after if self.tokens_after else None


@dataclass(frozen=True, slots=True)
class CompressedDocument:
    """A document after compression; `text` is exactly the join of `kept_spans` of `original`.

    In soft mode a document consists of `chunks`. It keeps their whole text beside the soft tokens, for
    readers that take text only; `tokens_after` then counts the soft tokens.

    `score` is the retriever's and is passed through. `share` is the allocator's view of this document's worth
    (the shares of a call sum to 1) and `rank` its place by share, 1 = worth most; both are None when
    everything fitted the budget and nothing had to be weighed. Token counts are those of the model's
    tokenizer on the text itself.
    """

    id: str
    text: str
    original: str
    metadata: Mapping[str, Any]
    score: float | None
    share: float | None
    rank: int | None
    budget: int
    tokens_before: int
    tokens_after: int
    kept_spans: tuple[Span, ...]
    chunks: tuple[CompressedChunk, ...] = ()

    @property
    def ratio(self) -> float | None:
        """Original tokens / compressed tokens, >= 1; None when nothing is left."""
        return self.tokens_before / self.tokens_after if self.tokens_after else None

    @property
    def parts(self) -> list[str | SoftTokens]:
        """What is left of the document, in order, for a prompt."""
        if not self.chunks:
            return [self.text] if self.text else []
        return [
            self.original[slice(*chunk.span)] if chunk.soft is None else chunk.soft
            for chunk in self.chunks
            if chunk.tokens_after
        ]

    @property
    def source(self) -> str | None:
        """Where the document came from, if its metadata says so."""
        source = self.metadata.get("source")
        return None if source is None else str(source)

    @property
    def account(self) -> dict[str, Any]:
        """What the document cost, JSON-ready: tokens, ratio, budget, score, share, rank, and its chunks."""
        names = ("tokens_before", "tokens_after", "ratio", "budget", "score", "share", "rank")
        chunks = [
            {
                "span": list(chunk.span),
                "tokens_before": chunk.tokens_before,
                "tokens_after": chunk.tokens_after,
            }
            for chunk in self.chunks
        ]
        return {**{name: getattr(self, name) for name in names}, "chunks": chunks}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready account of the document with its text; metadata stays out, it may hold anything."""
        return {
            "id": self.id,
            "source": self.source,
            **self.account,
            "text": self.text,
            "kept_spans": [list(span) for span in self.kept_spans],
        }


@dataclass(frozen=True, slots=True, repr=False)
class CompressionResult:
    """The documents of one call in the order they came, and what each cost; shown as a `BudgetTable`.

    Attributes:
        documents: one per input document.
        query: the question, or "".
        mode: how documents shrank ("text" or "soft").
        allocator: who decided how much each got.
        budget: most tokens the documents may have together.
        prior: "retriever" if the retriever's scores took part in the allocation, else "none".
        ratio_scale: the dial of predicted ratios, where an allocator asked for ratios.
        seconds: wall seconds per stage.
    """

    documents: tuple[CompressedDocument, ...]
    query: str
    mode: str
    allocator: str
    budget: int
    prior: str = "none"
    ratio_scale: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens_before(self) -> int:
        """Tokens of all original documents."""
        return sum(document.tokens_before for document in self.documents)

    @property
    def tokens_after(self) -> int:
        """Tokens of all compressed documents, at most `budget`."""
        return sum(document.tokens_after for document in self.documents)

    @property
    def compression_ratio(self) -> float | None:
        """Original tokens / compressed tokens; None when nothing is left."""
        return self.tokens_before / self.tokens_after if self.tokens_after else None

    @property
    def text(self) -> str:
        """The compressed context as one string; documents that were left empty take no room in it."""
        return "\n\n".join(document.text for document in self.documents if document.text)

    def parts(self, order: Order = "score") -> list[list[str | SoftTokens]]:
        """What is left of each document, for a prompt: a list of texts and soft tokens.

        Args:
            order: see `arranged`.

        Raises:
            ConfigError: another order.
        """
        present = [document for document in self.documents if document.tokens_after]
        return [
            document.parts for document in arranged(present, [document.share for document in present], order)
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready account of the whole call."""
        return {
            "query": self.query,
            "mode": self.mode,
            "allocator": self.allocator,
            "prior": self.prior,
            "budget": self.budget,
            "ratio_scale": self.ratio_scale,
            "tokens_before": self.tokens_before,
            "tokens_after": self.tokens_after,
            "compression_ratio": self.compression_ratio,
            "documents": [document.to_dict() for document in self.documents],
            "seconds": dict(self.seconds),
        }

    def __repr__(self) -> str:
        return repr(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> BudgetTable:
        details = f", budget {self.budget:,}, {self.mode}:{self.allocator}"
        accounts = [(document.id, document.account) for document in self.documents]
        return BudgetTable(accounts, details)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the decoder said, and the compression that led to it."""

    text: str
    result: CompressionResult
    prompt_tokens: int
    completion_tokens: int
    seconds: Mapping[str, float] = field(default_factory=dict)


def arranged(items: Sequence[Item], shares: Sequence[float | None], order: Order) -> list[Item]:
    """Documents as they should stand in a prompt.

    Args:
        items: the documents.
        shares: what each is worth; None counts as 0.
        order: "score" puts the document worth most last, next to the question: small models look there;
            "edges" puts the best ones first and last and the worst in the middle, where long prompts are read
            least; "original" keeps the order they came in.

    Raises:
        ConfigError: another order.
    """
    one_of("order", order, Order)
    places = list(range(len(items)))
    if order != "original":
        places.sort(key=lambda place: shares[place] or 0.0)
    if order == "edges":
        best_first = places[::-1]
        places = [*best_first[1::2], *best_first[::2][::-1]]
    return [items[place] for place in places]


def as_documents(documents: Iterable[Document | str | Mapping[str, Any]]) -> tuple[Document, ...]:
    """Read what callers pass: `Document`, plain strings, or mappings with the fields of `Document`.

    Raises:
        InputError: another type, a text that is not a string, or an id that occurs twice.
    """
    if isinstance(documents, (str, bytes, Document, Mapping)):
        raise InputError(
            f"documents must be a sequence of documents, got one {type(documents).__name__}; put it in a list"
        )
    read = tuple(_as_document(document, place) for place, document in enumerate(documents))
    _refuse_duplicate_ids(read)
    return read


def _as_document(document: Document | str | Mapping[str, Any], place: int) -> Document:
    if isinstance(document, str):
        document = Document(document)
    elif isinstance(document, Mapping):
        known = {entry.name for entry in dataclasses.fields(Document)}
        unknown = sorted(set(document) - known)
        if unknown or "text" not in document:
            raise InputError(
                f"document {place} must have the key 'text' and may have {sorted(known - {'text'})}, got "
                f"keys {sorted(document)}; put other values under 'metadata'"
            )
        document = Document(**document)
    if not isinstance(document, Document) or not isinstance(document.text, str):
        got = (
            type(document.text).__name__ + " text"
            if isinstance(document, Document)
            else type(document).__name__
        )
        raise InputError(
            f"document {place} must be a Document, a string or a mapping with string text, got {got}"
        )
    if document.score is not None and document.score != document.score:
        raise InputError(f"document {place} has the score NaN; pass a number, or None when there is no score")
    return document if document.id else dataclasses.replace(document, id=str(place))


def _refuse_duplicate_ids(documents: Sequence[Document]) -> None:
    places: dict[str, int] = {}
    for place, document in enumerate(documents):
        if document.id in places:
            raise InputError(
                f"document ids must be unique, got {document.id!r} at positions {places[document.id]} and "
                f"{place}; rename one, or leave ids empty to number documents by position"
            )
        places[document.id] = place
