"""Recipes, samples, losses and the learning rate, on the tiny random model."""

from __future__ import annotations

import copy
import dataclasses
import json
import lzma
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctxcompress import Backbone, ConfigError, InputError
from ctxcompress.chunking import chunked
from ctxcompress.config import SoftConfig
from ctxcompress.prompt import chat_prompt
from ctxcompress.soft import SoftCompressor
from ctxcompress.train.data import Batch, Chunk, Sample, Samples, Slot, _names, read_lines, whole
from ctxcompress.train.loop import learning_rate
from ctxcompress.train.losses import Objective
from ctxcompress.train.recipe import Recipe

TEXTS = [
    "The quick brown fox jumps over the lazy dog while Rome sleeps beside the Tiber. " * 3,
    "Photosynthesis turns light into chemical energy and chlorophyll absorbs blue light. " * 3,
]
TITLED = [f"Owl number {number} hunts mice at night." for number in range(6)]
OBJECTIVES = ("reconstruction", "continuation", "recall", "cloze", "answer")
SOFT = SoftConfig(
    ratio_set=(2, 4), encoder_layers=2, converter_size=16, encoder_rank=2, decoder_rank=2, window=64
)


def question(number: int) -> dict[str, Any]:
    """Every question has one document; its answer is also in the document of the next number."""
    return {
        "question": f"Which owl is number {number}?",
        "answers": [f"owl NUMBER {number}", f"number {number} "],
        "documents": [
            {"title": "Owl", "text": f"{TITLED[number]} Not Owl number {(number - 1) % 6}.", "is_gold": True}
        ],
    }


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A plain file of texts and a compressed one of questions."""
    texts, questions = tmp_path / "texts.jsonl", tmp_path / "questions.jsonl.xz"
    texts.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), encoding="utf-8")
    lines = "\n".join(json.dumps(question(number)) for number in range(6))
    questions.write_bytes(lzma.compress(lines.encode()))
    return str(texts), str(questions)


@pytest.fixture
def settings(files: tuple[str, str], tmp_path: Path) -> dict[str, Any]:
    return {
        "output": str(tmp_path / "run"), "compressor": SOFT, "texts": (files[0],), "questions": (files[1],),
        "objectives": {name: 1.0 for name in OBJECTIVES},
        "ratios": {1: 1.0, 2: 1.0, 4: 1.0}, "tokens": (5, 20), "documents": (1, 4), "longest_document": 60,
        "batch_size": 3,
    }  # fmt: skip


@pytest.fixture(scope="module")
def compressor(backbone: Backbone) -> SoftCompressor:
    """Trainable, with adapters that do something: fresh LoRA matrices B are zero."""
    torch.manual_seed(0)
    made = SoftCompressor(backbone, SOFT)
    made.finish(trainable=True)
    with torch.no_grad():
        for name, parameter in made.trained():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return made


# Samples


def test_batches_are_a_function_of_seed_and_number(settings: dict[str, Any], backbone: Backbone) -> None:
    forwards = [Samples(Recipe(**settings), backbone).batch(number) for number in range(40)]
    again = Samples(Recipe(**settings), backbone)
    assert [again.batch(number) for number in reversed(range(40))] == forwards[::-1]
    assert Samples(Recipe(**settings, seed=1), backbone).batch(0) != forwards[0]
    assert {batch.objective for batch in forwards} == {*OBJECTIVES}
    assert {batch.ratio for batch in forwards} == {1, 2, 4}


def test_order_of_weights_in_a_recipe_does_not_matter(settings: dict[str, Any], backbone: Backbone) -> None:
    turned = {name: dict(reversed(settings[name].items())) for name in ("objectives", "ratios")}
    first, second = Recipe(**settings), Recipe(**{**settings, **turned})
    assert first.to_json() == second.to_json()
    for number in range(5):
        assert Samples(first, backbone).batch(number) == Samples(second, backbone).batch(number)


def only(settings: dict[str, Any], objective: str, **changed: Any) -> Recipe:
    return Recipe(**{**settings, "objectives": {objective: 1.0}, **changed})


def test_reconstruction_repeats_its_document(settings: dict[str, Any], backbone: Backbone) -> None:
    ids = backbone.tokenizer.convert_tokens_to_ids
    for sample in Samples(only(settings, "reconstruction"), backbone).batch(0).samples:
        (document,) = sample.documents
        assert 5 <= len(document) <= 20
        assert sample.targets == (*document, ids("<|end|>"))
        # <|user|> [document] \n\nRepeat the text above. <|end|> <|assistant|>, each part encoded alone.
        command = backbone.encode("\n\nRepeat the text above.").ids
        assert sample.turns[0][0] == (
            (ids("<|user|>"),), Slot(0), (*command, ids("<|end|>"), ids("<|assistant|>")),
        )  # fmt: skip


def test_continuation_goes_on_where_the_document_ends(settings: dict[str, Any], backbone: Backbone) -> None:
    for sample in Samples(only(settings, "continuation"), backbone).batch(0).samples:
        (document,) = sample.documents
        assert len(sample.targets) == len(document)
        assert backbone.tokenizer.decode([*document, *sample.targets]) in " ".join(TEXTS)
        assert sample.turns[0][0] == tuple(chat_prompt(backbone, [Slot(0), "\n\nContinue the text above."]))


def test_recall_asks_what_follows_a_quote_of_one_document(
    settings: dict[str, Any], backbone: Backbone
) -> None:
    end = backbone.tokenizer.convert_tokens_to_ids("<|end|>")
    recipe = only(settings, "recall", tokens=(16, 16), documents=(2, 3), questions_per_sample=2)
    samples = Samples(recipe, backbone).batch(0).samples
    for sample in samples:
        assert {len(document) for document in sample.documents} == {16}
        (gold,) = sample.gold
        text = backbone.tokenizer.decode(sample.documents[gold])
        assert len(sample.turns) == 2
        for prompt, target in sample.turns:
            # Of 16 tokens a quarter is shown and half is asked for.
            quote = backbone.tokenizer.decode(prompt[-1]).split('What follows "')[1].split('"?')[0]
            assert len(target) == 8 + 1
            assert target[-1] == end
            assert quote + backbone.tokenizer.decode(target[:-1]) in text
    assert len({sample.gold for sample in samples}) > 1
    (alone,) = Samples(only(settings, "recall", documents=(1, 1), batch_size=1), backbone).batch(0).samples
    assert alone.gold == ()


def test_cloze_asks_for_names_by_words_around_them(
    settings: dict[str, Any], backbone: Backbone, tmp_path: Path
) -> None:
    end = backbone.tokenizer.convert_tokens_to_ids("<|end|>")
    # "The" begins a sentence and is no name; a name may have several words, a number separators.
    told = "The ship of Ada King left Rome with 1,200 owls. The fox saw it from the Tiber."
    around = {
        "Ada King": ("The ship of", "left Rome with 1,200 owls. The fox saw"),
        "Rome": ("The ship of Ada King left", "with 1,200 owls. The fox saw it from"),
        "1,200": ("The ship of Ada King left Rome with", "owls. The fox saw it from the Tiber."),
        "Tiber": ("1,200 owls. The fox saw it from the", "."),
    }
    file = tmp_path / "told.jsonl"
    file.write_text(json.dumps({"text": told}), encoding="utf-8")
    length = len(backbone.encode(told).ids)
    recipe = only(
        settings, "cloze", texts=(str(file),), tokens=(length, length), documents=(1, 1), batch_size=8,
        questions_per_sample=3,
    )  # fmt: skip
    asked, shown = set(), 0
    for sample in Samples(recipe, backbone).batch(0).samples:
        assert len({target for _, target in sample.turns}) == 3
        for prompt, target in sample.turns:
            name = backbone.tokenizer.decode(target[:-1])
            assert target[-1] == end
            text = backbone.tokenizer.decode(prompt[-1])
            before, after = text.split('missing in "')[1].split('"?')[0].split("____")
            for words, known in zip((before, after), around[name], strict=True):
                # Some of the words, in their order.
                left = iter(known.split())
                assert all(word in left for word in words.split())
                shown += len(words.split())
            asked.add(name)
    assert asked == {*around}
    mean = sum(len(" ".join(around[name]).split()) for name in around) / len(around)
    assert 0.6 * mean < shown / 24 < 0.8 * mean


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Owls hunt. They see at night in Rome", ["Rome"]),
        ('"Ada said "Owls hunt" to him', ["Owls"]),
        ("owls hunt at night", ["owls", "hunt", "at", "night"]),
        ("U.S. troops saw O'Neil ski 3.5 km", ["O'Neil", "3.5"]),
        ("🦉🦉", ["🦉🦉"]),
    ],
)
def test_names_are_capitalised_or_numbers_within_a_sentence(text: str, names: list[str]) -> None:
    assert [text[start:stop] for start, stop in _names(text)] == names


def test_texts_of_a_batch_are_equally_long(settings: dict[str, Any], backbone: Backbone) -> None:
    samples = Samples(only(settings, "reconstruction"), backbone)
    lengths = [{len(sample.documents[0]) for sample in samples.batch(n).samples} for n in range(8)]
    assert all(len(each) == 1 for each in lengths)
    assert len(set.union(*lengths)) > 1


def test_answer_of_one_document(settings: dict[str, Any], backbone: Backbone) -> None:
    ids = backbone.tokenizer.convert_tokens_to_ids
    (sample,) = Samples(only(settings, "answer", documents=(1, 1), batch_size=1), backbone).batch(0).samples
    text = backbone.tokenizer.decode(sample.documents[0])
    number = int(text.split()[3])
    assert text == f"Owl\n{TITLED[number]} Not Owl number {(number - 1) % 6}."
    assert sample.targets in {
        (*backbone.encode(answer).ids, ids("<|end|>")) for answer in question(number)["answers"]
    }
    after = f"\n\nQuestion: Which owl is number {number}?\nGive a short answer taken from the context."
    assert sample.turns[0][0] == (
        (ids("<|user|>"), *backbone.encode("Context:\n").ids),
        Slot(0),
        (*backbone.encode(after).ids, ids("<|end|>"), ids("<|assistant|>")),
    )


def test_more_questions_follow_about_the_same_document(
    settings: dict[str, Any], backbone: Backbone, tmp_path: Path
) -> None:
    ids = backbone.tokenizer.convert_tokens_to_ids
    records = [{**question(2), "question": f"{name}?", "answers": [f"{name}!"]} for name in ("A", "B", "C")]
    file = tmp_path / "three.jsonl"
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    recipe = only(settings, "answer", questions=(str(file),), questions_per_sample=2, documents=(1, 1))
    for sample in Samples(recipe, backbone).batch(0).samples:
        (prompt, target), ((between,), last) = sample.turns
        # <|end|> of the first answer is its target's last token; then comes the next turn.
        after = backbone.tokenizer.decode(between[1:-2])
        assert (between[0], *between[-2:]) == (ids("<|user|>"), ids("<|end|>"), ids("<|assistant|>"))
        assert after.endswith("?\nGive a short answer taken from the context.")
        assert after.startswith("Question: ")
        name = after[len("Question: ")]
        assert last == (*backbone.encode(f"{name}!").ids, ids("<|end|>"))
        assert f"Question: {name}?" not in backbone.tokenizer.decode(prompt[-1])
        assert target[-1] == ids("<|end|>")


@pytest.mark.parametrize(("name", "value"), [("eos_token", "<|user|>"), ("chat_template", None)])
def test_a_template_that_ends_answers_otherwise_is_refused(
    settings: dict[str, Any], backbone: Backbone, name: str, value: str | None
) -> None:
    tokenizer = copy.deepcopy(backbone.tokenizer)
    setattr(tokenizer, name, value)
    other = Backbone(backbone.model, tokenizer, name="other", window=backbone.window)
    recipe = only(settings, "recall", tokens=(16, 16), questions_per_sample=2)
    with pytest.raises(InputError, match=r"template of other .*, or set questions_per_sample to 1"):
        Samples(recipe, other).batch(0)
    Samples(dataclasses.replace(recipe, questions_per_sample=1), other).batch(0)


def test_other_documents_hold_no_answer_and_gold_moves(settings: dict[str, Any], backbone: Backbone) -> None:
    samples = Samples(only(settings, "answer", documents=(4, 4)), backbone)
    places = []
    for sample in (sample for number in range(6) for sample in samples.batch(number).samples):
        texts = [backbone.tokenizer.decode(document) for document in sample.documents]
        asked = backbone.tokenizer.decode(sample.turns[0][0][-1]).split("number ")[1][0]
        holding = [place for place, text in enumerate(texts) if f"Owl number {asked}" in text]
        # Of five others one names the answer, which leaves four: three are drawn.
        assert len(texts) == len(set(texts)) == 4
        assert len(holding) == 1
        assert texts[holding[0]].startswith(f"Owl\nOwl number {asked}")
        slots = [part for part in sample.turns[0][0] if isinstance(part, Slot)]
        assert slots == [Slot(place) for place in range(4)]
        places += holding
    assert set(places) == {0, 1, 2, 3}


def test_others_are_of_the_gold_documents_title(
    settings: dict[str, Any], backbone: Backbone, tmp_path: Path
) -> None:
    record = question(0)
    record["documents"].insert(0, {"title": "Bat", "text": "Bats hang."})
    bat = {**question(1), "documents": [{"title": "Bat", "text": "Bats sleep.", "is_gold": True}]}
    owl = {**question(2), "answers": []}  # its document is used, its question is not
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(map(json.dumps, (record, bat, owl))), encoding="utf-8")
    samples = Samples(only(settings, "answer", documents=(3, 3), questions=(str(file),)), backbone)
    seen = {
        frozenset(backbone.tokenizer.decode(document) for document in sample.documents)
        for number in range(4)
        for sample in samples.batch(number).samples
    }
    gold, other = (f"Owl\n{question(number)['documents'][0]['text']}" for number in (0, 2))
    assert seen == {
        frozenset({"Bat\nBats hang.", gold, other}),
        frozenset({"Bat\nBats sleep.", "Bat\nBats hang."}),
    }


def test_documents_are_cut_as_for_answers(settings: dict[str, Any], backbone: Backbone) -> None:
    whole_documents = only(settings, "answer", documents=(2, 3))
    cut = dataclasses.replace(whole_documents, chunk_tokens={8: 1.0})
    for number in range(6):
        plain, batch = (Samples(recipe, backbone).batch(number) for recipe in (whole_documents, cut))
        assert [sample.chunks for sample in plain.samples] == [()] * 3
        assert [dataclasses.replace(sample, chunks=()) for sample in batch.samples] == [*plain.samples]
        for sample in batch.samples:
            for document, chunks in zip(sample.documents, sample.chunks, strict=True):
                encoding = backbone.encode(text := backbone.tokenizer.decode(document))
                expected = chunked(text, encoding.ids, encoding.spans, 8)
                assert [*chunks] == [(chunk.ids, batch.ratio) for chunk in expected]
                assert len(chunks) > 1


def test_all_batches_of_a_step_are_cut_to_the_size_it_drew(
    settings: dict[str, Any], backbone: Backbone
) -> None:
    recipe = only(settings, "answer", documents=(3, 3), chunk_tokens={0: 0.5, 8: 0.5}, accumulation=2)
    samples = Samples(recipe, backbone)
    cut = [all(sample.chunks for sample in samples.batch(number).samples) for number in range(60)]
    assert cut[::2] == cut[1::2]
    assert 6 < sum(cut[::2]) < 24


def test_questions_with_long_documents_are_replaced(
    settings: dict[str, Any], backbone: Backbone, tmp_path: Path
) -> None:
    long = question(1)
    long["documents"] = [{"title": "Bat", "text": "Bats hang. " * 40, "is_gold": True}]
    file = tmp_path / "long.jsonl"
    file.write_text(f"{json.dumps(question(0))}\n{json.dumps(long)}", encoding="utf-8")
    recipe = only(
        settings, "answer", questions=(str(file),), documents=(1, 1), batch_size=20, longest_document=60
    )
    for number in range(3):
        samples = Samples(recipe, backbone).batch(number).samples
        assert len(samples) == 20
        assert all(len(sample.documents[0]) <= 60 for sample in samples)


def test_chunks_of_mixed_batches_draw_their_ratios(settings: dict[str, Any], backbone: Backbone) -> None:
    recipe = only(settings, "answer", documents=(3, 3), chunk_tokens={8: 1.0}, mixed=0.5, batch_size=6)
    batches = [Samples(recipe, backbone).batch(number) for number in range(40)]
    assert 10 < sum(batch.ratio == 0 for batch in batches) < 30
    raw: dict[bool, list[bool]] = {True: [], False: []}
    for batch in batches:
        ratios = {ratio for own in batch.chunks for _, ratio in own}
        assert ratios == ({batch.ratio} if batch.ratio else {1, 2, 4})
        for sample in batch.samples if batch.ratio == 0 else ():
            for place, own in enumerate(sample.chunks):
                raw[place in sample.gold] += [ratio == 1 for _, ratio in own]
    # A third of the draws is 1: 1/3 of the others' chunks stay raw, and 1 - (2/3)^3 of the gold documents'.
    assert sum(raw[False]) / len(raw[False]) == pytest.approx(1 / 3, abs=0.05)
    assert sum(raw[True]) / len(raw[True]) == pytest.approx(19 / 27, abs=0.05)
    alone = Samples(dataclasses.replace(recipe, chunk_tokens={0: 1.0}, mixed=1.0), backbone).batch(0)
    assert {len(own) for own in alone.chunks} == {1}
    assert len({ratio for ((_, ratio),) in alone.chunks}) > 1


def test_line_separators_inside_strings_are_no_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_bytes('{"text": "one\u2028two"}\r\n\n{"text": "three"}\n'.encode())
    assert [record["text"] for record in read_lines(str(file), "text")] == ["one\u2028two", "three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"title": "b"}', r"object with text, .*record 2; correct or remove"),
        (b"[1]", "object with text"),
        (b"\n", "no line; leave the file out"),
        (b"{", r"\.jsonl or \.jsonl\.xz"),
        (b'{"text": "\xff"}', r"\.jsonl or \.jsonl\.xz"),
        (None, r"\.jsonl or \.jsonl\.xz"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "texts.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_lines(str(file), "text")


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl.xz"
    for content in (b"no archive", lzma.compress(b'{"text": "a"}')[:-8]):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"\.jsonl\.xz"):
            read_lines(str(file), "text")


def test_data_without_fitting_samples_is_refused(settings: dict[str, Any], backbone: Backbone) -> None:
    with pytest.raises(InputError, match="raise longest_document"):
        Samples(only(settings, "answer", longest_document=2), backbone).batch(0)
    huge = SoftConfig(window=1024)
    with pytest.raises(InputError, match="lower tokens"):
        Samples(only(settings, "continuation", tokens=(999, 999), compressor=huge), backbone).batch(0)


# Losses


def read_alone(compressor: SoftCompressor, ids: Sequence[int], ratio: int) -> Tensor:
    """Embeddings of a chunk's tokens, or its soft tokens, window by window."""
    tokens = compressor.decoder_model.get_input_embeddings().weight[list(ids)]
    if ratio == 1:
        return tokens
    ended = torch.tensor([[*ids, compressor.tokenizer.eos_token_id]])
    everything = torch.ones(1, 1, ended.shape[1], ended.shape[1], dtype=torch.bool)
    states = compressor.encoder(input_ids=ended, attention_mask=everything, use_cache=False)
    states = states.last_hidden_state[0]
    rows = []
    for start in range(0, len(ids), ratio):
        stop = min(start + ratio, len(ids))
        hidden, mean = states[start:stop].mean(dim=0), tokens[start:stop].mean(dim=0)
        normed = hidden / (hidden.square().mean() + 1e-6).sqrt() * compressor.converter.norm.weight
        inner = F.gelu(compressor.converter.up.weight @ normed)
        learned = compressor.converter.scale * (compressor.converter.down.weight @ inner)
        rows.append(learned + mean * math.sqrt(stop - start))
    return torch.stack(rows)


def one_by_one(
    compressor: SoftCompressor, sample: Sample, chunks: Sequence[Sequence[Chunk]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities (V,) and NLL of every target token; every chunk and prefix alone, never padded."""
    model = compressor.decoder_model
    table = model.get_input_embeddings().weight
    documents = [torch.cat([read_alone(compressor, *chunk) for chunk in own]) for own in chunks]
    said, logs, nll = table[:0], [], []
    for prompt, target in sample.turns:
        parts = [documents[part.document] if isinstance(part, Slot) else table[list(part)] for part in prompt]
        said = torch.cat([said, *parts])
        for token in target:
            logits = model(inputs_embeds=said[None], use_cache=False).logits[0, -1]
            logs.append(logits.log_softmax(-1))
            nll.append(-logs[-1][token])
            said = torch.cat([said, table[[token]]])
    return logs, nll


def slow_losses(compressor: SoftCompressor, batch: Batch, distillation: float) -> tuple[Tensor, Tensor]:
    """Training loss, and KL(raw text || soft tokens), in nats per target token."""
    nll, divergences = [], []
    for sample in batch.samples:
        student, values = one_by_one(compressor, sample, sample.chunks or whole((sample,), batch.ratio))
        teacher, _ = one_by_one(compressor, sample, whole((sample,), 1))
        nll += values
        divergences += [
            (t.detach().exp() * (t.detach() - s)).sum() for s, t in zip(student, teacher, strict=True)
        ]
    divergence = torch.stack(divergences).mean()
    return torch.stack(nll).mean() + distillation * divergence, divergence


def uneven(backbone: Backbone, objective: str, ratio: int) -> Batch:
    """Documents of 7, 3, 12 tokens, two in the first prompt; targets of 2 + 2, in two turns, and 2 tokens."""
    before, between, after = ((5, 6), (7,), (1, 2, 8))
    return Batch(
        objective,
        ratio,
        (
            Sample(
                (tuple(range(20, 27)), (30, 31, 32)),
                (((before, Slot(0), between, Slot(1), after), (40, 41)), (((9, 10),), (42, 0))),
            ),
            Sample((tuple(range(50, 62)),), (((before, Slot(0), after), (43, 0)),)),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize(("objective", "weight"), [("reconstruction", 0.0), ("answer", 0.0), ("answer", 0.7)])
def test_loss_equals_one_by_one(
    compressor: SoftCompressor, backbone: Backbone, objective: str, weight: float, ratio: int
) -> None:
    batch = uneven(backbone, objective, ratio)
    with torch.no_grad():
        expected, divergence = slow_losses(compressor, batch, weight)
        computed = Objective(compressor, weight)(batch)
    assert float(computed["loss"]) == pytest.approx(float(expected), abs=1e-4)
    distilled = weight > 0 and ratio > 1
    assert ("kl" in computed) == distilled
    if distilled:
        assert float(divergence) > 0.01
        assert float(computed["kl"]) == pytest.approx(float(divergence), abs=1e-4)


def mixed(backbone: Backbone) -> Batch:
    """The samples of `uneven`, cut: 7 tokens as 2 soft and 3 raw, 3 as 1 soft, 12 as 4 raw, 2 and 2 soft."""
    first, second = uneven(backbone, "answer", 0).samples
    long, short, other = *first.documents, *second.documents
    cut = (((long[:4], 2), (long[4:], 1)), ((short, 4),))
    one = dataclasses.replace(first, chunks=cut)
    two = dataclasses.replace(second, chunks=(((other[:4], 1), (other[4:8], 2), (other[8:], 2)),))
    return Batch("answer", 0, (one, two))


def test_loss_of_mixed_ratios_equals_one_by_one(compressor: SoftCompressor, backbone: Backbone) -> None:
    batch = mixed(backbone)
    objective = Objective(compressor, 0.7)
    with torch.no_grad():
        expected, divergence = slow_losses(compressor, batch, 0.7)
        computed = objective(batch)
        _, sizes = objective._soft(batch.chunks)
    assert sizes == [2 + 3, 1, 4 + 2 + 2]
    assert float(computed["loss"]) == pytest.approx(float(expected), abs=1e-4)
    assert float(computed["kl"]) == pytest.approx(float(divergence), abs=1e-4)
    assert float(divergence) > 0.01


def test_reconstruction_is_never_distilled(compressor: SoftCompressor, backbone: Backbone) -> None:
    assert "kl" not in Objective(compressor, 1.0)(uneven(backbone, "reconstruction", 2))


def test_divergence_of_equal_distributions_is_zero(
    compressor: SoftCompressor, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = Objective(compressor, 1.0)
    raw = objective._soft
    # Soft tokens that are the raw ones: student and teacher read the same.
    monkeypatch.setattr(
        objective, "_soft", lambda documents: raw([[(ids, 1) for ids, _ in own] for own in documents])
    )
    with torch.no_grad():
        computed = objective(uneven(backbone, "answer", 2))
    assert float(computed["kl"]) == pytest.approx(0, abs=1e-6)
    assert float(computed["loss"]) == pytest.approx(float(computed["nll"]), abs=1e-6)


@pytest.mark.parametrize("ratio", [1, 4])
def test_padding_does_not_change_the_loss(compressor: SoftCompressor, backbone: Backbone, ratio: int) -> None:
    batch = uneven(backbone, "answer", ratio)
    objective = Objective(compressor, 0.5)
    with torch.no_grad():
        together = float(objective(batch)["loss"])
        first, second = (float(objective(Batch("answer", ratio, (s,)))["loss"]) for s in batch.samples)
    # 4 and 2 target tokens: the mean over tokens, not over samples.
    assert together == pytest.approx((4 * first + 2 * second) / 6, abs=1e-4)


def test_empty_documents_take_no_room(compressor: SoftCompressor) -> None:
    filled = Sample(((), (30, 31, 32)), ((((5,), Slot(0), Slot(1), (8,)), (40, 0)),))
    alone = Sample(((30, 31, 32),), ((((5,), Slot(0), (8,)), (40, 0)),))
    objective = Objective(compressor, 0.0)
    for ratio in (1, 2):
        with torch.no_grad():
            computed = [float(objective(Batch("answer", ratio, (s,)))["loss"]) for s in (filled, alone)]
        assert computed[0] == pytest.approx(computed[1], abs=1e-5)


def test_soft_tokens_are_those_of_inference(backbone: Backbone) -> None:
    torch.manual_seed(1)
    made = SoftCompressor(backbone, SoftConfig(ratio_set=(2, 4), converter_size=8, pool_end_token=True))
    made.finish(trainable=True)
    documents = [tuple(range(20, 28)), tuple(range(30, 37))]  # 8 tokens and the end token: 3 windows of 4
    soft_MD, sizes = Objective(made, 0.0)._soft([[(ids, 4)] for ids in documents])
    trained = soft_MD.split(sizes)
    inferred = [made.soft_tokens(text, 4).embeddings_MD for text in made.encode(documents)]
    assert [len(each) for each in trained] == [3, 2]
    for one, other in zip(trained, inferred, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    # Chunks of one document at three ratios, as allocators hand them out: raw, 4 windows of 2, 2 of 4.
    soft_MD, sizes = Objective(made, 0.0)._soft([[((5, 6), 1), (documents[1], 2), (documents[1], 4)]])
    assert sizes == [2 + 4 + 2]
    softened = made.soften([documents[1]] * 2, [2, 4])
    expected = torch.cat(
        [made.encoder.embed_tokens(torch.tensor([5, 6])), *(each.embeddings_MD for each in softened)]
    )
    torch.testing.assert_close(soft_MD, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio", [1, 2])
def test_gradients_reach_what_is_trained_and_nothing_else(
    compressor: SoftCompressor, backbone: Backbone, ratio: int
) -> None:
    compressor.zero_grad(set_to_none=True)
    Objective(compressor, 0.5)(uneven(backbone, "answer", ratio))["loss"].backward()
    reached = {
        name for name, value in compressor.named_parameters() if value.grad is not None and value.grad.any()
    }
    parts = {name.split(".")[0] for name in reached}
    # Raw text passes by encoder and converter; no loss is there for the ratio head.
    assert parts == ({"decoder_model"} if ratio == 1 else {"encoder", "converter", "decoder_model"})
    wanted = {name for name, _ in compressor.trained() if name.split(".")[0] in parts}
    assert reached == wanted
    compressor.zero_grad(set_to_none=True)


def test_teacher_takes_no_gradient(compressor: SoftCompressor, backbone: Backbone) -> None:
    batch = uneven(backbone, "answer", 2)
    name, parameter = next((n, p) for n, p in compressor.trained() if "decoder_model" in n and "lora_B" in n)
    gradients = []
    for loss in (Objective(compressor, 0.5)(batch)["loss"], slow_losses(compressor, batch, 0.5)[0]):
        (gradient,) = torch.autograd.grad(loss, parameter)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3, msg=lambda text: f"{name}: {text}")


# Recipes


def test_learning_rate_by_hand(settings: dict[str, Any]) -> None:
    recipe = Recipe(**settings, learning_rate=0.8, warmup=4, steps=12, final_learning_rate=0.25)
    # Warm-up of 4: quarters of 0.8. Then 8 steps of cosine from 0.8 to 0.2 with (1 + cos(pi part)) / 2:
    # part 0 -> 0.8; part 4/8 -> 0.2 + 0.6 / 2 = 0.5; part 2/8 -> 0.2 + 0.6 * (1 + 0.707107) / 2 = 0.712132;
    # part 7/8, the last -> 0.2 + 0.6 * (1 - 0.923880) / 2 = 0.222836.
    rates = [learning_rate(recipe, step) for step in range(12)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [rates[4], rates[8], rates[6], rates[11]] == pytest.approx(
        [0.8, 0.5, 0.712132, 0.222836], abs=1e-6
    )
    flat = Recipe(**settings, learning_rate=0.8, warmup=0, steps=1, final_learning_rate=1.0)
    assert learning_rate(flat, 0) == 0.8
    assert learning_rate(Recipe(**settings, learning_rate=1.0, warmup=20, steps=2), 1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps must be a whole number >= 1"),
        ({"batch_size": 1.5}, "batch_size must be a whole number >= 1, got 1.5"),
        ({"accumulation": 0}, "accumulation must be"),
        ({"warmup": -1}, "warmup must be a whole number >= 0"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"learning_rate": math.inf}, "learning_rate must be > 0 and finite"),
        ({"clip": math.nan}, "clip must be > 0"),
        ({"distillation": -1.0}, "distillation must be >= 0 .* 0 turns it off"),
        ({"weight_decay": math.nan}, "weight_decay must be >= 0"),
        ({"final_learning_rate": 2.0}, r"final_learning_rate must be in \[0, 1\]"),
        ({"start_weight": 1.5, "start": "x"}, r"start_weight must be in \[0, 1\] \(a part of the adapters"),
        ({"start_weight": 0.5}, "got 0.5 without start; set start"),
        ({"mixed": 1.5}, r"mixed must be in \[0, 1\] \(a part of the batches of questions\), got 1.5"),
        ({"chunk_tokens": {-1: 1.0}}, r"chunk_tokens must be whole numbers >= 0, got \[-1\]"),
        ({"chunk_tokens": {8: 0.0}}, "chunk_tokens must have"),
        ({"chunk_tokens": {8: 1.0, 65: 1.0}}, "lower chunk_tokens"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"tokens": (9, 3)}, r"tokens must be \[fewest, most\]"),
        ({"tokens": (3,)}, r"tokens must be \[fewest, most\]"),
        ({"documents": (0, 3)}, r"documents must be \[fewest, most\]"),
        ({"tokens": (5, 65)}, "tokens must be at most .* window of 64 .* lower tokens"),
        ({"longest_document": 65}, "lower longest_document"),
        ({"objectives": {}}, "objectives must have"),
        ({"objectives": {"answer": 0.0}}, "not all 0"),
        ({"objectives": {"answer": -1.0, "continuation": 2.0}}, "weights >= 0"),
        ({"objectives": {"recall": 1.0}, "tokens": (3, 9)}, "tokens must be at least 4 for recall"),
        ({"objectives": {"answers": 1.0}}, "an objective must be one of 'reconstruction'"),
        ({"ratios": {2: 0.0}}, "not all 0"),
        ({"ratios": {2: math.inf}}, "finite weights"),
        ({"ratios": {3: 1.0}}, r"of the ratio_set \[2, 4\], got \[3\]"),
        ({"compressor": SoftConfig(decoder_rank=0)}, "remove ratio 1, or raise decoder_rank"),
        ({"texts": ()}, "'reconstruction' needs files, got none; set texts"),
        ({"questions": ()}, "'answer' needs files, got none; set questions"),
        ({"texts": (), "objectives": {"continuation": 1.0}}, "'continuation' needs files, .* set texts"),
    ],
)  # fmt: skip
def test_impossible_recipes_are_refused(
    settings: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**{**settings, **changed})


def test_settings_without_weight_are_not_asked_for(settings: dict[str, Any]) -> None:
    unused = {"objectives": {"answer": 0.0, "reconstruction": 1.0}, "questions": (), "longest_document": 999}
    Recipe(**{**settings, **unused, "ratios": {2: 1.0, 3: 0.0}})


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_recipe_is_read(files: tuple[str, str], tmp_path: Path) -> None:
    text = """
        output = "out"
        start = "earlier/adapter"
        base = "base"
        texts = ["*.jsonl"]
        tokens = [4, 8]
        betas = [0.8, 0.9]
        [ratios]
        1 = 1
        2 = 0.5
        [compressor]
        ratio_set = [2, 4]
        window = 64
    """
    (tmp_path / "base").mkdir()
    recipe = Recipe.read(write(tmp_path, text))
    assert recipe.texts == (files[0],)
    folders = (recipe.output, recipe.start, recipe.base)
    assert folders == tuple(str(tmp_path / part) for part in ("out", "earlier/adapter", "base"))
    assert (recipe.tokens, recipe.betas, recipe.ratios) == ((4, 8), (0.8, 0.9), {1: 1, 2: 0.5})
    assert recipe.compressor == SoftConfig(ratio_set=(2, 4), window=64)
    absolute = Recipe.read(write(tmp_path, f'output = "/o"\ntexts = ["{files[0]}"]'))
    assert (absolute.output, absolute.texts, absolute.base) == ("/o", (files[0],), "embedded")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('output = "o"\nstep = 1', ConfigError, r"sets \['step'\].*known: .*'steps'"),
        ('texts = ["*.jsonl"]', ConfigError, "does not fit a recipe: .*'output'"),
        ('output = "o"\ntexts = ["none-*.jsonl"]', InputError, "correct the recipe or fetch the data"),
        ('output = "o"\ntexts = "texts.jsonl"', ConfigError, "texts must be a list"),
        ('output = "o"\ntexts = ["*.jsonl"]\nsteps = "many"', ConfigError, "steps must be a whole number"),
        ('output = "o"\ntexts = ["*.jsonl"]\nclip = "much"', ConfigError, "does not fit a recipe"),
        ('output = "o"\ntexts = ["*.jsonl"]\nratios = [2]', ConfigError, "does not fit a recipe|ratios must"),
        ('output = "o"\ntexts = ["*.jsonl"]\n[ratios]\ntwo = 1', ConfigError, "ratios must be whole numbers"),
        ('output = "o"\ntexts = ["*.jsonl"]\n[compressor]\nrank = 1', ConfigError, r"got .*'rank'"),
        ("output =", InputError, "a training recipe in TOML"),
    ],
)
def test_unreadable_recipes_are_refused(
    files: tuple[str, str], tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Recipe.read(write(tmp_path, text))
    with pytest.raises(InputError, match="a training recipe in TOML"):
        Recipe.read(tmp_path / "absent.toml")


HEADS = [(0, 1), (2, 0), (2, 3)]


def two_documents() -> Batch:
    """Samples of different length: gold document second, first, and unknown."""
    before, between, after = (5, 6), (7,), (1, 2, 8, 9)
    turns = lambda target: (((before, Slot(0), between, Slot(1), after), target),)  # noqa: E731
    return Batch(
        "answer",
        2,
        (
            Sample((tuple(range(20, 27)), (30, 31, 32)), turns((40, 41, 0)), gold=(1,)),
            Sample((tuple(range(50, 62)), tuple(range(60, 65))), turns((43, 0)), gold=(0,)),
            Sample((tuple(range(50, 56)), (60, 61)), turns((44, 0))),
        ),
    )


def test_attention_loss_equals_that_of_whole_attention_matrices(
    compressor: SoftCompressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = two_documents()
    objective = Objective(compressor, 0.0, attention=0.5, heads=HEADS)
    with torch.no_grad():
        computed = objective(batch)
        expected = []
        soft_MD, sizes = objective._soft(batch.chunks)
        soft = soft_MD.split(sizes)
        for row, (sample, gold) in enumerate(zip(batch.samples[:2], (1, 0), strict=True)):
            # before 2, document, between 1, document, question 4: places by hand from the soft lengths.
            first, second = (len(part) for part in soft[2 * row : 2 * row + 2])
            spans = [(2, 2 + first), (3 + first, 3 + first + second)]
            stop = 3 + first + second + 4
            own = soft[2 * row : 2 * row + 2]
            (one,) = objective._spliced([sample], torch.cat(own), [*map(len, own)]).embeds_BTD
            model = compressor.decoder_model
            model.set_attn_implementation("eager")
            try:
                output = model.model(inputs_embeds=one[None], use_cache=False, output_attentions=True)
            finally:
                model.set_attn_implementation("ctxcompress")
            read = [output.attentions[layer][0, head, stop - 4 : stop] for layer, head in HEADS]
            masses = [sum(weights[:, a:b].sum() for weights in read) for a, b in spans]
            expected.append(-math.log(float(masses[gold] / (masses[0] + masses[1]))))
    assert float(computed["attention"]) == pytest.approx(sum(expected) / 2, abs=1e-5)
    assert float(computed["loss"]) == pytest.approx(
        float(computed["nll"]) + 0.5 * float(computed["attention"]), abs=1e-5
    )


def test_attention_loss_teaches_the_decoder_where_to_look(backbone: Backbone) -> None:
    torch.manual_seed(0)
    compressor = SoftCompressor(backbone, SOFT)
    compressor.finish(trainable=True)
    objective = Objective(compressor, 0.0, attention=1.0, heads=HEADS)
    optimizer = torch.optim.AdamW([value for _, value in compressor.trained()], lr=1e-2)
    missed = []
    for _ in range(30):
        losses = objective(two_documents())
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        missed.append(float(losses["attention"].detach()))
    assert missed[-1] < 0.5 * missed[0]


def test_gold_places_are_known_where_there_are_others(settings: dict[str, Any], backbone: Backbone) -> None:
    several = Samples(only(settings, "answer", documents=(4, 4)), backbone).batch(0).samples
    for sample in several:
        (place,) = sample.gold
        asked = backbone.tokenizer.decode(sample.turns[0][0][-1]).split("number ")[1][0]
        assert f"Owl\nOwl number {asked}" in backbone.tokenizer.decode(sample.documents[place])
    alone = Samples(only(settings, "answer", documents=(1, 1)), backbone).batch(0).samples
    assert {sample.gold for sample in alone} == {()}
