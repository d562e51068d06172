"""The training loop: batches -> steps -> adapters, on a CPU, a GPU, or many through `accelerate launch`.

    OUTPUT/recipe.json        what made the run
    OUTPUT/metrics.jsonl      one line per step
    OUTPUT/checkpoint-N/      adapters in float32 and the optimizer's moments after N steps; the newest stays,
                              and another run may start from it
    OUTPUT/adapter/           the adapters after the last step in the base's dtype, ready to be loaded

Learning rate and samples are functions of the seed and the step, and nothing else is random, so adapters,
moments and a step number are all that is needed to go on exactly, on as many processes as before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import platform
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ctxcompress import checkpoint
from ctxcompress.backbone import Backbone, native_dtype
from ctxcompress.calibration import Calibration
from ctxcompress.errors import CheckpointError, InputError, MissingExtraError
from ctxcompress.files import write_atomically
from ctxcompress.methods.dac import Progress
from ctxcompress.soft import SoftCompressor
from ctxcompress.train.data import Batch, Samples
from ctxcompress.train.lean import few_kernels
from ctxcompress.train.losses import Objective
from ctxcompress.train.recipe import Recipe
from ctxcompress.train.sharded import apart, collect, gathered, part, sharding_asked_for

_MOMENTS = "optimizer.safetensors"
_NOT_SHOWN = ["base", "compressor", "notice", "output", "start", "save_every", "tensorboard", "workers"]


def train(recipe: Recipe, progress: Progress | None = None) -> SoftCompressor:
    """Run a recipe to its end, or take it up after its newest checkpoint.

    Args:
        recipe: what to do.
        progress: told after every step.

    Returns:
        The trained compressor.

    Raises:
        MissingExtraError: accelerate is not installed, or tensorboard, which the recipe asks for.
        CheckpointError: the output folder holds a run of another recipe.
        ConfigError: the recipe does not fit the adapters it starts from, or FSDP.
    """
    accelerator = _accelerator(recipe)
    output = Path(recipe.output)
    if accelerator.is_main_process:
        _claim(output, recipe)
    accelerator.wait_for_everyone()
    if recipe.tensorboard:
        accelerator.init_trackers("ctxcompress")
    shards = sharding_asked_for(accelerator, recipe)
    base = Backbone.from_pretrained(
        recipe.base,
        device="cpu" if shards else accelerator.device,
        dtype=native_dtype(accelerator.device),
    )
    compressor, moments, first = _begun(base, recipe, output)
    heads = Calibration.for_model(base.name, *base.layers_heads).heads
    trained = apart(compressor) if shards else compressor
    model = Objective(trained, recipe.distillation, recipe.attention, heads)
    optimizer: Any = torch.optim.AdamW(
        [parameter for _, parameter in trained.trained()],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    prepared, optimizer = accelerator.prepare(model, optimizer)
    _restore(optimizer, trained, moments)
    batches = _batches(recipe, base, first, accelerator)
    metrics = _Metrics(output, accelerator if recipe.tensorboard else None)
    with contextlib.nullcontext() if shards else few_kernels(model):
        for step in range(first, recipe.steps):
            figures = _step(accelerator, prepared, optimizer, batches, recipe, step)
            if accelerator.is_main_process:
                metrics.add(figures)
            if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
                moments = _moments(optimizer, trained)
                if shards:
                    collect(trained, compressor)
                if accelerator.is_main_process:
                    metrics.write()
                    stages = [*_earlier(recipe), _stage(recipe, output, accelerator.num_processes)]
                    _save(output, compressor, moments, step + 1, stages)
            if progress is not None:
                progress("training", step + 1, recipe.steps)
    _end(compressor, base, recipe)
    if accelerator.is_main_process:
        stages = [*_earlier(recipe), _stage(recipe, output, accelerator.num_processes)]
        native = compressor.encoder.embed_tokens.weight.dtype
        checkpoint.save(compressor, output / "adapter", dtype=native, training=stages)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return compressor


def _earlier(recipe: Recipe) -> list[dict[str, Any]]:
    """What the adapters this run started from had been trained on."""
    return list(checkpoint.describe(Path(recipe.start))["training"]) if recipe.start else []


def _stage(recipe: Recipe, output: Path, processes: int) -> dict[str, Any]:
    """This run so far, for the model card: settings without paths, effort, machine, and the last losses."""
    settings = json.loads(recipe.to_json())
    for name in _NOT_SHOWN:
        del settings[name]
    for name in ("texts", "questions"):
        settings[name] = [Path(file).name for file in settings[name]]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ends: dict[str, list[float]] = {}
    for line in lines[-max(len(lines) // 5, 1) :]:
        ends.setdefault(f"{line['objective']} at {line['ratio'] or 'mixed'}", []).append(line["nll"])
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "recipe": settings,
        "notice": recipe.notice,
        "steps": len(lines),
        "samples": len(lines) * recipe.batch_size * recipe.accumulation * processes,
        "seconds": sum(line["seconds"] for line in lines),
        "machine": cuda or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "losses": {name: statistics.fmean(values) for name, values in sorted(ends.items())},
    }


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine that ends just above `final_learning_rate` of the highest."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    part = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    low = recipe.final_learning_rate
    return recipe.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * part)) / 2)


def _accelerator(recipe: Recipe) -> Any:
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ModuleNotFoundError as error:
        raise MissingExtraError("accelerate", "train") from error
    # accelerate itself says nothing when it cannot write events.
    if recipe.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard", "tensorboard")
    return Accelerator(
        # Adapters stay float32, and `few_kernels` multiplies in the base's dtype.
        mixed_precision="no",
        gradient_accumulation_steps=recipe.accumulation,
        # No loss reaches the ratio head, and none of raw text the encoder.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with="tensorboard" if recipe.tensorboard else None,
        project_dir=recipe.output,
    )


def _batches(recipe: Recipe, base: Backbone, first: int, accelerator: Any) -> Iterator[Batch]:
    """This process's batches from step `first` on; workers, if any, make them while others are trained on."""
    samples = Samples(recipe, base, accelerator.num_processes)
    if recipe.workers:
        samples.read()  # once, before the workers share it

    def make(number: int) -> Batch | InputError:
        try:
            return samples.batch(number)
        except InputError as error:  # raised in a worker, it would arrive with the worker's stack as its text
            return error

    ends = (steps * recipe.accumulation * accelerator.num_processes for steps in (first, recipe.steps))
    numbers: Any = range(*ends)[accelerator.process_index :: accelerator.num_processes]
    made: Any = DataLoader(
        numbers,
        batch_size=None,
        collate_fn=cast(Any, make),
        num_workers=recipe.workers,
        # A forked worker has tokenizer and texts without a copy; it never computes on a GPU.
        multiprocessing_context="fork" if recipe.workers else None,
    )
    for batch in made:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _step(
    accelerator: Any, model: Any, optimizer: Any, batches: Iterator[Batch], recipe: Recipe, step: int
) -> dict[str, Any]:
    """One optimizer step; figures of this process's last batch, as tensors: nothing here waits for a GPU."""
    rate = learning_rate(recipe, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    figures: dict[str, Any] = {"step": step}
    for _ in range(recipe.accumulation):
        batch = next(batches)
        with accelerator.accumulate(model):
            losses = model(batch)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), recipe.clip)
                figures["gradient"] = gathered(norm)
            optimizer.step()
            optimizer.zero_grad()
        losses = {name: loss.detach() for name, loss in losses.items()}
        figures |= {"objective": batch.objective, "ratio": batch.ratio, **losses}
    return {**figures, "lr": rate}


class _Metrics:
    """`metrics.jsonl`, one step late: a figure is there when a GPU is done, which should have the next step.

    Args:
        output: folder of the run.
        accelerator: whose trackers are told, too; None tells none.
    """

    def __init__(self, output: Path, accelerator: Any = None) -> None:
        self._file = output / "metrics.jsonl"
        self._accelerator = accelerator
        self._waiting: dict[str, Any] = {}
        self._last = time.perf_counter()

    def add(self, figures: dict[str, Any]) -> None:
        """Figures of a step; those of the step before are written."""
        self.write()
        last, self._last = self._last, time.perf_counter()
        self._waiting = {**figures, "seconds": self._last - last}

    def write(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        figures = {
            name: float(value) if isinstance(value, Tensor) else value
            for name, value in self._waiting.items()
        }
        self._waiting = {}
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(figures) + "\n")
        if self._accelerator is not None:
            shown = {name: value for name, value in figures.items() if name != "objective"}
            self._accelerator.log(shown, step=figures["step"])


def _begun(base: Backbone, recipe: Recipe, output: Path) -> tuple[SoftCompressor, dict[str, Tensor], int]:
    """The compressor after the newest checkpoint, the optimizer's moments, and the number of steps done."""
    from safetensors.torch import load_file

    done = _newest(output)
    if done is not None:
        compressor = checkpoint.load(base, done, trainable=True)
        return compressor, load_file(done / _MOMENTS), int(done.name.rpartition("-")[2])
    if recipe.start:
        compressor = checkpoint.load(base, recipe.start, trainable=True)
        recipe.check(compressor.config)
        return compressor, {}, 0
    torch.manual_seed(recipe.seed)
    compressor = SoftCompressor(base, recipe.compressor)
    compressor.finish(trainable=True)
    return compressor, {}, 0


def _end(compressor: SoftCompressor, base: Backbone, recipe: Recipe) -> None:
    """Mix the adapters of `start` in, value by value, if the recipe says so; then make ready for use."""
    if recipe.start_weight:
        start = checkpoint.load(base, recipe.start, trainable=True)
        with torch.no_grad():
            for (_, trained), (_, begun) in zip(compressor.trained(), start.trained(), strict=True):
                trained.mul_(1 - recipe.start_weight).add_(begun, alpha=recipe.start_weight)
    compressor.finish()


def _claim(output: Path, recipe: Recipe) -> None:
    """Write the recipe into its folder, or see that the same one is there; drop steps that were not saved."""
    file, described = output / "recipe.json", recipe.to_json()
    if file.exists() and file.read_text(encoding="utf-8") != described:
        raise CheckpointError(
            f"{output} holds a run of another recipe (see recipe.json there); choose another output, or give "
            "its adapter folder as start"
        )
    write_atomically(file, described.encode())
    newest = _newest(output)
    done = int(newest.name.rpartition("-")[2]) if newest else 0
    metrics = output / "metrics.jsonl"
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8").splitlines()[:done]
        write_atomically(metrics, "".join(line + "\n" for line in lines).encode())


def _newest(output: Path) -> Path | None:
    complete = [folder for folder in output.glob("checkpoint-*") if (folder / "config.json").exists()]
    return max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def _save(
    output: Path,
    compressor: SoftCompressor,
    moments: dict[str, Tensor],
    step: int,
    stages: list[dict[str, Any]],
) -> None:
    """Moments first, adapters with their `config.json` last; only then the older checkpoints go."""
    from safetensors.torch import save as to_bytes

    folder = output / f"checkpoint-{step}"
    write_atomically(folder / _MOMENTS, to_bytes(moments))
    checkpoint.save(compressor, folder, training=stages)
    for older in output.glob("checkpoint-*"):
        if older != folder:
            shutil.rmtree(older)


def _moments(optimizer: Any, trained: SoftCompressor) -> dict[str, Tensor]:
    """What the optimizer keeps of every parameter that has had a gradient; called on all processes."""
    return {
        f"{key}.{name}": gathered(optimizer.state[parameter][key]).cpu()
        for name, parameter in trained.trained()
        if parameter in optimizer.state
        for key in ("exp_avg", "exp_avg_sq", "step")
    }


def _restore(optimizer: Any, trained: SoftCompressor, moments: dict[str, Tensor]) -> None:
    for name, parameter in trained.trained():
        if f"step.{name}" in moments:
            optimizer.state[parameter] = {
                "step": moments[f"step.{name}"].to(parameter.device),
                "exp_avg": part(moments[f"exp_avg.{name}"], parameter),
                "exp_avg_sq": part(moments[f"exp_avg_sq.{name}"], parameter),
            }
