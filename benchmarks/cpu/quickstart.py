"""A step of the quickstart beside the same network in diffusers and PEFT under a hand-written loop.

Both have the weights, adapted modules, batch, dtype and settings of configs/quickstart.toml, with
random weights in place of its own. The hand-written loop takes torch's fused AdamW and as little
else as works. The check compares the losses of three steps, fed the same noise.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.cpu.contest import Contender, Contest, installed, timed
from benchmarks.harness import ROOT
from fasttune.adapters.lora import adapted_modules
from fasttune.build import placement_for, scheduler_config
from fasttune.config import Config
from fasttune.config_file import load_config
from fasttune.models.weights import read_config
from fasttune.optim.schedule import lr_factor
from fasttune.rehearsal import Rehearsal, rehearse
from fasttune.seeds import derive_seed

MODEL = ROOT / "configs" / "quickstart" / "model"
TOLERANCE = 1e-4
"""Between the losses, relative: float32 sums in another order."""


def quickstart_rehearsal(batch_size: int | None = None, device: str = "cpu") -> Rehearsal:
    """The quickstart's step on a "cpu" or "cuda" device, with random weights."""
    config = load_config(ROOT / "configs" / "quickstart.toml")
    train = replace(config.train, batch_size=batch_size or config.train.batch_size)
    run = replace(config.run, device=device)  # type: ignore[arg-type]
    config = replace(config, run=run, train=train)
    return rehearse(config, MODEL, placement=placement_for(config))


def quickstart(folder: Path, *, quick: bool) -> Iterator[Contest]:
    batch_size = 2 if quick else None
    if not (installed("diffusers") and installed("peft")):
        raise RuntimeError("the contender needs diffusers and peft: pip install -e '.[dev]'")
    ours = quickstart_rehearsal(batch_size)
    theirs = by_hand(quickstart_rehearsal(batch_size))
    for step in range(3):
        mine, other = ours.take_step().item(), theirs(step).item()
        if abs(mine - other) > TOLERANCE * abs(other):
            raise RuntimeError(f"step {step}: loss {mine} beside diffusers' {other}")
    yield Contest(
        what="quickstart step",
        ours=timed(ours.take_step, quick=quick),
        theirs={
            "diffusers and PEFT by hand": Contender(
                measure=timed(lambda: theirs(0), quick=quick), package="diffusers"
            )
        },
        facts={
            "batch_size": ours.config.train.batch_size,
            "resolution": ours.config.data[0].resolution,
        },
    )


def by_hand(rehearsal: Rehearsal) -> Callable[[int], Tensor]:
    """A function of the step number that does the step with diffusers and PEFT, and returns its loss.
    The network starts with the weights of `rehearsal`."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig

    config, batch = rehearsal.config, rehearsal.batch
    unet: Any = UNet2DConditionModel.from_config(read_config(MODEL, "unet"))
    adapted = adapted_modules(rehearsal.denoiser)
    state = rehearsal.denoiser.state_dict()
    base = {name: t for name, t in state.items() if ".lora_" not in name}
    unet.load_state_dict(base)
    unet.requires_grad_(False)
    a = config.adapter
    unet.add_adapter(
        LoraConfig(
            r=a.rank, lora_alpha=int(a.alpha), target_modules=list(adapted), lora_dropout=0.0
        )
    )
    with torch.no_grad():
        for name, module in adapted.items():
            layer = unet.get_submodule(name)
            layer.lora_A["default"].weight.copy_(module.lora_A)
            layer.lora_B["default"].weight.copy_(module.lora_B)
    unet.train()
    params = [p for p in unet.parameters() if p.requires_grad]
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        params, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True
    )
    scheduler: Any = DDPMScheduler.from_config(scheduler_config(MODEL))
    text = batch.conditions["text_embeddings"]
    added = {"text_embeds": batch.conditions["pooled_text_embeddings"], "time_ids": batch.sizes}
    max_norm = config.train.max_grad_norm
    assert batch.latent_std is not None and max_norm is not None and a.alpha == int(a.alpha)
    mean, std = batch.latent_mean, batch.latent_std

    def step(number: int) -> Tensor:
        g = torch.Generator().manual_seed(derive_seed(config.run.seed, "micro-batch", number))
        clean = mean + std * torch.randn(mean.shape, generator=g)
        noise = torch.randn(clean.shape, generator=g)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),), generator=g)
        noisy = scheduler.add_noise(clean, noise, t)
        prediction = unet(noisy, t, text, added_cond_kwargs=added).sample
        loss = mse_loss(prediction, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.param_groups[0]["lr"] = _lr(config, number)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _lr(config: Config, step: int) -> float:
    s = config.schedule
    return config.optimizer.lr * lr_factor(
        step,
        name=s.name,
        total_steps=config.train.steps,
        warmup_steps=s.warmup_steps,
        min_lr_ratio=s.min_lr_ratio,
        cycles=s.cycles,
        power=s.power,
    )
