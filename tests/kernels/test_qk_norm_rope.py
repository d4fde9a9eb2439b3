"""qk_norm_rope against its definition."""

import torch
from torch import Tensor
from torch.testing import assert_close

from fasttune_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref


def inputs(text: bool) -> dict[str, Tensor]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    angle = torch.randn(7 if text else 4, 3)
    tensors = {"qkv": leaf(2, 4, 3, 3, 6), "q_weight": leaf(6), "k_weight": leaf(6)}
    tensors |= {"cos": angle.cos(), "sin": angle.sin()}
    if text:
        tensors |= {"text_qkv": leaf(2, 3, 3, 3, 6)}
        tensors |= {"text_q_weight": leaf(6), "text_k_weight": leaf(6)}
    return tensors


def test_gradients_are_those_of_the_definition() -> None:
    for text in (False, True):
        tensors = inputs(text)
        assert_close(qk_norm_rope(**tensors), qk_norm_rope_ref(**tensors))
        assert torch.autograd.gradcheck(
            lambda *values, names=tuple(tensors): qk_norm_rope(
                **dict(zip(names, values, strict=True))
            ),
            tuple(tensors.values()),
        )
