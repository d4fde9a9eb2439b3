"""The training loop beside a bare one with the same arithmetic.

Ours is the real `fasttune.train.train` with cached data and an empty network: one trainable number
that multiplies the latents (see benchmarks/foundation/loop_overhead.py). The bare loop holds its
batches in memory, draws latents, noise and timesteps, adds the noise, computes loss and gradient,
clips, updates, sets the learning rate, and every tenth step reads the loss and writes a line. A
measurement is the median step of a run, without the first ones.
"""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.cpu.contest import Contender, Contest
from benchmarks.foundation.loop_overhead import Clock, Empty, emptied, watched
from benchmarks.tiny_run import NUM_IMAGES, RESOLUTION, config, write_inputs
from fasttune import train as trainer

WARMUP_STEPS = 10
LOG_EVERY = 10
LATENTS = (1, 4, RESOLUTION // 8, RESOLUTION // 8)


def loop(folder: Path, *, quick: bool) -> Iterator[Contest]:
    steps = WARMUP_STEPS + (20 if quick else 200)
    write_inputs(folder)
    (folder / "bare").mkdir()

    def ours() -> float:
        clock = Clock()
        with ExitStack() as stack:
            stack.enter_context(emptied())
            stack.enter_context(watched(clock))
            trainer.train(config(folder, steps=steps, log_every=LOG_EVERY, name="loop"))
        # the first interval is what came before the loop
        return statistics.median(step["step"][0] for step in clock.steps[1 + WARMUP_STEPS :])

    yield Contest(
        what="training loop, empty network",
        ours=ours,
        theirs={
            "a bare loop": Contender(
                measure=lambda: bare_loop(folder / "bare" / "log.jsonl", steps),
                differs="batches are in memory; no text conditions, no seed for each step, no waiting "
                "times, no check of loss and gradient norm",
            )
        },
        facts={"steps": steps - WARMUP_STEPS},
    )


def bare_loop(log: Path, steps: int) -> float:
    """Seconds of the median step."""
    g = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(LATENTS, generator=g), torch.rand(LATENTS, generator=g))
        for _ in range(NUM_IMAGES)
    ]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    signal, std = abar.sqrt().float(), (1 - abar).sqrt().float()
    network: nn.Module = Empty()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    losses: list[Tensor] = []
    ends = []
    with log.open("w", encoding="utf-8") as file:
        for step in range(steps):
            mean, deviation = batches[step % len(batches)]
            clean = mean + deviation * torch.randn(LATENTS)
            noise = torch.randn(LATENTS)
            t = torch.randint(0, 1000, (1,))
            noisy = signal[t, None, None, None] * clean + std[t, None, None, None] * noise
            loss = mse_loss(network(noisy), noise)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if (step + 1) % LOG_EVERY == 0:
                value = torch.stack(losses).mean().item()
                file.write(json.dumps({"step": step + 1, "loss": value}) + "\n")
                file.flush()
                losses.clear()
            ends.append(time.perf_counter())
    intervals = [b - a for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return statistics.median(intervals[WARMUP_STEPS:])
