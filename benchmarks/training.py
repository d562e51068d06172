"""What few kernels save in training: steps through them against PEFT's layers and transformers' modules.

    python benchmarks/training.py --batch-size 8

Forward and backward of the same batches, the embedded model with a fresh compressor, medians of interleaved
repetitions in one process. On a GPU the host is what waits: take a batch there that the GPU is quick with.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft.helpers import disable_input_dtype_casting

from ctxcompress import Backbone, SoftCompressor, SoftConfig
from ctxcompress.train.data import Samples
from ctxcompress.train.lean import few_kernels
from ctxcompress.train.losses import Objective
from ctxcompress.train.recipe import Recipe

PAGES = Path(__file__).parent.parent / "examples" / "encyclopedia"


@contextlib.contextmanager
def as_it_comes(model: torch.nn.Module) -> Iterator[None]:
    """PEFT's layers under autocast, which multiplies float32 adapters in the base's dtype."""
    device, dtype = model.compressor.device.type, model.compressor.encoder.dtype
    with torch.autocast(device, dtype, enabled=dtype != torch.float32), disable_input_dtype_casting(model):
        yield


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--encoder-layers", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    base = Backbone.from_pretrained()
    compressor = SoftCompressor(base, SoftConfig(encoder_layers=arguments.encoder_layers))
    compressor.finish(trainable=True)
    model = Objective(compressor, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.jsonl"
        pages = [page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md"))]
        texts.write_text("".join(json.dumps({"text": page}) + "\n" for page in pages), encoding="utf-8")
        recipe = Recipe(
            output=folder, texts=(str(texts),), tokens=(100, 100), batch_size=arguments.batch_size
        )
        batches = [Samples(recipe, base).batch(number) for number in range(arguments.repetitions)]
    seconds: dict[str, list[float]] = {"few_kernels": [], "as_it_comes": []}
    for batch in [batches[0], *batches]:  # the first one warms up
        for way in (few_kernels, as_it_comes):
            started = time.perf_counter()
            with way(model):
                loss = model(batch)["loss"]
            loss.backward()
            compressor.zero_grad(set_to_none=True)
            if compressor.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[way.__name__].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(
        json.dumps(
            {
                "device": str(compressor.device),
                "batch_size": arguments.batch_size,
                **{f"seconds_{name}": value for name, value in medians.items()},
                "as_it_comes / few_kernels": medians["as_it_comes"] / medians["few_kernels"],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
