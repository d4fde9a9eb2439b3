"""Operations of other libraries, in our conventions, and whether they work here.

A library that imports may still lack its kernels or be built for another torch, so a library counts as there
when it has computed the operation, forward and backward, at the shape that is to be timed, and
the result is right. `why_not` tries that.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttune.models.rope import rotate

Inputs = dict[str, Tensor]
Bind = Callable[..., Callable[[], Any]]
"""Inputs by name -> the call, with what it prepares once (a module, an import) left out of it."""

CLOSE = 0.05
"""Relative distance to eager beyond which a library computes something else. Formulas that differ
slightly on purpose pass (GELU's tanh form against erf), and the name of the contender says so."""


def why_not(
    bind: Bind, inputs: Inputs, trained: Sequence[str], expected: Sequence[Tensor]
) -> str | None:
    """Why this library does not compute the operation here; None if it does. `expected` has eager's
    outputs, then the gradients of the sum of outputs in the order of `trained`."""
    try:
        found = outputs_of(bind(**inputs)())
        ones = [torch.ones_like(t) for t in found]
        grads = torch.autograd.grad(found, [inputs[n] for n in trained], ones) if trained else ()
        for name, ours, theirs in zip(
            [*(f"output {i}" for i in range(len(found))), *trained],
            expected,
            [*found, *grads],
            strict=True,
        ):
            distance = (theirs.float() - ours.float()).norm() / ours.float().norm()
            if not distance.item() <= CLOSE:
                return f"computes something else: {name} is off by {distance.item():.2g}"
    except ImportError as error:
        return f"not installed ({error})"
    except Exception as error:  # whatever a library raises when its kernels are missing
        return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
    return None


def outputs_of(found: Any) -> list[Tensor]:
    """The tensors an operation returns, as a list."""
    return [found] if isinstance(found, Tensor) else list(found)


def give(module: nn.Module, **tensors: Tensor) -> None:
    """Puts these very tensors in the places of parameters, so that gradients of them can be asked
    for: a Parameter made of one would be another leaf."""
    for name, tensor in tensors.items():
        module._parameters[name] = tensor  # type: ignore[assignment]


def _sdpa_backend(name: str) -> Bind:
    def bind(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = getattr(SDPBackend, name)

        def run() -> Tensor:
            with sdpa_kernel(backend):
                heads = (t.transpose(1, 2) for t in (q, k, v))
                return F.scaled_dot_product_attention(*heads).transpose(1, 2)

        return run

    return bind


def _flash_attn_2(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    from flash_attn import flash_attn_func

    return lambda: flash_attn_func(q, k, v)


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    from flash_attn_interface import flash_attn_func

    return lambda: outputs_of(flash_attn_func(q, k, v))[0]


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    from flash_attn.cute import flash_attn_func

    return lambda: outputs_of(flash_attn_func(q, k, v))[0]


ATTENTION: Mapping[str, Bind] = {
    "cudnn": _sdpa_backend("CUDNN_ATTENTION"),
    "torch flash": _sdpa_backend("FLASH_ATTENTION"),
    "torch efficient": _sdpa_backend("EFFICIENT_ATTENTION"),
    "flash-attn": _flash_attn_2,
    "flash-attn-3": _flash_attn_3,
    "flash-attn-4": _flash_attn_4,
}


def _liger_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unbind(2)
        table = cos[:, None], sin[:, None]
        return rotate(norm(q, q_weight), *table), rotate(norm(k, k_weight), *table), v

    return run


NORM_ROPE: Mapping[str, Bind] = {"liger norm, torch rope": _liger_norm_rope}


def _liger_geglu(projected: Tensor) -> Callable[[], Tensor]:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    def run() -> Tensor:
        y, gate = projected.chunk(2, dim=-1)
        # It copies strided inputs, and writes their gradients over the copies.
        return LigerGELUMulFunction.apply(gate, y)

    return run


GEGLU: Mapping[str, Bind] = {"liger (tanh form)": _liger_geglu}


def _liger_group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    def run() -> Tensor:
        batch, channels = x.shape[:2]
        flat = x.reshape(batch, channels, -1)
        y = LigerGroupNormFunction.apply(flat, weight, bias, channels, 32, 1e-5)
        return F.silu(y.view(x.shape))

    return run


def _apex_group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    from apex.contrib.group_norm import GroupNorm

    norm = GroupNorm(32, x.shape[1], eps=1e-5, act="silu", device=x.device, dtype=x.dtype)
    give(norm, weight=weight, bias=bias)
    return lambda: norm(x)


GROUP_NORM: Mapping[str, Bind] = {"liger norm, torch silu": _liger_group_norm}
GROUP_NORM_CHANNELS_LAST: Mapping[str, Bind] = {"apex": _apex_group_norm}


def _peft_lora(
    x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor
) -> Callable[[], Tensor]:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=len(A), lora_alpha=len(A), target_modules=["0"])
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], device=x.device))
    model = inject_adapter_in_model(config, model)
    layer = model[0]
    give(layer.base_layer, weight=weight, bias=bias)

    def run() -> Tensor:
        # In the input's dtype: PEFT computes in the adapter's.
        give(layer.lora_A["default"], weight=A.to(x.dtype))
        give(layer.lora_B["default"], weight=B.to(x.dtype))
        return layer(x)

    return run


LORA_LINEAR: Mapping[str, Bind] = {"peft": _peft_lora}
