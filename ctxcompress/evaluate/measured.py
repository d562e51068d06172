"""Results of evaluation runs -> what an adapter's card says: every row's figures, and the modes compared."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ctxcompress.errors import InputError

_CONDITIONS = ("task", "offset", "limit", "max_new_tokens", "chunk_tokens", "dtype")
_FIGURES = ("row", "n", "accuracy", "accuracy_ci", "f1")


def measured_modes(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Accuracy of each mode at each ratio: the best row of a run, the mean of the runs.

    Modes are compared within a run, where both answered the same questions, and by allocators that the run
    has in both: a better allocator in one mode only says nothing about modes.

    Args:
        results: contents of `results.json`.

    Returns:
        Per ratio, as a string, {"text": accuracy, "soft": accuracy}; ratios without both modes are left out.

    Raises:
        InputError: no run has both modes with one allocator.
    """
    compared: dict[float, list[tuple[float, float]]] = {}
    for run in results:
        accuracy = {row["row"]: row["accuracy"] for row in run["rows"]}
        both = [
            (accuracy[f"text:{allocator}"], accuracy[row])
            for row in accuracy
            for mode, _, allocator in [row.partition(":")]
            if mode == "soft" and f"text:{allocator}" in accuracy
        ]
        if both and run["config"]["ratio"] is not None:
            text, soft = zip(*both, strict=True)
            compared.setdefault(run["config"]["ratio"], []).append((max(text), max(soft)))
    if not compared:
        raise InputError(
            "a run must have a text row and a soft row of one allocator at some ratio, got none; run for "
            "example: ctxcompress evaluate --rows text:uniform,soft:uniform --ratio 4"
        )
    return {
        f"{ratio:g}": {
            mode: statistics.fmean(values)
            for mode, values in zip(("text", "soft"), zip(*pairs, strict=True), strict=True)
        }
        for ratio, pairs in sorted(compared.items())
    }


def measured_rows(results: Sequence[dict[str, Any]], fingerprint: str) -> list[dict[str, Any]]:
    """Figures of all rows, one table for each task and way to measure it.

    Args:
        results: contents of `results.json`; a row measured twice at a ratio counts as it was measured last.
        fingerprint: of the adapter that the runs must have measured.

    Returns:
        Per table what was asked (task, offset, limit, ...) and "rows" by rising ratio: ratio, n, accuracy and
        its interval, F1, mean tokens, and the accuracy as a share of the way from "none" to "full".

    Raises:
        InputError: a run of another adapter.
    """
    tables: dict[tuple[Any, ...], dict[tuple[float, str], dict[str, Any]]] = {}
    for run in results:
        config = run["config"]
        asked = {**config, **config["settings"]}
        if asked["adapter"] != fingerprint:
            raise InputError(
                f"runs must have measured this adapter, {fingerprint}, got one that measured "
                f"{asked['adapter'] or 'none'}; run ctxcompress evaluate --adapter FOLDER with a soft row"
            )
        rows = tables.setdefault(tuple(asked[name] for name in _CONDITIONS), {})
        for row in run["rows"]:
            ratio = row["ratio_requested"]
            figures = {name: row[name] for name in _FIGURES}
            rows[ratio or 0, row["row"]] = figures | {"ratio": ratio, "tokens": row["tokens_mean"]}
    return [
        dict(zip(_CONDITIONS, conditions, strict=True)) | {"rows": _normalised(rows)}
        for conditions, rows in tables.items()
    ]


def _normalised(rows: dict[tuple[float, str], dict[str, Any]]) -> list[dict[str, Any]]:
    none, full = (rows.get((0, row), {}).get("accuracy") for row in ("none", "full"))
    spread = None if none is None or full is None else full - none
    ordered = sorted(rows.items(), key=lambda item: item[0][0])
    return [row | {"normalised": (row["accuracy"] - none) / spread if spread else None} for _, row in ordered]
