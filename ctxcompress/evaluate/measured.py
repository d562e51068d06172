"""Results of evaluation runs -> what an adapter's card says about each ratio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctxcompress.errors import InputError


def measured_modes(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Accuracy of the best row of each mode at each ratio.

    Args:
        results: contents of `results.json`; all of one task and the same questions.

    Returns:
        Per ratio, as a string, {"text": accuracy, "soft": accuracy}; ratios without both modes are left out.

    Raises:
        InputError: runs of different tasks or questions, or no ratio with both modes.
    """
    questions = {tuple(run["config"][name] for name in ("task_sha256", "offset", "limit")) for run in results}
    if len(questions) != 1:
        raise InputError(
            f"runs must be of one task and the same questions, got {len(questions)} kinds; give only "
            "comparable ones"
        )
    best: dict[float, dict[str, float]] = {}
    for run in results:
        for row in run["rows"]:
            mode = row["row"].partition(":")[0]
            if row["ratio_requested"] is not None and mode in ("text", "soft"):
                modes = best.setdefault(float(row["ratio_requested"]), {})
                modes[mode] = max(modes.get(mode, 0.0), row["accuracy"])
    whole = {f"{ratio:g}": modes for ratio, modes in sorted(best.items()) if len(modes) == 2}
    if not whole:
        raise InputError(
            "runs must have a text row and a soft row at some ratio, got none; run for example: "
            "ctxcompress evaluate --rows text:uniform,soft:uniform --ratio 4"
        )
    return whole
