"""What `fasttune doctor` finds out by trying: each probe runs in a process of its own.

A library with a broken native part may abort the process that imports it, so the probes import in
a child, run one small operation, and print a JSON object. `probe` starts them from the parent.
"""

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 180
"""torchao compiles its update at the first step, which takes a C++ compiler half a minute."""

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from fasttune.probes import run; run(*sys.argv[2:])"
)


def probe(name: str, *args: str) -> dict[str, Any]:
    """The findings of the probe `name`; {"error": why} if it failed, crashed or hung."""
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, json.dumps(sys.path), name, *args]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {TIMEOUT_S} s"}
    except OSError as error:
        return {"error": f"{sys.executable} cannot be started: {error.strerror}"}
    lines = result.stdout.strip().splitlines()
    if result.returncode == 0 and lines:
        findings: dict[str, Any] = json.loads(lines[-1])
        return findings
    said = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if result.returncode < 0:
        return {"error": f"crashes the process ({signal.Signals(-result.returncode).name}): {said}"}
    return {"error": said}


def run(name: str, *args: str) -> None:
    """In the child: the probe's findings on stdout, an exception in one line."""
    try:
        findings = PROBES[name](*args)
    except Exception as error:  # whatever a broken library raises is the finding
        findings = {"error": one_line(error)}
    sys.stdout.write("\n" + json.dumps(findings) + "\n")


def one_line(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def torch_build() -> dict[str, Any]:
    """torch itself and each device it finds."""
    import torch

    if torch.version.hip is not None:
        build = f"ROCm {torch.version.hip}"
    elif torch.version.cuda is not None:
        build = f"CUDA {torch.version.cuda}"
    else:
        build = "CPU"
    why_no_gpu = None
    if build != "CPU" and not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except Exception as error:  # RuntimeError, AssertionError: the driver's reason is its text
            why_no_gpu = one_line(error)
    found = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "version": torch.__version__,
        "build": build,
        "why_no_gpu": why_no_gpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "mps": torch.backends.mps.is_available(),
        "gpus": [_gpu(index) for index in found],
    }


def _gpu(index: int) -> dict[str, Any]:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = str(properties.gcnArchName).split(":")[0]
        bf16, int8, fp8 = True, arch >= "gfx908", arch.startswith(("gfx94", "gfx95", "gfx12"))
    else:
        capability = (properties.major, properties.minor)
        arch = f"sm_{properties.major}{properties.minor}"
        bf16, int8, fp8 = capability >= (8, 0), capability >= (7, 2), capability >= (8, 9)
    return {
        "index": index,
        "name": properties.name,
        "arch": arch,
        "in_build": torch.version.hip is not None or _in_build(arch, torch.cuda.get_arch_list()),
        "total_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1),
        "bf16": bf16,
        "int8": int8,
        "fp8": fp8,
    }


def _in_build(arch: str, built: list[str]) -> bool:
    """Whether code for `arch`, or for a smaller minor number of the same major one, is in torch."""
    number = int(arch.removeprefix("sm_"))
    if f"compute_{number}" in built:
        return True
    kernels = [int(a.removeprefix("sm_")) for a in built if a.removeprefix("sm_").isdigit()]
    return any(k // 10 == number // 10 and k <= number for k in kernels)


def device_operations(name: str) -> dict[str, Any]:
    """On run.device = `name`: what auto resolves to, and which operations work."""
    import torch

    from fasttune.device import pick_device, place

    device = pick_device(name)
    dtypes = {}
    for short, dtype in (
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
    ):
        ones = torch.ones(32, 32, device=device, dtype=dtype)
        try:
            dtypes[short] = None if float((ones @ ones).sum()) == 32.0**3 else "wrong result"
        except RuntimeError as error:
            dtypes[short] = one_line(error)
    return {
        "device": str(device),
        "placement": place(device=name, base="auto", compute="auto", adapter=True).reason,
        "dtypes": dtypes,
        "attention": _attention_backends(device),
    }


def _attention_backends(device: Any) -> dict[str, str | None]:
    """Backend of scaled_dot_product_attention -> why it does not work here, None if it does."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from fasttune.device import has_bf16

    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    q = torch.ones(1, 2, 64, 64, device=device, dtype=dtype)
    backends: dict[str, str | None] = {}
    for label, backend in (
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("math", SDPBackend.MATH),
    ):
        try:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().item()
            backends[label] = None
        except RuntimeError as error:
            backends[label] = one_line(error)
    return backends


def optimizers(name: str) -> dict[str, Any]:
    """What each of optimizer.name is on run.device = `name`: the class that was built, what it runs by
    if that is our own, and why it failed. `own` is why the weights are not our own op's, None if they
    are; "adamw8bit" is built only there, as libraries may abort the process (`adamw8bit` tries them)."""
    import torch

    from fasttune.device import pick_device
    from fasttune.optim import OPTIMIZERS, fused_adamw

    device = pick_device(name)
    weight = torch.nn.Parameter(torch.ones(64, 64, device=device))
    own = fused_adamw.why_not([weight], eps=1e-8, device_type=device.type)
    names = [x for x in OPTIMIZERS if own is None or x != "adamw8bit"]
    return {"own": own, "found": {x: _optimizer(x, device) for x in names}}


def _optimizer(name: str, device: Any) -> dict[str, str | None]:
    import torch

    from fasttune.optim import build_optimizer
    from fasttune.optim.fused_adamw import FusedAdamW

    weight = torch.nn.Parameter(torch.ones(64, 64, device=device))
    weight.grad = torch.ones_like(weight)
    options: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    try:
        made = build_optimizer(name, [("weight", weight)], lr=0.5, **options)
        made.step()
        found = weight.detach().cpu()
    except Exception as error:  # whatever a kernel that does not compile or start raises
        return {"kind": None, "by": None, "error": one_line(error)}
    # The first step of each is lr times the sign of this gradient: 1 becomes 0.5.
    right = torch.allclose(found, torch.tensor(0.5), atol=0.02)
    by = None
    if isinstance(made, FusedAdamW):
        state = made.state[weight]
        by = _language(state["exp_avg"] if "exp_avg" in state else state["exp_avg.codes"])
    problem = None if right else "its first step gives wrong weights on this machine"
    return {"kind": type(made).__name__, "by": by, "error": problem}


def _language(m: Any) -> str:
    """What `optimizer_step_` runs in on such state, by the same questions."""
    from fasttune_kernels import dispatch
    from fasttune_kernels.optimizer_step_cuda import is_default

    if dispatch.runs_triton(m):
        return "CUDA C++" if is_default(m.device) else "Triton"
    return "C++" if dispatch.runs_cpp(m) else "PyTorch"


def adamw8bit(library: str, name: str) -> dict[str, Any]:
    """Whether this library's 8-bit AdamW makes a right step on run.device = `name`."""
    from fasttune.device import pick_device
    from fasttune.optim.adamw8bit import LIBRARIES, why_not

    return {"error": why_not(LIBRARIES[library], pick_device(name))}


def imports(module: str, *names: str) -> dict[str, Any]:
    """Whether a module and names in it import."""
    found = importlib.import_module(module)
    for name in names:
        getattr(found, name)
    return {"error": None}


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "torch_build": torch_build,
    "device_operations": device_operations,
    "optimizers": optimizers,
    "adamw8bit": adamw8bit,
    "imports": imports,
}
