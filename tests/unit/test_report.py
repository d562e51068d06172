"""Runs -> page: numbers worked by hand, forged names, damaged files, and nothing but the page itself."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ctxcompress import InputError
from ctxcompress.cli import app
from ctxcompress.errors import MissingExtraError
from ctxcompress.evaluate import runs as module
from ctxcompress.evaluate.report import write_report
from ctxcompress.evaluate.runner import EvaluationConfig, _figures
from ctxcompress.evaluate.runs import add_run

DAST = {"mode": "repaired", "alpha": 0.5, "ppl_sign": -1, "temperature": None, "prior": "retriever"}
TITLES = (
    "All rows", "Accuracy against achieved ratio", "Position of the gold document", "Alpha", "Ablation",
    "Gain against variance", "Runs",
)  # fmt: skip


def answered(right: Sequence[int], ratio: float | None = None, **more: Any) -> list[dict[str, Any]]:
    """A record a question, with 96 tokens of documents compressed to 96 / ratio; None keeps nothing."""
    return [
        {
            "id": f"q{number}", "answer": "", "accuracy": bool(one), "em": False, "f1": 0.0, "cut": False,
            "tokens_before": 96, "tokens_after": 0 if ratio is None else round(96 / ratio), "gold_tokens": 0,
            "gold_first": None, "seconds": 1.0,
            **{name: value[number] if isinstance(value, list) else value for name, value in more.items()},
        }
        for number, one in enumerate(right)
    ]  # fmt: skip


def added(
    folder: Path,
    rows: dict[str, list[dict[str, Any]]],
    *,
    ratio: float | None = 4.0,
    dast: dict[str, Any] | None = None,
    task: str = "nq.jsonl",
    **changed: Any,
) -> Path:
    """Add a run with these records by row, its figures made by the runner; the path of its copy."""
    known = set((folder / "runs").glob("*"))
    config = EvaluationConfig(**{
        "task": task, "task_sha256": "0" * 64, "model": "embedded", "rows": tuple(rows), "ratio": ratio,
        "budget": None, "limit": None, "offset": 0, "seed": 0, "max_new_tokens": 32,
        "settings": {"dast": DAST | (dast or {})}, **changed,
    })  # fmt: skip
    by_row = {row: [{**record, "row": row} for record in records] for row, records in rows.items()}
    results = {"config": dataclasses.asdict(config), "rows": _figures(by_row, config)}
    add_run(folder, results, [record for records in by_row.values() for record in records])
    (new,) = set((folder / "runs").glob("*")) - known
    return new


class Page(HTMLParser):
    """Tags with their attributes, and the text of cells, headings and everything."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._cell = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.tables[-1][-1][-1] += data

    def row(self, *first: str) -> list[str]:
        """The one row of any table that begins with these cells."""
        (found,) = [row for table in self.tables for row in table if row[: len(first)] == list(first)]
        return found


def shown(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_every_row_has_its_figures(tmp_path: Path) -> None:
    rows = {"none": answered([0] * 8), "full": answered([1, 1, 1, 1, 0, 0, 0, 0], 1)}
    added(tmp_path, rows | {"text:dast": answered([1, 1, 1, 0, 0, 0, 0, 0], 4)})
    added(tmp_path, rows | {"text:dast": answered([1, 0, 0, 0, 0, 0, 0, 0], 8)}, ratio=8.0)
    page = shown(tmp_path)
    # (3/8 - 0) / (4/8 - 0) = 0.75; 8 x 96 tokens -> 8 x 24.
    row = page.row("text:dast", "4x")
    assert row[2:3] + row[4:] == ["8", "0.75", "4.00x", "24", "1.00"]
    assert row[3].startswith("37.5 % [")
    assert page.row("text:dast", "8x")[4:6] == ["0.25", "8.00x"]
    assert page.row("none")[2:] == [
        "8",
        "0.0 % [0.0, 0.0]",
        "0.00",
        "",
        "0",
        "1.00",
    ]  # once, though run twice
    assert page.row("full")[5] == "1.00x"


def test_ablation_subtracts_question_by_question(tmp_path: Path) -> None:
    added(
        tmp_path,
        {
            "text:dast": answered([1, 1, 1, 0, 0], 4),
            "text:uniform": answered([1, 0, 0, 0, 0], 4),
            "text:random": answered([1, 1, 1, 0, 0], 4),
        },
    )
    for alpha, right in (
        (0.5, [1, 1, 0, 0, 0]),
        (1.0, [1, 0, 0, 0, 0]),
        (0.0, [0, 1, 0, 0, 0]),
        (0.3, [0] * 5),
    ):
        added(tmp_path, {"text:dast": answered(right, 4)}, dast={"mode": "scaled", "alpha": alpha})
    page = shown(tmp_path)
    table = next(table for table in page.tables if table[0][0] == "allocation")
    assert table[0][4:] == ["minus dast", "minus dast scaled"]
    differences = {row[0]: [cell.split(" ")[0] for cell in row[4:]] for row in table[1:]}
    assert differences == {
        "dast": ["", "+20.0"],  # 3/5 - 2/5
        "dast scaled": ["-20.0", ""],
        "dast scaled, alpha 0 (without attention)": ["-40.0", "-20.0"],
        "dast scaled, alpha 1 (without NLL)": ["-40.0", "-20.0"],
        "uniform": ["-40.0", "-20.0"],
        "random": ["+0.0", "+20.0"],
    }
    # In pairs: what answers the same questions right never differs, though each mean alone is far from sure.
    assert page.row("random", "5")[4] == "+0.0 [+0.0, +0.0]"
    assert page.row("random", "5")[2] == page.row("dast", "5")[2] != "60.0 % [60.0, 60.0]"
    # Alpha 0.3 belongs to the sweep alone.
    assert [page.row("dast scaled, 4x", alpha)[3].split(" ")[0] for alpha in ("0", "0.3", "0.5", "1")] == [
        "20.0", "0.0", "40.0", "20.0",
    ]  # fmt: skip


def test_gain_is_read_off_the_interpolated_curve(tmp_path: Path) -> None:
    added(tmp_path, {"soft:uniform": answered([1, 1, 1, 0], 2)}, ratio=2.0)
    added(tmp_path, {"soft:uniform": answered([1, 0, 0, 0], 8)}, ratio=8.0)
    chosen = [[2, 8], [4, 4], [0, 4], [2, 8, 0]]
    for scale, ratio, right in ((0.0, 4, [1, 1, 1, 0]), (1.0, 8, [1, 1, 0, 0]), (2.0, 32, [0, 0, 0, 0])):
        dynamic = {"soft:semi_dynamic": answered(right, ratio, ratios=chosen)}
        added(tmp_path, dynamic, ratio=None, ratio_scale=scale)
    page = shown(tmp_path)
    # At 4x, half way in log2 between 2x (3/4) and 8x (1/4): 3/4 - 2/4. log2 of the ratios: 1 3 2 2 2 1 3,
    # mean 2, variance 4/7.
    assert page.row("scale +0", "4.00x")[3].startswith("+25.0 [")
    assert page.row("scale +0", "4.00x")[4] == "0.57"
    assert page.row("scale +1", "8.00x")[3].startswith("+25.0 [")  # on the curve: 2/4 - 1/4
    assert page.row("scale +2", "32.00x")[3] == ""  # two octaves beside it: nothing to compare with


def test_gold_position(tmp_path: Path) -> None:
    places = {"gold_position": [0, 0, 2, 2, 2, None], "gold_tokens": [10, 20, 3, 6, 9, 1000]}
    added(tmp_path, {"text:dast": answered([1, 0, 1, 1, 1, 0], 4, **places)})
    page = shown(tmp_path)
    assert page.row("text:dast", "1") == ["text:dast", "1", "2", "50.0 %", "15.0"]
    assert page.row("text:dast", "3") == ["text:dast", "3", "3", "100.0 %", "6.0"]
    # 1.96 x sqrt(1/4 / 2) = 0.69
    assert "At least 2 questions a position: chance alone moves a point by up to 69 points" in page.text


def test_sections_without_runs_say_which_would_fill_them(tmp_path: Path) -> None:
    added(tmp_path, {"none": answered([0, 1])})
    page = shown(tmp_path)
    assert page.text.count("would fill this section") == 5
    assert all(title in page.text for title in TITLES)
    assert not list(tmp_path.glob("*.png"))
    assert [tag for tag, _ in page.tags].count("img") == 0


def test_runs_are_compared_only_when_all_else_is_equal(tmp_path: Path) -> None:
    added(tmp_path, {"text:dast": answered([1, 1], 4)}, limit=2)
    added(tmp_path, {"text:uniform": answered([0, 0], 4)}, limit=3)
    page = shown(tmp_path)
    assert {row[0] for row in page.tables[0] if len(row) == 1} == {"nq.jsonl (limit 2)", "nq.jsonl (limit 3)"}
    assert not any(table[0][0] == "allocation" for table in page.tables)
    assert len(list(tmp_path.glob("accuracy-nq-text-*.png"))) == 2


def test_unknown_settings_of_dast_make_another_row(tmp_path: Path) -> None:
    for later in ("a", "b"):
        added(tmp_path, {"text:dast": answered([1, 1], 4)}, dast={"later": later, "alpha": 0.1})
    page = shown(tmp_path)
    assert page.row("text:dast, later a")
    assert page.row("text:dast, later b")


def test_the_same_run_replaces_its_copy(tmp_path: Path) -> None:
    path = added(tmp_path, {"none": answered([0, 0])})
    first = path.read_bytes()
    content = json.loads(first)
    content["records"][0]["accuracy"] = True
    add_run(tmp_path, {name: content[name] for name in ("config", "rows")}, content["records"])
    assert list((tmp_path / "runs").iterdir()) == [path]
    assert json.loads(path.read_bytes()) == content != json.loads(first)


def test_names_are_text_never_markup_or_paths(tmp_path: Path) -> None:
    evil = '<script src="https://x.example/a.js"></script>$\\frac{'
    task = "../../" + evil + "\n\u4e2d'; rm -rf ~ #"
    folder = tmp_path / "report"
    path = added(folder, {"text:dast": answered([1, 0], 4), "text:uniform": answered([0, 0], 4)}, task=task)
    assert path.parent == folder / "runs"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["rows"][1]["row"] = f"text:_{evil}\ud800"
    content["config"]["model"] = f"<b>{evil}"
    path.write_text(json.dumps(content), encoding="utf-8")
    index = write_report(folder)
    page = Page(index.read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b"})
    assert page.row(f"text:_{evil}?")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["report"]
    assert shlex.split(module._command(content["config"]))[3] == task


def test_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    places = {"gold_position": [0, 1]}
    added(tmp_path, {"full": answered([1, 1], 1), "text:dast": answered([1, 0], 4, **places)})
    page = shown(tmp_path)
    pictures = []
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form")
        assert not {
            name for name in attributes if name.startswith("on") or name in ("style", "srcset", "action")
        }
        assert (attributes.get("href") or "#").startswith("#")
        if "src" in attributes:
            pictures.append(
                base64.b64decode((attributes["src"] or "").removeprefix("data:image/png;base64,"))
            )
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "url(" not in text
    assert "@import" not in text
    style = text.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = [attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert f"style-src 'sha256-{digest}'" in policy
    targets = {attributes.get("id") for _, attributes in page.tags}
    assert {(attributes.get("href") or "#")[1:] for tag, attributes in page.tags if tag == "a"} <= targets
    files = [path.read_bytes() for path in tmp_path.glob("*.png")]
    assert sorted(files) == sorted(pictures)
    assert len(files) == 2
    for file in files:
        assert file.startswith(b"\x89PNG\r\n\x1a\n")
        assert int.from_bytes(file[16:20], "big") == 1280
        assert 10_000 < len(file) < 200_000


def test_equal_runs_make_equal_files(tmp_path: Path) -> None:
    pages = []
    for name in ("a", "b"):
        runs = [(4.0, [1, 0, 1]), (8.0, [1, 0, 0])]
        for ratio, right in runs if name == "a" else runs[::-1]:
            rows = {"full": answered([1, 1, 1], 1, seconds=ratio), "text:dast": answered(right, ratio)}
            added(tmp_path / name, rows, ratio=ratio)
        pages.append(write_report(tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_command_says_what_differs_from_the_defaults(tmp_path: Path) -> None:
    scaled = {"mode": "scaled", "alpha": 0.25}
    added(
        tmp_path, {"text:dast": answered([1], 4)}, dast=scaled, limit=200, task="my task.jsonl", model="a/b"
    )
    page = shown(tmp_path)
    assert (
        "ctxcompress evaluate --task 'my task.jsonl' --rows text:dast --ratio 4 --limit 200 --model a/b "
        "--dast-mode scaled --alpha 0.25"
    ) in page.text


def test_options_are_those_of_the_command() -> None:
    known = {
        option: parameter.default
        for parameter in get_command(app).commands["evaluate"].params  # type: ignore[attr-defined]
        for option in parameter.opts
    }
    assert {option: known.get(option, "missing") for _, option, _ in module._OPTIONS} == {
        option: default for _, option, default in module._OPTIONS
    }


def test_charts_need_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added(tmp_path, {"text:dast": answered([1, 0], 4)})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"ctxcompress\[report\]"):
        write_report(tmp_path)
    assert not list(tmp_path.glob("*.*"))


def test_nothing_to_report_on(tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match="at least one run"):
            write_report(folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-9],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"accuracy": ', '"accuracy": NaN, "_": '),
        lambda text: text.replace('"accuracy": ', '"accuracy": "high", "_": '),
        lambda text: text.replace('"ratio_achieved": ', '"ratio_achieved": -'),
        lambda text: text.replace('"row"', '"wor"'),
        lambda text: text.replace('"task":', '"kast":'),
        lambda text: text.replace('"id"', '"di"'),
        lambda text: text.replace('"tokens_mean"', '"token"'),
    ],
)
def test_damaged_runs_are_named(tmp_path: Path, damage: Any) -> None:
    path = added(tmp_path, {"text:dast": answered([1, 0], 4)})
    text = path.read_text(encoding="utf-8")
    path.write_text(damage(text), encoding="utf-8")
    assert damage(text) != text
    with pytest.raises(InputError, match=path.name) as raised:
        write_report(tmp_path)
    assert "remove it" in str(raised.value)
    assert not (tmp_path / "index.html").exists()


def test_only_results_are_added(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="what evaluate returned"):
        add_run(tmp_path, {"rows": []}, [])
    path = added(tmp_path, {"none": answered([1])})
    content = json.loads(path.read_text(encoding="utf-8"))
    with pytest.raises(InputError, match="what evaluate returned"):
        add_run(tmp_path, content, [{"id": "q0"}])


def test_records_of_older_runs_are_read(tmp_path: Path) -> None:
    old = answered([1, 0], 4)
    for record in old:
        del record["gold_tokens"]
    path = added(tmp_path, {"text:dast": answered([1, 0], 4)})
    content = json.loads(path.read_text(encoding="utf-8"))
    content["records"] = [{**record, "row": "text:dast"} for record in old]
    content["config"]["settings"] = {}
    path.write_text(json.dumps(content), encoding="utf-8")
    assert shown(tmp_path).row("text:dast", "4x")
