"""What each choice in the compressor is worth: variants trained alike on little, compared on unseen texts.

    python benchmarks/ablation.py --texts 'data/text_wiki_00.jsonl.xz' --unseen 'data/text_wiki_01.jsonl.xz'

Every variant starts afresh from one seed, repeats the same short texts for the same steps, and is then asked
to repeat the same unseen ones. One JSON line per variant: nats per token at each ratio, what was trained, and
seconds of a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ctxcompress import Backbone
from ctxcompress.config import SoftConfig
from ctxcompress.soft import SoftCompressor
from ctxcompress.train.data import Samples
from ctxcompress.train.loop import train
from ctxcompress.train.losses import Objective
from ctxcompress.train.recipe import Recipe

DEFAULT = SoftConfig(encoder_layers=8)
VARIANTS = {
    "default": DEFAULT,
    "no residual": dataclasses.replace(DEFAULT, residual=False),
    "causal": dataclasses.replace(DEFAULT, bidirectional=False),
    "last_tokens": dataclasses.replace(DEFAULT, features="last_tokens"),
    "compression_tokens": dataclasses.replace(DEFAULT, features="compression_tokens"),
    "encoder_layers 4": dataclasses.replace(DEFAULT, encoder_layers=4),
    "encoder_layers 16": dataclasses.replace(DEFAULT, encoder_layers=16),
    "all encoder layers": dataclasses.replace(DEFAULT, encoder_layers=None),
}


@torch.inference_mode()
def unseen_nll(compressor: SoftCompressor, recipe: Recipe, batches: int) -> float:
    """Nats per token of repeating texts at the recipe's one ratio."""
    objective, samples = Objective(compressor, 0.0), Samples(recipe, compressor.decoder)
    return statistics.fmean(float(objective(samples.batch(number))["nll"]) for number in range(batches))


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", required=True, help="JSON lines with a text each, to train on")
    parser.add_argument("--unseen", required=True, help="others, to measure on")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated")
    arguments = parser.parse_args()
    base = Backbone.from_pretrained()
    for name in arguments.variants.split(","):
        with tempfile.TemporaryDirectory() as folder:
            recipe = Recipe(
                output=str(Path(folder) / "run"),
                compressor=VARIANTS[name],
                texts=(arguments.texts,),
                ratios={2: 1.0, 4: 1.0},
                steps=arguments.steps,
                batch_size=arguments.batch_size,
                final_learning_rate=0.1,
                save_every=arguments.steps,
            )
            started = time.perf_counter()
            compressor = train(recipe)
            seconds = time.perf_counter() - started
            nll = {
                f"nll_{ratio}x": unseen_nll(
                    compressor,
                    dataclasses.replace(
                        recipe, texts=(arguments.unseen,), ratios={ratio: 1.0}, batch_size=32, seed=1
                    ),
                    batches=8,
                )
                for ratio in (2, 4)
            }
        trained = sum(parameter.numel() for _, parameter in compressor.trained())
        row = {"variant": name, **nll, "trained": trained, "seconds_per_step": seconds / arguments.steps}
        print(json.dumps({**row, "base": base.name}), flush=True)


if __name__ == "__main__":
    main()
