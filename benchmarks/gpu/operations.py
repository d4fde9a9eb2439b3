"""The table of all operations that have kernels, most important first, and those of the loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.attention_operations import ATTENTION_OPERATIONS
from benchmarks.gpu.group_norm_operations import GROUP_NORM_OPERATIONS
from benchmarks.gpu.libraries import Inputs
from benchmarks.gpu.lora_operations import LORA_OPERATIONS
from benchmarks.gpu.operation import Draw, Operation, Sizes, bound
from benchmarks.gpu.token_operations import TOKEN_OPERATIONS
from fasttune_kernels import diffusion_loss

_HUBER_DELTA = 0.5


def _flow_loss(prediction: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    wide = prediction if prediction.dtype == torch.float64 else prediction.float()
    return (wide - (noise - clean)).square().flatten(1).mean(1)


def _our_flow_loss(prediction: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    return diffusion_loss(
        prediction, clean, noise, clean_factor=-torch.ones_like(clean[:, 0, 0, 0])
    )


def _masked_loss(
    prediction: Tensor,
    clean: Tensor,
    noise: Tensor,
    clean_factor: Tensor,
    noise_factor: Tensor,
    weight: Tensor,
    mask: Tensor,
) -> Tensor:
    """v-prediction, Huber, weighted by sample and by pixel."""
    wide = prediction if prediction.dtype == torch.float64 else prediction.float()
    factors = (f[:, None, None, None] for f in (clean_factor, noise_factor))
    target = sum(f * x for f, x in zip(factors, (clean, noise), strict=True))
    distance = 2 * F.huber_loss(wide, target, reduction="none", delta=_HUBER_DELTA)
    return weight * (mask * distance).flatten(1).mean(1)


def _our_masked_loss(prediction: Tensor, clean: Tensor, noise: Tensor, **others: Tensor) -> Tensor:
    return diffusion_loss(
        prediction, clean, noise, **others, kind="huber", huber_delta=_HUBER_DELTA
    )


def _loss_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    wide = torch.promote_types(draw.dtype, torch.float32)
    clean, noise = draw(*sizes, dtype=wide), draw(*sizes, dtype=wide)
    return {"prediction": draw(*sizes), "clean": clean, "noise": noise}


def _masked_loss_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    batch, _, height, width = sizes
    found = _loss_inputs(sizes, draw)
    wide = found["clean"].dtype
    vectors = ("clean_factor", "noise_factor", "weight")
    mask = (draw(batch, 1, height, width, dtype=wide) > 0).to(wide)
    return {**found, **{name: draw(batch, dtype=wide) for name in vectors}, "mask": mask}


LOSS_OPERATIONS: tuple[Operation, ...] = (
    Operation(
        name="flow loss",
        make=_loss_inputs,
        plain=_flow_loss,
        ours=bound(_our_flow_loss),
        trained=("prediction",),
        sizes=((1, 16, 128, 128),),
        odd=((1, 3, 5, 7), (3, 16, 9, 11)),
    ),
    Operation(
        name="masked huber loss",
        make=_masked_loss_inputs,
        plain=_masked_loss,
        ours=bound(_our_masked_loss),
        trained=("prediction",),
        odd=((1, 3, 5, 7), (3, 16, 9, 11)),
    ),
)

OPERATIONS: tuple[Operation, ...] = (
    *ATTENTION_OPERATIONS,
    *TOKEN_OPERATIONS,
    *GROUP_NORM_OPERATIONS,
    *LORA_OPERATIONS,
    *LOSS_OPERATIONS,
)
