"""How the kernels of lora_linear launch: their configs, and what ships."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttune_kernels.dispatch import arch, num_processors
from fasttune_kernels.jit import next_power_of_2
from fasttune_kernels.launch import TARGETS, Launch
from fasttune_kernels.lora_linear_kernels import gradient_kernel, linear_kernel, sum_kernel

MERGED_RANK = 32
"""Largest rank at which dlow is summed up while the kernel of lora_B's gradient has dy at hand. Its sums
over BLOCK_N columns are 2 r / BLOCK_N of dy's bytes, written and read again: a quarter at r = 16 and 128
columns, half at 32; at 64 as much as reading dy once more costs, so there it is a product of its own."""

_OWN_PRODUCT = ("sm_8", "sm_12", "gfx11", "gfx12")
"""Where the base product and the rank-r product are one kernel, ours; elsewhere the vendor's product is
updated by a second one. By reasoning, not measured:

The update reads and writes y, 4 M O bytes at the 2 M O K operations of the product, so that it takes
2 F / (K B) of its time, with F operations and B bytes a second: at K = 3072 11 % on A100 (312 T, 1.9 TB/s)
and RTX 4090 (165 T, 1.0), 5 % on RTX 3090, 8 % on RX 7900 XTX, 13 % on H200 (990 T, 4.8), 16 % on
MI300X (1307 T, 5.3); 2.4 times that at SDXL's 1280 channels, a fifth at the 15360 of Flux's proj_out.
A loop over tl.dot comes close to the vendor's where mma.sync or WMMA from registers is the matrix
instruction: Ampere, Ada, consumer Blackwell, RDNA. wgmma and tcgen05 want asynchronous bulk copies and
warps with roles of their own; without, a quarter or more of H200's and B200's rate is lost. MI300's
vendor kernels are assembly with schedules that the compiler does not find."""


def has_own_product(x: Tensor) -> bool:
    """Whether the base product of `x` (M, K) runs in our kernel. Of fewer than 16 rows, such as
    modulation vectors, a tile is mostly padding, and the vendor has kernels that stream weights."""
    return len(x) >= 16 and arch(x.device).startswith(_OWN_PRODUCT)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """linear_kernel's. Not measured; the reasoning is at each."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def from_heuristic(cls, rows: int, columns: int, arch: str) -> "LinearConfig":
        """Of a whole product. NVIDIA: 128 x 128 of float32 in 8 warps are 64 registers a thread and 32 x
        64 a warp. In 4 warps they are 128 registers; 64 x 64 a warp read a third less of shared memory.
        4 stages of 16 KiB fit the 99 KiB of RTX GPUs. 64 x 64 where 128 x 128 has too few tiles for the
        multiprocessors, of which the smallest of these GPUs have some 30 and the largest 170. RDNA:
        64 x 64."""
        if arch.startswith("gfx"):
            return cls(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=2)
        tiles = -(-rows // 128) * -(-columns // 128)
        if tiles < 100:
            return cls(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=4)
        return cls(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=4)

    @classmethod
    def of_low(cls, ranks: int, arch: str) -> "LinearConfig":
        """Of the product with A, which is bound by reading x: 64 rows, as wgmma needs, are 72 programs
        at 4608 tokens, and 16 KiB a stage keep 3.4 MB on their way, what an H200 needs."""
        block_n = min(64, max(16, next_power_of_2(ranks)))
        if arch.startswith("gfx1"):
            return cls(block_m=32, block_n=min(block_n, 32), block_k=64, num_warps=2, num_stages=2)
        if arch.startswith("gfx"):
            return cls(block_m=32, block_n=block_n, block_k=128, num_warps=4, num_stages=2)
        if arch in ("sm_90", "sm_100"):
            return cls(block_m=64, block_n=block_n, block_k=128, num_warps=4, num_stages=4)
        return cls(block_m=32, block_n=block_n, block_k=64, num_warps=4, num_stages=5)

    @classmethod
    def of_update(cls, arch: str) -> "LinearConfig":
        """Of the rank-r product alone, bound by reading and writing the output."""
        if arch.startswith("gfx1"):
            return cls(block_m=32, block_n=64, block_k=16, num_warps=4, num_stages=1)
        return cls(block_m=64, block_n=128, block_k=16, num_warps=4, num_stages=1)

    def constants(self, rank: int) -> dict[str, int]:
        """constexpr arguments. Tiles are taken 8 rows at a time, so that those running at once read
        about as many rows of one operand as of the other. The rank-r product is in steps of 16 or 32,
        a multiple of the matrix instruction's 16; 64 would take 32 registers more."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        return {**blocks, "BLOCK_R": 16 if rank <= 16 else 32, "GROUP": 8}

    def options(self) -> dict[str, Any]:
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientConfig:
    """gradient_kernel's: BLOCK_N columns of x are BLOCK_N by r of float32 for all of its rows."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @classmethod
    def from_heuristic(cls, arch: str) -> "GradientConfig":
        """Not measured. 16 KiB of dy a stage, three of them; 8 KiB where registers or LDS are few. Two
        on RTX 30 and 40, where the third spilled 16 bytes in the loop at rank 32: with one stage on
        its way to each of two programs an RTX 4090 has 4 MiB under way, and 1 TB/s needs under 1 MiB."""
        if arch.startswith("gfx1"):
            return cls(block_m=32, block_n=64, num_warps=4, num_stages=2)
        if arch.startswith("gfx"):
            return cls(block_m=64, block_n=128, num_warps=4, num_stages=2)
        num_stages = 2 if arch in ("sm_86", "sm_89") else 3
        return cls(block_m=64, block_n=128, num_warps=4, num_stages=num_stages)

    def group_rows(self, rows: int, programs: int, processors: int) -> int:
        """Rows of a program, so that there are two programs a multiprocessor. More would only add
        sums: each group of rows has its own, 4 r / group_rows of the bytes of x."""
        groups = max(1, 2 * processors // programs)
        return -(-rows // (groups * self.block_m)) * self.block_m

    def constants(self, rank: int) -> dict[str, int]:
        """constexpr arguments. Up to 64 ranks at a time, for which x is read once."""
        block_r = min(64, max(16, next_power_of_2(rank)))
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_R": block_r}

    def options(self) -> dict[str, Any]:
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


SUM_BLOCK = 64
"""Rows of a program of sum_kernel: 4 KiB of each tile's sums at r = 16, all its loads independent."""
SUM_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def launch_linear(
    out: Tensor,  # (M, N) contiguous
    config: LinearConfig,
    *,
    x: Tensor | None = None,
    x2: Tensor | None = None,
    weight: Tensor | None = None,  # (N, K)
    bias: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,  # (adapted columns, r)
    residual: Tensor | None = None,
    slices: tuple[int, ...] = (),
    scale: float = 1.0,
    seed: Tensor | None = None,
    threshold: int = 0,
    offset: int = 0,
    drops_input: bool = False,
) -> None:
    """out = x weight^T + bias + residual + scale low up^T, the parts that are given, with the dropout
    of the input or of the rank-r product if there is a seed."""
    rows, columns = out.shape
    rank = 0 if up is None else up.shape[1]
    grid = (-(-rows // config.block_m) * -(-columns // config.block_n),)
    linear_kernel[grid](
        out, x, x2, weight, bias, low, up, residual, seed, scale, threshold, offset, rows, columns,
        0 if x is None else x.shape[1], 0 if x2 is None else x2.shape[1],
        _stride(x, 0), _stride(x2, 0), _stride(weight, 0), _stride(weight, 1), _stride(low, 0),
        _stride(up, 0), _stride(up, 1), _stride(residual, 0),
        SLICES=slices, RANK=rank, DROPS_INPUT=drops_input,
        **config.constants(rank), **config.options(),
    )  # fmt: skip


def _stride(x: Tensor | None, dim: int) -> int:
    return 0 if x is None else x.stride(dim)


def launch_gradient(
    x: Tensor,  # (M, columns)
    low: Tensor,  # (M, targets * r)
    rank: int,
    *,
    up: Tensor | None = None,
    slices: tuple[int, ...] = (),
    transposed: bool = False,
    scale: float,
    seed: Tensor | None = None,
    threshold: int = 0,
    offset: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """scale x^T low as (P, r), or transposed, in float32; and, given `up` (P, r), x up per target as
    (M, targets * r) in x's dtype, for ranks up to MERGED_RANK."""
    rows, columns = x.shape
    config = GradientConfig.from_heuristic(arch(x.device))
    constants = config.constants(rank)
    ranges = slices or (0, columns)
    lengths = [end - begin for begin, end in zip(ranges[::2], ranges[1::2], strict=True)]
    tiles = sum(-(-length // config.block_n) for length in lengths)
    rank_tiles = -(-rank // constants["BLOCK_R"])
    group_rows = config.group_rows(rows, tiles * rank_tiles, num_processors(x.device))
    groups, adapted = -(-rows // group_rows), sum(lengths)
    partial = x.new_empty(
        (groups, rank, adapted) if transposed else (groups, adapted, rank), dtype=torch.float32
    )
    out = partial.transpose(1, 2) if transposed else partial
    sums = None if up is None else x.new_empty(tiles, rows, rank, dtype=torch.float32)
    gradient_kernel[(tiles * groups, rank_tiles)](
        out, sums, x, low, up, seed, scale, threshold, rows, columns, offset, group_rows, tiles,
        x.stride(0), low.stride(0), *out.stride(),
        SLICES=slices, RANK=rank, **constants, **config.options(),
    )  # fmt: skip
    total = partial.sum(0) if groups > 1 else partial[0]
    if sums is None:
        return total, None
    dlow = x.new_empty(rows, len(lengths) * rank)
    sum_kernel[(-(-rows // SUM_BLOCK), len(lengths))](
        dlow, sums, rows, tiles, SLICES=slices, RANK=rank, TILE=config.block_n,
        BLOCK_M=SUM_BLOCK, BLOCK_R=constants["BLOCK_R"], **SUM_OPTIONS,
    )  # fmt: skip
    return total, dlow


def _launch(
    name: str,
    kernel: Any,
    arguments: dict[str, Any],
    options: dict[str, Any],
    targets: tuple[str, ...],
    matrix: bool = True,
) -> Launch:
    """`arguments` are types, "*bf16", or constants."""
    signature = {key: value for key, value in arguments.items() if isinstance(value, str)}
    return Launch(
        name=name,
        kernel=lambda: kernel,
        signature=signature,
        constants={key: value for key, value in arguments.items() if key not in signature},
        aligned=tuple(key for key in signature if key not in _ANY),
        **options,
        targets=targets,
        matrix=matrix,
    )


_ANY = ("scale", "threshold", "M", "tiles")
"""Arguments that need not be divisible by 16."""
_BF16, _F32, _I32, _I64 = "*bf16", "*fp32", "i32", "*i64"
_LINEAR: dict[str, Any] = {
    "out_ptr": _BF16,
    **dict.fromkeys(("x_ptr", "x2_ptr", "weight_ptr", "bias_ptr", "low_ptr", "up_ptr"), None),
    **dict.fromkeys(("residual_ptr", "seed_ptr"), None),
    "scale": "fp32",
    **dict.fromkeys(("threshold", "offset", "M", "N", "width", "width2"), _I32),
    **dict.fromkeys(("x_stride", "x2_stride", "weight_n_stride", "weight_k_stride"), _I32),
    **dict.fromkeys(("low_stride", "up_n_stride", "up_r_stride", "residual_stride"), _I32),
    "SLICES": (),
    "RANK": 0,
    "DROPS_INPUT": False,
}
_GRADIENT: dict[str, Any] = {
    "out_ptr": _F32,
    "x_ptr": _BF16,
    "low_ptr": _BF16,
    **dict.fromkeys(("sums_ptr", "up_ptr", "seed_ptr"), None),
    "scale": "fp32",
    **dict.fromkeys(("threshold", "M", "width", "offset", "group_rows", "tiles"), _I32),
    **dict.fromkeys(("x_stride", "low_stride", "out_group_stride"), _I32),
    **dict.fromkeys(("out_column_stride", "out_rank_stride"), _I32),
    "SLICES": (),
}
_FLUX_SLICES = (0, 3072, 3072, 6144, 6144, 9216, 9216, 21504)
"""q, k, v and the MLP of a single block."""


def _declared(target: str) -> list[Launch]:
    """LoRA on all linear layers of Flux's single block: 4 targets that share their input, and proj_out
    with its input in two buffers, of ranks 16 and 256, and of 16 with dropout. 4096 image and 512
    text tokens."""
    return [
        *_of_rank(target, 16, dropout=False),
        *_of_rank(target, 16, dropout=True),
        *_of_rank(target, 256, dropout=False),
    ]


def _of_rank(target: str, rank: int, *, dropout: bool) -> list[Launch]:
    joint = 4 * rank
    low, update = LinearConfig.of_low(joint, target), LinearConfig.of_update(target)
    gradient = GradientConfig.from_heuristic(target)
    rank_product: dict[str, Any] = {
        "low_ptr": _BF16,
        "up_ptr": _BF16,
        "RANK": rank,
        "up_r_stride": 1,
    }
    seed: dict[str, Any] = {"seed_ptr": _I64} if dropout else {}
    end = f"{' dropout' if dropout else ''} bf16"
    made = []

    def linear(name: str, config: LinearConfig, rank: int, **given: Any) -> None:
        arguments = _LINEAR | config.constants(rank) | given
        made.append(_launch(f"{name}{end}", linear_kernel, arguments, config.options(), (target,)))

    linear(
        f"lora_linear_low R={joint}", low, 0,
        x_ptr=_BF16, weight_ptr=_BF16, weight_k_stride=1, DROPS_INPUT=dropout, **seed,
    )  # fmt: skip
    if target.startswith(_OWN_PRODUCT):
        product = LinearConfig.from_heuristic(4608, 3072, target)
        inputs: dict[str, Any] = {"x_ptr": _BF16, "weight_ptr": _BF16, "weight_k_stride": 1}
        inputs["bias_ptr"] = _BF16
        if not dropout:  # it is in `low` then
            linear(
                f"lora_linear_forward O=21504 in 4 slices r={rank}", product, rank,
                **inputs | rank_product | {"SLICES": _FLUX_SLICES},
            )  # fmt: skip
            linear(
                f"lora_linear_forward two buffers r={rank}", product, rank,
                **inputs | rank_product | {"x2_ptr": _BF16},
            )  # fmt: skip
        inputs = {"x_ptr": _BF16, "weight_ptr": _BF16, "weight_n_stride": 1, "residual_ptr": _BF16}
        linear(
            f"lora_linear_backward R={joint}", product, joint,
            **inputs | {"low_ptr": _BF16, "up_ptr": _BF16, "up_n_stride": 1, "RANK": joint} | seed,
        )  # fmt: skip
    else:
        if not dropout:
            linear(
                f"lora_linear_update O=21504 in 4 slices r={rank}", update, rank,
                **rank_product | {"residual_ptr": _BF16, "SLICES": _FLUX_SLICES},
            )  # fmt: skip
        linear(
            f"lora_linear_update R={joint}", update, joint,
            low_ptr=_BF16, up_ptr=_BF16, up_n_stride=1, RANK=joint, residual_ptr=_BF16, **seed,
        )  # fmt: skip

    def of_gradient(name: str, rank: int, **given: Any) -> None:
        arguments = _GRADIENT | gradient.constants(rank) | {"RANK": rank} | given
        made.append(
            _launch(
                f"lora_linear_gradient {name}{end}",
                gradient_kernel,
                arguments,
                gradient.options(),
                (target,),
            )  # fmt: skip
        )

    of_gradient(f"A R={joint}", joint, out_column_stride=1, **seed)
    if dropout:
        return made
    sums = {"sums_ptr": _F32, "up_ptr": _BF16} if rank <= MERGED_RANK else {}
    of_gradient(
        f"B{' and dlow' if sums else ''} O=21504 in 4 slices r={rank}", rank,
        out_rank_stride=1, SLICES=_FLUX_SLICES, **sums,
    )  # fmt: skip
    if not sums:
        return made
    arguments = {
        "dlow_ptr": _BF16,
        "sums_ptr": _F32,
        "M": _I32,
        "tiles": _I32,
        "SLICES": _FLUX_SLICES,
        "RANK": rank,
        "TILE": gradient.block_n,
        "BLOCK_M": SUM_BLOCK,
        "BLOCK_R": rank,
    }
    name = f"lora_linear_sum O=21504 in 4 slices r={rank}{end}"
    made.append(_launch(name, sum_kernel, arguments, SUM_OPTIONS, (target,), matrix=False))
    return made


LAUNCHES = tuple(launch for target in TARGETS for launch in _declared(target))
