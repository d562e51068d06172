"""Attention read in blocks against attention worked out number by number, and against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ctxcompress import reference
from ctxcompress.attention import QUERY_BLOCK, ColumnSums, SegmentMass
from ctxcompress.scores import attention_mass

ROWS, HEADS, SIZE = 2, 2, 4
SCALING = SIZE**-0.5
LENGTHS = [1, 2, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 9]

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Spread 6 makes the softmax all but pick one key.
spreads = pytest.mark.parametrize("spread", [1.0, 6.0])


def states(length: int, queries: int, dtype: torch.dtype, spread: float, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values, rounded to `dtype` before anything is computed from them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(ROWS, HEADS, queries, SIZE), *[(ROWS, HEADS, length, SIZE)] * 2]
    query, key, value = (torch.randn(size, generator=generator) for size in sizes)
    return [(query * spread).to(dtype), key.to(dtype), value.to(dtype)]


COARSE = {torch.float32: 1e-5, torch.bfloat16: 0.1}


def within_twice_the_naive_error(fast: Tensor, naive: Tensor, exact: Tensor) -> None:
    """Fast may err by no more than twice what the same arithmetic done plainly in its precision errs."""
    allowance = 8 * torch.finfo(torch.float32).eps * max(1.0, float(exact.abs().max()))
    error, naive_error = ((values.double() - exact).abs().max() for values in (fast, naive))
    assert float(error) <= 2 * float(naive_error) + allowance
    # If both were far off, it would be the reference that is wrong.
    assert float(naive_error) <= COARSE[naive.dtype] * max(1.0, float(exact.abs().max()))


def close_to_theirs(fast: Tensor, theirs: Tensor, spread: float) -> None:
    """Close to SDPA, which keeps scores and weights in float32; a plain implementation rounds them first.

    A bfloat16 has 8 bits, so a score of 6 times the spread carries 6 times the error.
    """
    assert fast.dtype == theirs.dtype
    tolerance = {} if fast.dtype == torch.float32 else {"atol": spread / 64, "rtol": spread / 64}
    torch.testing.assert_close(fast, theirs, **tolerance)


def naive_weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(QK^T / sqrt d), causal, at once and in the precision of its input."""
    scores = (query @ key.transpose(-1, -2)) * SCALING
    return scores.masked_fill(~visible(scores), -torch.inf).softmax(dim=-1)


def visible(scores: Tensor) -> Tensor:
    """The last query sees the last key."""
    queries, keys = scores.shape[-2:]
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def exact_columns(
    query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Outputs, and column sums over the queries of each row's span averaged over heads, both float64."""
    outputs = torch.zeros(value.shape, dtype=torch.float64)
    sums = torch.zeros(ROWS, key.shape[2], dtype=torch.float64)
    for row, (start, stop) in enumerate(spans):
        for head in range(HEADS):
            q, k, v = (part[row, head].tolist() for part in (query, key, value))
            output, _ = reference.causal_attention(q, k, v)
            outputs[row, head] = torch.tensor(output, dtype=torch.float64)
            for sign, last in ((1, stop), (-1, start)):
                _, received = reference.causal_attention(q[:last], k, v)
                sums[row] += sign * torch.tensor(received, dtype=torch.float64) / HEADS
    return outputs, sums


@both_dtypes
@spreads
@pytest.mark.parametrize("length", LENGTHS)
def test_column_sums(length: int, dtype: torch.dtype, spread: float) -> None:
    query, key, value = states(length, length, dtype, spread)
    recorder = ColumnSums([(0, length)] * ROWS)
    fast_output = recorder.attend(query, key, value, SCALING)
    outputs, sums = exact_columns(query, key, value, [(0, length)] * ROWS)

    weights = naive_weights(query, key)
    within_twice_the_naive_error(recorder.mean_BT, weights.sum(dim=2).mean(dim=1), sums)
    within_twice_the_naive_error(fast_output, weights @ value, outputs)
    theirs = scaled_dot_product_attention(query, key, value, is_causal=True)
    close_to_theirs(fast_output, theirs, spread)


@both_dtypes
def test_column_sums_of_some_queries(dtype: torch.dtype) -> None:
    length = QUERY_BLOCK + 9
    # Across the border of two blocks in one row, inside one block in the other.
    spans = [(QUERY_BLOCK - 5, QUERY_BLOCK + 3), (2, 7)]
    query, key, value = states(length, length, dtype, 1.0)
    recorder = ColumnSums(spans)
    recorder.attend(query, key, value, SCALING)
    _, sums = exact_columns(query, key, value, spans)

    weights = naive_weights(query, key)
    naive = torch.stack(
        [weights[row, :, start:stop].sum(dim=1).mean(dim=0) for row, (start, stop) in enumerate(spans)]
    )
    within_twice_the_naive_error(recorder.mean_BT, naive, sums)


def test_column_sums_are_averaged_over_layers() -> None:
    recorder = ColumnSums([(0, 9)] * ROWS)
    singles = []
    for layer in range(3):
        single = ColumnSums([(0, 9)] * ROWS)
        for one in (recorder, single):
            one.attend(*states(9, 9, torch.float32, 1.0, seed=layer), SCALING)
        singles.append(single.mean_BT)
    torch.testing.assert_close(recorder.mean_BT, torch.stack(singles).mean(dim=0))
    # Every query gives out exactly 1.
    torch.testing.assert_close(recorder.mean_BT.sum(dim=1), torch.full((ROWS,), 9.0))


def test_recorders_leave_their_input_alone() -> None:
    before = states(70, 70, torch.float32, 1.0)
    given = [part.clone() for part in before]
    ColumnSums([(0, 70)] * ROWS).attend(*given, SCALING)
    SegmentMass([(0, 60)], [6, 4]).attend(*given, SCALING)
    assert all(torch.equal(*pair) for pair in zip(before, given, strict=True))


@both_dtypes
@spreads
@pytest.mark.parametrize("queries", [1, 2, 7])
def test_segment_mass(queries: int, dtype: torch.dtype, spread: float) -> None:
    length = 150
    # A gap between segments, one of a single key, one that touches the next.
    segments = [(3, 40), (41, 42), (50, 100), (100, length - queries)]
    query, key, value = (part[:1] for part in states(length, length, dtype, spread))
    recorder = SegmentMass(segments, [queries])
    fast_output = recorder.attend(query, key, value, SCALING)
    (mass_LHQN,) = recorder.masses
    assert mass_LHQN.shape == (1, HEADS, queries, len(segments))
    theirs = scaled_dot_product_attention(query, key, value, is_causal=True)
    close_to_theirs(fast_output, theirs, spread)
    query = query[:, :, -queries:]

    exact = torch.tensor(
        [
            [
                reference.segment_mass(one.tolist(), keys[: length - queries + 1 + place].tolist(), segments)
                for place, one in enumerate(heads)
            ]
            for heads, keys in zip(query[0], key[0], strict=True)
        ],
        dtype=torch.float64,
    )
    weights = naive_weights(query, key)
    naive = torch.stack([weights[0, ..., start:stop].sum(dim=-1) for start, stop in segments], dim=-1)
    within_twice_the_naive_error(mass_LHQN[0], naive, exact)


@both_dtypes
@spreads
def test_questions_do_not_see_each_other(dtype: torch.dtype, spread: float) -> None:
    segments, questions = [(2, 40), (40, 58)], [5, 1, 7]
    given = [part[:1] for part in states(58 + sum(questions), 58 + sum(questions), dtype, spread)]
    together = SegmentMass(segments, questions)
    output = together.attend(*given, SCALING)
    start = 58
    for mass_LHQN, count in zip(together.masses, questions, strict=True):
        own = [torch.cat([part[:, :, :58], part[:, :, start : start + count]], dim=2) for part in given]
        alone = SegmentMass(segments, [count])
        own_output = alone.attend(*own, SCALING)
        torch.testing.assert_close(mass_LHQN, alone.masses[0])
        torch.testing.assert_close(output[:, :, start : start + count], own_output[:, :, 58:])
        start += count
    assert output.shape == given[0].shape


def test_mass_of_a_document_from_recorder_to_share() -> None:
    query, key, value = (part[:1] for part in states(41, 41, torch.float32, 2.0))
    segments = [(1, 10), (10, 15), (20, 40)]
    recorder = SegmentMass(segments, [1])
    recorder.attend(query, key, value, SCALING)
    heads = [
        reference.segment_mass(query[0, head, -1].tolist(), key[0, head].tolist(), segments)
        for head in range(HEADS)
    ]
    torch.testing.assert_close(
        attention_mass(recorder.masses[0][:, :, 0]), torch.tensor(reference.attention_mass(heads))
    )
