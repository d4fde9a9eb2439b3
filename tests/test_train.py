"""The loop end to end on tiny random models: determinism, resume, signals, refusals."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fasttune.checkpoint import list_checkpoints
from fasttune.config_file import load_config
from fasttune.errors import CheckpointError, TrainingError
from fasttune.metrics import read_metrics
from fasttune.train import train

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ROOT = Path(__file__).parents[1]

DRAWS = {"adapter__dropout": 0.1, "train__gradient_accumulation": 2}
"""What draws in the middle of a step, and has one go on in the next micro-batch."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images and a cache that the tests of this module share."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    for number in range(7):
        small = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        size = (64, 64) if number % 2 else (96, 64)
        image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        image.save(root / "images" / f"{number}.png")
        (root / "images" / f"{number}.txt").write_text(f"image {number}")
    (root / "held out").mkdir()
    for name in ("0.png", "0.txt", "1.png", "1.txt"):
        shutil.copy(root / "images" / name, root / "held out" / name)
    return root


@pytest.fixture
def write_config(data, tmp_path, tiny_sdxl):
    def write(**overrides):
        keys = {
            "run.output_dir": str(tmp_path / "runs"),
            "run.name": "r",
            "run.device": "cpu",
            "model.family": "sdxl",
            "model.path": str(tiny_sdxl),
            "adapter.rank": 4,
            "adapter.alpha": 4,
            "memory.activations": "save",
            "cache.dir": str(data / "cache"),
            "train.steps": 6,
            "train.batch_size": 2,
            "optimizer.lr": 1e-3,
            "schedule.name": "cosine",
            "schedule.warmup_steps": 2,
            "ema.enabled": "true",
            "validation.every": 0,
            "checkpoint.every": 2,
            "logging.every": 1,
        } | {key.replace("__", "."): value for key, value in overrides.items()}
        if keys.get("adapter.type") == "none":
            keys = {k: v for k, v in keys.items() if k == "adapter.type" or k[:8] != "adapter."}
        path = tmp_path / "config.toml"
        path.write_text(f'[[data]]\npath = "{data / "images"}"\nresolution = 64\n')
        return path, [f"{key}={value}" for key, value in keys.items()]

    return write


@pytest.fixture
def run(write_config, tmp_path):
    def go(resume=None, **overrides):
        path, keys = write_config(**overrides)
        status = train(load_config(path, keys), resume=resume)
        names = sorted((tmp_path / "runs").iterdir(), key=lambda p: p.stat().st_mtime_ns)
        return status, names[-1]

    return go


def state(run_dir):
    """All tensors of the newest checkpoint."""
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    return newest.name, {
        f"{file.stem}/{key}": tensor
        for file in sorted(newest.glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }


def losses(run_dir):
    lines = read_metrics(run_dir / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def assert_same_end(a, b):
    (name_a, state_a), (name_b, state_b) = state(a), state(b)
    assert name_a == name_b and state_a.keys() == state_b.keys()
    different = [key for key in state_a if not torch.equal(state_a[key], state_b[key])]
    assert not different
    assert losses(a) == losses(b)


@pytest.mark.slow  # resuming ends with the same bits only where running twice does
def test_twice_the_same_config_gives_bitwise_the_same_losses_and_weights(run, tmp_path):
    _, first = run(**DRAWS)
    _, second = run(**DRAWS)
    assert first.name == "r" and second.name == "r-2"  # nothing is written over
    assert_same_end(first, second)
    assert len(losses(first)) == 6
    trained = {k: v for k, v in state(first)[1].items() if k.startswith("trainable/")}
    assert all(v.abs().max() > 0 for v in trained.values())  # lora_B left zero
    _, third = run(**DRAWS, run__seed=43, train__steps=3)
    assert all(loss != losses(first)[step] for step, loss in losses(third).items())


def test_the_resolved_config_gives_the_same_run(run, tmp_path):
    _, first = run()
    config = load_config(first / "config.toml", [])
    assert train(config) == 0
    assert_same_end(first, tmp_path / "runs" / "r-2")


@pytest.mark.parametrize(
    "overrides",
    [
        DRAWS,
        DRAWS | {"precision__compute": "fp16", "memory__activations": "recompute"},
        {"precision__compute": "bf16", "precision__base": "bf16", "adapter__type": "none"},
        *(
            pytest.param(
                {"adapter__type": "none", "optimizer__name": name, "optimizer__lr": lr},
                marks=pytest.mark.slow,
            )
            for name, lr in (("adafactor", 1e-4), ("lion", 1e-5))
        ),
    ],
    ids=["lora", "fp16", "full-bf16", "full-adafactor", "full-lion"],
)
def test_stopping_in_the_middle_and_resuming_changes_nothing(run, tmp_path, monkeypatch, overrides):
    _, whole = run(**overrides, run__name="whole")
    import fasttune.trained

    update = fasttune.trained.Trained.update

    def killed(self, step):
        if step == 4:
            raise SystemExit("killed")
        return update(self, step)

    monkeypatch.setattr(fasttune.trained.Trained, "update", killed)
    with pytest.raises(SystemExit):
        run(**overrides, run__name="part")
    monkeypatch.setattr(fasttune.trained.Trained, "update", update)
    part = tmp_path / "runs" / "part"
    assert state(part)[0] == "step-000002"
    run(resume="latest", **overrides, run__name="part")
    assert_same_end(whole, part)


DIES_WRITING_STEP_8 = """
import os, signal, sys
import fasttune.checkpoint, fasttune.cli
write = fasttune.checkpoint.write_tensors
def dies(path, *args, **kwargs):
    if path.parent.name.startswith(".step-000008") and path.name.startswith("optimizer"):
        path.write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, *args, **kwargs)
fasttune.checkpoint.write_tensors = dies
sys.exit(fasttune.cli.main(sys.argv[1:]))
"""


def start(path, keys, *more, program=("-m", "fasttune")):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *program, "train", str(path), *keys, *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process, done, seconds=120):
    end = time.monotonic() + seconds
    while not done() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def test_sigkill_at_any_moment_then_resume_ends_with_the_same_weights(write_config, tmp_path, run):
    """Killed three times: after the first checkpoints, while a checkpoint is being written, and
    after some more steps."""
    options = {"train__steps": 16, "checkpoint__every": 1, "adapter__dropout": 0.1}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _, whole = run(run__name="whole", **options)
    finally:
        torch.set_num_threads(threads)
    path, keys = write_config(run__name="killed", **options)
    folder = tmp_path / "runs" / "killed" / "checkpoints"

    def newest():
        found = list_checkpoints(folder)
        return int(found[-1].name[5:]) if found else 0

    def kill(process, when):
        wait_for(process, when)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output

    kill(start(path, keys), lambda: newest() >= 2)
    assert 2 <= newest() < 8
    process = start(path, keys, "--resume", "latest", program=("-c", DIES_WRITING_STEP_8))
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    (left,) = folder.glob(".step-000008.tmp-*")
    assert (left / "optimizer.safetensors").read_bytes() == b"half a file"
    assert (left / "trainable.safetensors").is_file() and newest() == 7
    kill(start(path, keys, "--resume", "latest"), lambda: newest() >= 10)
    assert 10 <= newest() < 16 and not left.exists()
    process = start(path, keys, "--resume", "latest")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert_same_end(whole, tmp_path / "runs" / "killed")
    assert len(list_checkpoints(folder)) == 2  # checkpoint.keep


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_leaves_with_a_message(write_config, tmp_path, number):
    path, keys = write_config(train__steps=100000, checkpoint__every=0)
    process = start(path, keys)
    metrics = tmp_path / "runs" / "r" / "metrics.jsonl"
    wait_for(process, lambda: len(read_metrics(metrics)) >= 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    assert f"by {number.name}" in output
    assert f"config.toml --resume {tmp_path / 'runs' / 'r'}\n" in output
    step = int(re.search(r"stopped at step (\d+)", output)[1])
    assert state(tmp_path / "runs" / "r")[0] == f"step-{step:06d}"
    assert (tmp_path / "runs" / "r" / "report.html").is_file()


def test_a_loss_that_is_not_finite_stops_with_step_images_and_last_checkpoint(run, monkeypatch):
    import fasttune.trained

    update = fasttune.trained.Trained.update

    def poisoned(self, step):
        norm = update(self, step)
        if step == 3:
            with torch.no_grad():
                next(iter(self.parameters.values())).fill_(float("nan"))
        return norm

    monkeypatch.setattr(fasttune.trained.Trained, "update", poisoned)
    with pytest.raises(TrainingError) as error:
        run(logging__every=5)
    message = str(error.value)
    assert "step 4 is not finite" in message
    assert re.search(r"images/\d\.png", message)
    assert "step-000002" in message and "--resume latest" in message


def test_a_checkpoint_of_another_model_adapter_or_optimizer_is_refused(run):
    _, folder = run()
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match="shape"):
        run(resume="latest", adapter__rank=8)
    with pytest.raises(CheckpointError, match="another model or adapter"):
        run(resume="latest", adapter__type="none")
    with pytest.raises(CheckpointError, match="optimizer.name = 'adamw'"):
        run(resume="latest", optimizer__name="lion")
    with pytest.raises(CheckpointError, match="beyond train.steps"):
        run(resume="latest", train__steps=3)
    with pytest.raises(CheckpointError, match="'ema'"):
        run(resume="latest", ema__enabled="false")
    with pytest.raises(CheckpointError, match=r"adapter\.alpha = 4.*says 8"):
        run(resume="latest", adapter__alpha=8)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        run(resume="latest", run__name="other")
    after = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {k: v for k, v in after.items() if k.name != "run.log"} == {
        k: v for k, v in before.items() if k.name != "run.log"
    }  # a refused resume changes nothing


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(run, monkeypatch):
    """The loss of the last step is fine, its gradient is not: nothing bad may be saved."""
    import fasttune.trained

    update = fasttune.trained.Trained.update

    def poisoned(self, step):
        if step == 6:
            next(iter(self.parameters.values())).grad[0] = float("nan")
        return update(self, step)

    monkeypatch.setattr(fasttune.trained.Trained, "update", poisoned)
    with pytest.raises(TrainingError, match=r"gradient of step 6 .*step-000004"):
        run(logging__every=100)


def test_resume_warns_of_what_changed_and_takes_the_run_it_is_given(run, tmp_path, caplog):
    _, first = run(train__steps=2, schedule__warmup_steps=0)
    run(train__steps=2, schedule__warmup_steps=0, run__name="r")
    more = {"train__steps": 3, "schedule__warmup_steps": 0}
    run(resume=str(first), **more, run__seed=7)
    assert "run.seed: was 42, now 7" in caplog.text and "train.steps: was 2, now 3" in caplog.text
    assert state(first)[0] == "step-000003"
    assert state(tmp_path / "runs" / "r-2")[0] == "step-000002"
    caplog.clear()
    run(resume="latest", **more)
    assert (
        "resuming the run in" in caplog.text
        and state(tmp_path / "runs" / "r-2")[0] == "step-000003"
    )
    assert "run.seed: was" not in caplog.text


def test_going_back_sets_later_checkpoints_aside(run):
    _, folder = run(checkpoint__keep=0)
    run(resume=str(folder / "checkpoints" / "step-000002"), checkpoint__keep=1)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["abandoned-step-000004", "abandoned-step-000006", "step-000006"]


def test_two_processes_cannot_train_in_one_folder(run):
    _, folder = run(train__steps=2, schedule__warmup_steps=0)
    from fasttune.run_folder import locked

    with locked(folder), pytest.raises(CheckpointError, match="another process"):
        run(resume=str(folder), train__steps=3, schedule__warmup_steps=0)


def test_a_validation_that_was_killed_is_made_up_for(run, data, monkeypatch):
    import fasttune.train

    options = {
        "validation__every": 2,
        "validation__held_out_path": str(data / "held out"),
        "train__steps": 4,
    }
    validate = fasttune.train.Validator.run

    def killed(self, step, *rest):
        if step == 4:
            raise SystemExit("killed")
        validate(self, step, *rest)

    monkeypatch.setattr(fasttune.train.Validator, "run", killed)
    with pytest.raises(SystemExit):
        run(**options)
    monkeypatch.undo()
    _, folder = run(resume="latest", **options)
    steps = [x["step"] for x in read_metrics(folder / "metrics.jsonl") if "held_out_loss" in x]
    assert steps == [0, 2, 4]
    run(resume="latest", **options)
    again = [x["step"] for x in read_metrics(folder / "metrics.jsonl") if "held_out_loss" in x]
    assert again == steps


def test_no_step_waits_for_the_device(run, monkeypatch):
    """Reading a value on the host is one operator, whatever the device: more steps, no more reads."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (
                torch.ops.aten._local_scalar_dense,
                torch.ops.aten.nonzero,
                torch.ops.aten.masked_select,
                torch.ops.aten.is_nonzero,
            ):
                self.count += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for steps in (1, 2, 7):  # the first fills the cache
        with Reads() as reads:
            run(
                train__steps=steps,
                logging__every=100,
                checkpoint__every=0,
                schedule__warmup_steps=0,
                precision__compute="fp16",
                objective__offset_noise=0.1,
                objective__min_snr_gamma=5.0,
            )
        counts.append(reads.count)
    assert counts[1] == counts[2]


def test_resuming_can_train_longer_and_a_finished_run_is_left_as_it_is(run, tmp_path):
    run(train__steps=2, schedule__name="constant_with_warmup", schedule__warmup_steps=0)
    _, longer = run(
        resume="latest",
        train__steps=4,
        schedule__name="constant_with_warmup",
        schedule__warmup_steps=0,
    )
    assert longer.name == "r" and state(longer)[0] == "step-000004"
    before = state(longer)[1]
    _, again = run(
        resume=str(longer),
        train__steps=4,
        schedule__name="constant_with_warmup",
        schedule__warmup_steps=0,
    )
    assert again == longer and all(torch.equal(before[k], v) for k, v in state(again)[1].items())


def test_validation_writes_grids_with_the_untrained_model_first_and_a_fixed_held_out_loss(
    run, data
):
    _, folder = run(
        validation__every=2,
        validation__prompts='["image 1", "image 2"]',
        validation__sampling_steps=2,
        validation__held_out_path=str(data / "held out"),
        train__steps=4,
        optimizer__lr=0.0001,
    )
    grids = sorted(p.name for p in (folder / "samples").glob("*.png"))
    assert grids == ["step-000000.png", "step-000002.png", "step-000004.png"]
    from PIL import Image

    widths = []
    for grid in grids:
        with Image.open(folder / "samples" / grid) as image:
            widths.append(image.width)
    assert widths[0] < widths[1] == widths[2]  # the untrained column is the first of two
    lines = [x for x in read_metrics(folder / "metrics.jsonl") if "held_out_loss" in x]
    assert [x["step"] for x in lines] == [0, 2, 4]
    assert lines[0]["held_out_loss"] != lines[-1]["held_out_loss"]
    _, still = run(
        validation__every=2,
        validation__held_out_path=str(data / "held out"),
        train__steps=4,
        optimizer__lr=1e-30,
    )
    lines = [x for x in read_metrics(still / "metrics.jsonl") if "held_out_loss" in x]
    assert len({x["held_out_loss"] for x in lines}) == 1  # nothing else moves it


def test_flux_trains_and_a_lora_of_any_layout_starts_a_new_training(run, tiny_flux):
    flux = {
        "model__family": "flux",
        "model__path": str(tiny_flux),
        "train__steps": 3,
        "adapter__dropout": 0.0,
        "ema__enabled": "false",
        "export__formats": '["peft", "kohya", "comfyui"]',
        "export__dtype": "fp32",
    }
    _, first = run(**flux)
    trained = state(first)[1]
    files = sorted((first / "weights").glob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        _, second = run(
            **flux
            | {
                "adapter__init_from": str(file),
                "optimizer__lr": 1e-30,
                "schedule__warmup_steps": 0,
                "train__steps": 1,
            }
        )
        started = state(second)[1]
        for key in (k for k in trained if k.startswith("trainable/") and k.endswith("lora_A")):
            up = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(
                started[up] @ started[key], trained[up] @ trained[key], rtol=1e-4, atol=1e-7
            )


def test_the_log_file_has_what_was_said_before_the_folder_existed(run):
    logging.getLogger("fasttune").setLevel(logging.DEBUG)
    _, folder = run(train__steps=1, schedule__warmup_steps=0)
    text = (folder / "run.log").read_text()
    assert "device cpu" in text and "LoRA rank 4" in text and "report" in text
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 1 and summary["seconds"]["preparation"] > 0
