"""Every equation of the three papers once more, in plain Python: numbers, lists and loops, nothing clever.

Read it to learn the methods; the tests hold the fast versions against it. It imports nothing of the package
and trusts its input: the fast versions do the checking.

DAST (arXiv 2502.11493) shares a budget of tokens among N documents. It asks a language model two things of
each: how surprising is it (local, eq. 3), and how much does the question look at it (global, eq. 4)? Both
make a score, a softmax makes shares (eq. 5), and Algorithm 1 turns shares into whole numbers of tokens.

DAC (arXiv 2507.11942) shortens one text. It asks of each token how surprising it is and how much attention it
collects, weighs both, drops the least worth, and asks again in the next stage, because what is left reads
differently. Within one stage it never drops two neighbours: with the first gone, the second is news.

Semi-dynamic compression (arXiv 2603.25926) replaces a text by fewer vectors. The means of neighbouring states
go through a small network into the decoder's embedding space; how many tokens share a mean is predicted from
the text and then rounded to one of a few ratios, because a model copes with few structures, not with all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Vector = Sequence[float]
Span = tuple[int, int]
Scorer = Callable[[list[int]], tuple[Vector, Vector]]
"""The language model's part in DAC: tokens that are left -> NLL and accumulated attention of each."""

# ---------------------------------------------------------------------------------------------- attention


def softmax(scores: Vector) -> list[float]:
    """Positive numbers that sum to 1 and keep the order: exp(x_i) / sum_j exp(x_j).

    Example:
        >>> softmax([0.0, math.log(3)])
        [0.25, 0.75]
    """
    highest = max(scores)  # taken off first, or exp overflows; it cancels in the quotient
    powers = [math.exp(score - highest) for score in scores]
    return [power / sum(powers) for power in powers]


def attend(query: Vector, keys: Sequence[Vector]) -> list[float]:
    """How one query spreads its attention over the keys it sees: softmax(q k / sqrt d).

    Example:
        >>> attend([2.0, 0.0, 0.0, 0.0], [[0.0, 0, 0, 0], [math.log(3), 0, 0, 0]])
        [0.25, 0.75]
    """
    scale = math.sqrt(len(query))
    return softmax([sum(q * k for q, k in zip(query, key, strict=True)) / scale for key in keys])


def causal_attention(
    queries: Sequence[Vector], keys: Sequence[Vector], values: Sequence[Vector]
) -> tuple[list[list[float]], list[float]]:
    """One head of a decoder: token t attends to tokens 0..t.

    Returns:
        The head's output for each token, and DAC's s: the attention each token receives from all queries.
    """
    outputs = []
    received = [0.0] * len(keys)
    for t, query in enumerate(queries):
        weights = attend(query, keys[: t + 1])
        seen = list(zip(weights, values, strict=False))
        outputs.append([sum(weight * value[d] for weight, value in seen) for d in range(len(values[0]))])
        for key, weight in enumerate(weights):
            received[key] += weight
    return outputs, received


# --------------------------------------------------------------------------------------- documents (DAST)


def mean_nll(nll: Vector, segments: Sequence[Span]) -> list[float]:
    """P, the local importance of each segment: the mean of -ln p over its tokens.

    DAST eq. 3. Printed: the sum of -ln p, called perplexity. Over chunks of one length L it is L times this,
    and eq. 5 divides L away; over chunks of different lengths only the mean is fair.

    Example:
        >>> mean_nll([1.0, 2.0, 6.0], [(0, 2), (2, 3)])
        [1.5, 6.0]
    """
    return [sum(nll[start:stop]) / (stop - start) for start, stop in segments]


def segment_mass(query: Vector, keys: Sequence[Vector], segments: Sequence[Span]) -> list[float]:
    """Attention that one query pays to each document in one head.

    DAST eq. 4. Printed: q k summed over j = i..(i+1)m, which overlaps the neighbours. Read: the softmax of
    q k summed over the document's own m keys, j = im..(i+1)m-1.
    """
    weights = attend(query, keys)
    return [sum(weights[start:stop]) for start, stop in segments]


def attention_mass(mass_per_head: Sequence[Vector]) -> list[float]:
    """A, the global importance of each document: its mean mass over heads, as a share of all documents' mass.

    DAST eq. 4. Equal shares if no head looks at any document.

    Example:
        >>> attention_mass([[0.5, 0.25], [0.25, 0.0]])
        [0.75, 0.25]
    """
    mass = [sum(heads) / len(mass_per_head) for heads in zip(*mass_per_head, strict=True)]
    total = sum(mass)
    return [one / total if total > 0 else 1 / len(mass) for one in mass]


def importance(
    attention: Vector, nll: Vector, *, alpha: float = 0.5, ppl_sign: int = -1, nll_scale: str = "sum"
) -> list[float]:
    """S = alpha * A - (1 - alpha) * P / sum(P), the score of each document.

    DAST eq. 5. The minus is as printed and favours predictable documents (`ppl_sign=-1`). The text says P is
    "scaled by N", which may mean N * P / sum(P), P over its mean (`nll_scale="mean"`).

    Example:
        >>> importance([0.75, 0.25], [1.0, 3.0])
        [0.25, -0.25]
    """
    scale = sum(nll) / (len(nll) if nll_scale == "mean" else 1)
    local = [one / scale if scale > 0 else 0.0 for one in nll]
    return [alpha * a + ppl_sign * (1 - alpha) * p for a, p in zip(attention, local, strict=True)]


def shares(scores: Vector, temperature: float = 1.0) -> list[float]:
    """The part of the budget each document deserves: d_i / M = softmax(S / temperature)_i.

    DAST eq. 5, printed without a temperature. Scores then differ by about 1/N, the softmax is nearly flat,
    and Algorithm 1 gives all documents one size; temperature 1/N is the least change that lets them differ.

    Example:
        >>> shares([0.0, math.log(3) / 2], temperature=1 / 2)
        [0.25, 0.75]
    """
    return softmax([score / temperature for score in scores])


def attention_evidence(
    question: Sequence[Vector], baseline: Sequence[Vector], heads: Sequence[int]
) -> list[float]:
    """How much more the question looks at each document than a question without content does.

    Ours: eq. 4 at the chosen heads under the question, minus the same under "N/A".

    Args:
        question: per head, the mass on each document under the question.
        baseline: the same under the question without content.
        heads: the heads to read.
    """
    asked, idle = (attention_mass([mass[head] for head in heads]) for mass in (question, baseline))
    return [a - i for a, i in zip(asked, idle, strict=True)]


def standardised(values: Vector) -> list[float]:
    """Values in standard deviations from their mean; zeros if all are equal.

    Example:
        >>> standardised([1.0, 3.0])
        [-1.0, 1.0]
    """
    mean = sum(values) / max(len(values), 1)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values), 1))
    return [(value - mean) / deviation if deviation > 1e-12 else 0.0 for value in values]


# --------------------------------------------------------------------------- whole numbers of tokens (DAST)


def poured(shares: Vector, level: float, low: Sequence[int], high: Sequence[int]) -> list[float]:
    """Every glass filled to level * share, but no lower than its `low` and no higher than its `high`."""
    glasses = zip(shares, low, high, strict=True)
    return [float(min(max(level * share, least), most)) for share, least, most in glasses]


def filled(shares: Vector, budget: int, low: Sequence[int], high: Sequence[int]) -> list[float]:
    """Real amounts in proportion to `shares`, between `low` and `high`, that sum to `budget` (water filling).

    The total grows with the level in straight pieces. It bends where a glass leaves its `low` or meets its
    `high`: walk from bend to bend until the total passes the budget, and draw the line between the two.

    Example:
        >>> filled([0.6, 0.2, 0.2], 10, [0, 0, 0], [4, 9, 9])
        [4.0, 3.0, 3.0]
    """
    most = [cap if share > 0 else least for share, least, cap in zip(shares, low, high, strict=True)]
    if sum(most) < budget:  # all that deserve something are full: what is left goes to the rest, evenly
        low, shares = most, [1.0] * len(shares)
    glasses = zip(shares, low, high, strict=True)
    bends = {bound / share for share, *both in glasses if share > 0 for bound in both}
    for below, above in pairwise(sorted({0.0, *bends})):
        before, after = (sum(poured(shares, level, low, high)) for level in (below, above))
        if before < budget <= after + 1e-9:  # the last may miss by a bit of a float
            level = below + (above - below) * (budget - before) / (after - before)
            return poured(shares, level, low, high)
    return poured(shares, 0.0, low, high)


def largest_remainder(
    shares: Vector, budget: int, minimum: Sequence[int] | None = None, capacity: Sequence[int] | None = None
) -> list[int]:
    """Whole numbers in proportion to `shares`, between `minimum` and `capacity`, that sum to `budget`.

    Round every real amount down, then give one more to those that lost most by it; of equal losses to the
    higher share, then to the earlier. DAST only says d_i = M * share_i; rounding each alone may miss M.

    Example:
        >>> largest_remainder([0.5, 0.3, 0.2], 7)  # 3.5 2.1 1.4 -> 3 2 1, and the 7th to who lost 0.5
        [4, 2, 1]
    """
    low = minimum or [0] * len(shares)
    high = capacity or [budget] * len(shares)
    budget = min(budget, sum(high))
    amounts = filled(shares, budget, low, high)
    counts = [math.floor(amount + 1e-9) for amount in amounts]  # 2.9999999999999996 means 3
    lost = [round(amount - count, 9) for amount, count in zip(amounts, counts, strict=True)]
    order = sorted(range(len(shares)), key=lambda document: (-lost[document], -shares[document], document))
    for document in order[: budget - sum(counts)]:
        counts[document] += 1
    return counts


def reallocate(shares: Vector, budget: int, sizes: Sequence[int]) -> tuple[list[int], int]:
    """A legal size for every document, and what is left of the budget.

    DAST Algorithm 1. As printed it always finds 0 left, has no case for a total above the budget, and never
    ends when nothing fits. Read:

    1. Every document takes the legal size nearest to share * budget; of two the smaller.
    2. While the total is too large, the lowest-scored document above the smallest size, of equals the last,
       takes the next smaller size.
    3. Every document, best first, takes the next larger size if it fits; again, until nobody can.

    Example:
        >>> reallocate([0.4, 0.3, 0.2, 0.1], 46, [2, 4, 8, 16, 32])  # any step up costs 4 or more; 2 are left
        ([16, 16, 8, 4], 2)
    """
    legal = sorted(sizes)
    documents = range(len(shares))
    counts = [min(legal, key=lambda size: abs(size - share * budget)) for share in shares]

    while sum(counts) > budget:
        lowest = min((d for d in documents if counts[d] > legal[0]), key=lambda d: (shares[d], -d))
        counts[lowest] = max(size for size in legal if size < counts[lowest])

    changed = True
    while changed:
        changed = False
        for document in sorted(documents, key=lambda d: (-shares[d], d)):
            larger = [size for size in legal if size > counts[document]]
            if larger and larger[0] - counts[document] <= budget - sum(counts):
                counts[document] = larger[0]
                changed = True
    return counts, budget - sum(counts)


# -------------------------------------------------------------------------------------------- tokens (DAC)


def minmax(values: Vector) -> list[float]:
    """(x - min) / (max - min): in [0, 1], so that nats and attention can be added; zeros if all are equal.

    Example:
        >>> minmax([2.0, 4.0, 3.0])
        [0.0, 1.0, 0.5]
    """
    low, high = min(values, default=0.0), max(values, default=0.0)
    return [(value - low) / (high - low) if high - low > 1e-8 else 0.0 for value in values]


def fused(nll: Vector, attention: Vector, *, alpha: float = 0.8, fusion: str = "additive") -> list[float]:
    """M, the worth of each token: (1 - alpha) * minmax(I) + alpha * minmax(s); "multiplicative": I * s."""
    if fusion == "multiplicative":
        return [information * s for information, s in zip(nll, attention, strict=True)]
    both = zip(minmax(nll), minmax(attention), strict=True)
    return [(1 - alpha) * information + alpha * s for information, s in both]


def per_visible_query(attention: Vector) -> list[float]:
    """Accumulated attention over the number of queries that see the token: n see the first, 1 the last.

    Example:
        >>> per_visible_query([6.0, 3.0, 2.0])
        [2.0, 1.5, 2.0]
    """
    return [received / (len(attention) - place) for place, received in enumerate(attention)]


def stage_count(tokens: int) -> int:
    """D: one stage per 100 tokens, at least 1, at most 15."""
    return min(max(1, tokens // 100), 15)


@dataclass(frozen=True)
class Plan:
    """Settings of a DAC run, named as in `DACConfig`; `stages=None` takes `stage_count`."""

    alpha: float = 0.8
    fusion: str = "additive"
    schedule: str = "anchored"
    stages: int | None = None
    no_consecutive: bool = True
    strict: bool = True


def stage_target(left: int, original: int, kept_fraction: float, stage: int, plan: Plan) -> int:
    """Tokens that stage number `stage` (from 1) should leave of the `left` it finds.

    Every stage keeps tau^(1/D), so that all D keep tau of the tokens after the first. "reference", the
    authors' code: of what is left. "anchored", ours: tau^(stage/D) of the original, so that a stage makes up
    what the one before fell short of.
    """
    stages = plan.stages or stage_count(original)
    if plan.schedule == "reference":
        loss = 1 - math.pow(kept_fraction, 1 / stages)
        return 1 + max(1, int((left - 1) * (1 - loss)))  # 1 - loss, not the power: truncates as theirs does
    return 1 + max(1, math.floor((original - 1) * math.pow(kept_fraction, stage / stages) + 1e-9))


def cheapest(worth: Vector, remove: int) -> list[int]:
    """Positions of the `remove` lowest worths, in order, never position 0; of equals the later goes first.

    Example:
        >>> cheapest([0.0, 0.5, 0.2, 0.5], 2)
        [2, 3]
    """
    places = sorted(range(1, len(worth)), key=lambda place: (worth[place], -place))
    return sorted(places[: max(remove, 0)])


def without_neighbours(removed: Sequence[int]) -> list[int]:
    """DAC's rule: from left to right, a token stays if the token just before it goes.

    Example:
        >>> without_neighbours([2, 3, 4, 5, 8])
        [2, 4, 8]
    """
    gone: list[int] = []
    for place in removed:
        if not gone or gone[-1] != place - 1:
            gone.append(place)
    return gone


def prune(tokens: Sequence[int], kept_fraction: float, scorer: Scorer, plan: Plan) -> list[list[int]]:
    """A whole DAC run: the tokens that are left after each stage, and after the final pass if one is needed.

    The first token always stays: nothing predicts it, and every later one leans on it. The rule may leave
    more than the target; "anchored" with `strict` ends with a pass without it, on the worths of the last
    stage, that leaves exactly 1 + floor((n - 1) * tau).

    Args:
        tokens: the text.
        kept_fraction: tau in [0, 1]; the fraction of the tokens after the first to keep.
        scorer: called once per stage with what is left; its values at position 0 are not used.
        plan: the settings.

    Example:
        >>> prune([7, 8, 9], 0.5, lambda left: ([0, 1, 3], [0, 5, 5]), Plan())
        [[7, 9]]
    """
    left, worth, history = list(tokens), [0.0] * len(tokens), []
    anchored = plan.schedule == "anchored"
    limit = 1 + math.floor((len(tokens) - 1) * kept_fraction + 1e-9)
    for stage in range(1, 1 + (plan.stages or stage_count(len(tokens)))):
        if len(left) < 2 or (anchored and len(left) <= limit):
            break
        nll, attention = scorer(left)
        worth = [0.0, *fused(nll[1:], attention[1:], alpha=plan.alpha, fusion=plan.fusion)]
        gone = cheapest(worth, len(left) - stage_target(len(left), len(tokens), kept_fraction, stage, plan))
        if plan.no_consecutive:
            gone = without_neighbours(gone)
        left = [token for place, token in enumerate(left) if place not in gone]
        worth = [value for place, value in enumerate(worth) if place not in gone]
        history.append(left)
    if anchored and plan.strict and len(left) > limit:
        gone = cheapest(worth, len(left) - limit)
        history.append([token for place, token in enumerate(left) if place not in gone])
    return history


# ------------------------------------------------------------------------------ soft tokens (semi-dynamic)


def windows(tokens: int, ratio: int) -> int:
    """Soft tokens of a text: one for every window that is full, one more for a window that is not.

    Example:
        >>> windows(8, 4), windows(9, 4)
        (2, 3)
    """
    return tokens // ratio + (1 if tokens % ratio else 0)


def spans_of(items: int, size: int, alignment: str = "start") -> list[Span]:
    """Neighbouring ranges of `size` items; "start" cuts from the first item on, "end" from the last one back.

    Example:
        >>> spans_of(5, 2), spans_of(5, 2, "end")
        ([(0, 2), (2, 4), (4, 5)], [(0, 1), (1, 3), (3, 5)])
    """
    short = items % size if alignment == "end" else 0
    cuts = [0] if short == 0 else [0, short]
    while cuts[-1] < items:
        cuts.append(min(cuts[-1] + size, items))
    return list(pairwise(cuts))


def window_means(states: Sequence[Vector], ratio: int, alignment: str = "start") -> list[list[float]]:
    """The mean state of every `ratio` neighbouring tokens; a short window is the mean of what it has.

    The authors pad the short window with zeros in training and not in inference, and cut from opposite ends;
    here both alignments have the true mean.

    Example:
        >>> window_means([[1.0], [3.0], [8.0]], 2), window_means([[1.0], [3.0], [8.0]], 2, "end")
        ([[2.0], [8.0]], [[1.0], [5.5]])
    """
    means = []
    for start, stop in spans_of(len(states), ratio, alignment):
        own = states[start:stop]
        means.append([sum(column) / len(own) for column in zip(*own, strict=True)])
    return means


def pool(
    means: Sequence[Vector], counts: Vector, factor: int, alignment: str = "start"
) -> tuple[list[list[float]], list[float]]:
    """Means of `factor` neighbouring windows, from the means and the numbers of tokens behind them.

    Every mean is turned back into the sum it came from; sums can be added.

    Example:
        >>> pool([[2.0], [8.0]], [2, 1], 2)  # (2 * 2 + 1 * 8) / 3
        ([[4.0]], [3])
    """
    pooled, behind = [], []
    for start, stop in spans_of(len(means), factor, alignment):
        tokens = sum(counts[start:stop])
        sums = [0.0] * len(means[0])
        for mean, count in zip(means[start:stop], counts[start:stop], strict=True):
            sums = [total + count * value for total, value in zip(sums, mean, strict=True)]
        pooled.append([total / max(tokens, 1) for total in sums])
        behind.append(tokens)
    return pooled, behind


def nearest(wish: float, legal: Sequence[int], space: str = "log") -> list[int]:
    """The legal values at the least distance from a wish, smallest first; two if the wish lies midway.

    Semi-dynamic compression, eqs. 3-4. "log" compares logarithms, so that 2 is as far from 4 as 4 from 8;
    "linear" compares the values, as the authors' code does.

    Example:
        >>> nearest(6.0, [2, 4, 8], "linear"), nearest(6.0, [2, 4, 8])  # 6 / 4 = 1.5 is more than 8 / 6
        ([4, 8], [8])
    """

    def distance(value: int) -> float:
        exact = math.log2(value) - math.log2(wish) if space == "log" else value - wish
        return round(abs(exact), 12)  # midway is midway, whatever the last bit of a logarithm says

    closest = min(distance(value) for value in legal)
    return [value for value in sorted(legal) if distance(value) == closest]


def select_ratio(
    log2_ratio: float, ratio_set: Sequence[int], *, ratio_scale: float = 0.0, space: str = "log"
) -> int:
    """The legal ratio nearest to 2^(prediction + dial); of two the smaller, which keeps more.

    Semi-dynamic compression, eqs. 1-4.

    Example:
        >>> select_ratio(2.5, [2, 4, 8, 16, 32]), select_ratio(2.5, [2, 4, 8, 16, 32], ratio_scale=1)
        (4, 8)
    """
    return nearest(2.0 ** (log2_ratio + ratio_scale), ratio_set, space)[0]


def select_length(
    log2_ratio: float,
    tokens: int,
    length_set: Sequence[int],
    *,
    ratio_scale: float = 0.0,
    space: str = "log",
) -> int:
    """The legal number of soft tokens nearest to tokens / 2^(prediction + dial); of two the larger.

    Semi-dynamic compression, eq. 5. Ours: lengths beyond the text's own are left out while others remain.

    Example:
        >>> select_length(3.0, 500, [16, 32, 64, 128])  # 500 / 8 = 62.5
        64
    """
    fitting = [length for length in length_set if length <= tokens] or [min(length_set)]
    return nearest(tokens / 2.0 ** (log2_ratio + ratio_scale), fitting, space)[-1]


def rms_norm(vector: Vector, weight: Vector) -> list[float]:
    """The vector at root mean square 1, then scaled number by number.

    Example:
        >>> [round(value, 3) for value in rms_norm([3.0, -4.0], [5.0, 5.0])]  # the rms is 5 / sqrt 2
        [4.243, -5.657]
    """
    size = math.sqrt(sum(value * value for value in vector) / len(vector) + 1e-6)
    return [value / size * scale for value, scale in zip(vector, weight, strict=True)]


def gelu(value: float) -> float:
    """The value times the chance that a standard normal number lies below it; exact, not the tanh form."""
    return value * (1 + math.erf(value / math.sqrt(2))) / 2


def linear(weight: Sequence[Vector], vector: Vector) -> list[float]:
    """One sum of products per row of the weight; no bias.

    Example:
        >>> linear([[1.0, 2.0], [0.0, -1.0]], [3.0, 4.0])
        [11.0, -4.0]
    """
    return [sum(w * value for w, value in zip(row, vector, strict=True)) for row in weight]


@dataclass(frozen=True)
class ConverterWeights:
    """`norm` (hidden), `up` (inner rows of hidden), `down` (embedding rows of inner), and the one `scale`."""

    norm: Vector
    up: Sequence[Vector]
    down: Sequence[Vector]
    scale: float


def convert(
    state: Vector, weights: ConverterWeights, embedding: Vector | None = None, count: float = 1
) -> list[float]:
    """A window's mean state -> a soft token: scale * down(gelu(up(norm(state)))).

    Ours: the mean of the window's word embeddings is added, times sqrt(count): the mean of n independent
    vectors is shorter than one of them by that factor, and the decoder expects the length of one.

    Args:
        state: mean encoder state of a window.
        weights: of the converter.
        embedding: mean input embedding of the window; None leaves it out.
        count: tokens in the window.
    """
    inner = [gelu(value) for value in linear(weights.up, rms_norm(state, weights.norm))]
    learned = [weights.scale * value for value in linear(weights.down, inner)]
    if embedding is None:
        return learned
    return [soft + word * math.sqrt(count) for soft, word in zip(learned, embedding, strict=True)]


def fitted_scale(
    log2_ratios: Sequence[float], tokens: Sequence[int], ratio_set: Sequence[int], budget: int
) -> list[int]:
    """Ratios at the gentlest dial that fits: every point where a choice changes is tried, from the left.

    Example:
        >>> fitted_scale([1.0, 3.0], [64, 64], [2, 4, 8, 16, 32], 20)
        [4, 16]
    """
    ratios = sorted(ratio_set)
    halfway = [(math.log2(low) + math.log2(high)) / 2 for low, high in pairwise(ratios)]
    steps = sorted({half - log2_ratio for half in halfway for log2_ratio in log2_ratios})
    dials = [steps[0] - 1, *((low + high) / 2 for low, high in pairwise(steps))]
    for dial in [*dials, steps[-1] + 1]:
        chosen = [select_ratio(log2_ratio, ratio_set, ratio_scale=dial) for log2_ratio in log2_ratios]
        if sum(math.ceil(count / ratio) for count, ratio in zip(tokens, chosen, strict=True)) <= budget:
            return chosen
    raise ValueError("even the largest ratio exceeds the budget")


def splice(segments: Sequence[Sequence[int | Vector]], table: Sequence[Vector]) -> list[list[float]]:
    """Rows of a prompt: a token id is looked up in the embedding table, a soft token is its own row.

    Example:
        >>> splice([[1], [[0.5, 0.5]], [0]], [[1.0, 0.0], [0.0, 1.0]])
        [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    """
    return [list(table[part] if isinstance(part, int) else part) for segment in segments for part in segment]
