"""Runs of `evaluate` -> one page of tables and charts: who wins, where, and how sure that is.

A report is a folder: `runs/` has a copy of every run, `index.html` shows them all and needs nothing beside
it, and each chart is there again as a PNG.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from ctxcompress.evaluate.charts import STYLES, Chart, Line, Panel, Point, Section, Table, drawn, page
from ctxcompress.evaluate.metrics import bootstrap_interval
from ctxcompress.evaluate.runner import PLAIN_ROWS
from ctxcompress.evaluate.runs import (
    DEFAULT_ALPHA,
    Answered,
    RunRow,
    alpha_of,
    beside_defaults,
    kind_of,
    read_runs,
    titles_of,
)
from ctxcompress.files import write_atomically

NEAR_LOG2 = 0.25
"""How far, in log2 of the ratio, a point may lie outside a curve and still be held against its end."""

_Number = float | None


@dataclass(frozen=True, slots=True)
class _Difference:
    """Mean over questions of right minus right, and its interval."""

    mean: float
    low: float
    high: float
    n: int


def write_report(report: Path) -> Path:
    """Write the page and the charts of all runs in `report/runs`; equal runs give equal bytes.

    Returns:
        Path of `index.html`.

    Raises:
        InputError: no runs, or a file among them that is none.
        MissingExtraError: matplotlib is not installed.
    """
    runs = read_runs(report)
    titles = titles_of(runs)
    found: dict[object, RunRow] = {}
    for row in itertools.chain.from_iterable(run.rows for run in runs):
        # Every run answers `none` and `full` again, and `uniform` whatever DAST's settings: once will do.
        found.setdefault((row.group, row.name, row.asked), row)
    rows = sorted(found.values(), key=lambda row: (titles[row.group], row.group, *_order(row)))
    sections = [
        _all_rows(rows, titles),
        _accuracy_by_ratio(rows, titles),
        _gold_position(rows, titles),
        _alpha_sweep(rows, titles),
        _ablation(rows, titles),
        _gain_and_variance(rows, titles),
    ]
    for chart in (block for section in sections for block in section.blocks if isinstance(block, Chart)):
        write_atomically(report / f"{chart.name}.png", chart.png)
    index = report / "index.html"
    # An id may hold half a surrogate pair, which JSON can write and UTF-8 cannot.
    write_atomically(index, page(sections, runs, titles).encode("utf-8", "replace"))
    return index


def _order(row: RunRow) -> tuple[Any, ...]:
    """Plain rows first, then by mode, what was asked, and the places of allocator and label in `STYLES`."""
    known = {name: place for place, name in enumerate(STYLES)}
    allocator, label = (known.get(name, len(known)) for name in (row.allocator, row.label))
    plain = PLAIN_ROWS.index(row.allocator) if row.allocator in PLAIN_ROWS else len(PLAIN_ROWS)
    return plain, row.mode, row.asked, allocator, label, row.label


def _all_rows(rows: Sequence[RunRow], titles: Mapping[str, str]) -> Section:
    head = ("row", "asked", "n", "accuracy [95 %]", "normalised", "ratio", "tokens", "seconds")
    lines: list[Sequence[str]] = []
    for group, members in itertools.groupby(rows, key=lambda row: row.group):
        lines.append([titles[group]])
        lines += [
            (
                row.name,
                row.target,
                f"{row.n:,}",
                _percent(row.accuracy),
                "" if row.normalised is None else f"{row.normalised:.2f}",
                "" if row.ratio is None else f"{row.ratio:.2f}x",
                f"{row.tokens:,.0f}",
                f"{row.seconds:.2f}",
            )
            for row in members
        ]
    lede = (
        "Accuracy is the share of answers that hold a right answer; normalised, what a row keeps of the way "
        "from no documents (0) to all in full (1). Tokens and seconds are means per question. Rows that "
        "several runs share stand here once."
    )
    wanted = "Any finished run with at least one row would fill this section."
    return Section("All rows", lede, wanted, [("", Table(head, lines))] if rows else [])


def _accuracy_by_ratio(rows: Sequence[RunRow], titles: Mapping[str, str]) -> Section:
    charts = []
    for (group, mode), members in _grouped(rows, lambda row: (row.group, row.mode)):
        measured = [row for row in members if mode and row.ratio and not _off_default_alpha(row)]
        if measured:
            lines = [
                Line(label, [(row.ratio or 0.0, *row.accuracy) for row in of])
                for label, of in _grouped(measured, lambda row: row.label)
            ]
            levels = [(row.label, row.accuracy[0]) for row in rows if row.group == group and not row.mode]
            absent = [name for name in PLAIN_ROWS if name not in dict(levels)]
            title = f"{titles[group]}: {mode} rows"
            charts.append(
                Chart(
                    _file_name("accuracy", titles[group], mode, group),
                    title,
                    "Bars are 95 % intervals; points of about the same ratio are drawn side by side."
                    + (f" No run of this group has {' or '.join(absent)}." if absent else ""),
                    drawn(
                        title,
                        [Panel(lines, "achieved ratio", "accuracy", log2=True, levels=tuple(levels))],
                    ),
                )
            )
    lede = "Higher is better; further right is shorter. The numbers are in the table above."
    wanted = (
        "Runs with compressed rows would fill this section, for example --rows none,full,text:dast --ratio 4 "
        "and again at other ratios."
    )
    return Section("Accuracy against achieved ratio", lede, wanted, charts)


def _gold_position(rows: Sequence[RunRow], titles: Mapping[str, str]) -> Section:
    charts = []
    for (group, mode, _), members in _grouped(rows, lambda row: (row.group, row.mode, row.asked)):
        plain = [row for row in rows if row.group == group and not row.mode]
        shown = [
            row for row in [*members, *plain] if len(_positions(row)) > 1 and not _off_default_alpha(row)
        ]
        if mode and any(row.mode for row in shown):
            charts.append(_position_chart(shown, titles[group]))
    lede = (
        "Does a method find the document that holds the answer wherever it stands, and give it more than its "
        "even share? (Figure 2 of the DAST paper.)"
    )
    wanted = (
        "Runs on a task of several documents with the gold one at changing places would fill this section "
        "(records with gold_position)."
    )
    return Section("Position of the gold document", lede, wanted, charts)


def _position_chart(rows: Sequence[RunRow], title: str) -> Chart:
    first = next(row for row in rows if row.mode)
    title = ", ".join(filter(None, [f"{title}: {first.mode} rows", first.target]))
    right, tokens, cells = [], [], []
    for row in rows:
        by_position = _positions(row)
        means = [statistics.fmean(answer.right for answer in answers) for answers in by_position.values()]
        given = [
            statistics.fmean(answer.gold_tokens for answer in answers) for answers in by_position.values()
        ]
        places = [position + 1 for position in by_position]
        right.append(Line(row.label, [(x, y, None, None) for x, y in zip(places, means, strict=True)]))
        tokens.append(Line(row.label, [(x, y, None, None) for x, y in zip(places, given, strict=True)]))
        cells += [
            (row.name, str(x), str(len(answers)), f"{100 * y:.1f} %", f"{z:.1f}")
            for x, answers, y, z in zip(places, by_position.values(), means, given, strict=True)
        ]
    fewest = min(len(answers) for row in rows for answers in _positions(row).values())
    return Chart(
        _file_name("position", title, f"{first.mode}-{first.target}", first.group),
        title,
        # A bootstrap of a few equal answers has no width; the widest normal interval speaks for all points.
        f"At least {fewest:,} questions a position: chance alone moves a point by up to "
        f"{98 / math.sqrt(fewest):.0f} points to each side (95 %).",
        drawn(
            title,
            [
                Panel(right, "", "accuracy"),
                Panel(tokens, "position of the gold document", "tokens it got", percent=False),
            ],
        ),
        Table(("row", "position", "n", "accuracy", "gold tokens"), cells),
    )


def _positions(row: RunRow) -> dict[int, list[Answered]]:
    found: dict[int, list[Answered]] = {}
    for answer in row.answers.values():
        if answer.gold_position is not None:
            found.setdefault(answer.gold_position, []).append(answer)
    return dict(sorted(found.items()))


def _alpha_sweep(rows: Sequence[RunRow], titles: Mapping[str, str]) -> Section:
    charts = []
    swept = [row for row in rows if kind_of(row.dast)]
    for (group, mode), members in _grouped(swept, lambda row: (row.group, row.mode)):
        lines, cells = [], []
        for label, sweep in _grouped(members, _without_alpha):
            ordered = sorted(sweep, key=lambda row: alpha_of(row.dast))
            if len(ordered) > 1:
                lines.append(Line(label, [(alpha_of(row.dast), *row.accuracy) for row in ordered]))
                cells += [
                    (label, f"{alpha_of(row.dast):g}", f"{row.n:,}", _percent(row.accuracy))
                    for row in ordered
                ]
        if lines:
            title = f"{titles[group]}: {mode} rows"
            charts.append(
                Chart(
                    _file_name("alpha", titles[group], mode, group),
                    title,
                    "Bars are 95 % intervals, drawn side by side.",
                    drawn(title, [Panel(lines, "alpha (0: NLL alone, 1: attention alone)", "accuracy")]),
                    Table(("row", "alpha", "n", "accuracy [95 %]"), cells),
                )
            )
    lede = "Weight of attention against NLL in the scaled and paper modes. (Figure 3 of the DAST paper.)"
    wanted = (
        "Runs of a dast row in mode scaled or paper at two values of alpha or more would fill this section."
    )
    return Section("Alpha", lede, wanted, charts)


def _without_alpha(row: RunRow) -> str:
    """What tells a row of a sweep from rows of other sweeps."""
    rest = [said for said in beside_defaults(row.dast) if not said.startswith("alpha ")]
    return ", ".join([" ".join([row.allocator, *kind_of(row.dast)]), *rest, *filter(None, [row.target])])


def _off_default_alpha(row: RunRow) -> bool:
    """Whether a row is a point of the sweep, which elsewhere would only crowd the charts."""
    return bool(kind_of(row.dast)) and alpha_of(row.dast) != DEFAULT_ALPHA


def _ablation(rows: Sequence[RunRow], titles: Mapping[str, str]) -> Section:
    tables = []
    for (group, mode, _), members in _grouped(rows, lambda row: (row.group, row.mode, row.asked)):
        compared = [
            row
            for row in members
            if row.allocator in ("uniform", "random")
            or (row.allocator == "dast" and (not _off_default_alpha(row) or alpha_of(row.dast) in (0, 1)))
        ]
        references = [row for row in compared if row.label in ("dast", "dast scaled")]
        if references and len(compared) > 1:
            head = (
                "allocation",
                "n",
                "accuracy [95 %]",
                "ratio",
                *(f"minus {row.label}" for row in references),
            )
            title = ", ".join(filter(None, [f"{titles[group]}: {mode} rows", members[0].target]))
            tables.append((title, Table(head, [_ablated(row, references) for row in compared])))
    lede = (
        "The same questions at the same ratio; differences are in points, with 95 % bootstrap intervals over "
        "questions in pairs; an asterisk marks an interval that leaves out 0. (Table 3 of the DAST paper.)"
    )
    wanted = (
        "Runs of dast beside uniform or random, or of dast in another mode or at alpha 0 and 1, at one ratio "
        "would fill this section."
    )
    return Section("Ablation", lede, wanted, tables)


def _ablated(row: RunRow, references: Sequence[RunRow]) -> list[str]:
    without = {0.0: " (without attention)", 1.0: " (without NLL)"}.get(alpha_of(row.dast), "")
    return [
        row.label + (without if kind_of(row.dast) else ""),
        f"{row.n:,}",
        _percent(row.accuracy),
        "" if row.ratio is None else f"{row.ratio:.2f}x",
        *("" if row is reference else _points(_paired(row, reference)) for reference in references),
    ]


def _gain_and_variance(rows: Sequence[RunRow], titles: Mapping[str, str]) -> Section:
    charts = []
    for group, members in _grouped(rows, lambda row: row.group):
        soft = [row for row in members if row.mode == "soft" and row.ratio]
        uniforms = [row for row in soft if row.allocator == "uniform"]
        dynamic = sorted(
            (row for row in soft if row.allocator == "semi_dynamic"), key=lambda row: row.ratio or 0.0
        )
        if any(_gain(row, uniforms) for row in dynamic):
            charts.append(_gain_chart(dynamic, uniforms, titles[group]))
    lede = (
        "Choosing each chunk's ratio can only gain where choices differ: the gain over one ratio for all, "
        "and the variance of log2 of the chosen ratios. (Figure 5 of the semi-dynamic paper.)"
    )
    wanted = (
        "Runs of soft:semi_dynamic beside soft:uniform with about the same achieved ratios would fill this "
        "section."
    )
    return Section("Gain against variance", lede, wanted, charts)


def _gain_chart(dynamic: Sequence[RunRow], uniforms: Sequence[RunRow], title: str) -> Chart:
    gains: list[Point] = []
    variances: list[Point] = []
    cells = []
    for row in dynamic:
        ratio, gain, variance = row.ratio or 0.0, _gain(row, uniforms), _variance(row)
        gains += [] if gain is None else [(ratio, gain.mean, gain.low, gain.high)]
        variances += [] if variance is None else [(ratio, variance, None, None)]
        spread = "" if variance is None else f"{variance:.2f}"
        cells.append((row.target, f"{ratio:.2f}x", _percent(row.accuracy), _points(gain), spread))
    panels = [
        Panel([Line("semi_dynamic", gains)], "", "gain, points", log2=True, levels=(("", 0.0),), signed=True),
        Panel([Line("semi_dynamic", variances)], "achieved ratio", "variance", percent=False, log2=True),
    ]
    return Chart(
        _file_name("gain", title, "soft", dynamic[0].group),
        title,
        "Gain over soft:uniform at the same achieved ratio, interpolated in log2 of the ratio, in pairs of "
        "questions with 95 % intervals; no gain is said where no uniform row is near.",
        drawn(title, panels if variances else panels[:1]),
        Table(("asked", "ratio", "accuracy [95 %]", "gain, points", "variance of log2 ratio"), cells),
    )


# ---- numbers


def _paired(row: RunRow, reference: RunRow) -> _Difference | None:
    """Mean of right(row) - right(reference) over the questions of both; None if they share none."""
    return _interpolated(row, reference, reference, 0.0)


def _gain(row: RunRow, curve: Sequence[RunRow]) -> _Difference | None:
    """Difference to `curve` at the row's achieved ratio, by questions; None if the curve is not near."""
    if not curve or not row.ratio:
        return None
    where = math.log2(row.ratio)
    places = sorted(((math.log2(point.ratio), point) for point in curve if point.ratio), key=lambda at: at[0])
    below = max((at for at in places if at[0] <= where), key=lambda at: at[0], default=places[0])
    above = min((at for at in places if at[0] >= where), key=lambda at: at[0], default=places[-1])
    if below is above and abs(where - below[0]) > NEAR_LOG2:
        return None
    weight = (where - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
    return _interpolated(row, below[1], above[1], weight)


def _interpolated(row: RunRow, below: RunRow, above: RunRow, weight: float) -> _Difference | None:
    questions = sorted(row.answers.keys() & below.answers.keys() & above.answers.keys())
    if not questions:
        return None
    differences = [
        row.answers[question].right
        - (1 - weight) * below.answers[question].right
        - weight * above.answers[question].right
        for question in questions
    ]
    return _Difference(
        statistics.fmean(differences), *bootstrap_interval(differences, row.seed), len(differences)
    )


def _variance(row: RunRow) -> _Number:
    """Population variance of log2 of the chunks' ratios; dropped chunks (0) have none."""
    chosen = [math.log2(ratio) for answer in row.answers.values() for ratio in answer.ratios if ratio > 0]
    return statistics.pvariance(chosen) if chosen else None


def _grouped(rows: Iterable[RunRow], key: Callable[[RunRow], Any]) -> list[tuple[Any, list[RunRow]]]:
    """Rows by key, keys in the order of their first rows."""
    groups: dict[Any, list[RunRow]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def _percent(accuracy: tuple[float, float, float]) -> str:
    mean, low, high = (100 * value for value in accuracy)
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def _points(difference: _Difference | None) -> str:
    if difference is None:
        return ""
    mean, low, high = (100 * value for value in (difference.mean, difference.low, difference.high))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" + (" *" if low > 0 or high < 0 else "")


def _file_name(kind: str, title: str, mode: str, group: str) -> str:
    """Stable while runs come and go, and never a path."""
    task = regex.sub(r"[^A-Za-z0-9]+", "-", title.split(".")[0])[:40].strip("-")
    return str(regex.sub(r"[^A-Za-z0-9.+]+", "-", f"{kind}-{task}-{mode}-{group}"))
