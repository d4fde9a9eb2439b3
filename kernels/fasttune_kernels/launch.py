"""What a kernel file tells about each specialisation of its kernels that ships.

A file with kernels ends in `LAUNCHES`, one entry a specialisation, and has its name in OP_FILES. The
values are those that the file launches with, not a second copy of them: both come from one place,
such as `NormConfig.from_heuristic(...)`. They are data, so that a machine without a GPU can
compile every one of them for every target and hold its registers, spills and shared memory to what
the hardware has. Nothing here imports triton.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""A100; RTX 30; RTX 40; H100; B200; RTX 50."""
AMD = ("gfx942", "gfx950", "gfx1100", "gfx1201")
"""MI300; MI350; RX 7900; RX 9070."""
TARGETS = NVIDIA + AMD

OP_FILES: tuple[str, ...] = (
    "diffusion_loss",
    "ema_step",
    "flash_attention",
    "gated_residual_kernels",
    "geglu",
    "gelu_tanh",
    "gradient_norm",
    "group_norm_silu_launch",
    "lora_linear_launches",
    "norm_modulate_launch",
    "optimizer_step_cuda",
    "optimizer_step_kernels",
    "qk_norm_rope_kernels",
    "quantize_rows",
    "short_attention",
    "triton_probe",
)
"""Modules of this package that have LAUNCHES."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One specialisation of a Triton kernel. ValueError if it contradicts itself."""

    name: str
    """Kernel, sizes and dtypes that set this specialisation apart: "norm_modulate_forward D=3072
    bf16". Stable, as recorded numbers are found by it. Targets may have launches of one name."""
    kernel: Callable[[], Any]
    """Returns the @triton.jit function. Called only where triton is installed."""
    signature: Mapping[str, str]
    """Argument -> Triton type, "*bf16", "i32", "fp32", for all arguments but the constants."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """constexpr arguments, and those that triton makes constant: an absent pointer (None) and an
    integer that is 1."""
    aligned: tuple[str, ...] = ()
    """Arguments that are divisible by 16 whenever this is launched: pointers of whole tensors,
    sizes and strides."""
    over_2_gib: tuple[str, ...] = ()
    """Pointers whose storage may be larger: AMD addresses the others with 32 bits."""
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool
    """Contraction to FMA. Triton's default changes between versions, so it is always said."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the target's compiler: waves_per_eu, matrix_instr_nonkdim, num_ctas."""
    targets: tuple[str, ...] = TARGETS
    """Where it ships."""
    matrix: bool = False
    """Whether the target's matrix instruction has to be in it."""

    def __post_init__(self) -> None:
        _check_targets(self.name, self.targets, TARGETS)
        both = set(self.signature) & set(self.constants)
        unknown = {*self.aligned, *self.over_2_gib} - set(self.signature)
        if both:
            raise ValueError(f"{self.name}: {sorted(both)} are in signature and in constants")
        if unknown:
            raise ValueError(
                f"{self.name}: aligned and over_2_gib name arguments of signature, not "
                f"{sorted(unknown)}"
            )
        if "constexpr" in self.signature.values():
            raise ValueError(f"{self.name}: constexpr arguments go into constants, with a value")

    def keywords(self) -> dict[str, Any]:
        """What the compiler is told: `kernel[grid](*arguments, **launch.keywords())`."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.enable_fp_fusion,
            **self.options,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaLaunch:
    """One kernel of csrc/cuda as it ships, compiled at run time. ValueError for unknown targets."""

    name: str
    """As in Launch."""
    source: str
    """File in csrc/cuda: "dequantize.cu"."""
    entry: str
    """The kernel as C++ names it: "dequantize<__nv_bfloat16, 64>"."""
    threads: int
    """In a block."""
    dynamic_shared: int = 0
    """Bytes of shared memory that the launch asks for, beside what the source declares."""
    defines: Mapping[str, str] = field(default_factory=dict)
    """Macros."""
    fast_math: bool = False
    targets: tuple[str, ...] = NVIDIA
    """Where it ships. "sm_90a" and the like allow instructions of this very target."""
    matrix: bool = False
    """As in Launch."""

    def __post_init__(self) -> None:
        _check_targets(self.name, self.targets, (*NVIDIA, "sm_90a", "sm_100a", "sm_120a"))


def launches(op_files: Sequence[str] = OP_FILES) -> tuple[Launch | CudaLaunch, ...]:
    """All that ships, in the order of the op files. Imports them, and so torch."""
    found: list[Launch | CudaLaunch] = []
    for name in op_files:
        found += importlib.import_module(f"fasttune_kernels.{name}").LAUNCHES
    return tuple(found)


def _check_targets(name: str, targets: Sequence[str], known: Sequence[str]) -> None:
    unknown = [target for target in targets if target not in known]
    if unknown or not targets:
        raise ValueError(f"{name}: targets {unknown or 'none'}; there are {', '.join(known)}")
