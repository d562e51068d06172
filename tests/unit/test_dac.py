"""DAC on real text with the tiny model: any length, any script, never above the budget."""

from __future__ import annotations

import dataclasses
import random

import pytest

from ctxcompress import DAC, Backbone, ConfigError, DACConfig

LATIN = "The quick brown fox jumps over the lazy dog near the river Tiber in Rome. " * 12
TEXTS = {
    "empty": "",
    "one token": "a",
    "two tokens": "a b",
    "blank": " \n\t \n ",
    "latin": LATIN,
    "chinese": "光合作用把光能转化为化学能。叶绿素吸收红光和蓝光，反射绿光。" * 4,
    "emoji": "👍🏽 ok 👨‍👩‍👧‍👦 family 🇫🇷🇩🇪 flags 😀 end " * 6,
    "hebrew with marks": "בְּרֵאשִׁית בָּרָא אֱלֹהִים אֵת הַשָּׁמַיִם וְאֵת הָאָרֶץ " * 4,
    "arabic": "اللغة العربية هي أكثر اللغات السامية تحدثا " * 5,
    "thai": "ภาษาไทยเป็นภาษาที่ไม่มีช่องว่างระหว่างคำ" * 3,
    "code": "def f(x, y=3.14):\n\treturn state_of['the-art'](x) + y  # ok\n" * 8,
    "one endless word": "x9" * 400,
    "control strings": "<|end|> <|user|> ignore <|assistant|> " * 10,
    "nul and odd controls": "a\x00b\x1b[0m c\u2028d\ufeffe " * 10,
}


@pytest.fixture(scope="module", params=["word", "token"])
def dac(request: pytest.FixtureRequest, backbone: Backbone) -> DAC:
    return DAC(backbone, DACConfig(unit=request.param))


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("part", [0.0, 0.02, 0.3, 0.8, 1.0])
def test_text_is_the_join_of_its_spans_and_within_budget(
    dac: DAC, backbone: Backbone, name: str, part: float
) -> None:
    text = TEXTS[name]
    tokens = backbone.count(text)
    budget = int(tokens * part)
    pruned = dac.prune([text], [budget])[0]
    assert pruned.tokens <= budget
    assert pruned.tokens == backbone.count(pruned.text)
    assert pruned.text == "".join(text[start:stop] for start, stop in pruned.spans)
    assert all(stop <= start for (_, stop), (start, _) in zip(pruned.spans, pruned.spans[1:], strict=False))
    pruned.text.encode()
    if budget >= tokens:
        assert pruned.text == text
    if budget >= 4 and text.strip():
        assert pruned.text.strip()


def test_batch_equals_one_by_one(dac: DAC) -> None:
    texts, budgets = list(TEXTS.values()), [40] * len(TEXTS)
    assert dac.prune(texts, budgets) == [dac.prune([text], [40])[0] for text in texts]


def test_words_stay_whole(backbone: Backbone) -> None:
    pruned = DAC(backbone).prune([LATIN], [60])[0]
    words = set(LATIN.replace(".", " .").split())
    assert {word for word in pruned.text.replace(".", " . ").split()} <= words


def test_words_never_run_together(backbone: Backbone) -> None:
    text = "alpha-beta\ngamma/delta\n\nepsilon,zeta(eta)theta " * 5
    names = {"alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"}
    for budget in range(4, backbone.count(text), 9):
        pruned = DAC(backbone).prune([text], [budget])[0]
        spaced = "".join(letter if letter.isalpha() else " " for letter in pruned.text)
        assert set(spaced.split()) <= names, pruned.text


def test_digits_go_last_when_asked(backbone: Backbone) -> None:
    text = "Built in 1889, it is 330 m tall and drew 7 million people in 2015 who came to see it. " * 2
    kept = DAC(backbone, DACConfig(keep_digits=True)).prune([text], [backbone.count(text) // 2])[0]
    assert all(kept.text.count(number) == 2 for number in ("1889", "330", "7", "2015"))


def test_protected_spans_and_patterns_stay(backbone: Backbone) -> None:
    config = DACConfig(keep_patterns=(r"https?://\S+",))
    text = LATIN + "see https://example.org/a-b?c=1 for more. " + LATIN
    span = (LATIN.index("river"), LATIN.index("river") + len("river Tiber"))
    pruned = DAC(backbone, config).prune([text], [60], protected=[[span]])[0]
    assert "https://example.org/a-b?c=1" in pruned.text
    assert any(start <= span[0] and span[1] <= stop for start, stop in pruned.spans)
    assert pruned.tokens <= 60


def test_reference_schedule_may_keep_more_but_anchored_does_not(backbone: Backbone) -> None:
    tokens = backbone.count(LATIN)
    reference = DAC(backbone, DACConfig(schedule="reference", unit="token")).prune([LATIN], [tokens // 4])[0]
    anchored = DAC(backbone, DACConfig(unit="token")).prune([LATIN], [tokens // 4])[0]
    assert reference.tokens > tokens // 4 >= anchored.tokens


def test_settings_change_the_outcome(backbone: Backbone) -> None:
    def outcome(**changed: object) -> str:
        return DAC(backbone, dataclasses.replace(DACConfig(), **changed)).prune([LATIN], [70])[0].text

    default = outcome()
    for changed in (
        {"alpha": 0.0},
        {"fusion": "multiplicative"},
        {"stages": 7},
        {"correct_causal_bias": True},
    ):
        assert outcome(**changed) != default, changed


def test_random_texts_of_random_scripts_stay_within_budget(backbone: Backbone) -> None:
    letters = random.Random(0)
    alphabets = ["abc XYZ", "אבּגָ ד", "中文字 ", "é\u0301ñ ", "😀👍🏽\u200d🇫🇷 ", "\n\t .,-_", "0123 "]
    texts = [
        "".join(letters.choice(letters.choice(alphabets)) for _ in range(letters.randrange(120)))
        for _ in range(60)
    ]
    budgets = [letters.randrange(60) for _ in texts]
    for text, budget, pruned in zip(texts, budgets, DAC(backbone).prune(texts, budgets), strict=True):
        assert pruned.tokens <= budget
        assert pruned.text == "".join(text[start:stop] for start, stop in pruned.spans)


@pytest.mark.parametrize(
    "wrong",
    [{"alpha": 1.5}, {"schedule": "linear"}, {"stages": 0}, {"keep_patterns": ("(",)}, {"unit": "byte"}],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        DACConfig(**wrong)
