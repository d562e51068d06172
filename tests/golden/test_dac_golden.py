"""DAC's stages on paper.

Every expected list is worked out in a comment or was printed by the authors' code; none is our snapshot.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctxcompress.attention import ColumnSums
from ctxcompress.config import DACConfig
from ctxcompress.pruning import FREE, PREFERRED, PROTECTED, Pruning, stage_count, to_remove
from ctxcompress.scores import fused, minmax, per_visible_query

Lists = list[list[int]]


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(values: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(values.double(), double(expected), atol=1e-6, rtol=0)


# ----------------------------------------------------------------- G1: attention -> accumulated attention

HEADS = [
    [[1.0, 0, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.3, 0.2, 0], [0.4, 0.3, 0.2, 0.1]],
    [[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.7, 0.1, 0.2, 0], [0.1, 0.1, 0.3, 0.5]],
]


def recorded(query_spans: list[tuple[int, int]]) -> Tensor:
    """Accumulated attention as the recorder reads it: queries ln(weight) and unit keys give these weights."""
    query_BHQD = torch.tensor([HEADS]).clamp(min=1e-9).log()
    key_BHTD = torch.eye(4).expand(1, 2, 4, 4)
    recorder = ColumnSums(query_spans)
    output_BHQD = recorder.attend(query_BHQD, key_BHTD, key_BHTD, scaling=1.0)
    # Unit values make the output the weights themselves.
    torch.testing.assert_close(output_BHQD, torch.tensor([HEADS]))
    return recorder.mean_BT[0]


def test_g1_accumulated_attention_is_the_column_sum_averaged_over_heads() -> None:
    # Columns over both heads: 1 + .6 + .5 + .4 + 1 + .9 + .7 + .1 = 5.2; .4 + .3 + .3 + .1 + .1 + .1 = 1.3;
    # .2 + .2 + .2 + .3 = .9; .1 + .5 = .6. The authors divide by 2 * 1 - 1 by mistake: 1.3 .9 .6, the same
    # order.
    close(recorded([(0, 4)]), [2.6, 0.65, 0.45, 0.3])


def test_g1_only_queries_in_the_span_count() -> None:
    # The last two queries: .5 + .4 + .7 + .1 = 1.7; .3 + .3 + .1 + .1 = .8; .9; .6.
    close(recorded([(2, 4)]), [0.85, 0.4, 0.45, 0.3])


def test_g1_correcting_the_causal_bias_turns_the_order() -> None:
    # Seen by 4 3 2 1 queries: the last token, lowest before, is now highest after the first.
    corrected = per_visible_query(recorded([(0, 4)]))
    close(corrected, [0.65, 0.65 / 3, 0.225, 0.3])
    assert recorded([(0, 4)])[1:].argsort().tolist() == [2, 1, 0]
    assert corrected[1:].argsort().tolist() == [0, 1, 2]


def test_g1_minmax() -> None:
    # (.9 - .6) / (1.3 - .6) = 3/7, of the authors' numbers and of ours alike
    close(minmax(double([1.3, 0.9, 0.6])), [1.0, 3 / 7, 0.0])
    close(minmax(recorded([(0, 4)])[1:]), [1.0, 3 / 7, 0.0])
    assert minmax(double([0.3, 0.3])).tolist() == [0.0, 0.0]
    assert minmax(double([])).tolist() == []


# ----------------------------------------------------------------------------------------- G2: one stage

INFORMATION = [2.0, 0.5, 4.0, 1.0, 0.0, 3.0, 0.2, 0.4, 2.5, 0.1]
RECEIVED = [0.9, 0.3, 0.5, 0.2, 0.1, 0.8, 0.15, 0.25, 0.6, 0.1]


def test_g2_worth() -> None:
    # I over 4: .5 .125 1 .25 0 .75 .05 .1 .625 .025; (s - .1) / .8: 1 .25 .5 .125 0 .875 .0625 .1875 .625 0
    # .2 * .5 + .8 * 1 = .9, .2 * .125 + .8 * .25 = .225, ...
    close(
        fused(double(INFORMATION), double(RECEIVED), alpha=0.8),
        [0.9, 0.225, 0.6, 0.15, 0.0, 0.85, 0.06, 0.17, 0.625, 0.005],
    )
    close(
        fused(double(INFORMATION), double(RECEIVED), fusion="multiplicative"),
        [1.8, 0.15, 2.0, 0.2, 0.0, 2.4, 0.03, 0.1, 1.5, 0.01],
    )


@pytest.mark.parametrize("schedule", ["reference", "anchored"])
@pytest.mark.parametrize(
    ("kept_fraction", "without_rule", "with_rule"),
    [
        # The lowest three are 5, 10, 7; no two are neighbours.
        (0.7, {5, 7, 10}, {5, 7, 10}),
        # 4 and 8 join: of 4-5 the right one stays, and of 7-8.
        (0.5, {4, 5, 7, 8, 10}, {4, 7, 10}),
        # 2 joins.
        (0.4, {2, 4, 5, 7, 8, 10}, {2, 4, 7, 10}),
        # 3 joins: of 2-3-4-5 every second stays.
        (0.3, {2, 3, 4, 5, 7, 8, 10}, {2, 4, 7, 10}),
    ],
)
def test_g2_one_stage(
    schedule: str, kept_fraction: float, without_rule: set[int], with_rule: set[int]
) -> None:
    for rule, removed in ((False, without_rule), (True, with_rule)):
        config = DACConfig(schedule=schedule, no_consecutive=rule)
        pruning = Pruning(torch.arange(11), kept_fraction, config)
        # Position 0 has no worth: whatever stands there changes nothing.
        pruning.step(double([99.0, *INFORMATION]), double([99.0, *RECEIVED]))
        assert set(range(11)) - set(pruning.alive_A.tolist()) == removed


def test_g2_of_equals_the_later_goes_first() -> None:
    pruning = Pruning(torch.arange(6), 0.6, DACConfig(no_consecutive=False))
    pruning.step(torch.ones(6), torch.ones(6))
    assert pruning.alive_A.tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------ G3: several stages

TEXT = [3, 14, 15, 9, 26, 5, 35, 8, 97, 93, 23, 84, 62, 64, 33]
TWELVE = [3, 14, 15, 9, 26, 5, 35, 97, 23, 84, 62, 64]


def signals(left: list[int]) -> tuple[Tensor, Tensor]:
    """A model by formula: information changes when the predecessor goes, attention with the length."""
    size = len(left)
    information = [0.0] + [abs(left[i] - left[i - 1]) + 0.01 * i for i in range(1, size)]
    received = [0.0] + [7 * left[i] % 11 + 0.1 * (size - i) for i in range(1, size)]
    return double(information), double(received)


def stages_of(config: DACConfig) -> tuple[Lists, Pruning]:
    """The tokens left after every stage at tau = .5."""
    pruning = Pruning(torch.arange(len(TEXT)), 0.5, config)
    lists = []
    while not pruning.done:
        pruning.step(*signals([TEXT[token] for token in pruning.alive_A.tolist()]))
        lists.append(left(pruning))
    return lists, pruning


def left(pruning: Pruning) -> list[int]:
    return [TEXT[token] for token in pruning.alive_A.tolist()]


def test_g3_worths_of_the_first_stage() -> None:
    # Token 14: I = 11.01, of .05 + ... to 89.08; s = 7 * 14 mod 11 + 1.4 = 11.4, of .5 to 11.4 -> .8227
    information, received = signals(TEXT)
    torch.testing.assert_close(
        fused(information[1:], received[1:], alpha=0.8),
        double(
            [
                *[0.8227, 0.5097, 0.6556, 0.5320, 0.2508, 0.3350, 0.1795],
                *[0.8088, 0.1840, 0.6808, 0.5117, 0.4161, 0.5760, 0.0684],
            ]
        ),
        atol=5e-5,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (1, [[3, 14, 9, 26, 97, 23, 84, 64]]),
        (2, [[3, 14, 15, 9, 26, 97, 23, 84, 62, 64], [3, 14, 9, 26, 97, 23, 64]]),
        (3, [TWELVE, [3, 14, 15, 9, 26, 97, 23, 84, 64], [3, 14, 9, 26, 97, 23, 64]]),
    ],
)
def test_g3_authors_schedule_without_the_rule(stages: int, expected: Lists) -> None:
    # Floors add up: 14 -> 7 at D = 1, but 14 -> floor 9.89 -> floor 6.36 at D = 2, below the budget by one.
    config = DACConfig(schedule="reference", stages=stages, no_consecutive=False)
    assert stages_of(config)[0] == expected


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        # 7 should go: 33 8 93 5 35 62 15; but 35 stands between 5 and 8, and stays.
        (1, [[3, 14, 9, 26, 35, 97, 23, 84, 64]]),
        (2, [[3, 14, 15, 9, 26, 35, 97, 23, 84, 62, 64], [3, 14, 15, 9, 26, 97, 23, 62, 64]]),
        (3, [TWELVE, [3, 14, 15, 9, 26, 35, 97, 23, 84, 64], [3, 14, 15, 9, 26, 97, 23, 64]]),
    ],
)
def test_g3_authors_schedule_with_the_rule(stages: int, expected: Lists) -> None:
    assert stages_of(DACConfig(schedule="reference", stages=stages))[0] == expected


@pytest.mark.parametrize(
    ("stages", "expected", "enforced"),
    [
        # Targets of the stages: 1 + floor(14 * .5^(j/D)) = 8; 10, 8; 12, 9, 8. The rule misses the last one
        # at D = 1 and 2, and the final pass takes the cheapest that is left.
        # D = 1: 35, worth .3350, which the rule had kept between 5 and 8.
        (1, [[3, 14, 9, 26, 35, 97, 23, 84, 64]], [3, 14, 9, 26, 97, 23, 84, 64]),
        # D = 2: 62, worth .2 * .2884 + .8 * .2162 = .2307 in stage 2, which the rule had kept beside 84.
        (
            2,
            [[3, 14, 15, 9, 26, 35, 97, 23, 84, 62, 64], [3, 14, 15, 9, 26, 97, 23, 62, 64]],
            [3, 14, 15, 9, 26, 97, 23, 64],
        ),
        (
            3,
            [TWELVE, [3, 14, 15, 9, 26, 35, 97, 23, 84, 64], [3, 14, 15, 9, 26, 97, 23, 64]],
            [3, 14, 15, 9, 26, 97, 23, 64],
        ),
    ],
)
def test_g3_anchored_schedule_with_the_rule(stages: int, expected: Lists, enforced: list[int]) -> None:
    lists, pruning = stages_of(DACConfig(schedule="anchored", stages=stages))
    assert lists == expected
    pruning.enforce()
    assert left(pruning) == enforced


@pytest.mark.parametrize("stages", [2, 3])
def test_g3_anchored_schedule_without_the_rule_meets_the_budget_by_itself(stages: int) -> None:
    lists, pruning = stages_of(DACConfig(schedule="anchored", stages=stages, no_consecutive=False))
    assert lists[-1] == [3, 14, 15, 9, 26, 97, 23, 64]
    pruning.enforce()
    assert left(pruning) == lists[-1]


# ------------------------------------------------------------------------------ G4, G5: stages and sizes


@pytest.mark.parametrize(
    ("tokens", "stages"),
    [(80, 1), (100, 1), (199, 1), (200, 2), (250, 2), (999, 9), (1500, 15), (4000, 15)],
)
def test_g4_stage_count(tokens: int, stages: int) -> None:
    assert stage_count(tokens) == stages


@pytest.mark.parametrize(
    ("kept_fraction", "stages", "per_stage"),
    # .5^(1/15), .3^(1/9), .2^(1/2)
    [(0.5, 15, 0.95484), (0.3, 9, 0.87479), (0.2, 2, 0.44721)],
)
def test_g4_every_stage_keeps_the_same_fraction(kept_fraction: float, stages: int, per_stage: float) -> None:
    million = 1_000_001  # the first token always stays
    for schedule in ("reference", "anchored"):
        kept = million - to_remove(million, million, kept_fraction, 1, stages, schedule) - 1
        assert kept / 1_000_000 == pytest.approx(per_stage, abs=6e-6)


@pytest.mark.parametrize(
    ("tokens", "kept_fraction", "left_over"),
    [
        *[(80, 0.5, 40), (250, 0.5, 125), (999, 0.5, 497), (1500, 0.5, 746), (4000, 0.5, 1995)],
        *[(999, 0.3, 299), (1500, 0.3, 447)],
        *[(999, 0.2, 198), (1500, 0.2, 298), (4000, 0.2, 797)],
    ],
)
def test_g5_sizes_of_the_authors_schedule(tokens: int, kept_fraction: float, left_over: int) -> None:
    # Without the rule the signals do not matter for the size; 80 -> 1 + floor(79 * .5) = 40.
    pruning = Pruning(
        torch.arange(tokens), kept_fraction, DACConfig(schedule="reference", no_consecutive=False)
    )
    while not pruning.done:
        pruning.step(pruning.alive_A.double(), pruning.alive_A.double())
    assert len(pruning.alive_A) == left_over


# ------------------------------------------------------------------------------ ours: words and protection


def test_a_word_is_worth_the_mean_of_its_tokens_and_goes_whole() -> None:
    # Words 0 | 1 2 | 3 | 4 5. Min-max of the attention 3 3 4 0 10 of tokens 1 to 5: .3 .3 .4 0 1, so the
    # words are worth .3 .4 .5; sums, .6 .4 1, would favour long words. One token must go: word 1 2 does.
    pruning = Pruning(torch.tensor([0, 1, 1, 2, 3, 3]), 0.8, DACConfig(alpha=1.0, no_consecutive=False))
    pruning.step(torch.zeros(6), torch.tensor([99.0, 3, 3, 4, 0, 10]))
    assert pruning.alive_A.tolist() == [0, 3, 4, 5]


def test_protected_units_go_last_just_after_the_first() -> None:
    # Worth falls with the position, so without tiers 5 would go first. 3 and 4 are digits, 5 is protected.
    tier_T = torch.tensor([FREE, FREE, FREE, PREFERRED, PREFERRED, PROTECTED])
    pruning = Pruning(torch.arange(6), 0.0, DACConfig(), tier_T)
    pruning.step(torch.arange(6, 0, -1), torch.arange(6, 0, -1))
    assert pruning.alive_A.tolist() == [0, 2, 3, 4, 5]  # 1 and 2 are free to go, but 2 stands beside 1
    for limit, kept in ((4, [0, 3, 4, 5]), (3, [0, 3, 5]), (2, [0, 5]), (1, [5]), (0, [])):
        pruning.enforce(limit)
        assert pruning.alive_A.tolist() == kept
