"""Generation: equal whole, in batches, in pieces and in threads; nothing left running or half said."""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ctxcompress import Backbone
from ctxcompress.decoder import Completion, LocalDecoder, Settings, _Answer, _Listener, _Sampler
from ctxcompress.errors import CheckpointError, ConfigError, InputError
from ctxcompress.prompt import Ids, chat_prompt, question_prompt
from ctxcompress.types import SoftTokens

TEXTS = (
    "Rome",
    "The quick brown fox jumps over the lazy dog.",
    "In 1928 Fleming discovered penicillin.",
    "red " * 20,
)


@pytest.fixture
def decoder(backbone: Backbone) -> LocalDecoder:
    return LocalDecoder(backbone)


@pytest.fixture
def prompts(backbone: Backbone) -> list[list[Ids]]:
    return [chat_prompt(backbone, [text]) for text in TEXTS]


def ending_at(backbone: Backbone, token: int) -> Backbone:
    """The same model, whose settings name another end token and much that must not count."""
    other = copy.copy(backbone)
    other.model = copy.copy(backbone.model)
    other.model.generation_config = GenerationConfig(
        eos_token_id=[token], do_sample=True, temperature=0.7, top_k=3, top_p=0.5, repetition_penalty=5.0
    )
    return other


@torch.inference_mode()
def argmax_ids(backbone: Backbone, prompt: list[Ids]) -> list[int]:
    """The 12 tokens that follow, each from a forward pass over everything before."""
    ids = list(prompt[0])
    for _ in range(12):
        ids.append(int(backbone.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-12:]


def soft(backbone: Backbone, text: str, fingerprint: str = "") -> SoftTokens:
    """Soft tokens that are exactly the text's embeddings."""
    ids = torch.tensor(backbone.encode(text).ids)
    return SoftTokens(
        backbone.model.get_input_embeddings()(ids).detach(), len(ids), ratio=1, fingerprint=fingerprint
    )


def sampler(p: list[float], rows: int = 1, **changes: Any) -> Callable[[], torch.Tensor]:
    values = {"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0, "seed": 0, "stop": (), **changes}
    processor, scores = _Sampler(Settings(**values), rows), torch.tensor([p] * rows).log()
    return lambda: processor(torch.empty(rows, 0), scores).argmax(dim=-1)


def shares(draw: Callable[[], torch.Tensor], draws: int = 4000) -> list[float]:
    return (torch.bincount(torch.cat([draw() for _ in range(draws)]), minlength=3) / draws).tolist()


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.5, 0.3, 0.2]),
        # Before the second token 0.5 < 0.6, before the third 0.5 + 0.3 >= 0.6: 0.5 / 0.8 and 0.3 / 0.8.
        (1.0, 0.6, [0.625, 0.375, 0.0]),
        (1.0, 0.45, [1.0, 0.0, 0.0]),
        # p ** (1 / 0.5): 0.25, 0.09, 0.04 of 0.38.
        (0.5, 1.0, [0.658, 0.237, 0.105]),
    ],
)
def test_samples_follow_temperature_and_top_p(
    temperature: float, top_p: float, expected: list[float]
) -> None:
    got = shares(sampler([0.5, 0.3, 0.2], temperature=temperature, top_p=top_p))
    # Three standard errors of 4,000 draws: 3 * sqrt(0.25 / 4000) = 0.024.
    assert got == pytest.approx(expected, abs=0.024)


def test_the_smallest_temperature_is_greedy() -> None:
    processor = _Sampler(Settings(1, 5e-324, 0.9, 0, ()), rows=1)
    scores = processor(torch.empty(1, 0), torch.tensor([[0.2, 0.3, 0.5]]).log())
    assert scores.argmax() == 2
    assert not scores.isnan().any()


def test_rows_without_a_seed_differ() -> None:
    draw = sampler([1 / 300] * 300, rows=2, seed=None)
    drawn = torch.stack([draw() for _ in range(20)])
    assert drawn[:, 0].tolist() != drawn[:, 1].tolist()


def test_greedy_is_argmax_step_by_step(backbone: Backbone, decoder: LocalDecoder) -> None:
    prompt = question_prompt(backbone, "Where is Rome?", ["Rome is in Italy."])
    new = argmax_ids(backbone, prompt)
    assert backbone.tokenizer.eos_token_id not in new
    text = backbone.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert decoder.generate(prompt, max_new_tokens=12) == Completion(text, len(prompt[0]), 12, 0, "length")


def test_only_end_tokens_of_the_models_settings_count(backbone: Backbone, prompts: list[list[Ids]]) -> None:
    ids = argmax_ids(backbone, prompts[1])
    place = ids.index(ids[5])
    assert place >= 2
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        ended = LocalDecoder(ending_at(backbone, ids[place])).generate(prompts[1], max_new_tokens=12)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    text = backbone.tokenizer.decode(ids[:place]).strip()
    assert ended == Completion(text, len(prompts[1][0]), place + 1, 0, "stop")
    assert not records


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.9, "seed": 3}, {"temperature": 1.5, "top_p": 0.8, "seed": 4}]
)
@pytest.mark.parametrize("most", [1, 40])
def test_batch_equals_one_by_one(
    backbone: Backbone,
    decoder: LocalDecoder,
    prompts: list[list[Ids]],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    most: int,
) -> None:
    mixed = [*prompts, [prompts[0][0], soft(backbone, TEXTS[1])]]
    alone = [decoder.generate(prompt, max_new_tokens=most, stop="e", **settings) for prompt in mixed]
    assert decoder.generate_batch(mixed, max_new_tokens=most, stop="e", **settings) == alone
    monkeypatch.setattr("ctxcompress.backbone.BATCH_TOKENS", 150)
    assert decoder.generate_batch(mixed, max_new_tokens=most, stop="e", **settings) == alone
    assert [answer.soft_tokens for answer in alone] == [0, 0, 0, 0, len(soft(backbone, TEXTS[1]))]


def test_a_batch_that_begins_alike_equals_step_by_step(backbone: Backbone, decoder: LocalDecoder) -> None:
    alike = [question_prompt(backbone, "Where?", [text]) for text in TEXTS]
    completions = decoder.generate_batch(alike, max_new_tokens=12)
    assert [completion.text for completion in completions] == [
        backbone.tokenizer.decode(argmax_ids(backbone, prompt), skip_special_tokens=True).strip()
        for prompt in alike
    ]
    mixed = [alike[3], chat_prompt(backbone, [TEXTS[0]]), [soft(backbone, "red")]]
    assert decoder.generate_batch(mixed, max_new_tokens=12) == [
        decoder.generate(prompt, max_new_tokens=12) for prompt in mixed
    ]


def test_sampling_leaves_torchs_random_state_alone(decoder: LocalDecoder, prompts: list[list[Ids]]) -> None:
    with torch.random.fork_rng():
        texts = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            texts.append(decoder.generate(prompts[0], temperature=1.0, seed=7).text)
            decoder.generate(prompts[0], temperature=1.0)
            assert torch.equal(torch.get_rng_state(), before)
    assert texts[0] == texts[1]
    assert texts[0] != decoder.generate(prompts[0], temperature=1.0, seed=8).text


@pytest.mark.parametrize("seed", range(6))
def test_stream_joins_to_generate(decoder: LocalDecoder, prompts: list[list[Ids]], seed: int) -> None:
    settings: dict[str, Any] = {"temperature": 1.2, "seed": seed, "max_new_tokens": 80}
    whole = decoder.generate(prompts[1], **settings).text
    middle = len(whole) // 2
    for stop in ((), ("\n",), (whole[middle : middle + 5], "e"), whole[middle : middle + 3]):
        expected = decoder.generate(prompts[1], stop=stop, **settings)
        pieces = list(decoder.stream(prompts[1], stop=stop, **settings))
        assert "".join(pieces) == expected.text
        assert all(pieces)
        assert not any(string in expected.text for string in ((stop,) if isinstance(stop, str) else stop))
        if stop:
            assert whole.startswith(expected.text)
    assert len(list(decoder.stream(prompts[1], **settings))) > 10


def answer(tokenizer: Any, stop: tuple[str, ...] = (), most: int = 99) -> tuple[_Answer, list[str]]:
    pieces: list[str] = []
    return _Answer(tokenizer, {0}, Settings(most, 0.0, 1.0, None, stop), _Listener(pieces.append)), pieces


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece's: 0 ends, 1 is "a ", 2 "b", 3 and 4 are the two bytes of "é", 5 is "EN", 6 "D"."""
    from tokenizers import Tokenizer, decoders, models

    words = ["<end>", "a ", "b", "<0xC3>", "<0xA9>", "EN", "D"]
    inner = Tokenizer(
        models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[], byte_fallback=True)
    )
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


@pytest.mark.parametrize(
    ("tokens", "pieces", "text", "reason"),
    [
        # The space after "a" waits for what follows; at the end it goes.
        ([1, 2, 1, 0], ["a", " b", "a"], "a ba", "stop"),
        # "é" is whole with its second byte, but a third could still break it: it is put after "b".
        ([3, 4, 2, 0], ["éb"], "éb", "stop"),
        ([2, 3, 4, 3, 2, 0], ["b", "\ufffd\ufffd\ufffdb"], "b\ufffd\ufffd\ufffdb", "stop"),
        # "EN" may begin the stop string "END": held back, put when it did not, dropped when it did.
        ([2, 5, 2, 5, 6], ["b", "ENb"], "bENb", "stop"),
        ([2, 5], ["b", "EN"], "bEN", "length"),
    ],
)
def test_pieces_are_put_when_sure(tokens: list[int], pieces: list[str], text: str, reason: str) -> None:
    row, put = answer(bytes_tokenizer(), stop=("END",), most=len(tokens) if reason == "length" else 99)
    for token in tokens:
        assert not row.done
        row.add(token)
    assert row.done
    assert (put, row.text, row.finish_reason, row.tokens) == (pieces, text, reason, len(tokens))


def test_the_earliest_stop_string_ends() -> None:
    row, _ = answer(bytes_tokenizer(), stop=("D", "N"))
    for token in (2, 5):
        row.add(token)
    assert (row.text, row.done) == ("bE", True)


class Gate:
    """Lets a number of forward passes happen, holds the next until it is opened, and counts all."""

    def __init__(self, backbone: Backbone, free: int) -> None:
        self.passes, self.free, self.opened = 0, free, threading.Event()
        self._handle = backbone.model.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.passes += 1
        if self.passes > self.free:
            assert self.opened.wait(20)

    def close(self) -> None:
        self.opened.set()
        self._handle.remove()


@pytest.fixture
def gate(backbone: Backbone) -> Iterator[Gate]:
    gate = Gate(backbone, free=8)
    yield gate
    gate.close()
    settle()


def settle() -> None:
    """Wait until no generation runs."""
    end = time.monotonic() + 20
    while any(thread.name.startswith("ctxcompress") for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.001)


def test_closing_a_stream_ends_the_work(decoder: LocalDecoder, prompts: list[list[Ids]], gate: Gate) -> None:
    stream = decoder.stream(prompts[1], max_new_tokens=100)
    assert gate.passes == 0
    assert next(stream)
    stream.close()
    gate.opened.set()
    settle()
    assert gate.passes <= 9


async def test_cancelling_ends_the_work(decoder: LocalDecoder, prompts: list[list[Ids]], gate: Gate) -> None:
    async def read() -> None:
        async for _ in decoder.astream(prompts[1], max_new_tokens=100):
            pass

    for work in (read(), decoder.agenerate(prompts[1], max_new_tokens=100)):
        gate.passes = 0
        gate.opened.clear()
        task = asyncio.create_task(work)
        # The loop goes on while the ninth pass waits.
        while gate.passes < 9:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()
        await asyncio.to_thread(settle)
        await asyncio.sleep(0.1)
        assert gate.passes == 9


async def test_closing_an_astream_ends_the_work(
    decoder: LocalDecoder, prompts: list[list[Ids]], gate: Gate
) -> None:
    stream = decoder.astream(prompts[1], max_new_tokens=100)
    assert await anext(stream)
    await stream.aclose()
    gate.opened.set()
    await asyncio.to_thread(settle)
    assert gate.passes <= 9


async def test_async_equals_sync(decoder: LocalDecoder, prompts: list[list[Ids]]) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 30, "temperature": 1.0, "seed": 1, "stop": ["zz"]}
    expected = decoder.generate(prompts[1], **settings)
    assert await decoder.agenerate(prompts[1], **settings) == expected
    assert "".join([piece async for piece in decoder.astream(prompts[1], **settings)]) == expected.text


async def test_errors_reach_the_reader(
    backbone: Backbone, decoder: LocalDecoder, prompts: list[list[Ids]]
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    handle = backbone.model.register_forward_hook(fail)
    try:
        with pytest.raises(MemoryError, match="no room"):
            list(decoder.stream(prompts[0]))
        with pytest.raises(MemoryError, match="no room"):
            [piece async for piece in decoder.astream(prompts[0])]
    finally:
        handle.remove()
    # Wrong arguments fail at the call, before anything is iterated.
    with pytest.raises(InputError):
        decoder.stream([])
    with pytest.raises(InputError):
        decoder.astream([])


def test_threads_do_not_disturb_each_other(decoder: LocalDecoder, prompts: list[list[Ids]]) -> None:
    jobs = [
        (prompt, {"max_new_tokens": 30, "temperature": heat, "seed": 5})
        for prompt in prompts
        for heat in (0, 1)
    ]
    expected = [decoder.generate(prompt, **settings).text for prompt, settings in jobs]
    with ThreadPoolExecutor(4) as pool:
        whole = [pool.submit(lambda job=job: decoder.generate(job[0], **job[1]).text) for job in jobs]
        parts = [pool.submit(lambda job=job: "".join(decoder.stream(job[0], **job[1]))) for job in jobs]
        assert [future.result() for future in whole] == expected
        assert [future.result() for future in parts] == expected


def test_soft_tokens_stand_for_their_tokens(backbone: Backbone) -> None:
    before, after = (3, 4), (5, 6)
    middle = soft(backbone, TEXTS[1], "abc")
    decoder = LocalDecoder(backbone, "abc")
    raw = decoder.generate([(*before, *backbone.encode(TEXTS[1]).ids, *after)], max_new_tokens=20)
    mixed = decoder.generate([before, middle, after], max_new_tokens=20)
    assert (mixed.text, mixed.prompt_tokens) == (raw.text, raw.prompt_tokens)
    assert (mixed.soft_tokens, raw.soft_tokens) == (len(middle), 0)


def test_soft_tokens_of_another_decoder_are_refused(backbone: Backbone) -> None:
    with pytest.raises(CheckpointError, match=r"'abc', got some for 'xyz'; encode the text again"):
        LocalDecoder(backbone, "abc").generate([(1, 2), soft(backbone, "fox", "xyz")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number >= 1, got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be"),
        ({"temperature": -0.1}, "temperature must be finite and >= 0, got -0.1"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"top_p": math.nan}, "top_p must be"),
        ({"seed": -1}, "seed must be"),
        ({"stop": ["a", ""]}, "stop strings must be"),
        ({"stop": ""}, "stop strings must be"),
        ({"stop": [3]}, "stop strings must be"),
    ],
)
def test_settings_out_of_range_are_refused(
    decoder: LocalDecoder, prompts: list[list[Ids]], settings: dict[str, Any], message: str
) -> None:
    for method in (decoder.generate, decoder.stream, decoder.astream):
        with pytest.raises(ConfigError, match=message):
            method(prompts[0], **settings)
    with pytest.raises(ConfigError, match=message):
        decoder.generate_batch([], **settings)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "must have tokens, got none"),
        ([()], "must have tokens, got none"),
        ("text", "must consist of soft tokens and tuples of token ids"),
        ([1, 2], "must consist of"),
        ([(1, 100_000)], "must consist of"),
        ([(1, -1)], "must consist of"),
        ([(1, 2), SoftTokens(torch.full((2, 32), torch.nan), 4, 2, "")], "must be finite"),
        ([(1, 2), SoftTokens(torch.zeros(2, 31), 4, 2, "")], r"of shape \(M, 32\), got \(2, 31\)"),
        ([(1,) * 193], "must fit the model's window of 256 tokens, got 193 \\+ 64"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(decoder: LocalDecoder, prompt: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^(soft tokens of )?prompt .*{message}"):
        decoder.generate(prompt)
    with pytest.raises(InputError, match=f"prompt 1 .*{message}"):
        decoder.generate_batch([[(1, 2)], prompt])


def test_a_prompt_may_fill_the_window(decoder: LocalDecoder) -> None:
    assert decoder.generate([(1,) * 192]).prompt_tokens == 192
    assert decoder.generate_batch([]) == []


@pytest.mark.parametrize("most", [3, 12])
async def test_a_stream_ends_with_what_generate_returns(backbone: Backbone, most: int) -> None:
    decoder, prompt = LocalDecoder(backbone), chat_prompt(backbone, [TEXTS[0]])
    whole = decoder.generate(prompt, max_new_tokens=most)
    ends: list[Completion] = []
    assert "".join(decoder.stream(prompt, max_new_tokens=most, on_end=ends.append)) == whole.text
    pieces = [piece async for piece in decoder.astream(prompt, max_new_tokens=most, on_end=ends.append)]
    assert "".join(pieces) == whole.text
    assert ends == [whole, whole]


def test_a_stream_that_is_closed_has_no_end(backbone: Backbone) -> None:
    ends: list[Completion] = []
    prompt = chat_prompt(backbone, [TEXTS[0]])
    pieces = LocalDecoder(backbone).stream(prompt, max_new_tokens=100, on_end=ends.append)
    next(pieces)
    pieces.close()
    assert not ends
