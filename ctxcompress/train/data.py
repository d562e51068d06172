"""Files -> samples -> batches, without state: batch number n of a run is a function of the seed and n.

So a run that is taken up again sees what it would have seen, and two processes together see what one would
see with twice the accumulation. All batches of an optimizer step have one objective, one ratio and one length
of texts and chunks, on however many processes and passes it is spread: so processes hardly wait for each
other.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import lzma
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ctxcompress.backbone import Backbone, Encoding, Ids
from ctxcompress.chunking import chunked
from ctxcompress.errors import InputError
from ctxcompress.prompt import (
    CLOZE,
    CONTINUE,
    NEXT_QUESTION,
    RECALL,
    REPEAT,
    chat_prompt,
    follow_up,
    question_prompt,
)
from ctxcompress.train.recipe import Recipe
from ctxcompress.types import Span

CANDIDATES = 4  # a batch of questions is cut from this many times its size, sorted by characters
ATTEMPTS = 100  # records tried for one sample before the data is called unsuitable
QUOTED, RECALLED = 8, 24  # tokens of a passage that recall shows, and tokens after them that it asks for
AROUND, KEPT = 8, 0.7  # words on either side of what cloze leaves out, and the part of them it shows
GAP = "____"
FOUND = 3  # ratios drawn for a chunk of the gold document, of which it gets the finest: allocators favour it
_QUESTION = ("question", "answers", "documents")
_WORD = re.compile(r"\w(?:[\w'\u2019.,-]*\w)?")
_BEFORE_SENTENCES = ("", "\n", ".", "!", "?", ":")

Chunk = tuple[Ids, int]
"""Token ids that are encoded alone, and their ratio; at 1 they stay raw."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a document's soft tokens, or its raw tokens, stand in a prompt."""

    document: int

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation about documents.

    Attributes:
        documents: token ids of each.
        turns: of each turn the prompt, token ids and slots, and the target: what the decoder should say, with
            the end of its turn.
        gold: which documents hold the first answer, where there are others beside them.
        chunks: of each document; empty: every document is a chunk, at the batch's ratio.
    """

    documents: tuple[Ids, ...]
    turns: tuple[tuple[tuple[Ids | Slot, ...], Ids], ...]
    gold: tuple[int, ...] = ()
    chunks: tuple[tuple[Chunk, ...], ...] = ()

    @property
    def targets(self) -> Ids:
        """Token ids of all targets, one after another."""
        return tuple(token for _, target in self.turns for token in target)


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that are trained together: one objective, one ratio; 0 where every chunk has its own."""

    objective: str
    ratio: int
    samples: tuple[Sample, ...]

    @property
    def chunks(self) -> list[Sequence[Chunk]]:
        """Of every document, samples one after another."""
        return [chunks for sample in self.samples for chunks in sample.chunks or whole((sample,), self.ratio)]


class _Question(NamedTuple):
    """A question that was drawn, and the documents it will be asked about."""

    record: dict[str, Any]
    documents: tuple[str, ...]
    gold: Sequence[str]


def whole(samples: Sequence[Sample], ratio: int) -> list[Sequence[Chunk]]:
    """Every document of samples as one chunk."""
    return [((document, ratio),) for sample in samples for document in sample.documents]


class Samples:
    """All batches of a run.

    Args:
        recipe: files, objectives, ratios, lengths, seed.
        backbone: its tokenizer and chat template.
        processes: that train together.
    """

    def __init__(self, recipe: Recipe, backbone: Backbone, processes: int = 1) -> None:
        self._recipe = recipe
        self._per_step = recipe.accumulation * processes
        self._backbone = backbone
        self._end = _end_of_turn(backbone)

    def batch(self, number: int) -> Batch:
        """Batch `number` of the run, >= 0."""
        recipe = self._recipe
        step = random.Random(f"{recipe.seed} step {number // self._per_step}")
        objective, ratio = _drawn(step, recipe.objectives), _drawn(step, recipe.ratios)
        draw = random.Random(f"{recipe.seed} batch {number}")
        if objective == "answer":
            ratio = 0 if step.random() < recipe.mixed else ratio
            size = _drawn(step, recipe.chunk_tokens)
            candidates = [self._drawn_question(draw) for _ in range(CANDIDATES * recipe.batch_size)]
            candidates.sort(key=lambda question: sum(map(len, question.documents)))
            first = draw.randrange(len(candidates) - recipe.batch_size + 1)
            samples = [
                self._question(draw, question, ratio, size)
                for question in candidates[first : first + recipe.batch_size]
            ]
        else:
            # One length for all, drawn evenly in its logarithm: hardly any padding.
            shortest, longest = recipe.tokens
            tokens = round(shortest * (longest / shortest) ** step.random())
            make: dict[str, Callable[[random.Random, int], Sample]] = {
                "reconstruction": self._repeat,
                "continuation": self._go_on,
                "recall": functools.partial(self._asked, self._recall),
                "cloze": functools.partial(self._asked, self._cloze),
            }
            samples = [make[objective](draw, tokens) for _ in range(recipe.batch_size)]
        return Batch(objective, ratio, tuple(samples))

    def read(self) -> None:
        """Read all files now; otherwise each is read when first needed."""
        for name in ("_texts", "_questions", "_by_gold", "_by_title"):
            getattr(self, name)

    def _repeat(self, draw: random.Random, tokens: int) -> Sample:
        document = self._text(draw, tokens)
        return self._sample([document], [Slot(0), REPEAT], (*document, *self._end))

    def _go_on(self, draw: random.Random, tokens: int) -> Sample:
        ids = self._text(draw, 2 * tokens)
        return self._sample([ids[:tokens]], [Slot(0), CONTINUE], ids[tokens:])

    def _asked(
        self, ask: Callable[[random.Random, Ids], list[tuple[str, Ids]]], draw: random.Random, tokens: int
    ) -> Sample:
        """Questions about one of several texts: as answers are, theirs are found by content, not by place."""
        ids = [self._text(draw, tokens) for _ in range(draw.randint(*self._recipe.documents))]
        gold = draw.randrange(len(ids))
        return self._conversation(ids, ask(draw, ids[gold]), (gold,))

    def _recall(self, draw: random.Random, ids: Ids) -> list[tuple[str, Ids]]:
        """What follows a quote?"""
        quoted, recalled = min(QUOTED, len(ids) // 4), min(RECALLED, len(ids) // 2)
        asked = []
        for _ in range(self._recipe.questions_per_sample):
            start = draw.randrange(len(ids) - quoted - recalled + 1)
            stop = start + quoted
            quote = self._backbone.tokenizer.decode(ids[start:stop])
            answer = (*ids[stop : stop + recalled], *self._end)
            asked.append((RECALL.replace("{quote}", quote), answer))
        return asked

    def _cloze(self, draw: random.Random, ids: Ids) -> list[tuple[str, Ids]]:
        """Which name or number belongs between some of the words around it? Nearly what people ask."""
        text = self._backbone.tokenizer.decode(ids)
        names = _names(text)
        asked = []
        for start, stop in draw.sample(names, min(self._recipe.questions_per_sample, len(names))):
            before, after = text[:start].split()[-AROUND:], text[stop:].split()[:AROUND]
            words = [word if draw.random() < KEPT else "" for word in (*before, *after)]
            words.insert(len(before), GAP)
            quote = " ".join(filter(None, words))
            answer = (*self._backbone.encode(text[start:stop]).ids, *self._end)
            asked.append((CLOZE.replace("{quote}", quote), answer))
        return asked

    def _text(self, draw: random.Random, wanted: int) -> Ids:
        for _ in range(ATTEMPTS):
            text = draw.choice(self._texts)
            # Six characters a token is more than English needs: cut before encoding, not after.
            start = draw.randrange(max(len(text) - 6 * wanted, 0) + 1)
            start = _word_start(text, start)
            ids = self._backbone.encode(text[start : start + 6 * wanted]).ids
            if len(ids) >= wanted:
                return ids[:wanted]
        raise InputError(
            f"no text of {wanted} tokens in {ATTEMPTS} draws from {self._recipe.texts}; lower tokens"
        )

    def _drawn_question(self, draw: random.Random) -> _Question:
        for _ in range(ATTEMPTS):
            record = draw.choice(self._questions)
            gold = [document for document in record["documents"] if document.get("is_gold")]
            if record["answers"] and gold:
                break
        else:
            raise InputError(
                f"no question with answers and a document marked is_gold in {ATTEMPTS} draws from "
                f"{self._recipe.questions}; complete the records"
            )
        documents = [_shown(document) for document in gold]
        others = self._others(record, gold)
        missing = draw.randint(*self._recipe.documents) - len(documents)
        documents += draw.sample(others, min(max(missing, 0), len(others)))
        draw.shuffle(documents)
        return _Question(record, tuple(documents), [_shown(document) for document in gold])

    def _question(self, draw: random.Random, question: _Question, ratio: int, size: int) -> Sample:
        for _ in range(ATTEMPTS):
            encodings = [self._backbone.encode(document) for document in question.documents]
            if max(len(encoding.ids) for encoding in encodings) <= self._recipe.longest_document:
                break
            question = self._drawn_question(draw)
        else:
            raise InputError(
                f"no question whose documents have at most {self._recipe.longest_document} tokens in "
                f"{ATTEMPTS} draws from {self._recipe.questions}; raise longest_document"
            )
        record, documents, known = question
        asked = [(record["question"], self._answer(draw, record))]
        siblings = [other for other in self._by_gold[known[0]] if other is not record]
        for other in draw.sample(siblings, min(self._recipe.questions_per_sample - 1, len(siblings))):
            asked.append((other["question"], self._answer(draw, other)))
        golden = tuple(place for place, text in enumerate(documents) if text in known)
        sample = self._conversation([encoding.ids for encoding in encodings], asked, golden)
        if ratio and not size:
            return sample
        chunks = tuple(
            tuple(self._chunks(draw, text, encoding, ratio, size, FOUND if text in known else 1))
            for text, encoding in zip(documents, encodings, strict=True)
        )
        return dataclasses.replace(sample, chunks=chunks)

    def _chunks(
        self, draw: random.Random, text: str, encoding: Encoding, ratio: int, size: int, draws: int
    ) -> Iterator[Chunk]:
        """A document cut as `compress` cuts it; at ratio 0 each chunk has the finest of its draws."""
        for chunk in chunked(text, encoding.ids, encoding.spans, size or max(len(encoding.ids), 1)):
            yield chunk.ids, ratio or min(_drawn(draw, self._recipe.ratios) for _ in range(draws))

    def _conversation(
        self, documents: Sequence[Ids], asked: Sequence[tuple[str, Ids]], gold: tuple[int, ...]
    ) -> Sample:
        """Questions and answers in turn."""
        slots = [[Slot(place)] for place in range(len(documents))]
        (question, answer), *others = asked
        turns: list[tuple[tuple[Ids | Slot, ...], Ids]] = [
            (tuple(question_prompt(self._backbone, question, slots)), answer)
        ]
        for question, answer in others:
            between = follow_up(self._backbone, NEXT_QUESTION.replace("{query}", question))
            turns.append(((between,), answer))
        return Sample(tuple(documents), tuple(turns), gold if len(gold) < len(documents) else ())

    def _answer(self, draw: random.Random, record: dict[str, Any]) -> Ids:
        return (*self._backbone.encode(draw.choice(record["answers"])).ids, *self._end)

    def _sample(self, documents: Sequence[Ids], content: Sequence[str | Slot], target: Ids) -> Sample:
        return Sample(tuple(documents), ((tuple(chat_prompt(self._backbone, content)), target),))

    def _others(self, record: dict[str, Any], gold: Sequence[dict[str, Any]]) -> list[str]:
        """Documents of the question, then of the gold document's title, that hold none of the answers."""
        listed = [_shown(document) for document in record["documents"]]
        same_title = self._by_title.get(gold[0].get("title", ""), ())
        known = {_shown(document) for document in gold}
        answers = [answer.casefold() for answer in record["answers"]]
        return [
            text
            for text in dict.fromkeys([*listed, *same_title])
            if text not in known and not any(answer in text.casefold() for answer in answers)
        ]

    @functools.cached_property
    def _texts(self) -> list[str]:
        return [record["text"] for file in self._recipe.texts for record in read_lines(file, "text")]

    @functools.cached_property
    def _questions(self) -> list[dict[str, Any]]:
        return [record for file in self._recipe.questions for record in read_lines(file, *_QUESTION)]

    @functools.cached_property
    def _by_gold(self) -> dict[str, list[dict[str, Any]]]:
        """Questions that have an answer, by the text of their first gold document."""
        by_gold: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in self._questions:
            gold = [document for document in record["documents"] if document.get("is_gold")]
            if gold and record["answers"]:
                by_gold[_shown(gold[0])].append(record)
        return by_gold

    @functools.cached_property
    def _by_title(self) -> dict[str, list[str]]:
        by_title: dict[str, dict[str, None]] = defaultdict(dict)
        for record in self._questions:
            for document in record["documents"]:
                by_title[document.get("title", "")][_shown(document)] = None
        return {title: list(texts) for title, texts in by_title.items() if title}


def read_lines(file: str, *keys: str) -> list[dict[str, Any]]:
    """Records of a JSON-lines file, plain or xz-compressed, that all have `keys`.

    Raises:
        InputError: unreadable, empty, or a line without one of the keys.
    """
    try:
        content = Path(file).read_bytes()
        # Not splitlines(): JSON strings may hold other line separators, such as U+2028, as they are.
        lines = (lzma.decompress(content) if file.endswith(".xz") else content).decode().split("\n")
        records = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, lzma.LZMAError) as error:
        raise InputError(
            f"training data (.jsonl or .jsonl.xz) was expected at {file}, got: {error}"
        ) from error
    if not records:
        raise InputError(
            f"training data was expected in {file}, got no line; leave the file out or fetch it again"
        )
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or not record.keys() >= {*keys}:
            raise InputError(
                f"every line of {file} must be an object with {', '.join(keys)}, got {str(record)[:80]!r} "
                f"as record {number}; correct or remove it"
            )
    return records


def _drawn(draw: random.Random, weights: dict[Any, float]) -> Any:
    """One key by weight; the order in which a recipe lists them does not matter."""
    keys = sorted(weights)
    return draw.choices(keys, [weights[key] for key in keys])[0]


def _shown(document: dict[str, Any]) -> str:
    """A document as `ctxcompress evaluate` shows it: its title above its text."""
    title = document.get("title", "")
    return f"{title}\n{document['text']}" if title else document["text"]


def _names(text: str) -> list[Span]:
    """Where runs of capitalised words and numbers are that begin no sentence; failing them, all words."""
    words = [word.span() for word in _WORD.finditer(text)]
    names: list[Span] = []
    for start, stop in words:
        begins = text[:start].rstrip(' "“(')[-1:] in _BEFORE_SENTENCES
        if begins or not (text[start].isupper() or text[start].isdigit()):
            continue
        if names and text[names[-1][1] : start] == " ":
            names[-1] = (names[-1][0], stop)
        else:
            names.append((start, stop))
    return names or words or [(0, len(text))]


def _word_start(text: str, start: int) -> int:
    space = text.find(" ", start - 1) if start else 0
    return space + 1 if start and space >= 0 else 0


def _end_of_turn(backbone: Backbone) -> Ids:
    return (backbone.tokenizer.eos_token_id,)
