"""The model card of an adapter: what it was trained on and what it measures, from `config.json` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def render(description: Mapping[str, Any]) -> str:
    """Markdown with a front matter, as model hubs read it.

    Args:
        description: content of an adapter's `config.json`: base, compressor, training, ratio_head, measured.
    """
    base, made = description["base"], description["compressor"]
    parts = [
        f"---\nlibrary_name: ctxcompress\nbase_model: {base['name']}\n---\n",
        f"# Soft-token adapter for `{base['name']}`\n",
        "One base model, two LoRA adapters: an encoder that turns text into soft tokens, and a decoder that "
        "reads them.\n",
        "```python\nfrom ctxcompress import ContextCompressor\n\n"
        f'compressor = ContextCompressor.from_pretrained("{base["name"]}", adapter="FOLDER")\n'
        'compressor.compress(documents, query, compression_ratio=4, mode="soft")\n```\n',
        f"- features `{made['features']}`, ratios {', '.join(map(str, made['ratio_set']))}, "
        f"{made['encoder_layers'] or 'all'} encoder layers, ranks {made['encoder_rank']} (encoder) and "
        f"{made['decoder_rank']} (decoder), converter {made['converter_size']}, residual {made['residual']}\n"
        f"- base fingerprint `{base['fingerprint']}`, adapter fingerprint `{description['fingerprint']}`\n",
    ]
    if description["training"]:
        parts += ["## Training\n", _stages(description["training"])]
    if description.get("ratio_head"):
        parts += ["## Ratio head\n", _ratio_head(description["ratio_head"])]
    if description["measured"]:
        parts += [
            "## Measured\n",
            *map(_table, description.get("results", [])),
            _measured(description["measured"]),
        ]
    return "\n".join(parts)


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for number, stage in enumerate(stages, start=1):
        recipe = stage["recipe"]
        settings = ", ".join(f"{name} {value}" for name, value in recipe.items() if value not in ("", [], {}))
        lines += [
            f"{number}. {stage['samples']:,} samples in {stage['steps']:,} steps, "
            f"{stage['seconds'] / 60:.1f} minutes on {stage['machine']}, finished {stage['date']}",
            f"   - recipe: {settings}",
            f"   - loss of the last batches, nats per token: {_losses(stage['losses'])}",
        ]
        lines += [f"   - data: {stage['notice']}"] if stage["notice"] else []
    return "\n".join(lines) + "\n"


def _losses(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in losses.items())


def _ratio_head(fitted: Mapping[str, Any]) -> str:
    lines = [
        f"- fitted to {fitted['texts']:,} texts; labels: {fitted['labels']}",
        f"- on texts it had not seen: R2 {fitted['r2']:.2f}, rank correlation {fitted['spearman']:.2f}",
    ]
    lines += [f"- data: {fitted['notice']}"] if fitted["notice"] else []
    return "\n".join(lines) + "\n"


def _table(table: Mapping[str, Any]) -> str:
    lines = [
        f"`{table['task']}` from question {table['offset'] + 1} on, answers of at most "
        f"{table['max_new_tokens']} tokens, chunks of at most {table['chunk_tokens']}, "
        f"{table['dtype'].removeprefix('torch.')}:\n",
        "| row | ratio | n | accuracy | F1 | normalised | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        low, high = row["accuracy_ci"]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:g}"
        normalised = "" if row["normalised"] is None else f"{row['normalised']:.2f}"
        lines.append(
            f"| {row['row']} | {ratio} | {row['n']} | {100 * row['accuracy']:.1f} % [{100 * low:.1f}, "
            f"{100 * high:.1f}] | {100 * row['f1']:.1f} | {normalised} | {row['tokens']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def _measured(measured: Mapping[str, Mapping[str, float]]) -> str:
    lines = ["| ratio | text | soft |", "|---|---|---|"]
    lines += [
        f"| {ratio} | {100 * modes['text']:.1f} % | {100 * modes['soft']:.1f} % |"
        for ratio, modes in measured.items()
    ]
    return (
        "Right answers at each ratio, mean over runs of the best row of each mode, among allocators measured "
        'in both; `mode="auto"` takes the better mode at the nearest ratio.\n\n' + "\n".join(lines) + "\n"
    )
