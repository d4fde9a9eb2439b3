"""Runs with train.compile = "blocks": they train as eager ones do, and go on where they were killed.

By aot_eager, which traces, makes and runs graphs as Inductor does and leaves code generation out: a
minute a run on a CPU. One test has Inductor.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fasttune.checkpoint import list_checkpoints
from fasttune.config_file import load_config
from fasttune.metrics import read_metrics
from fasttune.models.compiled import Compiler
from fasttune.train import train

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one size, and a cache that the tests share."""
    root = tmp_path_factory.mktemp("compiled")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    for number in range(4):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        small.resize((64, 64)).save(root / "images" / f"{number}.png")
        (root / "images" / f"{number}.txt").write_text(f"image {number}")
    return root


@pytest.fixture
def run(data: Path, tmp_path: Path, tiny_sdxl: Path, tiny_flux: Path) -> Run:
    """run(family, name, resume=None, **overrides): trains, returns the run folder."""
    folders = {"sdxl": tiny_sdxl, "flux": tiny_flux}

    def go(family: str, name: str, resume: str | None = None, **overrides: Any) -> Path:
        keys = {
            "run.output_dir": str(tmp_path),
            "run.name": name,
            "run.device": "cpu",
            "model.family": family,
            "model.path": str(folders[family]),
            "adapter.rank": 4,
            "adapter.targets": "all-linear",
            "adapter.dropout": 0.1,
            "cache.dir": str(data / "cache"),
            "train.steps": 4,
            "train.gradient_accumulation": 2,
            "train.compile": "blocks",
            "optimizer.lr": 1e-3,
            "ema.enabled": "true",
            "validation.every": 0,
            "checkpoint.every": 2,
            "logging.every": 1,
        } | {key.replace("__", "."): value for key, value in overrides.items()}
        path = tmp_path / "config.toml"
        path.write_text(f'[[data]]\npath = "{data / "images"}"\nresolution = 64\n')
        assert train(load_config(path, [f"{k}={v}" for k, v in keys.items()]), resume=resume) == 0
        return tmp_path / name

    return go


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Compiler.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(Compiler.__init__.__kwdefaults__, "backend", "aot_eager")
    torch.compiler.reset()


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All of the last checkpoint: weights, optimizer, average."""
    newest = list_checkpoints(folder / "checkpoints")[-1]
    assert newest.name == "step-000004"
    return {
        f"{file.stem}/{key}": tensor
        for file in sorted(newest.glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }


def check_same_training(compiled: Path, eager: Path) -> None:
    """Losses and adapters agree as far as float32 sums of another order can."""
    np.testing.assert_allclose(losses(compiled), losses(eager), rtol=1e-4)
    expected = tensors(eager)
    for key, tensor in tensors(compiled).items():
        if key.startswith("trainable/"):
            assert (tensor - expected[key]).norm() <= 1e-3 * expected[key].norm(), key


@pytest.mark.usefixtures("aot_eager")
@pytest.mark.parametrize(
    ("family", "activations"),
    [
        ("flux", "int8"),
        *(
            pytest.param(family, activations, marks=pytest.mark.slow)
            for family in ("flux", "sdxl")
            for activations in ("save", "int8", "recompute")
            if (family, activations) != ("flux", "int8")
        ),
    ],
)
def test_compiled_runs_train_and_resume(
    run: Run, tmp_path: Path, family: str, activations: str
) -> None:
    kept = {"memory__activations": activations}
    whole = run(family, "whole", **kept)
    found = json.loads((whole / "summary.json").read_text())
    assert found["compiled"]["graphs"] > 0 and found["compiled"]["given_up"] is None
    assert 0 < found["compiled"]["seconds"] < found["first_step_s"] < found["elapsed_s"] + 60
    log = (whole / "run.log").read_text()
    assert f"{found['compiled']['graphs']} graphs in " in log
    check_same_training(whole, run(family, "eager", train__compile="off", **kept))

    # As killed after step 2: a run that stopped there has left just this.
    shutil.copytree(whole, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step-000004")
    part = run(family, "part", resume="latest", **kept)
    again, once = tensors(part), tensors(whole)
    assert losses(part) == losses(whole) and again.keys() == once.keys()
    assert not [key for key in once if not torch.equal(once[key], again[key])]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler here")
def test_inductor_trains_as_eager_mode_does(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Twice: the second run finds every graph in the cache of the first."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    cold, warm = run("flux", "cold"), run("flux", "warm")
    found = [json.loads((p / "summary.json").read_text())["compiled"] for p in (cold, warm)]
    assert found[0]["from_cache"] == 0 < found[0]["graphs"]
    assert found[1]["from_cache"] == found[1]["graphs"] == found[0]["graphs"]
    assert found[1]["seconds"] < found[0]["seconds"]
    assert losses(warm) == losses(cold)
    check_same_training(cold, run("flux", "eager", train__compile="off"))
