"""Whole training runs on the tiny random model: alone, stopped and taken up again, and on two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ctxcompress import Backbone, CheckpointError, ConfigError, checkpoint
from ctxcompress.errors import InputError, MissingExtraError
from ctxcompress.train.loop import train
from ctxcompress.train.recipe import Recipe

pytest.importorskip("accelerate", reason="the extra train")

WORDS = [
    f"{size} {name}" for size in ("red", "old", "far", "new") for name in ("owl", "ship", "hill", "moon")
]
SOFT = {
    "ratio_set": [2, 4], "encoder_layers": 2, "converter_size": 32, "encoder_rank": 4, "decoder_rank": 4,
    "window": 64,
}  # fmt: skip
ALONE = {
    "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo",
}  # fmt: skip
"""Environment of a process on the CPU that speaks with this machine only."""
WORKER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from ctxcompress import checkpoint
from ctxcompress.train import data, loop
from ctxcompress.train.recipe import Recipe

recipe, fault = Recipe.read(Path(sys.argv[1])), "".join(sys.argv[2:3])
if "float32" in sys.argv:
    loop.native_dtype = lambda place: torch.float32
if os.environ.get("ACCELERATE_USE_FSDP"):
    # accelerate shards on GPUs only, torch on CPUs as well: it is told that these are GPUs.
    from accelerate.state import DistributedType, PartialState

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def progress(stage, done, total):
    if fault == f"after step {done}":
        die()

if fault == "inside save":
    checkpoint.save = die
drawn = data.Samples.batch
def batch(self, number):
    got = drawn(self, number)
    with open(f"{sys.argv[1]}.{os.environ.get('RANK', 0)}", "a") as stream:
        print(number, got.ratio, file=stream)
    return got
data.Samples.batch = batch
loop.train(recipe, progress)
"""
"""Runs the recipe argv[1], dies as argv[2] says, computes in argv[3], and notes what every process sees."""


def written(folder: Path, tiny_model: Path, **changed: Any) -> Path:
    """A recipe file in `folder` with its data."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(WORDS[(start + 3 * place) % 16] for place in range(40)) for start in range(4)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(lines, encoding="utf-8")
    settings = {
        "output": "run", "base": str(tiny_model), "texts": ["texts.jsonl"], "tokens": [6, 12], "steps": 8,
        "batch_size": 2, "learning_rate": 0.01, "warmup": 2, "save_every": 3, "seed": 5,
    } | changed  # fmt: skip
    tables = {
        "objectives": {"reconstruction": 1, "continuation": 1},
        "ratios": {1: 1, 2: 1, 4: 1},
        "compressor": SOFT,
    } | {name: settings.pop(name) for name in ("objectives", "ratios", "compressor") if name in settings}
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    for table, values in tables.items():
        text += f"[{table}]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def tensors(folder: Path) -> dict[str, Tensor]:
    """Everything the last checkpoint and the adapter of a run hold."""
    run = folder / "run"
    return {
        f"{file.relative_to(run)}:{name}": tensor
        for file in sorted(run.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def run_worker(
    recipe: Path, *arguments: str, launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    script = recipe.with_name("worker.py")
    script.write_text(WORKER, encoding="utf-8")
    return subprocess.run(
        [sys.executable, *launcher, str(script), str(recipe), *arguments],
        env={**os.environ, **ALONE, **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_killed_runs_go_on_as_if_nothing_had_happened(tiny_model: Path, tmp_path: Path) -> None:
    through, killed = (written(tmp_path / name, tiny_model) for name in ("through", "killed"))
    train(Recipe.read(through))
    # Steps 1-5, saved after 3: steps 4 and 5 are done twice. The second run dies while it saves step 6.
    assert run_worker(killed, "after step 5").returncode == -signal.SIGKILL
    assert len(metrics(killed.parent)) == 4  # the last one waits for the next step
    assert run_worker(killed, "inside save").returncode == -signal.SIGKILL
    run = killed.parent / "run"
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    assert not (run / "checkpoint-6" / "config.json").exists()
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 6, "gra')  # what a kill inside a write leaves
    train(Recipe.read(killed))
    assert metrics(killed.parent) == metrics(through.parent)
    assert [line["step"] for line in metrics(killed.parent)] == list(range(8))
    expected, got = tensors(through.parent), tensors(killed.parent)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-8"}


def test_loss_falls_and_the_base_stays(tiny_model: Path, tmp_path: Path) -> None:
    recipe = Recipe.read(
        written(
            tmp_path, tiny_model, steps=60, tokens=[12, 12], learning_rate=0.03, save_every=60, batch_size=4,
            objectives={"reconstruction": 1}, ratios={2: 1},
        )
    )  # fmt: skip
    compressor = train(recipe)
    nll = [line["nll"] for line in metrics(tmp_path)]
    assert sum(nll[-5:]) < 0.7 * sum(nll[:5])
    base = Backbone.from_pretrained(tiny_model, device="cpu").model.state_dict()
    for part in (compressor.decoder_model, compressor.encoder):
        own = {name.replace(".base_layer", ""): value for name, value in part.state_dict().items()}
        prefix = "" if part is compressor.decoder_model else "model."
        shared = {name for name in own if "lora_" not in name}
        assert len(shared) > 10
        assert all(torch.equal(own[name], base[prefix + name]) for name in shared)


def test_finished_run_is_not_repeated_and_another_recipe_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    recipe = written(tmp_path, tiny_model, steps=2)
    first = train(Recipe.read(recipe))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train(Recipe.read(recipe)).fingerprint == first.fingerprint
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    changed = Recipe.read(written(tmp_path, tiny_model, steps=3))
    with pytest.raises(CheckpointError, match="choose another output, or give its adapter folder as start"):
        train(changed)


def test_start_goes_on_from_an_adapter(tiny_model: Path, tmp_path: Path) -> None:
    train(Recipe.read(written(tmp_path / "first", tiny_model, steps=3)))
    adapter = tmp_path / "first" / "run" / "adapter"
    # Steps too small to move a bfloat16 or float32 weight: what comes out is what went in.
    still = {"start": str(adapter), "learning_rate": 1e-30, "steps": 1, "compressor": {"decoder_rank": 8}}
    train(Recipe.read(written(tmp_path / "second", tiny_model, **still)))
    before, after = (
        {name: value for name, value in tensors(tmp_path / run).items() if name.startswith("adapter/")}
        for run in ("first", "second")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    described = [checkpoint.describe(tmp_path / run / "run" / "adapter") for run in ("first", "second")]
    assert described[0]["compressor"] == described[1]["compressor"]


def test_a_part_of_the_start_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    train(Recipe.read(written(tmp_path / "first", tiny_model, steps=3)))
    start = tmp_path / "first" / "run" / "adapter"
    recipe = written(tmp_path / "second", tiny_model, start=str(start), steps=4, start_weight=0.25)
    train(Recipe.read(recipe))
    ends = tensors(tmp_path / "second")
    for name, before in tensors(tmp_path / "first").items():
        if not name.startswith("adapter/"):
            continue
        trained, after = ends[name.replace("adapter", "checkpoint-4", 1)].float(), ends[name].float()
        wanted = 0.75 * trained + 0.25 * before.float()
        # The adapter is written in bfloat16, whose numbers have eight bits.
        assert torch.allclose(after, wanted, rtol=2**-8, atol=0)


def test_start_and_recipe_must_fit(tiny_model: Path, tmp_path: Path) -> None:
    train(Recipe.read(written(tmp_path / "first", tiny_model, steps=1)))
    start = str(tmp_path / "first" / "run" / "adapter")
    ratio = written(tmp_path / "ratio", tiny_model, start=start, ratios={8: 1})
    with pytest.raises(ConfigError, match=r"of the ratio_set \[2, 4\], got \[8\]"):
        train(Recipe.read(ratio))
    absent = written(tmp_path / "absent", tiny_model, start=str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="check the path"):
        train(Recipe.read(absent))


def test_answers_with_distillation_and_tensorboard(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard")
    tmp_path.joinpath("questions.jsonl").write_text(
        json.dumps({
            "question": "Who hunts?", "answers": ["owls"],
            "documents": [{"title": "Owl", "text": "At night owls hunt.", "is_gold": True}],
        }), encoding="utf-8",
    )  # fmt: skip
    changed = {"questions": ["questions.jsonl"], "objectives": {"answer": 1}, "ratios": {2: 1}, "steps": 2}
    recipe = written(tmp_path, tiny_model, **changed, tensorboard=True, distillation=0.5, longest_document=60)
    told: list[tuple[str, int, int]] = []
    train(Recipe.read(recipe), progress=lambda *args: told.append(args))
    assert told == [("training", 1, 2), ("training", 2, 2)]
    for line in metrics(tmp_path):
        assert line["loss"] == pytest.approx(line["nll"] + 0.5 * line["kl"], rel=1e-5)
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    content = events.read_bytes()
    assert all(name in content for name in (b"nll", b"kl", b"lr", b"gradient"))


def test_tensorboard_that_is_missing_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"ctxcompress\[tensorboard\]"):
        train(Recipe.read(written(tmp_path, tiny_model, tensorboard=True)))


# With --cpu, `accelerate launch` starts one process, whatever --num_processes says.
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--local_addr", "127.0.0.1")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch --use_fsdp --fsdp_version 2` tells its processes."""


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["whole", "sharded"])
def test_two_processes_equal_twice_the_accumulation(
    tiny_model: Path, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # In bfloat16 a sum in another order soon makes other weights.
    monkeypatch.setattr("ctxcompress.train.loop.native_dtype", lambda place: torch.float32)
    settings: dict[str, Any] = {"steps": 7, "save_every": 4, "tensorboard": True, "seed": 1}
    alone = written(tmp_path / "alone", tiny_model, **settings, accumulation=2)
    both = written(tmp_path / "both", tiny_model, **settings)
    train(Recipe.read(alone))
    assert run_worker(both, "after step 5", "float32", launcher=TWO, **environment).returncode != 0
    done = run_worker(both, "to the end", "float32", launcher=TWO, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [Path(f"{both}.{rank}").read_text(encoding="utf-8").splitlines() for rank in range(2)]
    seen = [[tuple(map(int, line.split())) for line in own] for own in lines]
    # Steps 0 to 4, and after the checkpoint of four steps 4 to 6; step n is batch 2n here and 2n + 1 there.
    for rank in range(2):
        assert [number for number, _ in seen[rank]] == [2 * n + rank for n in (0, 1, 2, 3, 4, 4, 5, 6)]
    # Both have one ratio; 1 leaves the encoder without a gradient.
    ratios = {(one, other) for (_, one), (_, other) in zip(*seen, strict=True)}
    assert {(1, 1), (4, 4)} <= ratios <= {(1, 1), (2, 2), (4, 4)}
    # Of the scale, a scalar, FSDP keeps vectors of one.
    expected, got = (
        {name: tensor.flatten() for name, tensor in tensors(run.parent).items()} for run in (alone, both)
    )
    assert expected.keys() == got.keys()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_sharded_runs_say_what_they_need(tiny_model: Path, tmp_path: Path) -> None:
    text = (path := written(tmp_path, tiny_model)).read_text(encoding="utf-8")
    path.write_text(f"mixed = 0.5\n{text}", encoding="utf-8")
    for environment, message in (
        (FSDP, "mixed must be 0 under FSDP"),
        ({**FSDP, "FSDP_VERSION": "1"}, "launch with --fsdp_version 2"),
    ):
        done = run_worker(path, launcher=TWO, **environment)
        assert done.returncode != 0
        assert message in done.stderr


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on one core
def test_workers_change_nothing(tmp_path: Path, tiny_model: Path) -> None:
    alone, helped = (
        written(tmp_path / "alone", tiny_model),
        written(tmp_path / "helped", tiny_model, workers=2),
    )
    for recipe in (alone, helped):
        train(Recipe.read(recipe))
    assert metrics(alone.parent) == metrics(helped.parent)
    assert len(metrics(alone.parent)) == 8
    one, other = tensors(alone.parent), tensors(helped.parent)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_errors_in_workers_are_told_as_elsewhere(tmp_path: Path, tiny_model: Path) -> None:
    recipe = written(tmp_path, tiny_model, workers=1, tokens=[12, 12], objectives={"reconstruction": 1})
    (tmp_path / "texts.jsonl").write_text('{"text": "too short"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"^no text of 12 tokens in 100 draws"):
        train(Recipe.read(recipe))
