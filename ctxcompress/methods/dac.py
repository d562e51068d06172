"""DAC (arXiv 2507.11942): prune text by entropy and accumulated attention, in stages.

Text -> tokens -> units -> [signals of what is left -> drop the least worth] x D -> the kept character ranges
-> text. Where we leave the paper: whole words instead of tokens, several texts in one forward pass, exact
budgets, any length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import regex
import torch
from torch import Tensor

from ctxcompress.backbone import Backbone, Encoding
from ctxcompress.config import DACConfig
from ctxcompress.pruning import FREE, PREFERRED, PROTECTED, Pruning
from ctxcompress.types import Span
from ctxcompress.words import character_units, joined, tokens_within, word_units

Progress = Callable[[str, int, int], None]
"""Called with the name of the work, units done, and units in all."""

_DIGITS = regex.compile(r"\p{Nd}+")


@dataclass(frozen=True, slots=True)
class Pruned:
    """A pruned text: exactly the join of `spans` of its source, and its length in tokens."""

    text: str
    spans: tuple[Span, ...]
    tokens: int


class DAC:
    """Prunes texts to token budgets with one language model.

    Args:
        backbone: gives the signals and counts the tokens.
        config: the method's settings.
    """

    def __init__(self, backbone: Backbone, config: DACConfig | None = None) -> None:
        self._backbone = backbone
        self._config = config or DACConfig()

    def protected_spans(self, text: str, spans: Sequence[Span] = ()) -> tuple[Span, ...]:
        """Character ranges to keep: the caller's, and what the configured patterns match."""
        found = (
            match.span() for pattern in self._config.keep_patterns for match in regex.finditer(pattern, text)
        )
        return (*spans, *(span for span in found if span[0] < span[1]))

    def protected_tokens(self, text: str, spans: Sequence[Span] = ()) -> int:
        """Tokens that protecting `spans` costs at least: those of every unit they touch."""
        spans = self.protected_spans(text, spans)
        if not spans:
            return 0
        encoding = self._backbone.encode(text)
        units_T = self._units(text, encoding)
        kept_T = torch.isin(units_T, units_T[tokens_within(encoding.spans, spans)])
        kept = [span for span, keep in zip(encoding.spans, kept_T.tolist(), strict=True) if keep]
        return self._backbone.count(joined(text, kept)[0])

    def prune(
        self,
        texts: Sequence[str],
        budgets: Sequence[int],
        *,
        protected: Sequence[Sequence[Span]] | None = None,
        progress: Progress | None = None,
    ) -> list[Pruned]:
        """Shorten every text to its budget.

        Args:
            texts: any length, any script; a text within its budget comes back as it is.
            budgets: tokens each text may keep, >= 0. With schedule "reference", or without `strict`, the
                no-consecutive rule may leave more.
            protected: per text, character ranges that go last, after digits and everything else.
            progress: told after every stage.

        Returns:
            One result per text, in order.
        """
        jobs = [
            _Job(text, self._backbone.encode(text), budget, self.protected_spans(text, spans))
            for text, budget, spans in zip(texts, budgets, protected or [()] * len(texts), strict=True)
        ]
        prunings = {
            number: self._pruning(job)
            for number, job in enumerate(jobs)
            if len(job.encoding.ids) > job.budget
        }
        self._run({number: jobs[number] for number in prunings}, prunings, progress)
        return [self._finish(job, prunings.get(number)) for number, job in enumerate(jobs)]

    def _pruning(self, job: _Job) -> Pruning:
        tokens = len(job.encoding.ids)
        tier_T = torch.full((tokens,), FREE)
        if self._config.keep_digits:
            tier_T[
                tokens_within(job.encoding.spans, (match.span() for match in _DIGITS.finditer(job.text)))
            ] = PREFERRED
        tier_T[tokens_within(job.encoding.spans, job.protected)] = PROTECTED
        kept_fraction = max(job.budget - 1, 0) / max(tokens - 1, 1)
        return Pruning(self._units(job.text, job.encoding), kept_fraction, self._config, tier_T)

    def _units(self, text: str, encoding: Encoding) -> Tensor:
        return (
            word_units(text, encoding.spans)
            if self._config.unit == "word"
            else character_units(encoding.spans)
        )

    def _run(self, jobs: dict[int, _Job], prunings: dict[int, Pruning], progress: Progress | None) -> None:
        """All stages of all texts; stage j of every text is one batch of forward passes."""
        stages = 0
        # With room for a single token only the first unit or nothing can stay, whatever the model says.
        while running := [
            number for number in prunings if jobs[number].budget > 1 and not prunings[number].done
        ]:
            ids = {number: jobs[number].encoding.ids for number in running}
            alive = [
                [ids[number][token] for token in prunings[number].alive_A.tolist()] for number in running
            ]
            for number, signals in zip(running, self._backbone.token_signals(alive), strict=True):
                prunings[number].step(signals.nll_T, signals.attention_T)
            stages += 1
            if progress is not None:
                progress("pruning", stages, stages + max(prunings[number].stages_left for number in running))

    def _finish(self, job: _Job, pruning: Pruning | None) -> Pruned:
        if pruning is None:
            return Pruned(job.text, ((0, len(job.text)),) if job.text else (), len(job.encoding.ids))
        exact = self._config.strict and self._config.schedule == "anchored"
        if exact:
            pruning.enforce(job.budget)
        pruned = self._rebuilt(job, pruning)
        limit = job.budget
        # Joined pieces may tokenise into more tokens than they were; what is counted is the text that leaves.
        while exact and pruned.tokens > job.budget:
            limit = min(limit, len(pruning.alive_A)) - 1
            pruning.enforce(limit)
            pruned = self._rebuilt(job, pruning)
        return pruned if pruned.text or not job.budget else self._opening(job)

    def _rebuilt(self, job: _Job, pruning: Pruning) -> Pruned:
        text, spans = joined(job.text, [job.encoding.spans[token] for token in pruning.alive_A.tolist()])
        return Pruned(text, spans, self._backbone.count(text))

    def _opening(self, job: _Job) -> Pruned:
        """The longest beginning within the budget: if not even one word fits, a part beats nothing."""
        for tokens in range(job.budget, 0, -1):
            text, spans = joined(job.text, job.encoding.spans[:tokens])
            count = self._backbone.count(text)
            if count <= job.budget:
                return Pruned(text, spans, count)
        return Pruned("", (), 0)


@dataclass(frozen=True, slots=True)
class _Job:
    text: str
    encoding: Encoding
    budget: int
    protected: tuple[Span, ...]
