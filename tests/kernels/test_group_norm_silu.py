"""group_norm_silu against its definition: PyTorch and Triton's interpreter."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttune_kernels.dispatch import Backend, forced
from fasttune_kernels.group_norm_silu import group_norm_silu, group_norm_silu_ref

BACKENDS: tuple[Backend, ...] = ("torch",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one call, and what it is given."""

    batch: int = 2
    channels: int = 12
    height: int = 5
    width: int = 3
    groups: int = 4
    skip: int = 0
    add: bool = False
    silu: bool = True
    nhwc: bool = True
    weight_dtype: torch.dtype | None = None
    """x's where None."""

    def arguments(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """x, weight, bias, dy and what else is given, in dtypes of a call in `dtype`."""

        def image(channels: int) -> Tensor:
            made = 2 * torch.randn(self.batch, channels, self.height, self.width, dtype=dtype) + 1
            return made.to(memory_format=torch.channels_last) if self.nhwc else made

        joint = self.channels + self.skip
        vector = {"dtype": self.weight_dtype or dtype}
        made = {"x": image(self.channels), "dy": image(joint)}
        made |= {"weight": torch.randn(joint, **vector), "bias": torch.randn(joint, **vector)}
        if self.skip:
            made["skip"] = image(self.skip)
        if self.add:
            made["add"] = torch.randn(self.batch, joint, dtype=dtype)
        return made

    def run(
        self, function: Callable[..., Tensor], arguments: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """y and the gradient of every argument."""
        given = {k: v.detach().requires_grad_() for k, v in arguments.items() if k != "dy"}
        y = function(**given, groups=self.groups, eps=EPS, silu=self.silu)
        y.backward(arguments["dy"].to(y.dtype))
        return {"y": y.detach()} | {k: v.grad for k, v in given.items() if v.grad is not None}


def eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float,
    silu: bool = True,
    add: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """The network's own operations, in x's dtype."""
    x = x if skip is None else torch.cat([x, skip], dim=1)
    x = x if add is None else x + add[:, :, None, None]
    z = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.silu(z) if silu else z


def check(case: Case, dtype: torch.dtype, arguments: dict[str, Tensor] | None = None) -> None:
    """Output and gradients are as near to the truth as eager PyTorch's, within a tolerance: each is
    rounded once to its dtype (eps / 2 of the value), and float32 sums of up to n terms of size 10,
    errors of 2^-24 each, are off by some sqrt(n) 2^-24 10 < 2e-5 for n < 1000."""
    arguments = arguments or case.arguments(dtype)
    ours, plain = case.run(group_norm_silu, arguments), case.run(eager, arguments)
    wide = {name: value.double() for name, value in arguments.items()}
    truth = case.run(group_norm_silu_ref, wide)
    for name, true in truth.items():
        own, other = ours[name], plain[name]
        kind = arguments["x" if name == "y" else name].dtype
        assert own.dtype is kind and own.shape == true.shape, name
        tolerance = torch.finfo(kind).eps * true.abs() + 2e-5
        worst = (other - true).abs().max()  # eager's errors are random, and may be 0 at an element
        assert torch.all((own - true).abs() <= 2 * worst + tolerance), name


CASES = [
    Case(),
    Case(silu=False),
    Case(add=True),
    Case(skip=8),
    Case(skip=20, groups=2, silu=False),
    Case(channels=7, skip=3, groups=5),
    Case(batch=1, channels=6, groups=1, height=1, width=7, add=True),
    Case(batch=8, channels=5, groups=5, height=2, width=2),
    Case(nhwc=False),
    Case(nhwc=False, add=True, silu=False),
    Case(nhwc=False, skip=4),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_near_the_truth(backend: Backend, case: Case) -> None:
    with forced(backend):
        check(case, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_dtypes(backend: Backend, dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    with forced(backend):
        check(Case(add=True, weight_dtype=weight_dtype), dtype)
        check(Case(skip=4, weight_dtype=weight_dtype), dtype)
