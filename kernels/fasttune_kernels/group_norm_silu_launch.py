"""How `group_norm_silu` launches its kernels: config, division into programs, and what ships."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttune_kernels.dispatch import arch, num_processors
from fasttune_kernels.group_norm_silu_backward_kernels import _differentiate, _finish, _sums
from fasttune_kernels.group_norm_silu_kernels import _normalise, _statistics
from fasttune_kernels.jit import next_power_of_2
from fasttune_kernels.launch import TARGETS, Launch

FINISH_CHANNELS = 16
"""Of a program of `_finish`: 20 programs for 320 channels, and a 64-byte load for each chunk."""
MAX_PARTS = 2048
"""Partial statistics that a program combines at once: 16 of each kind in a thread, of 128."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupNormConfig:
    """How the kernels launch. Not measured; the reasoning is in `from_heuristic`."""

    block_pixels: int
    block_channels: int
    slots: int
    """Groups that a block of channels has a part of, at most."""
    span: int
    """Blocks that a group has a part in, at most."""
    max_chunks: int
    """Parts of the pixels."""
    num_warps: int

    @classmethod
    def from_heuristic(
        cls, channels: int, skip_channels: int, groups: int, backward: bool, arch: str
    ) -> "GroupNormConfig":
        """64 channels are 128 bytes of bfloat16, a whole cache line. A thread has two loads of 16 bytes
        in flight: 16 elements of x, or in the backward 8 of x and 8 of dy, beside two or three float32
        sums of each. That takes 60 to 130 registers, so an H200's processor holds 4 to 8 programs and
        as many times 4 KiB on their way; 4.8 TB/s at 700 ns of latency need 25 KiB.
        """
        block = min(64, next_power_of_2(max(channels, skip_channels)))
        per_group = (channels + skip_channels) // groups
        ragged = skip_channels > 0 and channels % block > 0  # x's last block ends before the next
        slots = next_power_of_2((block + per_group - 2) // per_group + 1)
        span = next_power_of_2((per_group + block - 2) // block + 1 + ragged)
        wave, num_warps = 64 if arch.startswith("gfx9") else 32, 4
        return cls(
            block_pixels=(8 if backward else 16) * num_warps * wave // block,
            block_channels=block,
            slots=slots,
            span=span,
            max_chunks=max(1, min(128, MAX_PARTS // (slots * span))),
            num_warps=num_warps,
        )

    @classmethod
    def by_target(
        cls, channels: int, skip_channels: int, groups: int, backward: bool
    ) -> "list[tuple[tuple[str, ...], GroupNormConfig]]":
        """(targets, config): targets of one config together."""
        sizes = channels, skip_channels, groups, backward
        configs = {target: cls.from_heuristic(*sizes, target) for target in TARGETS}
        return [
            (tuple(target for target in TARGETS if configs[target] == config), config)
            for config in dict.fromkeys(configs.values())
        ]

    def constants(self) -> dict[str, int]:
        """The kernels' constexpr arguments."""
        return {
            "BLOCK_PIXELS": self.block_pixels,
            "BLOCK_CHANNELS": self.block_channels,
            "SLOTS": self.slots,
            "SPAN": self.span,
            "MAX_CHUNKS": self.max_chunks,
        }

    def options(self) -> dict[str, Any]:
        """The compiler's. Programs are many and their loops short: occupancy hides the latency."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


def pixels_of(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B, HW, C), contiguous: a view of a dense channels_last tensor."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """How one call is divided into programs, and what all of its kernels are given."""

    config: GroupNormConfig
    grid: tuple[int, int, int]
    """Blocks of channels, chunks of pixels, samples."""
    shared: dict[str, Any]
    """Arguments of the kernels by name: inputs, sizes, constants, options."""

    @classmethod
    def of(
        cls, x: Tensor, skip: Tensor | None, add: Tensor | None, groups: int, backward: bool
    ) -> "Call":
        """For x (B, C, H, W), skip (B, S, H, W), add (B, C). Four programs a processor, if there are as
        many tiles: each reads all parts of its groups, so there are no more than load enough at once.
        """
        x, skip = pixels_of(x), None if skip is None else pixels_of(skip)
        add = None if add is None else add.contiguous()
        (batch, pixels, channels), skip_channels = x.shape, 0 if skip is None else skip.shape[2]
        sizes = channels, skip_channels, groups, backward
        config = GroupNormConfig.from_heuristic(*sizes, arch(x.device))
        block = config.block_channels
        blocks = -(-channels // block) + -(-skip_channels // block)
        chunks = min(-(-4 * num_processors(x.device) // (blocks * batch)), config.max_chunks)
        chunk_tiles = -(-pixels // (config.block_pixels * chunks))
        chunk_pixels = chunk_tiles * config.block_pixels
        shared: dict[str, Any] = {
            "x_ptr": x,
            "skip_ptr": skip,
            "add_ptr": add,
            "pixels": pixels,
            "channels": channels,
            "skip_channels": skip_channels,
            "groups": groups,
            "chunk_pixels": chunk_pixels,
        }
        return cls(
            config=config,
            grid=(blocks, -(-pixels // chunk_pixels), batch),
            shared=shared | config.constants() | config.options(),
        )

    def new_parts(self) -> Tensor:
        """Room for two numbers of each part of each group: (B, chunks, SPAN, 2, G)."""
        shape = (self.grid[2], self.grid[1], self.config.span, 2, self.shared["groups"])
        return self.shared["x_ptr"].new_empty(shape, dtype=torch.float32)


def launch_forward(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, HW, C + S), mean and rstd (B, G)."""
    call = Call.of(x, skip, add, groups, backward=False)
    pixels = call.shared["x_ptr"]
    y = pixels.new_empty((*pixels.shape[:2], weight.shape[0]))
    mean = pixels.new_empty((pixels.shape[0], groups), dtype=torch.float32)
    rstd, parts = torch.empty_like(mean), call.new_parts()
    _statistics[call.grid](parts_ptr=parts, **call.shared)
    _normalise[call.grid](
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        parts_ptr=parts,
        y_ptr=y,
        mean_ptr=mean,
        rstd_ptr=rstd,
        eps=eps,
        SILU=silu,
        **call.shared,
    )
    return y, mean, rstd


def launch_backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    silu: bool,
    wants_weight: bool,
    wants_add: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx (B, HW, C), dskip (B, HW, S), dadd (B, C), dweight and dbias (C + S,), all contiguous. What is
    not wanted has no elements."""
    groups, channels = mean.shape[1], weight.shape[0]
    call = Call.of(x, skip, add, groups, backward=True)
    pixels, skip_pixels, dy = call.shared["x_ptr"], call.shared["skip_ptr"], pixels_of(dy)
    residual = None if residual is None else pixels_of(residual)
    wants_sums = wants_weight or wants_add
    sums = mean.new_empty((call.grid[2], call.grid[1], 3, channels)) if wants_sums else None
    terms = mean.new_empty((mean.shape[0], 2, groups)) if wants_add else None
    dx = torch.empty_like(pixels)
    dskip = pixels.new_empty(0 if skip_pixels is None else skip_pixels.shape)
    shared = call.shared | {
        "dy_ptr": dy,
        "weight_ptr": weight.contiguous(),
        "bias_ptr": bias.contiguous(),
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "parts_ptr": call.new_parts(),
        "SILU": silu,
    }
    _sums[call.grid](channel_sums_ptr=sums, **shared)
    _differentiate[call.grid](
        residual_ptr=residual,
        terms_ptr=terms,
        dx_ptr=dx,
        dskip_ptr=None if skip is None else dskip,
        **shared,
    )
    dadd = mean.new_empty((mean.shape[0], channels) if wants_add else 0)
    dweight, dbias = (mean.new_empty(channels if wants_sums else 0) for _ in range(2))
    if wants_sums:
        _finish[(-(-channels // FINISH_CHANNELS),)](
            channel_sums_ptr=sums,
            terms_ptr=terms,
            weight_ptr=shared["weight_ptr"],
            rstd_ptr=rstd,
            dadd_ptr=dadd if wants_add else None,
            dweight_ptr=dweight,
            dbias_ptr=dbias,
            batch=mean.shape[0],
            chunks=call.grid[1],
            pixels=pixels.shape[1],
            channels=channels,
            groups=groups,
            BLOCK_CHANNELS=FINISH_CHANNELS,
            MAX_CHUNKS=call.config.max_chunks,
            **call.config.options(),
        )
    if not wants_weight:
        dweight, dbias = mean.new_empty(0), mean.new_empty(0)
    return dx, dskip, dadd, dweight, dbias


_INPUTS = dict.fromkeys(("x_ptr", "skip_ptr", "add_ptr"), "*bf16")
_VECTORS = dict.fromkeys(("weight_ptr", "bias_ptr"), "*bf16")
_STATISTICS = dict.fromkeys(("parts_ptr", "mean_ptr", "rstd_ptr"), "*fp32")
_SIZES = dict.fromkeys(("pixels", "channels", "skip_channels", "groups", "chunk_pixels"), "i32")
_NORMALISE = _INPUTS | _VECTORS | _STATISTICS | {"y_ptr": "*bf16"} | _SIZES | {"eps": "fp32"}
_SUMS = _INPUTS | _VECTORS | _STATISTICS | {"dy_ptr": "*bf16", "channel_sums_ptr": "*fp32"} | _SIZES
_DX = dict.fromkeys(("dy_ptr", "dx_ptr", "dskip_ptr", "residual_ptr"), "*bf16")
_DIFFERENTIATE = _INPUTS | _VECTORS | _STATISTICS | {"terms_ptr": "*fp32"} | _DX | _SIZES
_OUTPUTS = ("channel_sums_ptr", "terms_ptr", "rstd_ptr", "dadd_ptr", "dweight_ptr", "dbias_ptr")
_FINISH = dict.fromkeys(_OUTPUTS, "*fp32") | {"weight_ptr": "*bf16"}
_FINISH |= dict.fromkeys(("batch", "chunks", "pixels", "channels", "groups"), "i32")


def _declare(
    name: str,
    kernel: Callable[[], Any],
    signature: dict[str, str],
    absent: tuple[str, ...],
    constants: dict[str, int],
    config: GroupNormConfig,
    targets: tuple[str, ...],
) -> Launch:
    given = {k: v for k, v in signature.items() if k not in absent}
    return Launch(
        name=name,
        kernel=kernel,
        signature=given,
        constants=dict.fromkeys(absent) | constants,
        aligned=tuple(k for k in given if k not in ("eps", "batch", "chunks")),
        **config.options(),
        targets=targets,
    )


# SDXL at 1024 px: the norm after the time embedding, of the widest level, and the first of the middle
# level's up path, where groups of 60 lie across x and skip.
LAUNCHES = tuple(
    _declare(
        f"group_norm_{name} {case} bf16",
        kernel,
        signature,
        tuple(k for k in absent if k in signature),
        config.constants() | ({} if name == "statistics" else {"SILU": True}),
        config,
        targets,
    )
    for case, sizes, absent in (
        ("C=320 add", (320, 0, 32), ("skip_ptr", "dskip_ptr", "residual_ptr")),
        ("C=1280+640", (1280, 640, 32), ("add_ptr", "terms_ptr")),
    )
    for name, backward, kernel, signature in (
        ("statistics", False, lambda: _statistics, _INPUTS | {"parts_ptr": "*fp32"} | _SIZES),
        ("silu_normalise", False, lambda: _normalise, _NORMALISE),
        ("silu_sums", True, lambda: _sums, _SUMS),
        ("silu_differentiate", True, lambda: _differentiate, _DIFFERENTIATE),
    )
    for targets, config in GroupNormConfig.by_target(*sizes, backward)
) + tuple(
    _declare(
        "group_norm_finish C=320 bf16",
        lambda: _finish,
        _FINISH,
        (),
        {"BLOCK_CHANNELS": FINISH_CHANNELS, "MAX_CHUNKS": config.max_chunks},
        config,
        targets,
    )
    for targets, config in GroupNormConfig.by_target(320, 0, 32, True)
)
