"""The gated residual, alone and with the next norm, against its definition."""

import pytest
import torch
from torch import Tensor

from fasttune_kernels.gated_residual import (
    gated_residual,
    gated_residual_norm_modulate,
    gated_residual_norm_modulate_ref,
)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_gradcheck(rms: bool, batch: int) -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(batch, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    vectors = [torch.randn(batch, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs = (x, y, *vectors, *weights)

    def f(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return gated_residual_norm_modulate(*inputs, rms=rms)

    for ours, truth in zip(
        f(*inputs), gated_residual_norm_modulate_ref(*inputs, rms=rms), strict=True
    ):
        torch.testing.assert_close(ours, truth)
    torch.autograd.gradcheck(f, inputs)
    torch.autograd.gradcheck(gated_residual, inputs[:3])
