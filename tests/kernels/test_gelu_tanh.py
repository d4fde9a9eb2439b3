"""gelu_tanh against its definition."""

import torch
from torch.testing import assert_close

from fasttune_kernels.gelu_tanh import gelu_tanh, gelu_tanh_ref


def test_gradients_are_those_of_the_definition() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert_close(gelu_tanh(x), gelu_tanh_ref(x))
    assert torch.autograd.gradcheck(gelu_tanh, (x,))
