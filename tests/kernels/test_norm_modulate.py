"""Normalisation with weights or modulation against its definition."""

import pytest
import torch
from torch import Tensor

from fasttune_kernels.norm_modulate import norm_modulate, norm_modulate_ref


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_gradcheck(rms: bool, batch: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, 4, 5, dtype=torch.float64, requires_grad=True)
    vectors = [torch.randn(batch, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    weights = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def f(*inputs: Tensor) -> Tensor:
        return norm_modulate(*inputs, rms=rms)

    torch.testing.assert_close(
        f(x, *vectors, *weights), norm_modulate_ref(x, *vectors, *weights, rms=rms)
    )
    torch.autograd.gradcheck(f, (x, *vectors, *weights))
