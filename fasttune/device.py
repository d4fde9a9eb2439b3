"""Which device and dtypes a run uses. Only "auto" chooses, and the choice comes with its reason."""

from dataclasses import dataclass

import torch

from fasttune.errors import HardwareError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where tensors live and in what precision."""

    device: torch.device
    base_dtype: torch.dtype
    """Storage of the network's weights."""
    compute_dtype: torch.dtype
    """Matmuls and activations."""
    reason: str
    """One line for the log: what was chosen and why."""


def pick_device(name: str) -> torch.device:
    """`name` is auto, cpu, cuda (NVIDIA and AMD) or mps. Raises HardwareError if absent."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    found = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not found[name]:
        build = "a CPU build" if torch.version.cuda is None and torch.version.hip is None else "ok"
        raise HardwareError(
            f'run.device = "{name}" but torch {torch.__version__} finds no such device '
            f"(this torch is {build}); use run.device=cpu, or see `fasttune doctor`"
        )
    return torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """bf16 matmuls at full rate: Ampere and later, any ROCm card; not the CPU, not yet MPS."""
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def place(*, device: str, base: str, compute: str, adapter: bool) -> Placement:
    """Resolves the "auto" of run.device and [precision].

    Weights that are trained are kept in fp32 unless the config says otherwise: a bf16 weight
    has 8 bits, and an update of lr 1e-5 rounds away.
    """
    chosen = pick_device(device)
    base_dtype, compute_dtype = dtypes(base, compute, adapter=adapter, bf16=has_bf16(chosen))
    why = "as configured"
    if compute == "auto":
        why = "has bf16" if has_bf16(chosen) else "no fast bf16 here"
    if compute == "bf16" and chosen.type == "cuda" and not has_bf16(chosen):
        raise HardwareError(
            f"precision.compute = bf16 but {torch.cuda.get_device_name(chosen)} has no bf16 matmul; "
            "use precision.compute=fp16 or fp32"
        )
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type
    reason = (
        f"device {name}, compute {short(compute_dtype)} ({why}), base weights {short(base_dtype)}"
    )
    return Placement(
        device=chosen, base_dtype=base_dtype, compute_dtype=compute_dtype, reason=reason
    )


def dtypes(
    base: str, compute: str, *, adapter: bool, bf16: bool
) -> tuple[torch.dtype, torch.dtype]:
    """(base, compute) of [precision], "auto" resolved; `bf16` says whether the device has it."""
    if compute == "auto":
        compute_dtype = torch.bfloat16 if bf16 else torch.float32
    else:
        compute_dtype = DTYPES[compute]
    if base == "auto":
        return (compute_dtype if adapter else torch.float32), compute_dtype
    return DTYPES[base], compute_dtype


def short(dtype: torch.dtype) -> str:
    """The config's name of a dtype."""
    return next(name for name, value in DTYPES.items() if value == dtype)
