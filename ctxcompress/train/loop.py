"""The training loop: batches -> steps -> adapters, on a CPU, a GPU, or many through `accelerate launch`.

    OUTPUT/recipe.json        what made the run
    OUTPUT/metrics.jsonl      one line per step
    OUTPUT/checkpoint-N/      adapters in float32 and the optimizer's moments after N steps; the newest stays,
                              and another run may start from it
    OUTPUT/adapter/           the adapters of the last step in the base's dtype, ready to be loaded

Learning rate and samples are functions of the seed and the step, and nothing else is random, so adapters,
moments and a step number are all that is needed to go on exactly, on as many processes as before.
"""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctxcompress import checkpoint
from ctxcompress.backbone import Backbone, native_dtype
from ctxcompress.calibration import Calibration
from ctxcompress.errors import CheckpointError, MissingExtraError
from ctxcompress.files import write_atomically
from ctxcompress.methods.dac import Progress
from ctxcompress.soft import SoftCompressor
from ctxcompress.train.data import Samples
from ctxcompress.train.losses import Objective
from ctxcompress.train.recipe import Recipe

_MOMENTS = "optimizer.safetensors"


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
        ConfigError: the recipe does not fit the adapters it starts from.
    """
    from peft.helpers import disable_input_dtype_casting

    accelerator = _accelerator(recipe)
    output = Path(recipe.output)
    if accelerator.is_main_process:
        _claim(output, recipe)
    accelerator.wait_for_everyone()
    if recipe.tensorboard:
        accelerator.init_trackers("ctxcompress")
    base = Backbone.from_pretrained(recipe.base, device=accelerator.device)
    compressor, moments, first = _begun(base, recipe, output)
    heads = Calibration.for_model(base.name, *base.layers_heads).heads
    model = Objective(compressor, recipe.distillation, recipe.attention, heads)
    names = dict(compressor.trained())
    optimizer = torch.optim.AdamW(
        names.values(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    _restore(optimizer, names, moments)
    model, optimizer = accelerator.prepare(model, optimizer)
    samples = Samples(recipe, base)
    for step in range(first, recipe.steps):
        started = time.perf_counter()
        # PEFT would widen every input to the adapters' float32, and autocast make it bfloat16 again.
        with disable_input_dtype_casting(model):
            figures = _step(accelerator, model, optimizer, samples, recipe, step)
        if accelerator.is_main_process:
            figures["seconds"] = time.perf_counter() - started
            _log(output, figures)
            if recipe.tensorboard:
                accelerator.log({key: figures[key] for key in figures if key != "objective"}, step=step)
            if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
                stages = [*_earlier(recipe), _stage(recipe, output, accelerator.num_processes)]
                _save(output, compressor, optimizer, step + 1, stages)
        if progress is not None:
            progress("training", step + 1, recipe.steps)
    compressor.finish()
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
    for name in ("base", "compressor", "notice", "output", "start", "save_every", "tensorboard"):
        del settings[name]
    for name in ("texts", "questions"):
        settings[name] = [Path(file).name for file in settings[name]]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ends: dict[str, list[float]] = {}
    for line in lines[-max(len(lines) // 5, 1) :]:
        ends.setdefault(f"{line['objective']} at {line['ratio']}", []).append(line["nll"])
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
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Accelerator(
        # Adapters stay float32 but multiply in bfloat16 where the base does: a fifth faster on a CPU.
        mixed_precision="bf16" if native_dtype(place) == torch.bfloat16 else "no",
        gradient_accumulation_steps=recipe.accumulation,
        # No loss reaches the ratio head, and none of raw text the encoder.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with="tensorboard" if recipe.tensorboard else None,
        project_dir=recipe.output,
    )


def _step(
    accelerator: Any, model: Any, optimizer: Any, samples: Samples, recipe: Recipe, step: int
) -> dict[str, Any]:
    """One optimizer step; figures of this process's last batch."""
    rate = learning_rate(recipe, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    figures: dict[str, Any] = {"step": step}
    for part in range(recipe.accumulation):
        batch = samples.batch(
            (step * recipe.accumulation + part) * accelerator.num_processes + accelerator.process_index
        )
        with accelerator.accumulate(model):
            losses = model(batch)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                figures["gradient"] = float(accelerator.clip_grad_norm_(model.parameters(), recipe.clip))
            optimizer.step()
            optimizer.zero_grad()
        figures |= {"objective": batch.objective, "ratio": batch.ratio, **_numbers(losses)}
    return {**figures, "lr": rate}


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
    output: Path, compressor: SoftCompressor, optimizer: Any, step: int, stages: list[dict[str, Any]]
) -> None:
    """Moments first, adapters with their `config.json` last; only then the older checkpoints go."""
    from safetensors.torch import save as to_bytes

    folder = output / f"checkpoint-{step}"
    state = optimizer.state_dict()["state"]
    tensors = {
        f"{key}.{name}": state[place][key].cpu()
        for place, (name, _) in enumerate(compressor.trained())
        if place in state
        for key in ("exp_avg", "exp_avg_sq", "step")
    }
    write_atomically(folder / _MOMENTS, to_bytes(tensors))
    checkpoint.save(compressor, folder, training=stages)
    for older in output.glob("checkpoint-*"):
        if older != folder:
            shutil.rmtree(older)


def _restore(optimizer: torch.optim.Optimizer, names: dict[str, Any], moments: dict[str, Tensor]) -> None:
    for name, parameter in names.items():
        state = {
            key: moments[f"{key}.{name}"].to(parameter.device if key != "step" else "cpu")
            for key in ("exp_avg", "exp_avg_sq", "step")
            if f"{key}.{name}" in moments
        }
        if state:
            optimizer.state[parameter] = state


def _numbers(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in losses.items()}


def _log(output: Path, figures: dict[str, Any]) -> None:
    with (output / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(figures) + "\n")
