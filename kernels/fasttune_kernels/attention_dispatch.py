"""Which backend computes attention on a GPU: a table, read from the top.

The first rule that applies, and whose backend this PyTorch has on this GPU, decides; forward and
backward ask the same question and so get the same answer. Nothing in the table was measured by us
yet: sources are beside each rule.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fasttune_kernels import flash_attention, short_attention
from fasttune_kernels.dispatch import arch, device_type, runs_triton

Backend = Literal["short", "cudnn", "flash", "efficient", "own_flash", "cpu", "math"]
"""`short_attention.py`; PyTorch's cuDNN, flash and memory-efficient attention; `flash_attention.py`;
PyTorch's flash attention for CPUs; blocks of scores in plain PyTorch."""

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One call."""

    arch: str
    dtype: torch.dtype
    num_queries: int
    num_keys: int
    num_heads: int
    width: int
    is_masked: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """`backend` is for the cases within all of these limits."""

    backend: Backend
    archs: tuple[str, ...] = ("",)
    """Beginnings of the target's name: lists of names of consumer GPUs go stale."""
    dtypes: tuple[torch.dtype, ...] = _HALF
    masked: tuple[bool, ...] = (False,)
    widths: tuple[int, ...] = ()
    """Of a head; () for all up to max_width."""
    max_width: int = 256
    max_keys: int = 1 << 31
    multiple: int = 1
    """Of the numbers of queries and of keys."""
    min_heads: int = 1
    reason: str
    source: str

    def applies(self, case: Case) -> bool:
        """Whether the case is within the limits."""
        return (
            case.arch.startswith(self.archs)
            and case.dtype in self.dtypes
            and case.is_masked in self.masked
            and (case.width in self.widths or not self.widths)
            and case.width <= self.max_width
            and case.width % 8 == 0  # all kernels load 16 bytes at once
            and case.num_keys <= self.max_keys
            and case.num_queries % self.multiple == 0
            and case.num_keys % self.multiple == 0
            and case.num_heads >= self.min_heads
        )


RULES = (
    Rule(
        backend="short",
        archs=("sm_8", "sm_90", "sm_100", "sm_103", "sm_12", "gfx94", "gfx95"),
        max_width=short_attention.MAX_WIDTH,
        max_keys=short_attention.MAX_KEYS,
        reason="K and V fit into a program: each query is moved once, forward and backward",
        source="arithmetic: 77 FLOP a byte of q and out at 77 keys; an H200 does 200. Not measured.",
    ),
    # The allow-list of cuDNN. Its backward gave NaN where a tile of 128 keys or queries is not full
    # and a row's logsumexp is below -88.7: exp(0 - lse) of the padding overflows. Fixes are in
    # cuDNN 9.26 and later only, so that lengths are multiples of 128 here, without a mask:
    # pytorch#196678, cudnn-frontend#628, #1072, #160.
    Rule(
        backend="cudnn",
        archs=("sm_90",),
        widths=(64, 128),
        multiple=128,
        reason="1.7 to 2.3 times as fast as FlashAttention-2 on H100, forward and backward",
        source="pytorch#142132: 631 against 329 TFLOP/s at Flux's shape, forward",
    ),
    Rule(
        backend="cudnn",
        archs=("sm_100",),
        widths=(64, 128),
        multiple=128,
        min_heads=8,
        reason="FlashAttention-2 does not use tcgen05; silently wrong below 8 heads of keys",
        source="sglang#33655: 1.24 to 1.98 times FlashAttention-4; pytorch#193893: the wrong results",
    ),
    Rule(
        backend="flash",
        reason="the default. cuDNN: 0.82 times as fast on A100, 0.88 on RTX PRO 6000, 1.0 on L40S",
        source="transformers#48163",
    ),
    Rule(
        backend="efficient",
        dtypes=(*_HALF, torch.float32),
        masked=(False, True),
        reason="flash takes neither masks nor float32; cuDNN's masked backward gives NaN",
        source="pytorch, sdp_utils.cpp; pytorch#196678",
    ),
    Rule(
        backend="own_flash",
        archs=("gfx", "sm_8", "sm_9", "sm_10", "sm_12"),
        masked=(False, True),
        max_width=flash_attention.MAX_WIDTH,
        reason="SDPA is plain math on RDNA unless TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL is set",
        source="unsloth#8821: 486 ms and 8.55 GiB against 41 ms and 0.52 GiB on an RX 9060 XT",
    ),
)


def choose(case: Case, available: frozenset[str]) -> Backend:
    """Backend of a call on a GPU that has those in `available`."""
    for rule in RULES:
        if rule.backend in available and rule.applies(case):
            return rule.backend
    return "math"


def backend_of(q: Tensor, k: Tensor, mask: Tensor | None) -> Backend:
    """Backend of a call with these tensors: q (B, L, H, E), k (B, S, H, E)."""
    if q.numel() == 0 or k.numel() == 0:
        return "math"
    own = runs_triton(q) and q.dtype != torch.float64 and q.shape[3] % 8 == 0
    if q.is_cuda:
        case = Case(
            arch=arch(q.device),
            dtype=q.dtype,
            num_queries=q.shape[1],
            num_keys=k.shape[1],
            num_heads=q.shape[2],
            width=q.shape[3],
            is_masked=mask is not None,
        )
        return choose(case, available(q.device, q.dtype, q.shape[3], own))
    if own and q.shape[3] <= flash_attention.MAX_WIDTH:  # the interpreter
        is_short = k.shape[1] <= short_attention.MAX_KEYS and mask is None
        return "short" if is_short and q.shape[3] <= short_attention.MAX_WIDTH else "own_flash"
    return "cpu" if device_type(q) == "cpu" else "math"


@cache
def available(device: torch.device, dtype: torch.dtype, width: int, own: bool) -> frozenset[str]:
    """Backends that run on a GPU, which PyTorch knows of its own: how it was built, the GPU, ROCm's
    switches. Asked with all of them enabled: a context that disables one may end before the
    backward."""
    from torch.backends.cuda import (
        SDPAParams,
        can_use_cudnn_attention,
        can_use_efficient_attention,
        can_use_flash_attention,
    )
    from torch.nn.attention import SDPBackend, sdpa_kernel

    x = torch.empty(1, 128, 8, width, dtype=dtype, device=device).transpose(1, 2)
    call = SDPAParams(x, x, x, None, 0.0, False, False)
    fused = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ]
    with sdpa_kernel(fused):
        found = {
            "cudnn": can_use_cudnn_attention(call),
            "flash": can_use_flash_attention(call),
            "efficient": can_use_efficient_attention(call),
            "short": own,
            "own_flash": own,
        }
    return frozenset(name for name, can in found.items() if can)
