"""What holds for every text and ratio: windows pool again exactly, and the selector obeys its dial."""

from __future__ import annotations

import math
import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxcompress import Backbone
from ctxcompress.backbone import splice
from ctxcompress.pooling import pool, windows
from ctxcompress.prompt import length, question_prompt
from ctxcompress.selector import select_length, select_ratio

examples = settings(max_examples=int(os.environ.get("CTXCOMPRESS_MAX_EXAMPLES", "50")), deadline=None)

LENGTHS = st.integers(0, 70)
FACTORS = st.integers(1, 9)
ALIGNMENTS = st.sampled_from(["start", "end"])
SEEDS = st.integers(0, 2**31)
SETS = st.lists(st.integers(1, 64), min_size=1, max_size=6, unique=True)
WISHES = st.floats(-9, 9)
SPACES = st.sampled_from(["log", "linear"])
SPECIALS = ("<|end|>", "<|user|>", "<|assistant|>")
HOSTILE = st.lists(
    st.one_of(st.sampled_from([*SPECIALS, "{query}", "{0}", "<content-8f1d4c02>", "\n\n", "%s"]), st.text()),
    max_size=6,
).map("".join)


def random_states(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, 3, generator=torch.Generator().manual_seed(seed))


@examples
@given(LENGTHS, FACTORS, FACTORS, ALIGNMENTS, SEEDS)
def test_pooling_twice_is_pooling_once(
    tokens: int, first: int, second: int, alignment: str, seed: int
) -> None:
    states_TD = random_states(tokens, seed)
    fine = pool(states_TD, torch.ones(tokens), first, alignment)
    means_GD, counts_G = pool(*fine, second, alignment)
    expected_GD, expected_G = pool(states_TD, torch.ones(tokens), first * second, alignment)
    torch.testing.assert_close(means_GD, expected_GD, rtol=0, atol=1e-6)
    assert counts_G.tolist() == expected_G.tolist()


@examples
@given(LENGTHS, FACTORS, ALIGNMENTS, SEEDS)
def test_every_token_counts_once(tokens: int, factor: int, alignment: str, seed: int) -> None:
    states_TD = random_states(tokens, seed)
    means_GD, counts_G = pool(states_TD, torch.ones(tokens), factor, alignment)
    assert len(means_GD) == len(counts_G) == windows(tokens, factor) == math.ceil(tokens / factor)
    assert counts_G.sum() == tokens
    torch.testing.assert_close((means_GD * counts_G[:, None]).sum(dim=0), states_TD.sum(dim=0))


@examples
@given(LENGTHS, FACTORS, ALIGNMENTS, st.floats(-1e4, 1e4, width=32))
def test_a_constant_stays_that_constant(tokens: int, factor: int, alignment: str, value: float) -> None:
    means_GD, _ = pool(torch.full((tokens, 2), value), torch.ones(tokens), factor, alignment)
    torch.testing.assert_close(means_GD, torch.full_like(means_GD, value))


@examples
@given(LENGTHS, st.integers(0, 20), FACTORS, SEEDS)
def test_padding_changes_nothing(tokens: int, padding: int, factor: int, seed: int) -> None:
    states_TD = random_states(tokens + padding, seed)
    means_GD, counts_G = pool(states_TD, (torch.arange(tokens + padding) < tokens).float(), factor)
    alone_GD, alone_G = pool(states_TD[:tokens], torch.ones(tokens), factor)
    torch.testing.assert_close(means_GD[: len(alone_GD)], alone_GD)
    assert counts_G.tolist() == alone_G.tolist() + [0.0] * (len(counts_G) - len(alone_G))


@examples
@given(LENGTHS, FACTORS, SEEDS)
def test_the_end_is_the_start_read_backwards(tokens: int, factor: int, seed: int) -> None:
    states_TD = random_states(tokens, seed)
    from_end_GD, _ = pool(states_TD, torch.ones(tokens), factor, "end")
    backwards_GD, _ = pool(states_TD.flip(0), torch.ones(tokens), factor)
    torch.testing.assert_close(from_end_GD, backwards_GD.flip(0))


@examples
@given(WISHES, SETS, st.floats(-4, 4), SPACES)
def test_nothing_legal_is_nearer_than_what_was_chosen(
    log2_ratio: float, legal: list[int], scale: float, space: str
) -> None:
    def distance(value: int) -> float:
        exponent = log2_ratio + scale
        return abs(math.log2(value) - exponent) if space == "log" else abs(value - 2.0**exponent)

    chosen = select_ratio(log2_ratio, legal, ratio_scale=scale, space=space)
    assert chosen.value in legal
    assert distance(chosen.value) <= min(map(distance, legal)) + 1e-9
    assert chosen == select_ratio(log2_ratio, legal[::-1], ratio_scale=scale, space=space)


@examples
@given(WISHES, SETS, st.lists(st.floats(-9, 9), min_size=2, max_size=5), SPACES, st.integers(1, 2000))
def test_the_dial_turns_one_way(
    log2_ratio: float, legal: list[int], scales: list[float], space: str, tokens: int
) -> None:
    chosen = [
        select_ratio(log2_ratio, legal, ratio_scale=scale, space=space).value for scale in sorted(scales)
    ]
    assert chosen == sorted(chosen)
    lengths = [
        select_length(log2_ratio, tokens, legal, ratio_scale=scale, space=space).value
        for scale in sorted(scales)
    ]
    assert lengths == sorted(lengths, reverse=True)


@examples
@given(WISHES, SETS, st.floats(0, 20))
def test_a_saturated_dial_does_nothing_more(log2_ratio: float, legal: list[int], further: float) -> None:
    chosen = select_ratio(log2_ratio, legal)
    assert chosen.saturated == (not min(legal) <= 2.0**log2_ratio <= max(legal))
    if chosen.saturated:
        away = math.copysign(further, log2_ratio - math.log2(max(legal)))
        assert select_ratio(log2_ratio, legal, ratio_scale=away).value == chosen.value


@examples
@given(WISHES, SETS, st.integers(1, 200))
def test_never_more_soft_tokens_than_tokens_unless_all_are(
    log2_ratio: float, legal: list[int], tokens: int
) -> None:
    chosen = select_length(log2_ratio, tokens, legal).value
    assert chosen in legal
    assert chosen <= tokens or chosen == min(legal)


@examples
@given(HOSTILE, st.lists(HOSTILE, max_size=3))
def test_what_is_written_in_a_prompt_is_what_was_given(
    backbone: Backbone, query: str, documents: list[str]
) -> None:
    (ids,) = question_prompt(backbone, query, documents)
    controls = [token for token in ids if token in backbone.tokenizer.all_special_ids]
    user, end, assistant = backbone.tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>", "<|assistant|>"])
    assert controls == [user, end, assistant]

    present = [document for document in documents if document]
    question = f"Question: {query}\nGive a short answer"
    text = backbone.tokenizer.decode(ids[1:-2])
    if present:
        context = "\n\n".join(present)
        assert text == f"Context:\n{context}\n\n{question} taken from the context."
    else:
        assert text == f"{question}."


@examples
@given(st.lists(st.one_of(st.integers(0, 3), st.text(min_size=1)), max_size=4), SEEDS)
def test_a_spliced_prompt_has_one_row_per_token(
    backbone: Backbone, documents: list[int | str], seed: int
) -> None:
    embed = backbone.model.get_input_embeddings()
    soft = [torch.randn(one, 32) if isinstance(one, int) else one for one in documents]
    segments = question_prompt(backbone, "Who?", [[own] for own in soft])
    with torch.no_grad():
        rows_TD = splice(segments, embed)
    assert rows_TD.shape == (length(segments), 32)
    place = 0
    for segment in segments:
        rows = rows_TD[place : place + len(segment)]
        expected = segment if isinstance(segment, torch.Tensor) else embed.weight[list(segment)]
        assert torch.equal(rows, expected)
        place += len(segment)
