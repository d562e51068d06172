"""What soft tokens cost: memory of one base with two adapters, and encoding against a plain forward.

    python benchmarks/soft.py --documents 40

Memory: bytes of all distinct weights, and the highest resident size (Linux) of a process that encodes and
answers, against one that only answers with the base. Times: medians of interleaved repetitions in one
process, same tokens.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from ctxcompress import Backbone, ContextCompressor

PAGES = Path(__file__).parent.parent / "examples" / "encyclopedia"
QUESTION = "Who discovered penicillin?"
DOCUMENT_TOKENS = 150


def documents_of_pages(backbone: Backbone, count: int) -> list[list[int]]:
    """`count` documents of 120 to 180 tokens, cut from the example pages."""
    text = "\n\n".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md")))
    ids = list(backbone.encode(text).ids)
    lengths = [DOCUMENT_TOKENS + 60 * (place % 11) // 10 - 30 for place in range(count)]
    starts = [place * 180 % (len(ids) - 180) for place in range(count)]
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def plain_forward(backbone: Backbone, documents: list[list[int]]) -> None:
    """Hidden states of all documents, all layers, in batches by length."""
    rows = sorted(documents, key=len)
    with torch.inference_mode():
        for start in range(0, len(rows), 16):
            batch = [torch.tensor(row) for row in rows[start : start + 16]]
            ids_BT = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(backbone.device)
            backbone.model.model(ids_BT, use_cache=False)


def distinct_bytes(*modules: torch.nn.Module) -> int:
    """Bytes of all weights, shared ones once."""
    weights = {tensor.data_ptr(): tensor for module in modules for tensor in module.parameters()}
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def peak(adapter: str | None) -> float:
    """Highest resident size, in MB, of a process that answers a question: from soft tokens, or from text."""
    compressor = ContextCompressor.from_pretrained(adapter=adapter)
    pages = [page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md"))[:2]]
    mode = "soft" if adapter else "text"
    ratio = 8 if adapter else 1
    result = compressor.compress(pages, QUESTION, compression_ratio=ratio, mode=mode, allocator="uniform")
    compressor.answer(result, max_new_tokens=8)
    # Not getrusage: what it returns is never below the parent's size at the fork.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def in_own_process(adapter: str | None) -> float:
    """`peak` in a fresh interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, adapter).result()


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--adapter", default="embedded")
    arguments = parser.parse_args()
    compressor = ContextCompressor.from_pretrained(adapter=arguments.adapter)
    base, soft = compressor.backbone, compressor.soft
    documents = documents_of_pages(base, arguments.documents)
    work: dict[str, Callable[[], object]] = {
        "plain_forward": lambda: plain_forward(base, documents),
        "encode": lambda: soft.encode(documents),
    }
    samples: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(arguments.repetitions + 1):
        for name, call in work.items():
            taken = seconds(call)
            if repetition:
                samples[name].append(taken)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    tokens = sum(map(len, documents))
    weights = distinct_bytes(base.model, soft) / distinct_bytes(base.model)
    peaks = {"base": in_own_process(None), "soft": in_own_process(arguments.adapter)}
    report = {
        "documents": len(documents),
        "tokens": tokens,
        "tokens_per_second": {name: tokens / taken for name, taken in medians.items()},
        "encode_over_plain_forward": medians["plain_forward"] / medians["encode"],
        "weights_over_base": weights,
        "peak_mb": peaks,
        "peak_over_base": peaks["soft"] / peaks["base"],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
