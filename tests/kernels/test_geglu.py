"""geglu against its definition."""

import torch
from torch.testing import assert_close

from fasttune_kernels.geglu import geglu, geglu_ref


def test_gradients_are_those_of_the_definition() -> None:
    projected = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    assert_close(geglu(projected), geglu_ref(projected))
    assert torch.autograd.gradcheck(geglu, (projected,))
