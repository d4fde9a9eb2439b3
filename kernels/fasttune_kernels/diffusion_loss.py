"""The loss of a diffusion model, from the network's output to one number a sample, and its gradient.

    target = clean_factor clean + noise_factor noise            e = prediction - target
    loss = weight mean(mask d(e))                               d: squared, absolute or Huber

One pass reads prediction, clean and noise latents once and leaves partial sums, which a second stage
adds up in a fixed order, and the derivative d'(e), which the backward scales. The target is never in
memory, and no latents are kept for the backward.

The targets: noise - clean in flow matching (https://arxiv.org/abs/2210.02747), noise in DDPM, and
sqrt(abar) noise - sqrt(1 - abar) clean for v (https://arxiv.org/abs/2202.00512). `weight` is for
min-SNR (https://arxiv.org/abs/2303.09556) and its like.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fasttune_kernels import diffusion_loss_kernels as kernels
from fasttune_kernels.dispatch import arch, custom_op, runs_triton
from fasttune_kernels.launch import NVIDIA, Launch

Kind = Literal["mse", "l1", "huber"]


def diffusion_loss_ref(
    prediction: Tensor,
    clean: Tensor | None,
    noise: Tensor | None,
    *,
    clean_factor: Tensor | None = None,
    noise_factor: Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    kind: Kind = "mse",
    huber_delta: float = 0.1,
) -> Tensor:
    """As `diffusion_loss`, in float32, or float64 if the prediction is."""
    error = prediction.to(_accumulates_in(prediction))
    error = error - _target(error, clean, noise, clean_factor, noise_factor)
    if kind == "mse":
        loss = error.square()
    elif kind == "l1":
        loss = error.abs()
    else:
        beyond = huber_delta * (2 * error.abs() - huber_delta)
        loss = torch.where(error.abs() <= huber_delta, error.square(), beyond)
    loss = (loss if mask is None else loss * mask).flatten(1).mean(1)
    return loss if weight is None else loss * weight


def _accumulates_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _target(
    like: Tensor,
    clean: Tensor | None,
    noise: Tensor | None,
    clean_factor: Tensor | None,
    noise_factor: Tensor | None,
) -> Tensor:
    """In the dtype of `like`; what is None is 0, or the factor 1."""
    terms = []
    for latents, factor in ((noise, noise_factor), (clean, clean_factor)):
        if latents is not None:
            latents = latents.to(like.dtype)
            terms.append(latents if factor is None else latents * _per_sample(factor, like))
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _per_sample(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionLossConfig:
    """How the kernels launch. Not measured; the reasoning is in `from_heuristic`."""

    block: int
    """Elements of one sample that a program computes, and partial sums that the second stage adds
    at once."""
    num_warps: int

    @classmethod
    def from_heuristic(cls, arch: str) -> "DiffusionLossConfig":
        """Latents are small: at 1024 px a sample of SDXL has 65536 elements and one of Flux 262144, 3 MB
        with the gradient. Blocks of 512 make 128 programs of the smaller, about one for each
        multiprocessor of an H200, and at most 512 partial sums, and 128 threads load 16 bytes of
        float32 each. The launches take longer than the memory.
        """
        return cls(block=512, num_warps=2 if arch.startswith("gfx9") else 4)

    def options(self) -> dict[str, Any]:
        """The compiler's. One block a program leaves nothing to pipeline, so there is one stage."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


def _is_channels_last(x: Tensor) -> bool:
    is_channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return is_channels_last and not x.is_contiguous()


def _empty_gradient(prediction: Tensor) -> Tensor:
    """In the prediction's memory format, as the backward of a channels_last network wants it."""
    channels_last = _is_channels_last(prediction)
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(prediction, dtype=_accumulates_in(prediction), memory_format=format)


def _as_kernels_see(x: Tensor, *, channels_last: bool) -> Tensor:
    """(B, ...) as (B, I, J) in the order of the gradient's memory: a view where strides allow it."""
    if channels_last:
        return x.permute(0, 2, 3, 1).flatten(1, 2)
    return x.flatten(2) if x.dim() > 2 else x[:, None]


@custom_op("fasttune::diffusion_loss_forward")
def diffusion_loss_forward(
    prediction: Tensor,
    clean: Tensor | None,
    noise: Tensor | None,
    clean_factor: Tensor | None,
    noise_factor: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    kind: str,
    huber_delta: float,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """loss (B,) and mask * d'(e) in the prediction's memory format, both float32 (float64 for such a
    prediction); the latter is empty where it is not wanted."""
    loss = prediction.new_empty(prediction.shape[0], dtype=_accumulates_in(prediction))
    gradient = _empty_gradient(prediction) if wants_gradient else loss.new_empty(0)
    if not _launches(prediction):
        error = prediction.to(_accumulates_in(prediction))
        error = error - _target(error, clean, noise, clean_factor, noise_factor)
        loss, slope = _distance(error, kind, huber_delta)
        if mask is not None:
            mask = mask.to(error.dtype)
            loss, slope = loss * mask, slope * mask
        if wants_gradient:
            gradient.copy_(slope)
        loss = loss.flatten(1).mean(1)
        return loss if weight is None else loss * weight.to(loss.dtype), gradient
    config = DiffusionLossConfig.from_heuristic(arch(prediction.device))
    channels_last = _is_channels_last(prediction)
    seen = _as_kernels_see(prediction, channels_last=channels_last)
    others = [
        None if x is None else _as_kernels_see(x, channels_last=channels_last)
        for x in (clean, noise, None if mask is None else mask.expand_as(prediction))
    ]
    strides = [
        stride for x in (seen, *others) for stride in (x.stride() if x is not None else (0, 0, 0))
    ]
    numel = math.prod(seen.shape[1:])
    num_partials = -(-numel // config.block)
    partial = loss.new_empty((len(loss), num_partials))
    kernels.forward_kernel[(num_partials, len(loss))](
        seen,
        *others,
        _dense(clean_factor),
        _dense(noise_factor),
        gradient if wants_gradient else None,
        partial,
        numel,
        seen.shape[2],
        *strides,
        huber_delta,
        KIND=kind,
        BLOCK=config.block,
        **config.options(),
    )
    kernels.sum_kernel[(len(loss),)](
        partial, _dense(weight), loss, num_partials, numel, BLOCK=config.block, **config.options()
    )
    return loss, gradient


@custom_op("fasttune::diffusion_loss_backward")
def diffusion_loss_backward(
    dloss: Tensor, gradient: Tensor, weight: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """gradient * dloss * weight / n for n elements a sample: in `dtype`, gradient's memory format."""
    dprediction = torch.empty_like(gradient, dtype=dtype)
    numel = math.prod(gradient.shape[1:])
    if not _launches(gradient):
        scale = (dloss if weight is None else dloss * weight.to(dloss.dtype)) / numel
        return dprediction.copy_(gradient * _per_sample(scale, gradient))
    config = DiffusionLossConfig.from_heuristic(arch(gradient.device))
    kernels.backward_kernel[(-(-numel // config.block), len(gradient))](
        dloss.contiguous(),
        gradient,
        _dense(weight),
        dprediction,
        numel,
        BLOCK=config.block,
        **config.options(),
    )
    return dprediction


def _distance(error: Tensor, kind: str, huber_delta: float) -> tuple[Tensor, Tensor]:
    """d(e) and d'(e)."""
    if kind == "l1":
        return error.abs(), error.sign()
    bounded = error.clamp(-huber_delta, huber_delta) if kind == "huber" else error
    return bounded * (2 * error - bounded), 2 * bounded


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _launches(x: Tensor) -> bool:
    return runs_triton(x) and x.dtype is not torch.float64 and x.numel() > 0


@diffusion_loss_forward.register_fake
def _(
    prediction: Tensor,
    clean: Tensor | None,
    noise: Tensor | None,
    clean_factor: Tensor | None,
    noise_factor: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    kind: str,
    huber_delta: float,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    loss = prediction.new_empty(prediction.shape[0], dtype=_accumulates_in(prediction))
    return loss, _empty_gradient(prediction) if wants_gradient else loss.new_empty(0)


@diffusion_loss_backward.register_fake
def _(dloss: Tensor, gradient: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[5])
    ctx.dtype = inputs[0].dtype


def _differentiate(ctx: Any, dloss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    gradient, weight = ctx.saved_tensors
    if dloss is None or not ctx.needs_input_grad[0]:
        return (None,) * 10
    return diffusion_loss_backward(dloss, gradient, weight, ctx.dtype), *(None,) * 9


diffusion_loss_forward.register_autograd(_differentiate, setup_context=_save)


def diffusion_loss(
    prediction: Tensor,
    clean: Tensor | None,
    noise: Tensor | None,
    *,
    clean_factor: Tensor | None = None,
    noise_factor: Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    kind: Kind = "mse",
    huber_delta: float = 0.1,
) -> Tensor:
    """weight * mean(mask * d(prediction - (clean_factor clean + noise_factor noise))), one a sample.

    prediction, clean, noise (B, ...) of any strides; factors and weight (B,), 1 where they are None;
    mask is broadcast over the prediction, and masked elements count in the mean. Returns (B,) in
    float32, in which all is computed, or float64 for such a prediction. d of an error e is e^2 (mse),
    |e| (l1), or e^2 up to huber_delta and huber_delta (2 |e| - huber_delta) beyond (huber; twice
    torch's). Only the prediction gets a gradient. ValueError for shapes and dtypes that do not fit.
    """
    given = {"clean": clean, "noise": noise, "mask": mask}
    factors = {"clean_factor": clean_factor, "noise_factor": noise_factor, "weight": weight}
    if clean is None and noise is None:
        raise ValueError("diffusion_loss: clean and noise are None; a target needs one of them")
    if not prediction.is_floating_point() or prediction.dtype.itemsize == 1 or prediction.dim() < 2:
        raise ValueError(
            f"diffusion_loss: prediction is {tuple(prediction.shape)} {prediction.dtype}; give (B, ...)"
            " in float16, bfloat16, float32 or float64"
        )
    for name, x in (given | factors).items():
        if x is None:
            continue
        if name == "mask":
            fits = x.dim() == prediction.dim() and all(
                m in (1, p) for m, p in zip(x.shape, prediction.shape, strict=True)
            )
        else:
            fits = x.shape == (prediction.shape if name in given else prediction.shape[:1])
        if not fits:
            raise ValueError(
                f"diffusion_loss: {name} is {tuple(x.shape)} and prediction {tuple(prediction.shape)}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"diffusion_loss: {name} requires a gradient; only the prediction has one"
            )
    if kind not in get_args(Kind):
        raise ValueError(f"diffusion_loss: kind is {kind!r}; give {', '.join(get_args(Kind))}")
    if kind == "huber" and not huber_delta > 0:
        raise ValueError(f"diffusion_loss: huber_delta is {huber_delta}; it must be larger than 0")
    loss, _ = diffusion_loss_forward(
        prediction,
        clean,
        noise,
        clean_factor,
        noise_factor,
        weight,
        mask,
        kind,
        huber_delta,
        prediction.requires_grad and torch.is_grad_enabled(),
    )
    return loss


_SIZES = (
    "numel",
    "size_j",
    "prediction_b",
    "prediction_i",
    "prediction_j",
    "clean_b",
    "clean_i",
    "clean_j",
    "noise_b",
    "noise_i",
    "noise_j",
    "mask_b",
    "mask_i",
    "mask_j",
)
_FORWARD = dict.fromkeys(_SIZES, "i32") | {"huber_delta": "fp32"}
_FORWARD |= {"prediction_ptr": "*bf16", "gradient_ptr": "*fp32", "partial_ptr": "*fp32"}
_SUM = {"partial_ptr": "*fp32", "loss_ptr": "*fp32", "num_partials": "i32", "numel": "i32"}
_BACKWARD = {"dloss_ptr": "*fp32", "gradient_ptr": "*fp32", "dprediction_ptr": "*bf16"}
_BACKWARD |= {"numel": "i32"}
_NO_MASK = {"mask_ptr": None, "noise_factor_ptr": None, "KIND": "mse"}

# name, kernel, pointers beside those above, constants, arguments that 16 does not divide
_SHIPPED: tuple[tuple[str, Any, dict[str, str], dict[str, Any], set[str]], ...] = (
    (
        "forward velocity bf16",  # Flux: contiguous
        lambda: kernels.forward_kernel,
        _FORWARD | dict.fromkeys(("clean_ptr", "noise_ptr", "clean_factor_ptr"), "*fp32"),
        _NO_MASK | {"prediction_j": 1, "clean_j": 1, "noise_j": 1},
        set(),
    ),
    (
        "forward epsilon channels_last bf16",  # SDXL: 4 channels
        lambda: kernels.forward_kernel,
        _FORWARD | {"noise_ptr": "*fp32"},
        _NO_MASK | {"clean_ptr": None, "clean_factor_ptr": None, "prediction_j": 1, "noise_i": 1},
        {"size_j", "prediction_i"},
    ),
    ("sum", lambda: kernels.sum_kernel, _SUM, {"weight_ptr": None}, set()),
    ("backward bf16", lambda: kernels.backward_kernel, _BACKWARD, {"weight_ptr": None}, set()),
)
LAUNCHES = tuple(
    Launch(
        name=f"diffusion_loss_{name}",
        kernel=kernel,
        signature={key: kind for key, kind in signature.items() if key not in constants},
        constants=constants | {"BLOCK": config.block},
        aligned=tuple(key for key in signature if key not in odd | {*constants, "huber_delta"}),
        **config.options(),
        targets=targets,
    )
    for targets in (NVIDIA + ("gfx1100", "gfx1201"), ("gfx942", "gfx950"))
    for config in (DiffusionLossConfig.from_heuristic(targets[0]),)
    for name, kernel, signature, constants, odd in _SHIPPED
)
