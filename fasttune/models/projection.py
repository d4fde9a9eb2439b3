"""Linear layers as fused blocks call them: several that share an input are one product.

The weights of the members are views into one buffer (`pack_`), so that q, k and v are one matrix
product while each keeps its name, its parameter and its place in the checkpoint.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttune_kernels.lora_linear import (
    lora_linear_backward,
    lora_linear_backward_into,
    lora_linear_forward,
)

Tensors = Mapping[str, Tensor]
"""Name in the block, such as "attn.to_q.weight" -> tensor."""


SEED = "seed"
"""Name of the (1,) int64 tensor from which a block's dropout masks are derived."""

MATRICES = ("lora_A", "lora_B")
"""An adapter's parameters: (r, K) and (O, r)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradients:
    """Of one projection; None for what is not wanted."""

    x: Tensor | None
    x2: Tensor | None
    parameters: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """y = x W^T + b + scale x A^T B^T for the joint outputs of its members."""

    members: tuple[str, ...]
    """Names of the Linear modules in the block."""
    widths: tuple[int, ...]
    """Output channels of each."""
    adapted: tuple[bool, ...]
    scale: float
    """alpha / rank of the adapted members."""
    dropout: float
    has_bias: bool

    joint: str
    """Name of the members together: joint + ".weight" and joint + ".bias" are their joint parameters."""
    stream: int
    """Sets this projection's dropout apart from the others of the block."""

    def forward(
        self, p: Tensors, x: Tensor, x2: Tensor | None = None, *, training: bool
    ) -> tuple[Tensor, Tensor]:
        """x (..., K), with further channels in x2 -> y (..., sum of widths), low (..., R)."""
        lora_A, lora_B = self._adapters(p, x.dtype)
        dropout = self.dropout if training else 0.0
        return lora_linear_forward(
            x, x2, self._weight(p, x.dtype), self._bias(p, x.dtype), lora_A, lora_B,
            self._slices(), self.scale, dropout, self._seed(p, dropout),
        )  # fmt: skip

    def backward(
        self,
        p: Tensors,
        wanted: frozenset[str],
        dy: Tensor,
        x: Tensor,
        low: Tensor,
        x2: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        into: Tensor | None = None,
        wants_x: bool = True,
        training: bool = True,
    ) -> Gradients:
        """Gradients of the input, plus `residual`, and of the parameters in `wanted`. That of the input is
        written `into` a part of a larger tensor, if given, of a projection with one input and no residual.
        """
        lora_A, lora_B = self._adapters(p, dy.dtype)
        dropout = self.dropout if training else 0.0
        weights = [f"{member}.weight" for member in self.members]
        biases = [f"{member}.bias" for member in self.members]
        weight = self._weight(p, dy.dtype)
        adapters = lora_A, lora_B, low, self._slices(), self.scale, dropout, self._seed(p, dropout)
        wants = any(name in wanted for name in weights), any(name in wanted for name in biases)
        if into is None:
            dx, dx2, dweight, dbias, dA, dB = lora_linear_backward(
                dy, x, x2, weight, *adapters, residual, wants_x, *wants
            )
        else:
            assert x2 is None and residual is None
            dx = dx2 = into
            dweight, dbias, dA, dB = lora_linear_backward_into(
                into, dy, x, weight, *adapters, *wants
            )
        found: dict[str, Tensor] = {}
        for names, gradient in ((weights, dweight), (biases, dbias)):
            if gradient.numel():
                found |= zip(names, gradient.split(list(self.widths)), strict=True)
        if lora_A is not None:
            chosen = self.adapted_members()
            outs = [w for w, adapted in zip(self.widths, self.adapted, strict=True) if adapted]
            found |= zip([f"{n}.lora_A" for n in chosen], dA.chunk(len(chosen)), strict=True)
            found |= zip([f"{n}.lora_B" for n in chosen], dB.split(outs), strict=True)
        return Gradients(
            x=dx if wants_x else None,
            x2=dx2 if wants_x and x2 is not None else None,
            parameters={name: value for name, value in found.items() if name in wanted},
        )

    def keeps_input(self, wanted: frozenset[str]) -> bool:
        """Whether the backward needs the input: for gradients of weights or of A."""
        return any(self.adapted) or any(f"{member}.weight" in wanted for member in self.members)

    def adapted_members(self) -> list[str]:
        """Of the members, those with an adapter."""
        return [name for name, adapted in zip(self.members, self.adapted, strict=True) if adapted]

    def matrix(self, name: str) -> str:
        """Name of the members' matrices "lora_A" or "lora_B" together, (R, K) or (P, r)."""
        return f"{self.joint}.joint_{name}"

    def _adapters(self, p: Tensors, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        if not any(self.adapted):
            return None, None
        lora_A, lora_B = (p[self.matrix(name)].to(dtype) for name in MATRICES)
        return lora_A, lora_B

    def _weight(self, p: Tensors, dtype: torch.dtype) -> Tensor:
        return p[f"{self.joint}.weight"].to(dtype)

    def _bias(self, p: Tensors, dtype: torch.dtype) -> Tensor | None:
        return p[f"{self.joint}.bias"].to(dtype) if self.has_bias else None

    def _slices(self) -> list[int]:
        """[begin, end, ...] of the outputs that are adapted."""
        found: list[int] = []
        begin = 0
        for width, adapted in zip(self.widths, self.adapted, strict=True):
            found += [begin, begin + width] if adapted else []
            begin += width
        return found

    def _seed(self, p: Tensors, dropout: float) -> Tensor | None:
        """Of this projection's mask: the block's, moved on."""
        return p[SEED] + self.stream if dropout else None


def projection(block: nn.Module, *members: str) -> Projection:
    """The projection of Linear modules of a block that share their input.

    Adapters of the members have one rank, scale and dropout. ValueError if they differ in that, in their
    inputs, or in having a bias."""
    modules: list[Any] = [block.get_submodule(name) for name in members]
    adapted = tuple(hasattr(module, "lora_A") for module in modules)
    settings = {
        (module.lora_alpha / len(module.lora_A), module.lora_dropout, len(module.lora_A))
        for module, is_adapted in zip(modules, adapted, strict=True)
        if is_adapted
    }
    biased = {module.bias is not None for module in modules}
    inputs = {module.weight.shape[1] for module in modules}
    if len(settings) > 1 or len(biased) > 1 or len(inputs) > 1:
        raise ValueError(
            f"{members}: adapters, biases or inputs differ: {settings} {biased} {inputs}"
        )
    scale, dropout, _ = next(iter(settings), (1.0, 0.0, 0))
    joint = "+".join(members)
    return Projection(
        members=members,
        widths=tuple(len(module.weight) for module in modules),
        adapted=adapted,
        scale=scale,
        dropout=dropout,
        has_bias=biased == {True},
        joint=joint,
        stream=zlib.crc32(joint.encode()),
    )


def pack_(block: nn.Module, projection: Projection) -> dict[str, Tensor]:
    """Moves the members' parameters into one buffer each (sum of outputs, inputs), of which every one
    becomes a view, and returns the buffers by their joint names. A single member stays as it is: its
    parameter has the joint name already."""
    found: dict[str, Tensor] = {}
    if len(projection.members) == 1:
        return found
    for kind in ("weight", "bias") if projection.has_bias else ("weight",):
        parts = [block.get_parameter(f"{member}.{kind}") for member in projection.members]
        joint = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, joint.split(list(projection.widths)), strict=True):
            part.data = view
        found[f"{projection.joint}.{kind}"] = joint
    return found
