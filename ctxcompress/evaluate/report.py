"""Runs of `evaluate` -> one page of tables and charts: who wins, where, and how sure that is.

A report is a folder: `runs/` has a copy of every run, `index.html` shows them all and needs nothing beside
it, and each chart is there again as a PNG. Runs are compared only if they agree in everything but what is
swept on purpose (rows, ratio or budget, DAST's settings, the ratio scale); runs that agree so are a group.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from ctxcompress.config import DASTConfig, to_dict
from ctxcompress.errors import InputError, MissingExtraError
from ctxcompress.evaluate.metrics import bootstrap_interval
from ctxcompress.evaluate.runner import PLAIN_ROWS, EvaluationConfig, Record
from ctxcompress.files import read_text, write_atomically

NEAR_LOG2 = 0.25
"""How far, in log2 of the ratio, a point may lie outside a curve and still be held against its end."""

_DEFAULT_ALPHA = 0.5
_SWEPT = regex.compile(r"rows|ratio|budget|ratio_scale|settings\.dast(\..*)?")
_OPTIONS: tuple[tuple[str, str, object], ...] = (
    ("ratio", "--ratio", None),
    ("budget", "--budget", None),
    ("ratio_scale", "--ratio-scale", None),
    ("limit", "--limit", None),
    ("offset", "--offset", 0),
    ("seed", "--seed", 0),
    ("max_new_tokens", "--max-new-tokens", 32),
    ("model", "--model", "embedded"),
    ("settings.embedder", "--embedder", "embedded"),
    ("settings.dast.prior", "--prior", "retriever"),
    ("settings.dast.mode", "--dast-mode", "repaired"),
    ("settings.dast.alpha", "--alpha", _DEFAULT_ALPHA),
    ("settings.dast.ppl_sign", "--ppl-sign", -1),
)
"""(path in the configuration, option, default) of what a command line says beside task and rows."""

# Okabe and Ito's palette without its yellow, which white swallows; a marker each for those who see no colour.
_STYLES = {
    "dast": ("#0072B2", "o"),
    "dast scaled": ("#56B4E9", "s"),
    "dast paper": ("#009E73", "^"),
    "semi_dynamic": ("#D55E00", "D"),
    "dast+semi_dynamic": ("#882255", "p"),
    "embedding": ("#CC79A7", "v"),
    "bm25": ("#E69F00", "P"),
    "uniform": ("#333333", "X"),
    "random": ("#999999", "<"),
}
_LEVELS = {"full": (0, (6, 3)), "none": (0, (2, 2))}
_INK = "#333333"

_Number = float | None
_Point = tuple[float, float, _Number, _Number]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one question's record says."""

    right: float
    gold_position: int | None
    gold_tokens: float
    ratios: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of one run.

    Attributes:
        group: of the run; rows of different groups are never compared.
        mode: "text" or "soft"; "" for `none` and `full`.
        allocator: the row's other half, or "none" or "full".
        label: the allocator, with what its settings have beside the defaults.
        asked: ("ratio" or "budget" or "scale", value); ("", 0) if nothing.
        dast: settings of a row that DAST weighs.
        accuracy: mean and both ends of its interval.
        answers: by question.
    """

    group: str
    mode: str
    allocator: str
    label: str
    asked: tuple[str, float]
    dast: Mapping[str, Any]
    seed: int
    n: int
    accuracy: tuple[float, float, float]
    normalised: _Number
    ratio: _Number
    tokens: float
    seconds: float
    answers: Mapping[str, _Answer]

    @property
    def name(self) -> str:
        return f"{self.mode}:{self.label}" if self.mode else self.label

    @property
    def target(self) -> str:
        kind, value = self.asked
        texts = {"ratio": f"{value:g}x", "budget": f"{value:g} tokens", "scale": f"scale {value:+g}"}
        return texts.get(kind, "")


@dataclass(frozen=True, slots=True)
class _Run:
    name: str
    command: str
    model: str
    config: Mapping[str, Any]
    group: str
    rows: list[_Row]


@dataclass(frozen=True, slots=True)
class _Difference:
    """Mean over questions of right minus right, and its interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class _Table:
    """Cells are text; a row of one cell is a heading of those below it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class _Line:
    label: str
    points: list[_Point]


@dataclass(frozen=True, slots=True)
class _Panel:
    lines: list[_Line]
    x_label: str
    y_label: str
    percent: bool = True
    log2: bool = False
    levels: tuple[tuple[str, float], ...] = ()
    signed: bool = False


@dataclass(frozen=True, slots=True)
class _Chart:
    """Attributes: file name without suffix, what it shows, how to read it, the picture, its numbers."""

    name: str
    title: str
    caption: str
    png: bytes
    numbers: _Table | None = None


@dataclass(frozen=True, slots=True)
class _Section:
    """A heading, what to know before reading, and its tables and charts; `wanted` stands in for none."""

    title: str
    lede: str
    wanted: str
    blocks: Sequence[tuple[str, _Table] | _Chart]


def add_run(report: Path, results: dict[str, Any], records: Sequence[Record]) -> None:
    """Keep a copy of a run in the report's folder; the same run replaces its older copy.

    Args:
        report: folder of the report; made if missing.
        results: what `evaluate` returned, or `results.json`.
        records: its records. `gold_position` (from 0) and `ratios` fill their sections if present.

    Raises:
        InputError: not the results of a run, or the folder cannot be written to.
    """
    try:
        content: dict[str, Any] = {**results, "records": list(records)}
        name = EvaluationConfig(**{**content["config"], "rows": tuple(content["config"]["rows"])}).name
        _run(name, content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"results must be what evaluate returned (config and rows) and records its lines, got: {error!r}"
        ) from error
    # A task name is the user's; a file name must stay in this folder.
    path = report / "runs" / (regex.sub(r"[^\w.-]|^\.", "_", name) + ".json")
    write_atomically(path, json.dumps(content, sort_keys=True).encode())


def write_report(report: Path) -> Path:
    """Write the page and the charts of all runs in `report/runs`; equal runs give equal bytes.

    Returns:
        Path of `index.html`.

    Raises:
        InputError: no runs, or a file among them that is none.
        MissingExtraError: matplotlib is not installed.
    """
    runs = _runs(report)
    titles = _titles(runs)
    found: dict[object, _Row] = {}
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
    for chart in (block for section in sections for block in section.blocks if isinstance(block, _Chart)):
        write_atomically(report / f"{chart.name}.png", chart.png)
    page = report / "index.html"
    # An id may hold half a surrogate pair, which JSON can write and UTF-8 cannot.
    write_atomically(page, _page(sections, runs, titles).encode("utf-8", "replace"))
    return page


# ---- files -> rows


def _runs(report: Path) -> list[_Run]:
    files = sorted((report / "runs").glob("*.json"))
    if not files:
        raise InputError(
            f"{report / 'runs'} must hold at least one run, got none; add one with: "
            "ctxcompress evaluate --task TASK --ratio 4 --report FOLDER"
        )
    runs = []
    for file in files:
        text = read_text(file)
        try:
            runs.append(_run(file.stem, json.loads(text)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{file} must be a run that add_run wrote, got: {error!r}; remove it and evaluate again"
            ) from error
    return runs


def _run(name: str, content: Any) -> _Run:
    config: dict[str, Any] = content["config"]
    answers: dict[str, dict[str, _Answer]] = {}
    for record in content["records"]:
        answers.setdefault(record["row"], {})[str(record["id"])] = _answer(record)
    group = hashlib.sha256(json.dumps(_comparable(config), sort_keys=True).encode()).hexdigest()[:8]
    rows = [_row(figures, config, group, answers.get(figures["row"], {})) for figures in content["rows"]]
    return _Run(name, _command(config), str(config["model"]), config, group, rows)


def _answer(record: Record) -> _Answer:
    position = record.get("gold_position")
    return _Answer(
        right=_number(record["accuracy"]),
        gold_position=None if position is None else int(_number(position)),
        gold_tokens=_number(record.get("gold_tokens", 0)),
        ratios=tuple(_number(ratio) for ratio in record.get("ratios", ())),
    )


def _row(
    figures: Mapping[str, Any], config: Mapping[str, Any], group: str, answers: Mapping[str, _Answer]
) -> _Row:
    first, _, second = figures["row"].partition(":")
    plain = figures["row"] in PLAIN_ROWS
    mode, allocator = ("", first) if plain else (first, second)
    settings = config["settings"]
    weighs = allocator.split("+")
    dast = settings.get("dast", {}) if "dast" in weighs else {}
    low, high = figures["accuracy_ci"]
    return _Row(
        group=group,
        mode=mode,
        allocator=allocator,
        label=", ".join([" ".join([allocator, *_kind(dast)]), *_beside_defaults(dast)]),
        asked=("", 0.0) if plain else _asked(config, "semi_dynamic" in weighs),
        dast=dast,
        seed=int(_number(config["seed"])),
        n=int(_number(figures["n"])),
        accuracy=(_number(figures["accuracy"]), _number(low), _number(high)),
        normalised=_optional(figures["normalised"]),
        ratio=_positive(figures["ratio_achieved"]),
        tokens=_number(figures["tokens_mean"]),
        seconds=_number(figures["seconds_mean"]),
        answers=answers,
    )


def _asked(config: Mapping[str, Any], dialled: bool) -> tuple[str, float]:
    """What a compressed row was to meet; one that chooses its own ratios follows the dial if there is one."""
    for name, kind in (("ratio_scale", "scale"), ("ratio", "ratio"), ("budget", "budget")):
        if config.get(name) is not None and (dialled or kind != "scale"):
            return kind, _number(config[name])
    return "", 0.0


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"a number was expected, got {value!r}")
    return float(value)


def _optional(value: Any) -> _Number:
    return None if value is None else _number(value)


def _positive(value: Any) -> _Number:
    if value is not None and _number(value) <= 0:
        raise ValueError(f"a ratio above 0 was expected, got {value}")
    return _optional(value)


def _kind(dast: Mapping[str, Any]) -> list[str]:
    """DAST's mode, if it is not the default."""
    return [] if dast.get("mode", "repaired") == "repaired" else [str(dast["mode"])]


def _alpha(dast: Mapping[str, Any]) -> float:
    return _number(dast.get("alpha", _DEFAULT_ALPHA))


def _beside_defaults(dast: Mapping[str, Any]) -> list[str]:
    """What else a `dast` row differs in; each mode has settings that it does not read."""
    defaults = to_dict(DASTConfig())
    unread = {"mode", "prior"} if _kind(dast) else {"mode", "alpha", "ppl_sign"}
    return [
        f"{name} {value:g}" if isinstance(value, (int, float)) else f"{name} {value}"
        for name, value in sorted(dast.items())
        if name not in unread and value != defaults.get(name)
    ]


def _comparable(config: Mapping[str, Any]) -> dict[str, str]:
    """What two runs must share for their rows to be compared, by dotted name."""
    return {name: value for name, value in _flat(config).items() if not _SWEPT.fullmatch(name)}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return flat


def _titles(runs: Sequence[_Run]) -> dict[str, str]:
    """Per group, its task and what tells it from other groups of that task."""
    groups = {run.group: _comparable(run.config) for run in runs}
    titles = {}
    for group, settings in groups.items():
        task = settings["task"]
        others = [other for other in groups.values() if other["task"] == task]
        names = sorted({name for other in others for name in other})
        differing = [name for name in names if len({other.get(name) for other in others}) > 1]
        said = [f"{name.removeprefix('settings.')} {_short(settings.get(name))}" for name in differing]
        titles[group] = f"{task} ({', '.join(said)})" if said else task
    return titles


def _short(value: str | None) -> str:
    if value is None:
        return "unknown"
    return value if len(value) <= 24 else hashlib.sha256(value.encode("utf-8", "replace")).hexdigest()[:8]


def _order(row: _Row) -> tuple[Any, ...]:
    """Plain rows first, then by mode, what was asked, and the places of allocator and label in `_STYLES`."""
    known = {name: place for place, name in enumerate(_STYLES)}
    allocator, label = (known.get(name, len(known)) for name in (row.allocator, row.label))
    plain = PLAIN_ROWS.index(row.allocator) if row.allocator in PLAIN_ROWS else len(PLAIN_ROWS)
    return plain, row.mode, row.asked, allocator, label, row.label


# ---- rows -> sections


def _all_rows(rows: Sequence[_Row], titles: Mapping[str, str]) -> _Section:
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
    return _Section("All rows", lede, wanted, [("", _Table(head, lines))] if rows else [])


def _accuracy_by_ratio(rows: Sequence[_Row], titles: Mapping[str, str]) -> _Section:
    charts = []
    for (group, mode), members in _grouped(rows, lambda row: (row.group, row.mode)):
        measured = [row for row in members if mode and row.ratio and not _off_default_alpha(row)]
        if measured:
            lines = [
                _Line(label, [(row.ratio or 0.0, *row.accuracy) for row in of])
                for label, of in _grouped(measured, lambda row: row.label)
            ]
            levels = [(row.label, row.accuracy[0]) for row in rows if row.group == group and not row.mode]
            absent = [name for name in PLAIN_ROWS if name not in dict(levels)]
            title = f"{titles[group]}: {mode} rows"
            charts.append(
                _Chart(
                    _file_name("accuracy", titles[group], mode, group),
                    title,
                    "Bars are 95 % intervals; points of about the same ratio are drawn side by side."
                    + (f" No run of this group has {' or '.join(absent)}." if absent else ""),
                    _drawn(
                        title,
                        [_Panel(lines, "achieved ratio", "accuracy", log2=True, levels=tuple(levels))],
                    ),
                )
            )
    lede = "Higher is better; further right is shorter. The numbers are in the table above."
    wanted = (
        "Runs with compressed rows would fill this section, for example --rows none,full,text:dast --ratio 4 "
        "and again at other ratios."
    )
    return _Section("Accuracy against achieved ratio", lede, wanted, charts)


def _gold_position(rows: Sequence[_Row], titles: Mapping[str, str]) -> _Section:
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
    return _Section("Position of the gold document", lede, wanted, charts)


def _position_chart(rows: Sequence[_Row], title: str) -> _Chart:
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
        right.append(_Line(row.label, [(x, y, None, None) for x, y in zip(places, means, strict=True)]))
        tokens.append(_Line(row.label, [(x, y, None, None) for x, y in zip(places, given, strict=True)]))
        cells += [
            (row.name, str(x), str(len(answers)), f"{100 * y:.1f} %", f"{z:.1f}")
            for x, answers, y, z in zip(places, by_position.values(), means, given, strict=True)
        ]
    fewest = min(len(answers) for row in rows for answers in _positions(row).values())
    return _Chart(
        _file_name("position", title, f"{first.mode}-{first.target}", first.group),
        title,
        # A bootstrap of a few equal answers has no width; the widest normal interval speaks for all points.
        f"At least {fewest:,} questions a position: chance alone moves a point by up to "
        f"{98 / math.sqrt(fewest):.0f} points to each side (95 %).",
        _drawn(
            title,
            [
                _Panel(right, "", "accuracy"),
                _Panel(tokens, "position of the gold document", "tokens it got", percent=False),
            ],
        ),
        _Table(("row", "position", "n", "accuracy", "gold tokens"), cells),
    )


def _positions(row: _Row) -> dict[int, list[_Answer]]:
    found: dict[int, list[_Answer]] = {}
    for answer in row.answers.values():
        if answer.gold_position is not None:
            found.setdefault(answer.gold_position, []).append(answer)
    return dict(sorted(found.items()))


def _alpha_sweep(rows: Sequence[_Row], titles: Mapping[str, str]) -> _Section:
    charts = []
    swept = [row for row in rows if _kind(row.dast)]
    for (group, mode), members in _grouped(swept, lambda row: (row.group, row.mode)):
        lines, cells = [], []
        for label, sweep in _grouped(members, _without_alpha):
            ordered = sorted(sweep, key=lambda row: _alpha(row.dast))
            if len(ordered) > 1:
                lines.append(_Line(label, [(_alpha(row.dast), *row.accuracy) for row in ordered]))
                cells += [
                    (label, f"{_alpha(row.dast):g}", f"{row.n:,}", _percent(row.accuracy)) for row in ordered
                ]
        if lines:
            title = f"{titles[group]}: {mode} rows"
            charts.append(
                _Chart(
                    _file_name("alpha", titles[group], mode, group),
                    title,
                    "Bars are 95 % intervals, drawn side by side.",
                    _drawn(title, [_Panel(lines, "alpha (0: NLL alone, 1: attention alone)", "accuracy")]),
                    _Table(("row", "alpha", "n", "accuracy [95 %]"), cells),
                )
            )
    lede = "Weight of attention against NLL in the scaled and paper modes. (Figure 3 of the DAST paper.)"
    wanted = (
        "Runs of a dast row in mode scaled or paper at two values of alpha or more would fill this section."
    )
    return _Section("Alpha", lede, wanted, charts)


def _without_alpha(row: _Row) -> str:
    """What tells a row of a sweep from rows of other sweeps."""
    rest = [said for said in _beside_defaults(row.dast) if not said.startswith("alpha ")]
    return ", ".join([" ".join([row.allocator, *_kind(row.dast)]), *rest, *filter(None, [row.target])])


def _off_default_alpha(row: _Row) -> bool:
    """Whether a row is a point of the sweep, which elsewhere would only crowd the charts."""
    return bool(_kind(row.dast)) and _alpha(row.dast) != _DEFAULT_ALPHA


def _ablation(rows: Sequence[_Row], titles: Mapping[str, str]) -> _Section:
    tables = []
    for (group, mode, _), members in _grouped(rows, lambda row: (row.group, row.mode, row.asked)):
        compared = [
            row
            for row in members
            if row.allocator in ("uniform", "random")
            or (row.allocator == "dast" and (not _off_default_alpha(row) or _alpha(row.dast) in (0, 1)))
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
            tables.append((title, _Table(head, [_ablated(row, references) for row in compared])))
    lede = (
        "The same questions at the same ratio; differences are in points, with 95 % bootstrap intervals over "
        "questions in pairs; an asterisk marks an interval that leaves out 0. (Table 3 of the DAST paper.)"
    )
    wanted = (
        "Runs of dast beside uniform or random, or of dast in another mode or at alpha 0 and 1, at one ratio "
        "would fill this section."
    )
    return _Section("Ablation", lede, wanted, tables)


def _ablated(row: _Row, references: Sequence[_Row]) -> list[str]:
    without = {0.0: " (without attention)", 1.0: " (without NLL)"}.get(_alpha(row.dast), "")
    return [
        row.label + (without if _kind(row.dast) else ""),
        f"{row.n:,}",
        _percent(row.accuracy),
        "" if row.ratio is None else f"{row.ratio:.2f}x",
        *("" if row is reference else _points(_paired(row, reference)) for reference in references),
    ]


def _gain_and_variance(rows: Sequence[_Row], titles: Mapping[str, str]) -> _Section:
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
    return _Section("Gain against variance", lede, wanted, charts)


def _gain_chart(dynamic: Sequence[_Row], uniforms: Sequence[_Row], title: str) -> _Chart:
    gains: list[_Point] = []
    variances: list[_Point] = []
    cells = []
    for row in dynamic:
        ratio, gain, variance = row.ratio or 0.0, _gain(row, uniforms), _variance(row)
        gains += [] if gain is None else [(ratio, gain.mean, gain.low, gain.high)]
        variances += [] if variance is None else [(ratio, variance, None, None)]
        spread = "" if variance is None else f"{variance:.2f}"
        cells.append((row.target, f"{ratio:.2f}x", _percent(row.accuracy), _points(gain), spread))
    panels = [
        _Panel(
            [_Line("semi_dynamic", gains)], "", "gain, points", log2=True, levels=(("", 0.0),), signed=True
        ),
        _Panel([_Line("semi_dynamic", variances)], "achieved ratio", "variance", percent=False, log2=True),
    ]
    return _Chart(
        _file_name("gain", title, "soft", dynamic[0].group),
        title,
        "Gain over soft:uniform at the same achieved ratio, interpolated in log2 of the ratio, in pairs of "
        "questions with 95 % intervals; no gain is said where no uniform row is near.",
        _drawn(title, panels if variances else panels[:1]),
        _Table(("asked", "ratio", "accuracy [95 %]", "gain, points", "variance of log2 ratio"), cells),
    )


# ---- numbers


def _paired(row: _Row, reference: _Row) -> _Difference | None:
    """Mean of right(row) - right(reference) over the questions of both; None if they share none."""
    return _interpolated(row, reference, reference, 0.0)


def _gain(row: _Row, curve: Sequence[_Row]) -> _Difference | None:
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


def _interpolated(row: _Row, below: _Row, above: _Row, weight: float) -> _Difference | None:
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


def _variance(row: _Row) -> _Number:
    """Population variance of log2 of the chunks' ratios; dropped chunks (0) have none."""
    chosen = [math.log2(ratio) for answer in row.answers.values() for ratio in answer.ratios if ratio > 0]
    return statistics.pvariance(chosen) if chosen else None


def _grouped(rows: Iterable[_Row], key: Callable[[_Row], Any]) -> list[tuple[Any, list[_Row]]]:
    """Rows by key, keys in the order of their first rows."""
    groups: dict[Any, list[_Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


# ---- text


def _percent(accuracy: tuple[float, float, float]) -> str:
    mean, low, high = (100 * value for value in accuracy)
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def _points(difference: _Difference | None) -> str:
    if difference is None:
        return ""
    mean, low, high = (100 * value for value in (difference.mean, difference.low, difference.high))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" + (" *" if low > 0 or high < 0 else "")


def _command(config: Mapping[str, Any]) -> str:
    """What to type for this run; adapter and calibration are known by content only: theirs to add."""
    flat: dict[str, Any] = {
        **config,
        **{f"settings.{name}": value for name, value in config["settings"].items()},
    }
    flat |= {f"settings.dast.{name}": value for name, value in config["settings"].get("dast", {}).items()}
    words = ["ctxcompress", "evaluate", "--task", str(config["task"]), "--rows", ",".join(config["rows"])]
    for path, option, default in _OPTIONS:
        if flat.get(path, default) != default and flat[path] is not None:
            value = flat[path]
            words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


def _file_name(kind: str, title: str, mode: str, group: str) -> str:
    """Stable while runs come and go, and never a path."""
    task = regex.sub(r"[^A-Za-z0-9]+", "-", title.split(".")[0])[:40].strip("-")
    return str(regex.sub(r"[^A-Za-z0-9.+]+", "-", f"{kind}-{task}-{mode}-{group}"))


# ---- pictures


def _drawn(title: str, panels: Sequence[_Panel]) -> bytes:
    """PNG of panels over each other with one legend below."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", "report") from error
    figure = Figure(figsize=(6.4, 4.6 if len(panels) == 1 else 6.0), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    handles: dict[str, Any] = {}
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    all_axes[0].set_title(_safe(title), fontsize=12, color=_INK, loc="left", parse_math=False)
    for axes, panel in zip(all_axes, panels, strict=True):
        handles |= _plotted(axes, panel)
    legend = figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=11,
        labelcolor=_INK,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    buffer = io.BytesIO()
    # Without the library's version in it, equal data makes equal files.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _plotted(axes: Any, panel: _Panel) -> dict[str, Any]:
    """Draw one panel; its legend entries."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    handles: dict[str, Any] = {}
    if panel.log2:
        _log2_axis(axes, [x for line in panel.lines for x, *_ in line.points])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10]))
    for label, level in panel.levels:
        line = axes.axhline(level, color=_INK, linewidth=1.1, linestyle=_LEVELS.get(label, "-"), zorder=1)
        handles |= {f"{label}: {100 * level:.1f} %": line} if label else {}
    drawn = {line.label for line in panel.lines}
    spare = itertools.cycle(style for name, style in _STYLES.items() if name not in drawn)
    for number, line in enumerate(panel.lines):
        color, marker = _STYLES.get(line.label) or ((_INK, "") if line.label in _LEVELS else next(spare))
        shift = number - (len(panel.lines) - 1) / 2
        handles[_safe(line.label)] = _curve(axes, panel, line, (color, marker, shift))
    axes.set_xlabel(panel.x_label, fontsize=12, color=_INK)
    axes.set_ylabel(panel.y_label, fontsize=12, color=_INK)
    if panel.percent:
        form = "{:+.0f}" if panel.signed else "{:.0f} %"
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form.format(100 * value)))
    if not panel.signed:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11, colors=_INK)
    return handles


def _curve(axes: Any, panel: _Panel, line: _Line, look: tuple[str, str, float]) -> Any:
    color, marker, shift = look
    points = sorted(line.points)
    xs, ys = [x for x, *_ in points], [y for _, y, *_ in points]
    bars = None
    if points and points[0][2] is not None:
        # Bars stand side by side, 1.2 % of the axis apart; on a log axis that is a factor.
        low, high = axes.get_xlim()
        xs = [x * (high / low) ** (0.012 * shift) if panel.log2 else x + 0.012 * shift for x in xs]
        bars = [
            [max(y - (lower or 0.0), 0.0) for _, y, lower, _ in points],
            [max((upper or 0.0) - y, 0.0) for _, y, _, upper in points],
        ]
    style = _LEVELS.get(line.label, "-")
    return axes.errorbar(
        xs,
        ys,
        yerr=bars,
        color=color,
        marker=marker,
        linestyle=style,
        linewidth=1.8,
        markersize=6.5,
        elinewidth=1.1,
        capsize=2.5,
        zorder=3,
        clip_on=False,
    )


def _log2_axis(axes: Any, ratios: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    first, last = math.floor(math.log2(min(ratios)) + 0.2), math.ceil(math.log2(max(ratios)) - 0.2)
    last = max(last, first + 1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** (first - 0.3), 2 ** (last + 0.3))
    ticks = [2.0**power for power in range(first, last + 1)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")


def _safe(text: str) -> str:
    """Short, and only what the built-in font has; all else is named in the page."""
    drawn = "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in text)
    return drawn if len(drawn) <= 72 else drawn[:69] + "..."


# ---- the page

_CSS = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--line:#d7dce1;--paper:#fff;--tint:#f4f6f8}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#9aa4ae;--line:#343b42;--paper:#14181c;--tint:#1d2328}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1.5rem 1rem 4rem;color:var(--ink);background:var(--paper);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.25rem;margin:3rem 0 .25rem}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
p{margin:.25rem 0 1rem;max-width:44rem}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;list-style:none;margin:0;padding:0}
a{color:inherit}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.3rem .75rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:.25rem}
thead th{color:var(--soft);font-weight:600}
tbody th{background:var(--tint);white-space:normal;overflow-wrap:anywhere}
figure{margin:0 0 1.5rem}
figure img{display:block;width:100%;max-width:46rem;height:auto;padding:.5rem;background:#fff;
border:1px solid var(--line);border-radius:.5rem}
figcaption,.lede,.wanted{color:var(--soft)}
figcaption{font-size:.875rem;margin:.5rem 0;max-width:46rem}
summary{cursor:pointer;font-size:.875rem}
pre{margin:.25rem 0 .5rem;padding:.6rem .75rem;background:var(--tint);border-radius:.5rem;font-size:.8125rem;
white-space:pre-wrap}
"""


def _page(sections: Sequence[_Section], runs: Sequence[_Run], titles: Mapping[str, str]) -> str:
    digest = base64.b64encode(hashlib.sha256(_CSS.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    names = [*(section.title for section in sections), "Runs"]
    links = "".join(f'<li><a href="#{_anchor(name)}">{_text(name)}</a></li>' for name in names)
    tasks = sorted({str(run.config["task"]) for run in runs})
    models = sorted({run.model for run in runs})
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Evaluation report</title>\n<style>{_CSS}</style>\n</head>\n<body>",
            "<header>\n<h1>Evaluation report</h1>",
            f"<p>{len(runs)} {'run' if len(runs) == 1 else 'runs'} of ctxcompress on "
            f"{_text(', '.join(tasks))} with {_text(', '.join(models))}. Runs are compared only if they "
            "agree in everything but rows, ratio or budget, ratio scale and the settings of DAST.</p>",
            f"<nav><ul>{links}</ul></nav>\n</header>\n<main>",
            *map(_section_html, sections),
            _runs_html(runs, titles),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _section_html(section: _Section) -> str:
    head = f'<section id="{_anchor(section.title)}">\n<h2>{_text(section.title)}</h2>'
    if not section.blocks:
        return f'{head}\n<p class="wanted">{_text(section.wanted)}</p>\n</section>'
    blocks = [
        _chart_html(block) if isinstance(block, _Chart) else _titled(*block) for block in section.blocks
    ]
    return "\n".join([head, f'<p class="lede">{_text(section.lede)}</p>', *blocks, "</section>"])


def _titled(title: str, table: _Table) -> str:
    return (f"<h3>{_text(title)}</h3>\n" if title else "") + _table_html(table)


def _chart_html(chart: _Chart) -> str:
    source = base64.b64encode(chart.png).decode()
    numbers = ""
    if chart.numbers is not None:
        numbers = f"\n<details><summary>Numbers</summary>{_table_html(chart.numbers)}</details>"
    return (
        f'<h3>{_text(chart.title)}</h3>\n<figure><img alt="Chart: {_text(chart.title)}" '
        f'src="data:image/png;base64,{source}">\n<figcaption>{_text(chart.caption)}</figcaption>{numbers}'
        "\n</figure>"
    )


def _table_html(table: _Table) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.head)
    lines = []
    for row in table.rows:
        if len(row) == 1:
            lines.append(f'<tr><th scope="rowgroup" colspan="{len(table.head)}">{_text(row[0])}</th></tr>')
        else:
            lines.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>")
    body = "\n".join(lines)
    # The focus lets a keyboard scroll what is wider than the screen.
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _runs_html(runs: Sequence[_Run], titles: Mapping[str, str]) -> str:
    parts = [
        '<section id="runs">\n<h2>Runs</h2>\n<p class="lede">The command of each run, with the name of its '
        "task file, and everything else that made its numbers. An adapter or a calibration stands there by "
        "its content, not by its place on the disk: add --adapter or --calibration for one of your own.</p>"
    ]
    for run in sorted(runs, key=lambda run: (titles[run.group], run.name)):
        settings = json.dumps(run.config, indent=1, sort_keys=True, ensure_ascii=False)
        parts.append(
            f"<h3>{_text(run.name)}</h3>\n<pre>{_text(run.command)}</pre>\n"
            f"<details><summary>Settings</summary><pre>{_text(settings)}</pre></details>"
        )
    return "\n".join([*parts, "</section>"])


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
