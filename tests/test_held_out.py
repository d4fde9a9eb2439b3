"""The held-out loss: comparable from step to step, and equal to its definition."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fasttune.ddpm import Ddpm
from fasttune.flow_matching import FlowMatching
from fasttune.held_out import HeldOutBatch, HeldOutLoss, held_out_loss
from fasttune.models import MODELS
from fasttune.models.weights import load_denoiser
from fasttune.reconstruction import Reconstruction

CPU = torch.device("cpu")


def batch_of(keys: list[str], *, channels: int = 4, **conditions: tuple[int, ...]) -> HeldOutBatch:
    """Latents and conditions as a function of the key, so that batches can be cut anyhow."""

    def tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(key)))

    return HeldOutBatch(
        clean_latents=torch.stack([tensor(key, (channels, 8, 8)) for key in keys]),
        conditions={
            name: torch.stack([tensor(key, shape) for key in keys])
            for name, shape in conditions.items()
        },
        sizes=torch.full((len(keys), 6), 64.0),
        keys=keys,
    )


def evaluate(
    folder: Path, denoiser: nn.Module, batches: list[HeldOutBatch], **changes: Any
) -> HeldOutLoss:
    objective = Ddpm(prediction="epsilon")
    return held_out_loss(
        MODELS["sdxl"],
        denoiser,
        objective,
        batches,
        **{
            "timesteps": objective.held_out_times(4),
            "seed": 1,
            "device": CPU,
            "compute_dtype": torch.float32,
            **changes,
        },
    )


TEXT = {"text_embeddings": (77, 40), "pooled_text_embeddings": (20,)}


def test_it_depends_on_seed_and_samples_alone(tiny_sdxl: Path) -> None:
    denoiser = load_denoiser(MODELS["sdxl"], tiny_sdxl, dtype=torch.float32, device=CPU).train()
    together = [batch_of(["a", "bb", "ccc"], **TEXT)]
    first = evaluate(tiny_sdxl, denoiser, together)
    state = torch.get_rng_state()
    torch.randn(7)
    again = evaluate(tiny_sdxl, denoiser, together)
    assert first == again
    torch.set_rng_state(state)
    evaluate(tiny_sdxl, denoiser, together)
    assert torch.equal(torch.get_rng_state(), state)
    assert denoiser.training and all(p.grad is None for p in denoiser.parameters())

    apart = [batch_of(["ccc"], **TEXT), batch_of(["a", "bb"], **TEXT)]
    other_cut = evaluate(tiny_sdxl, denoiser, apart)
    assert other_cut.loss == pytest.approx(first.loss, rel=1e-5)
    assert other_cut.by_timestep == pytest.approx(first.by_timestep, rel=1e-5)
    assert evaluate(tiny_sdxl, denoiser, together, seed=2).loss != first.loss

    assert len(first.by_timestep) == 4
    assert first.loss == pytest.approx(sum(first.by_timestep) / 4)
    with torch.no_grad():
        next(denoiser.parameters()).mul_(2)
    assert evaluate(tiny_sdxl, denoiser, together).loss != first.loss


def test_it_is_the_loss_of_its_definition() -> None:
    """A network that answers with the noisy latents has the error mean((x - target)^2)."""
    from dataclasses import replace

    seen = []

    def predict(_: nn.Module, noisy: torch.Tensor, t: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((noisy, float(t[0])))
        return noisy

    flow = FlowMatching(timestep_sampling="uniform", shift="none")
    batch = batch_of(["a", "bb"])
    result = held_out_loss(
        replace(MODELS["flux"], predict=predict),
        nn.Identity(),
        flow,
        [batch],
        timesteps=[0.25, 0.75],
        seed=0,
        device=CPU,
        compute_dtype=torch.float32,
    )
    expected = []
    for noisy, sigma in seen:
        eps = (noisy - (1 - sigma) * batch.clean_latents) / sigma
        expected.append(float((noisy - (eps - batch.clean_latents)).square().mean()))
    assert [sigma for _, sigma in seen] == [0.25, 0.75]
    assert result.by_timestep == pytest.approx(expected, rel=1e-4)


def test_the_autoencoder_is_repeatable(tiny_sdxl: Path) -> None:
    spec = MODELS["autoencoder"]
    denoiser = load_denoiser(spec, tiny_sdxl, dtype=torch.float32, device=CPU)
    objective = Reconstruction(kl_weight=1e-6)
    batch = HeldOutBatch(
        clean_latents=torch.rand(2, 3, 32, 32) * 2 - 1,
        conditions={},
        sizes=torch.zeros(2, 6),
        keys=[0, 1],
    )
    losses = [
        held_out_loss(
            spec,
            denoiser,
            objective,
            [batch],
            timesteps=objective.held_out_times(8),
            seed=0,
            device=CPU,
            compute_dtype=torch.float32,
        )
        for _ in range(2)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0].by_timestep) == 1 and losses[0].loss > 0


def test_without_samples_there_is_no_number(tiny_sdxl: Path) -> None:
    assert math.isnan(evaluate(tiny_sdxl, nn.Identity(), []).loss)
