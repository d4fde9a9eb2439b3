"""GroupNorm and SiLU of the U-Nets' ResNet blocks, and the GroupNorm of their transformers.

B batch, C channels, S channels that a skip connection adds.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import libraries
from benchmarks.gpu.libraries import Inputs
from benchmarks.gpu.names import BOTH, FORWARD
from benchmarks.gpu.operation import Draw, Operation, Sizes, Target, bound
from fasttune_kernels import group_norm_silu

GROUPS = 32
_EPS = 1e-5


def _group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    if add is not None:
        x = x + add[:, :, None, None]
    if skip is not None:
        x = torch.cat([x, skip], dim=1)
    return F.silu(F.group_norm(x, GROUPS, weight, bias, _EPS))


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, GROUPS, weight, bias, _EPS)


def _ours(silu: bool = True, **inputs: Tensor) -> Any:
    return group_norm_silu(**inputs, groups=GROUPS, eps=_EPS, silu=silu)


def _inputs(layout: torch.memory_format, sizes: Sizes, draw: Draw) -> Inputs:
    """(B, C, H, W)."""
    channels = sizes[1]
    return {
        "x": draw(*sizes).contiguous(memory_format=layout),
        "weight": 1 + draw(channels, scale=0.1),
        "bias": draw(channels, scale=0.1),
    }


def _added_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    found = _inputs(torch.channels_last, sizes, draw)
    return {**found, "add": draw(*sizes[:2])}


def _joined_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    """(B, C, S, H, W)."""
    batch, channels, others, *sides = sizes
    whole = _inputs(torch.channels_last, (batch, channels + others, *sides), draw)
    x, skip = whole["x"].split([channels, others], dim=1)
    layout = torch.channels_last
    parts = {
        "x": x.contiguous(memory_format=layout),
        "skip": skip.contiguous(memory_format=layout),
    }
    return {**whole, **parts}


_SDXL = ((1, 320, 128, 128), (1, 640, 64, 64), (1, 1280, 32, 32), (1, 1920, 32, 32))
_ODD = ((1, 32, 3, 5), (3, 96, 7, 6))
_channels_last = partial(
    Operation,
    make=partial(_inputs, torch.channels_last),
    plain=_group_norm_silu,
    ours=bound(_ours),
    trained=("x", "weight", "bias"),
    odd=_ODD,
)

GROUP_NORM_OPERATIONS: tuple[Operation, ...] = (
    _channels_last(
        name="group norm silu channels last",
        libraries=libraries.GROUP_NORM_CHANNELS_LAST,
        sizes=_SDXL,
        targets=tuple(
            Target(against="others", at_least=1.5, direction=way, batch=1)
            for way in (FORWARD, BOTH)
        ),
    ),
    _channels_last(
        name="group norm silu, embedding added",
        make=_added_inputs,
        trained=("x", "weight", "bias", "add"),
        sizes=((1, 640, 64, 64),),
        odd=((1, 64, 3, 5), (3, 96, 7, 6)),  # a group of one channel takes away what is added to it
    ),
    _channels_last(
        name="group norm silu, skip joined",
        make=_joined_inputs,
        trained=("x", "weight", "bias", "skip"),
        sizes=((1, 640, 640, 64, 64), (1, 1280, 640, 32, 32)),
        odd=((1, 32, 32, 3, 5), (3, 40, 56, 7, 6)),
    ),
    _channels_last(
        name="group norm channels last",
        plain=_group_norm,
        ours=bound(partial(_ours, silu=False)),
        sizes=((1, 640, 64, 64),),
    ),
    _channels_last(
        name="group norm silu",
        make=partial(_inputs, torch.contiguous_format),
        libraries=libraries.GROUP_NORM,
    ),
)
