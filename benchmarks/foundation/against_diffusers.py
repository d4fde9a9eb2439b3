"""A tiny SDXL LoRA, ours beside the diffusers text-to-image LoRA script.

    python -m benchmarks.foundation.against_diffusers --diffusers-script train_text_to_image_lora_sdxl.py
        [--loss-steps 40] [--steps 200] [--pairs 2]

The script is examples/text_to_image/train_text_to_image_lora_sdxl.py of the diffusers repository, run
unchanged by diffusers_script.py. Same model, images, captions, batch size, rank, AdamW settings, gradient
clipping, constant learning rate, float32, number of threads.

- loss: ours runs as it is; the script gets its first LoRA weights, batches, noise and timesteps. The
  loss of every step is compared, once with latents as each computes them (ours come from the cache in
  float16), once with the script's rounded in the same way.
- rate: both run with their own random numbers, in the order ours, theirs, theirs, ours, by wall time
  and by processor time of the whole process (which hardly grows when others use the machine). The
  script encodes images and captions in each step; its step less this time stands beside it, as ours has
  done that work before (`prepare_s`, once for all epochs and runs).
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, collect, emit, spread

BATCH_SIZE = 2
LOSS_LR = 1e-2
"""A hundred times the script's default: within 40 steps training must move the loss for the curves to
be worth comparing. `effect_of_training` says by how much it does."""
WARMUP_STEPS = 10


def ours(folder: Path, steps: int, lr: float, begun: float, feed: Path | None) -> None:
    """In the child: one training by fasttune. With `feed`, writes what the script shall draw."""
    import torch

    from benchmarks.tiny_run import config
    from fasttune import train as loop
    from fasttune.metrics import Metrics

    settings = config(
        folder, steps=steps, batch_size=BATCH_SIZE, lr=lr, log_every=1 if feed else 10, name="ours"
    )
    if feed is not None:
        write_feed(feed, settings, steps)
    ends: list[float] = []
    cpu: list[float] = []
    prepare_s = 0.0
    step, prepare = Metrics.step, loop.prepare

    def step_done(self: Metrics, *args: Any) -> None:
        step(self, *args)
        ends.append(time.perf_counter())
        cpu.append(time.process_time())
        if len(ends) == steps:
            ends.append(time.time())

    def timed_prepare(*args: Any) -> Any:
        nonlocal prepare_s
        begin = time.perf_counter()
        prepared = prepare(*args)
        prepare_s = time.perf_counter() - begin
        return prepared

    Metrics.step = step_done  # type: ignore[assignment]
    loop.prepare = timed_prepare  # type: ignore[assignment]
    loop.train(settings)
    last = ends.pop()
    run = max((folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    whole = [1000 * (b - a) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    emit(
        "",
        **spread(whole[WARMUP_STEPS:], "step_ms"),
        mean_step_cpu_ms=round(
            1000 * (cpu[-1] - cpu[WARMUP_STEPS]) / (len(cpu) - 1 - WARMUP_STEPS), 3
        ),
        prepare_s=round(prepare_s, 2),
        whole_run_s=round(last - begun, 2),
        losses=[line["loss"] for line in lines if "loss" in line],
        threads=torch.get_num_threads(),
    )


def write_feed(path: Path, settings: Any, steps: int) -> None:
    """What our loop draws, by step, for the script: sample numbers (steps, B), the noise of the latents
    and the noise added to them (steps, B, 4, h, w), timesteps (steps, B), and the LoRA's first A of
    each module."""
    import torch
    from safetensors.torch import save_file

    from fasttune.adapters.lora import adapted_modules
    from fasttune.build import denoiser_for, objective_for, placement_for
    from fasttune.data.loader import BatchPlan
    from fasttune.models import MODELS
    from fasttune.models.weights import read_config
    from fasttune.prepare import prepare
    from fasttune.seeds import derive_seed

    spec, placement = MODELS["sdxl"], placement_for(settings)
    prepared = prepare(settings)
    plan = BatchPlan(
        [cached.plan.bucket for cached in prepared.train],
        batch_size=BATCH_SIZE,
        seed=settings.run.seed,
    )
    numbers = [int(Path(cached.sample.path).stem) for cached in prepared.train]
    shape = prepared.reader.read([prepared.train[0]] * BATCH_SIZE).latent_mean.shape
    objective = objective_for(settings, spec, prepared.folder)
    latent_noise, noise, timesteps = [], [], []
    for step in range(steps):
        generator = torch.Generator().manual_seed(
            derive_seed(settings.run.seed, "micro-batch", step)
        )
        latent_noise.append(torch.randn(shape, generator=generator))
        noise.append(torch.randn(shape, generator=generator))
        times = objective.sample_times(BATCH_SIZE, 0, generator, "cpu")
        timesteps.append(times.long())
    denoiser = denoiser_for(settings, spec, prepared.folder, placement)
    first = {name: module.lora_A.detach() for name, module in adapted_modules(denoiser).items()}
    batches = [[numbers[index] for index in plan.batch(step)] for step in range(steps)]
    scale = read_config(prepared.folder, "vae")["scaling_factor"]
    save_file(
        {
            **first,
            "indices": torch.tensor(batches),
            "batches_per_epoch": torch.tensor(plan.batches_per_epoch),
            "latent_noise": torch.stack(latent_noise),
            "noise": torch.stack(noise),
            "timesteps": torch.stack(timesteps),
            "scaling_factor": torch.tensor(scale, dtype=torch.float64),
        },
        path,
    )
    prepared.cache.close()


def run_ours(folder: Path, steps: int, lr: float, feed: Path | None = None) -> Row:
    options = ["--ours", "--folder", str(folder), "--steps", str(steps), "--lr", repr(lr)]
    if feed is not None:
        options += ["--feed", str(feed)]
    (row,) = collect([sys.executable, __file__, "--begun", repr(time.time()), *options])
    return row


def run_theirs(script: Path, folder: Path, steps: int, lr: float, *options: str) -> Row:
    from benchmarks.tiny_run import RANK, RESOLUTION

    arguments = {
        "pretrained_model_name_or_path": folder / "model",
        "train_data_dir": folder / "images",
        "output_dir": folder / "theirs",
        "cache_dir": folder / "datasets",
        "resolution": RESOLUTION,
        "train_batch_size": BATCH_SIZE,
        "max_train_steps": steps + 1,  # it saves and samples after its last step
        "checkpointing_steps": 10 * steps,
        "rank": RANK,
        "learning_rate": lr,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "seed": 42,
        "mixed_precision": "no",
    }
    child = [sys.executable, str(Path(__file__).with_name("diffusers_script.py"))]
    child += ["--script", str(script), "--steps", str(steps), "--begun", repr(time.time())]
    flags = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    (row,) = collect([*child, *options, "--", "--center_crop", *flags])
    return row


def compare_losses(script: Path, folder: Path, steps: int) -> None:
    feed = folder / "feed.safetensors"
    mine = run_ours(folder, steps, LOSS_LR, feed)["losses"]
    untrained = run_ours(folder, steps, 1e-12, feed)["losses"]
    effect = max(abs(a - b) / b for a, b in zip(mine, untrained, strict=True))
    for latents in ("float32", "float16"):
        options = ("--feed", str(feed), "--latents", latents)
        theirs = run_theirs(script, folder, steps, LOSS_LR, *options)["losses"]
        difference = [abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True)]
        emit(
            f"loss beside diffusers: its latents in {latents}",
            steps=steps,
            max_relative_difference=max(difference),
            first_relative_difference=difference[0],
            last_relative_difference=difference[-1],
            effect_of_training=effect,
            losses=mine,
            diffusers_losses=theirs,
        )


def compare_rates(script: Path, folder: Path, steps: int, pairs: int) -> None:
    found: dict[str, list[Row]] = {"fasttune": [], "diffusers": []}
    for pair in range(pairs):
        for which in list(found)[:: 1 if pair % 2 == 0 else -1]:
            if which == "fasttune":
                found[which].append(run_ours(folder, steps, 1e-4))
            else:
                found[which].append(run_theirs(script, folder, steps, 1e-4))
    if len({row["threads"] for rows in found.values() for row in rows}) != 1:
        raise RuntimeError("the two have run with different numbers of threads")
    mine, theirs = found["fasttune"], found["diffusers"]
    ratios = [b["mean_step_ms"] / a["mean_step_ms"] for a, b in zip(mine, theirs, strict=True)]
    key = "mean_step_without_encoding_ms"
    bare = [b[key] / a["mean_step_ms"] for a, b in zip(mine, theirs, strict=True)]
    emit(
        "step rate beside diffusers",
        steps=steps,
        pairs=pairs,
        rate_ratio=[round(value, 3) for value in ratios],
        rate_ratio_without_encoding=[round(value, 3) for value in bare],
        step_ms=[row["mean_step_ms"] for row in mine],
        diffusers_step_ms=[row["mean_step_ms"] for row in theirs],
        diffusers_step_without_encoding_ms=[row[key] for row in theirs],
        step_cpu_ms=[row["mean_step_cpu_ms"] for row in mine],
        diffusers_step_cpu_ms=[row["mean_step_cpu_ms"] for row in theirs],
        diffusers_parts_ms=theirs[-1]["parts_ms"],
        prepare_s=mine[0]["prepare_s"],
        whole_run_s=[row["whole_run_s"] for row in mine],
        diffusers_whole_run_s=[row["whole_run_s"] for row in theirs],
        torchvision=theirs[-1]["torchvision"],
        threads=mine[0]["threads"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--diffusers-script", type=Path)
    parser.add_argument("--loss-steps", type=int, default=40)
    parser.add_argument("--steps", type=int, default=200, help="of a run whose rate is taken")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="for inputs and runs; default: a temporary one")
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--lr", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--feed", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        ours(args.folder, args.steps, args.lr, args.begun, args.feed)
        return
    if args.diffusers_script is None or not args.diffusers_script.is_file():
        parser.error("--diffusers-script: the path of train_text_to_image_lora_sdxl.py is needed")
    from benchmarks.tiny_run import write_inputs

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        write_inputs(folder)
        compare_losses(args.diffusers_script, folder, args.loss_steps)
        compare_rates(args.diffusers_script, folder, args.steps, args.pairs)


if __name__ == "__main__":
    main()
