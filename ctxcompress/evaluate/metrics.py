"""How right an answer is, and how sure a mean."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
import regex

BOOTSTRAP_SAMPLES = 2000
_ARTICLES = regex.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case without punctuation, articles and extra space (SQuAD's rule).

    Example:
        >>> normalised("The  Eiffel Tower!")
        'eiffel tower'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def contains_answer(prediction: str, answers: Sequence[str]) -> bool:
    """Whether a normalised answer is part of the normalised prediction.

    Example:
        >>> contains_answer("It was in March, 1974.", ["March 1974"])
        True
    """
    said = normalised(prediction)
    return any(wanted in said for wanted in map(normalised, answers) if wanted)


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the normalised prediction is a normalised answer."""
    return normalised(prediction) in {normalised(answer) for answer in answers}


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best harmonic mean of word precision and recall over the answers, in [0, 1].

    Example:
        >>> f1("in March 1974", ["March 1974"])  # precision 2/3, recall 1
        0.8
    """
    return max(
        (_f1(normalised(prediction).split(), normalised(answer).split()) for answer in answers), default=0.0
    )


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def bootstrap_interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; (nan, nan) without values."""
    if not values:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    drawn = generator.choice(np.asarray(values, dtype=np.float64), size=(BOOTSTRAP_SAMPLES, len(values)))
    low, high = np.percentile(drawn.mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
