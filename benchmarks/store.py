"""What keeping encoded documents costs: seconds to put, bytes per token, lookups per second.

    python benchmarks/store.py --documents 10000 --json

Random states, so no compression of the disk can help. Cold lookups follow a request to the system to forget
the files' pages; warm ones come from its page cache; those from memory from the store's own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from ctxcompress.chunking import CHUNK_TOKENS
from ctxcompress.store import SoftTokenStore
from ctxcompress.stored import StoredChunk, StoredDocument, StoreDtype

LOOKUP = 10  # documents of one query


def documents(numbers: Sequence[int], tokens: int, windows: int, hidden: int) -> dict[str, StoredDocument]:
    """Random documents in chunks of the usual size, by key."""
    chunks = tuple(
        StoredChunk((4 * start, 4 * stop), stop - start, 2.0, 1.0)
        for start, stop in pairwise([*range(0, tokens, CHUNK_TOKENS), tokens])
    )
    counts_M = torch.full((windows,), 2, dtype=torch.int32)
    return {
        f"{number:064x}": StoredDocument(
            chunks,
            torch.randint(0, 49152, (tokens,), dtype=torch.int32),
            torch.randn(windows, hidden),
            counts_M,
            2,
        )
        for number in numbers
    }


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forget_pages(folder: Path) -> None:
    """Ask the system to drop the files from its page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def lookups_per_second(store: SoftTokenStore, queries: Sequence[Sequence[str]]) -> float:
    """Documents read per second when each query reads its own."""

    def read() -> None:
        for keys in queries:
            if len(store.get(keys)) != len(keys):
                raise SystemExit(f"all documents of a lookup were expected, got fewer for {keys[0]}")

    return sum(map(len, queries)) / seconds(read)


def measured(folder: Path, dtype: StoreDtype, arguments: argparse.Namespace) -> dict[str, float]:
    """Figures of one dtype."""
    shape = arguments.tokens, arguments.windows, arguments.hidden
    put = 0.0
    with SoftTokenStore(folder, dtype=dtype, memory_bytes=0) as store:
        for start in range(0, arguments.documents, arguments.batch):
            numbers = range(start, min(start + arguments.batch, arguments.documents))
            batch = documents(numbers, *shape)
            put += seconds(lambda batch=batch: store.put(batch, fingerprint="benchmark"))  # type: ignore[misc]
    size = size_of(folder)
    numbers = random.Random(0).sample(range(arguments.documents), min(arguments.lookups, arguments.documents))
    keys = [f"{number:064x}" for number in numbers]
    queries = [keys[start : start + LOOKUP] for start in range(0, len(keys), LOOKUP)]
    forget_pages(folder)
    with SoftTokenStore(folder, memory_bytes=0) as store:
        cold = lookups_per_second(store, queries)
        warm = lookups_per_second(store, queries)
    with SoftTokenStore(folder, memory_bytes=1 << 32) as store:
        store.get(keys)
        memory = lookups_per_second(store, queries)
        verify = seconds(store.verify)
        gc = seconds(store.gc)
    return {
        "put_seconds": put,
        "put_documents_per_second": arguments.documents / put,
        "bytes_per_token": size / (arguments.documents * arguments.tokens),
        "cold_lookups_per_second": cold,
        "warm_lookups_per_second": warm,
        "memory_lookups_per_second": memory,
        "verify_seconds": verify,
        "gc_seconds": gc,
    }


def main() -> None:
    """Print the figures of each dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=150, help="of each document")
    parser.add_argument("--windows", type=int, default=75, help="states of each document")
    parser.add_argument("--hidden", type=int, default=576, help="size of a state")
    parser.add_argument("--batch", type=int, default=100, help="documents of one put")
    parser.add_argument("--lookups", type=int, default=2_000, help="documents read, ten at a time")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report = {}
    for dtype in arguments.dtypes:
        with tempfile.TemporaryDirectory() as name:
            report[dtype] = measured(Path(name), dtype, arguments)
    if arguments.json:
        print(json.dumps({"settings": vars(arguments), "figures": report}, indent=1))
        return
    for dtype, figures in report.items():
        print(dtype)
        for name, value in figures.items():
            print(f"  {name:28} {value:10,.1f}")


if __name__ == "__main__":
    main()
