"""lora_linear against its definition."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fasttune_kernels.lora_linear import lora_linear, lora_linear_ref

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "adapted": {"rank": 3, "slices": [0, 10]},
    "targets": {"rank": 2, "slices": [1, 4, 4, 7, 8, 10], "split": 5},
    "dropout": {"rank": 3, "slices": [2, 9], "dropout": 0.3, "split": 2},
}


def inputs(
    case: dict[str, Any], dtype: torch.dtype, tokens: tuple[int, ...] = (2, 3)
) -> dict[str, Any]:
    """Arguments of lora_linear: 7 channels, 10 outputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        )

    split = case.get("split", 7)
    found: dict[str, Any] = {"x": draw(*tokens, split), "weight": draw(10, 7), "bias": draw(10)}
    if split < 7:
        found["x2"] = draw(*tokens, 7 - split)
    if "rank" in case:
        slices, rank = case["slices"], case["rank"]
        found["lora_A"] = draw(rank * len(slices) // 2, 7)
        found["lora_B"] = draw(sum(slices[1::2]) - sum(slices[::2]), rank)
        found |= {"slices": slices, "scale": 0.5}
    if "dropout" in case:
        found |= {"dropout": case["dropout"], "seed": torch.tensor([11])}
    return found


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_definition(name: str) -> None:
    given = inputs(CASES[name], torch.float64)
    names = [n for n, value in given.items() if isinstance(value, Tensor) and value.requires_grad]

    def call(*tensors: Tensor) -> Tensor:
        return lora_linear(**given | dict(zip(names, tensors, strict=True)))

    assert_close(lora_linear(**given), lora_linear_ref(**given))
    assert torch.autograd.gradcheck(call, [given[n] for n in names])
