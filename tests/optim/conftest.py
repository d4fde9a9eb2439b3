"""A few weights of the shapes that networks have, and gradients that repeat."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fasttune.seeds import generator_for

Named = list[tuple[str, nn.Parameter]]


@pytest.fixture
def weights() -> Callable[..., Named]:
    """weights(dtype) -> the same named parameters in each call."""

    def make(dtype: torch.dtype = torch.float32) -> Named:
        g = generator_for(0, "weights")
        shapes = {
            "block.0.weight": (96, 64),
            "block.1.weight": (96, 64),
            "conv.weight": (16, 8, 3, 3),
            "norm.bias": (24,),
            "scale": (),
        }
        return [
            (name, nn.Parameter(torch.randn(shape, generator=g).to(dtype)))
            for name, shape in shapes.items()
        ]

    return make


@pytest.fixture
def set_gradients() -> Callable[..., None]:
    """set_gradients(named, step, scale): gradients as a function of the step."""

    def fill(named: Named, step: int, scale: float = 0.01) -> None:
        g = generator_for(0, "gradients", step)
        for _, p in named:
            p.grad = (scale * torch.randn(p.shape, generator=g)).to(p.dtype)

    return fill
