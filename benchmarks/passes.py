"""What the passes cost against a plain forward of the same tokens, in the same run.

    python benchmarks/passes.py --tokens 2000

Memory: each variant runs in a process of its own, whose resident size is read before and during the pass; the
figure is the growth, so weights and imports do not count. Times: medians of interleaved repetitions in one
process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import torch

from ctxcompress import DAC, DAST, Backbone

PAGES = Path(__file__).parent.parent / "examples" / "encyclopedia"
QUESTION = "Who discovered penicillin?"


def tokens_of_pages(backbone: Backbone, tokens: int) -> list[int]:
    """The first `tokens` tokens of the example pages."""
    text = "\n\n".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md")))
    return list(backbone.encode(text).ids[:tokens])


def plain_forward(backbone: Backbone, ids: list[int]) -> None:
    """Hidden states of all tokens and nothing else."""
    with torch.inference_mode():
        backbone.model.model(torch.tensor([ids], device=backbone.device), use_cache=False)


def prefill(backbone: Backbone, ids: list[int]) -> None:
    """What a decoder does before its first token: fill the cache, logits of the last position only."""
    with torch.inference_mode():
        backbone.model(torch.tensor([ids], device=backbone.device), use_cache=True, logits_to_keep=1)


def signals(backbone: Backbone, ids: list[int]) -> None:
    """NLL and accumulated attention of all tokens: one DAC stage."""
    backbone.token_signals([ids])


def eager_attention(backbone: Backbone, ids: list[int]) -> None:
    """All attention matrices at once, as the authors' code keeps them."""
    backbone.model.set_attn_implementation("eager")
    with torch.inference_mode():
        backbone.model(torch.tensor([ids], device=backbone.device), use_cache=False, output_attentions=True)


VARIANTS: dict[str, Callable[[Backbone, list[int]], None]] = {
    "plain_forward": plain_forward,
    "signals": signals,
    "eager_attention": eager_attention,
}


def peak_growth(variant: str, tokens: int) -> float:
    """Growth of the resident size during one pass, in MB, sampled every millisecond."""
    backbone = Backbone.from_pretrained()
    ids = tokens_of_pages(backbone, tokens)
    signals(backbone, ids[:16])  # all weights, the head's too, are read from disk before the count starts
    process, finished, peak = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not finished.wait(0.001):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    VARIANTS[variant](backbone, ids)
    finished.set()
    watcher.join()
    return (max(peak[0], process.memory_info().rss) - before) / 1e6


def in_own_process(variant: str, tokens: int) -> float:
    """`peak_growth` of a variant in a fresh interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_growth, variant, tokens).result()


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def times(tokens: int, repetitions: int) -> dict[str, float]:
    """Median seconds of each kind of work, interleaved so that drift of the machine hits all alike."""
    backbone = Backbone.from_pretrained()
    ids = tokens_of_pages(backbone, tokens)
    documents = [ids[start : start + 150] for start in range(0, len(ids), 150)]
    text = backbone.tokenizer.decode(ids)
    dast, dac = DAST(backbone), DAC(backbone)
    work: dict[str, Callable[[], object]] = {
        "prefill": lambda: prefill(backbone, ids),
        "dast_score": lambda: dast.worth(documents, QUESTION, [None] * len(documents)),
        "dac_stage": lambda: signals(backbone, ids),
    }
    samples: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(repetitions + 1):
        for name, call in work.items():
            taken = seconds(call)
            if repetition:
                samples[name].append(taken)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {**medians, "dac_all_stages_keep_half": seconds(lambda: dac.prune([text], [tokens // 2]))}


def main() -> None:
    """Print one JSON object: seconds, ratios to a plain prefill, and memory in MB."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    taken = times(arguments.tokens, arguments.repetitions)
    memory = {variant: in_own_process(variant, arguments.tokens) for variant in VARIANTS}
    report = {
        "tokens": arguments.tokens,
        "seconds": taken,
        "ratio_to_prefill": {name: value / taken["prefill"] for name, value in taken.items()},
        "peak_growth_mb": memory,
        "signals_over_plain_forward_mb": memory["signals"] - memory["plain_forward"],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
