"""What tests of the LlamaIndex packages share: nodes, an index, and windows into what happens inside."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.bridge.pydantic import Field
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode

from ctxcompress import ContextCompressor, Decoder, SoftTokens

TEXTS = [
    "In 1928 Alexander Fleming discovered penicillin at St Mary's Hospital in London, by chance.",
    "Rome is the capital of Italy and lies on the Tiber. It was founded, they say, in 753 BC.",
    "Photosynthesis turns light into chemical energy; chlorophyll absorbs red and blue light.",
]
DIMENSION = 384  # as all-MiniLM-L6-v2
Prompt = Sequence[tuple[int, ...] | SoftTokens]
Decoded = list[tuple[Prompt, dict[str, Any]]]


class WordEmbedding(BaseEmbedding):
    """Counts words: texts with the same words are close, on every machine."""

    def _get_text_embedding(self, text: str) -> list[float]:
        counts = [0.0] * DIMENSION
        for word in text.lower().replace("?", " ").replace(".", " ").split():
            counts[zlib.crc32(word.encode()) % DIMENSION] += 1.0
        norm = sum(count * count for count in counts) ** 0.5 or 1.0
        return [count / norm for count in counts]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


class EventList(BaseEventHandler):
    """Keeps events."""

    seen: list[Any] = Field(default_factory=list)

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.seen.append(event)


class RecordingDecoder:
    """A decoder that also writes down what it is asked."""

    def __init__(self, decoder: Decoder, decoded: Decoded) -> None:
        self.decoder = decoder
        self.decoded = decoded

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.decoder, name)

        def asked(prompt: Prompt, **settings: Any) -> Any:
            recorded = {key: value for key, value in settings.items() if key != "on_end"}
            self.decoded.append((prompt, recorded))
            return method(prompt, **settings)

        return asked


@pytest.fixture(autouse=True)
def _no_global_llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """LlamaIndex' global LLM is OpenAI's unless it is set; nothing of ours may ask for it."""
    monkeypatch.setattr(Settings, "_llm", None)
    yield
    assert Settings._llm is None


@pytest.fixture
def nodes() -> list[NodeWithScore]:
    return [
        NodeWithScore(
            node=TextNode(
                id_=f"page-{place}",
                text=text,
                metadata={"source": f"{place}.txt", "secret": place},
                excluded_llm_metadata_keys=["secret"],
                relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"book-{place}")},
                embedding=[0.5, float(place)],
                start_char_idx=100 * place,
            ),
            score=score,
        )
        for place, (text, score) in enumerate(zip(TEXTS, [0.3, 0.2, 0.9], strict=True))
    ]


@pytest.fixture
def index() -> VectorStoreIndex:
    """An index of three pages, with a deterministic embedding."""
    pages = [TextNode(id_=f"page-{place}", text=text) for place, text in enumerate(TEXTS)]
    return VectorStoreIndex(pages, embed_model=WordEmbedding())


@pytest.fixture
def word_embedding() -> BaseEmbedding:
    return WordEmbedding()


@pytest.fixture
def decoded(soft_compressor: ContextCompressor, monkeypatch: pytest.MonkeyPatch) -> Decoded:
    """Every prompt that decoders of `soft_compressor` really get, with the settings."""
    decoded: Decoded = []
    decoder = soft_compressor.decoder

    def recording(**settings: Any) -> Any:
        return RecordingDecoder(decoder(**settings), decoded)

    monkeypatch.setattr(soft_compressor, "decoder", recording)
    return decoded


@pytest.fixture
def shown(soft_compressor: ContextCompressor) -> Callable[[Prompt], str]:
    """A prompt as text, control tokens too, with <soft> where soft tokens stand."""
    tokenizer = soft_compressor.backbone.tokenizer
    return lambda prompt: "".join(
        "<soft>" if isinstance(part, SoftTokens) else tokenizer.decode(part) for part in prompt
    )


@pytest.fixture
def plain() -> Callable[[Prompt], list[Any]]:
    """A prompt that can be compared: soft tokens as numbers."""
    return lambda prompt: [
        part.embeddings_MD.tolist() if isinstance(part, SoftTokens) else part for part in prompt
    ]


@pytest.fixture
def events() -> Iterator[list[Any]]:
    """Events of LlamaIndex' instrumentation, as they come."""
    handler = EventList()
    handlers = get_dispatcher().event_handlers
    handlers.append(handler)
    yield handler.seen
    handlers.remove(handler)
