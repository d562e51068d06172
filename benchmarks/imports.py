"""Seconds to import a framework alone, and with our package for it: medians of fresh processes.

    python benchmarks/imports.py --runs 9

"Alone" is what any program imports that builds such a chain or query engine with the framework itself. Both
sides run in turn, so that other work on the machine slows both.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

CASES = {
    "LangChain": (
        "import langchain_core.documents, langchain_core.language_models, langchain_core.output_parsers, "
        "langchain_core.prompts, langchain_core.retrievers, langchain_core.runnables",
        "from langchain_ctxcompress import *",
    ),
    "LlamaIndex": (
        "import llama_index.core",
        "import llama_index.postprocessor.ctxcompress, llama_index.llms.ctxcompress, "
        "llama_index.response_synthesizers.ctxcompress",
    ),
}
CLOCK = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(code: str) -> float:
    """Wall seconds of `code` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CLOCK.format(code)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    """Print a row per framework."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="fresh processes of each kind (default: 9)")
    runs = parser.parse_args().runs
    print("| framework | alone | with ctxcompress | ratio |\n|---|---|---|---|")
    for name, (alone, ours) in CASES.items():
        pairs = [(seconds(alone), seconds(f"{alone}; {ours}")) for _ in range(runs + 1)][1:]  # one to warm up
        before, after = (statistics.median(own) for own in zip(*pairs, strict=True))
        print(f"| {name} | {before:.2f} s | {after:.2f} s | {after / before:.2f}x |")


if __name__ == "__main__":
    main()
