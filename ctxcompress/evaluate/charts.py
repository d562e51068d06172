"""Tables and charts -> PNG files and one page of HTML that needs nothing beside it."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctxcompress.errors import MissingExtraError
from ctxcompress.evaluate.runs import Run

# Okabe and Ito's palette without its yellow, which white swallows; a marker each for those who see no colour.
STYLES = {
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
TITLE_WIDTH = 54  # characters of a title that fit over the axes

_Number = float | None
Point = tuple[float, float, _Number, _Number]


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are text; a row of one cell is a heading of those below it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Line:
    """A curve; a point is x, y, and the ends of its interval if it has one."""

    label: str
    points: list[Point]


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes; `levels` are horizontal lines, `signed` numbers carry their sign."""

    lines: list[Line]
    x_label: str
    y_label: str
    percent: bool = True
    log2: bool = False
    levels: tuple[tuple[str, float], ...] = ()
    signed: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Attributes: file name without suffix, what it shows, how to read it, the picture, its numbers."""

    name: str
    title: str
    caption: str
    png: bytes
    numbers: Table | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, what to know before reading, and its tables and charts; `wanted` stands in for none."""

    title: str
    lede: str
    wanted: str
    blocks: Sequence[tuple[str, Table] | Chart]


def drawn(title: str, panels: Sequence[Panel]) -> bytes:
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
    shown = textwrap.fill(_safe(title, 2 * TITLE_WIDTH), TITLE_WIDTH)
    all_axes[0].set_title(shown, fontsize=12, color=_INK, loc="left", parse_math=False)
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


def _plotted(axes: Any, panel: Panel) -> dict[str, Any]:
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
    spare = itertools.cycle(style for name, style in STYLES.items() if name not in drawn)
    for number, line in enumerate(panel.lines):
        color, marker = STYLES.get(line.label) or ((_INK, "") if line.label in _LEVELS else next(spare))
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


def _curve(axes: Any, panel: Panel, line: Line, look: tuple[str, str, float]) -> Any:
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


def _safe(text: str, most: int = 72) -> str:
    """Short, and only what the built-in font has; all else is named in the page."""
    drawn = "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in text)
    return drawn if len(drawn) <= most else drawn[: most - 3] + "..."


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


def page(sections: Sequence[Section], runs: Sequence[Run], titles: Mapping[str, str]) -> str:
    """The report as HTML: sections, then the command and settings of every run."""
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


def _section_html(section: Section) -> str:
    head = f'<section id="{_anchor(section.title)}">\n<h2>{_text(section.title)}</h2>'
    if not section.blocks:
        return f'{head}\n<p class="wanted">{_text(section.wanted)}</p>\n</section>'
    blocks = [_chart_html(block) if isinstance(block, Chart) else _titled(*block) for block in section.blocks]
    return "\n".join([head, f'<p class="lede">{_text(section.lede)}</p>', *blocks, "</section>"])


def _titled(title: str, table: Table) -> str:
    return (f"<h3>{_text(title)}</h3>\n" if title else "") + _table_html(table)


def _chart_html(chart: Chart) -> str:
    source = base64.b64encode(chart.png).decode()
    numbers = ""
    if chart.numbers is not None:
        numbers = f"\n<details><summary>Numbers</summary>{_table_html(chart.numbers)}</details>"
    return (
        f'<h3>{_text(chart.title)}</h3>\n<figure><img alt="Chart: {_text(chart.title)}" '
        f'src="data:image/png;base64,{source}">\n<figcaption>{_text(chart.caption)}</figcaption>{numbers}'
        "\n</figure>"
    )


def _table_html(table: Table) -> str:
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


def _runs_html(runs: Sequence[Run], titles: Mapping[str, str]) -> str:
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
