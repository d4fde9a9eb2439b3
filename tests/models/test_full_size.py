"""The released models at real size, on fake tensors: no memory, no weights, no GPU."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fasttune.models import MODELS
from fasttune.models.layers import set_recompute
from fasttune.models.weights import set_tensor

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "models"

# name -> family, parameters of the released checkpoint, latents and conditioning at its resolution
MODEL_CASES: dict[str, tuple[str, int, tuple[int, ...], tuple[int, int], int]] = {
    "flux-dev": ("flux", 11_901_408_320, (1, 16, 128, 128), (512, 4096), 768),
    "flux-schnell": ("flux", 11_891_178_560, (1, 16, 128, 128), (256, 4096), 768),
    "sdxl": ("sdxl", 2_567_463_684, (1, 4, 128, 128), (77, 2048), 1280),
    "sd15": ("sd1", 859_520_964, (1, 4, 64, 64), (77, 768), 0),
    "sd21": ("sd2", 865_910_724, (1, 4, 96, 96), (77, 1024), 0),
}


def read(name: str) -> dict[str, Any]:
    folder = MODELS[MODEL_CASES[name][0]].denoiser_folder
    return json.loads((CONFIGS / name / folder / "config.json").read_text())


@pytest.fixture
def fake_mode() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


def fake_denoiser(name: str, dtype: torch.dtype) -> nn.Module:
    """Built on meta; fake CPU parameters take the place of meta ones, as `.to` cannot do it."""
    family = MODEL_CASES[name][0]
    with torch.device("meta"):
        denoiser = MODELS[family].build(read(name))
    for parameter, value in list(denoiser.named_parameters()):
        set_tensor(denoiser, parameter, torch.empty(value.shape, dtype=dtype, device="cpu"))
    return denoiser


def predict(name: str, denoiser: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    family, _, latents_shape, text_shape, pooled_width = MODEL_CASES[name]
    latents = torch.empty(latents_shape, dtype=dtype, requires_grad=True)
    conditions = {"text_embeddings": torch.empty(1, *text_shape, dtype=dtype)}
    if pooled_width:
        conditions["pooled_text_embeddings"] = torch.empty(1, pooled_width, dtype=dtype)
    numbers = torch.empty(1)
    out = MODELS[family].predict(
        denoiser, latents, numbers, conditions, torch.empty(1, 6), guidance=numbers
    )
    return latents, out


@pytest.mark.parametrize("name", MODEL_CASES)
def test_parameter_count_is_that_of_the_released_checkpoint(name: str) -> None:
    with torch.device("meta"):
        denoiser = MODELS[MODEL_CASES[name][0]].build(read(name))
    assert sum(p.numel() for p in denoiser.parameters()) == MODEL_CASES[name][1]


@pytest.mark.parametrize(
    "name",
    [
        "sd15",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux-dev", "sdxl", "sd21")),
    ],
)
def test_forward_and_backward_at_full_size_in_bf16(name: str, fake_mode: FakeTensorMode) -> None:
    denoiser = fake_denoiser(name, torch.bfloat16)
    set_recompute(denoiser, False)
    latents, out = predict(name, denoiser, torch.bfloat16)
    assert out.shape == latents.shape and out.dtype == torch.bfloat16
    out.sum().backward()
    missing = [n for n, p in denoiser.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad.dtype == torch.bfloat16 for p in denoiser.parameters() if p.grad is not None)
