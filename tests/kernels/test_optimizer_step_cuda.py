"""The optimizer step in CUDA C++: its source, run on the CPU by tests/kernels/cuda_on_cpu.h where there is
no GPU, is the PyTorch path; and its lookup tables."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttune_kernels import cuda_source, optimizer_step_cuda
from fasttune_kernels.arena import Arena
from fasttune_kernels.blockwise import dequantize_blockwise, dynamic_map
from fasttune_kernels.dispatch import forced
from fasttune_kernels.launch import NVIDIA, CudaLaunch
from fasttune_kernels.optimizer_step import optimizer_step_
from fasttune_kernels.optimizer_step_cuda import (
    LAUNCHES,
    launch_cuda,
    launch_of,
    lookup_tables,
    takes,
)

CPU = torch.device("cpu")
FP32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
SHAPES = ((15,), (257, 5), (1024,), (9, 10))

# weight, gradient, state, average, rounding
KINDS: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None, str]] = {
    "fp32": (FP32, FP32, FP32, FP32, "nearest"),
    "bf16": (BF16, BF16, FP32, FP32, "stochastic"),
    "8-bit": (BF16, BF16, U8, BF16, "stochastic"),
    "nearest": (BF16, FP32, U8, None, "nearest"),
}


@pytest.mark.parametrize("signed", [True, False])
def test_lookup_tables_find_the_nearest_value(signed: bool) -> None:
    tables = lookup_tables(CPU)
    size = optimizer_step_cuda.NUM_CELLS
    encode = tables[:size] if signed else tables[size : 2 * size]
    values = dynamic_map(signed, CPU)
    assert torch.equal(
        tables[2 * size :].view(torch.float32).view(2, 256)[0 if signed else 1], values
    )
    values = values[127:] if signed else values
    borders = (values[1:] + values[:-1]) / 2
    spread = 10 ** torch.linspace(-9, 0, 20000)
    x = torch.cat([values, borders * 1.0001, borders * 0.9999, spread]).clamp(max=1)
    raw = x.view(torch.int32)
    border = encode[((raw >> 16) - ((127 - 23) << 7)).clamp(0, size - 1)]
    code = (border & 0xFF) + (raw > border)
    assert torch.equal(code[: len(values)], torch.arange(len(values), dtype=torch.int32))
    best = (x[:, None] - values).abs().amin(1)
    assert ((x - values[code]).abs() <= best + 1e-4 * x).all()


def test_what_it_takes_and_where() -> None:
    w = [torch.zeros(3, dtype=BF16)]
    assert takes(w, w, U8, BF16, "stochastic") and takes(w, w, FP32, None, "nearest")
    assert not takes(w, w, U8, BF16, "kahan") and not takes(w, w, BF16, None, "nearest")
    half = [torch.zeros(3, dtype=torch.float16)]
    assert not takes(half, half, FP32, None, "nearest")
    assert optimizer_step_cuda.DEFAULT_ON <= set(NVIDIA)
    assert not optimizer_step_cuda.is_default(CPU)
    assert len({launch.entry for launch in LAUNCHES}) == len(LAUNCHES)


def test_triton_runs_where_it_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(launch: CudaLaunch, index: int) -> None:
        raise cuda_source.CudaSourceError("NVRTC cannot be used")

    monkeypatch.setattr(optimizer_step_cuda, "DEFAULT_ON", frozenset({"sm_90"}))
    monkeypatch.setattr(optimizer_step_cuda, "arch", lambda device: "sm_90")
    monkeypatch.setattr(cuda_source, "load", absent)
    # A GPU of which no other test has the answer.
    first, second = torch.device("cuda", 98), torch.device("cuda", 99)
    with pytest.warns(RuntimeWarning, match="Triton's runs: NVRTC cannot be used") as said:
        assert not any(optimizer_step_cuda.is_default(first) for _ in range(2))
    assert len(said) == 1
    monkeypatch.setattr(cuda_source, "load", lambda launch, index: None)
    assert optimizer_step_cuda.is_default(second)
    assert not optimizer_step_cuda.is_default(first)


Run = Callable[..., None]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Stands for cuda_source.run: the same arguments, on the CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("cuda")
    entries = [launch_of(*kind).entry for kind in KINDS.values()]
    wrappers = ""
    for index, entry in enumerate(entries):
        weight, _, state, ema = entry[len("optimizer_step<") :].split(", ")[:4]
        wrappers += f"""
extern "C" void run{index}(unsigned grid, unsigned threads, const int2* chunks, int num_chunks,
    int tiles, const i64* layout, const u64* pointers, int num_tensors, int aligned, {state}* m,
    {state}* v, float* m_absmax, float* v_absmax, {ema}* ema, const float* hyper,
    const float* scalars, const u64* seed, const u32* tables, float beta1, float rest1, float beta2,
    float rest2, float eps) {{
  run_grid(grid, threads, [&] {{
    {entry}(chunks, num_chunks, tiles, layout, pointers, num_tensors, aligned, m, v, m_absmax,
        v_absmax, ema, hyper, scalars, seed, tables, beta1, rest1, beta2, rest2, eps);
  }});
}}
"""
    shim = Path(__file__).with_name("cuda_on_cpu.h")
    source = cuda_source.SOURCES / LAUNCHES[0].source
    (folder / "all.cpp").write_text(f'#include "{shim}"\n#include "{source}"\n{wrappers}')
    library = folder / "all.so"
    # Without inlining: in code, what the compiler for GPUs is told to inline takes it 20 s.
    command = [compiler, "-std=c++17", "-O1", "-fno-inline", "-w", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*command, str(folder / "all.cpp"), "-o", str(library)], check=True)
    functions = ctypes.CDLL(str(library))

    def run(launch: CudaLaunch, grid: int, device: torch.device, *arguments: Any) -> None:
        function = getattr(functions, f"run{entries.index(launch.entry)}")
        function(grid, launch.threads, *map(_ctype, arguments))

    return run


def _ctype(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(0)
    return ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else value


def guarded(x: Tensor) -> Tensor:
    """A copy with something behind its end that nobody may read or write."""
    return torch.cat([x.flatten(), x.new_full((8,), 99)])[:-8].view(x.shape)


def state_of(kind: str, device: str = "cpu") -> dict[str, Any]:
    weight, _, state, ema, _ = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1 + 9 * 10, generator=generator)
    weights = [torch.randn(s, generator=generator) for s in SHAPES[:-1]]
    # The last one is not aligned to 16 bytes, which is told to the kernel for all of a call.
    weights = [guarded(w.to(weight).to(device)) for w in weights]
    weights.append(base.to(weight).to(device)[1:].view(9, 10))
    layout = Arena.of(weights)
    arenas: dict[str, Any] = {
        "m": layout.zeros(state, device),
        "v": layout.zeros(state, device),
        "m_absmax": layout.absmax(device) if state == U8 else None,
        "v_absmax": layout.absmax(device) if state == U8 else None,
        "ema": None if ema is None else layout.zeros(ema, device),
        "compensation": None,
    }
    return {"weights": weights, **arenas}


def steps(
    kind: str, step: Callable[..., None], tensors: slice, keep: float = 1.0, device: str = "cpu"
) -> dict[str, Any]:
    _, grad, _, _, rounding = KINDS[kind]
    state = state_of(kind, device)
    state["weights"] = state["weights"][tensors]
    layout = Arena.of(state["weights"])
    for name in ("m", "v", "ema"):
        if state[name] is not None:
            state[name] = state[name][: layout.total].clone()
    for name in ("m_absmax", "v_absmax"):
        if state[name] is not None:
            state[name] = state[name][: layout.total // 256].clone()
    groups = [i % 2 for i in range(len(state["weights"]))]
    for t in (1, 2):
        generator = torch.Generator().manual_seed(t)
        grads = [torch.randn(w.shape, generator=generator) for w in state["weights"]]
        values = [1e-2, 0.5, keep, 1 - 0.9**t, 1 - 0.999**t, 0.1]
        step(
            **state,
            grads=[guarded(g.to(grad).to(device)) for g in grads],
            groups=groups,
            hyper=torch.tensor([[1.0, 0.1], [0.5, 0.0]], device=device),
            scalars=torch.tensor(values, device=device),
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            rounding=rounding,
            seed=torch.tensor([t + (7 << 33)], device=device),
        )
    for w in state["weights"][:-1]:
        assert (w.as_strided((8,), (1,), w.numel()) == 99).all()
    return state


def assert_same(kind: str, ours: dict[str, Any], truth: dict[str, Any]) -> None:
    """But for what the last bit of float32 decides: a bf16's, or a code."""
    weight, _, state, ema, _ = KINDS[kind]

    def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
        a, b = a.double().cpu(), b.double().cpu()
        eps = {FP32: 3e-6, BF16: 2**-7, U8: 2**-3}[dtype]
        far = (a - b).abs() > eps * b.abs() + 1e-7
        assert far.double().mean() <= (0.003 if state == U8 else 0)
        assert ((a - b).abs() > 3e-6 * b.abs() + 1e-7).double().mean() < 0.02

    ours_flat, flat = (torch.cat([w.flatten() for w in x["weights"]]) for x in (ours, truth))
    close(ours_flat, flat, weight)
    for name in ("m", "v"):
        a, b = ours[name], truth[name]
        if state == U8:
            a, b = (
                dequantize_blockwise(x[name].cpu(), x[f"{name}_absmax"].cpu(), name == "m")
                for x in (ours, truth)
            )
        close(a, b, state)
    if ema is not None:
        close(ours["ema"], truth["ema"], ema)


@pytest.mark.parametrize("tensors", [slice(0, 3), slice(0, 4)], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("kind", KINDS)
def test_source_is_the_pytorch_path(
    kind: str, tensors: slice, on_cpu: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_source, "run", on_cpu)
    ours = steps(kind, launch_cuda, tensors)
    with forced("torch"):
        truth = steps(kind, optimizer_step_, tensors)
    assert_same(kind, ours, truth)
    kept = steps(kind, launch_cuda, tensors, keep=0.0)
    untouched = state_of(kind)
    assert all(map(torch.equal, kept["weights"], untouched["weights"]))
    assert not kept["m"].any() and not kept["v"].any()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_is_the_pytorch_path(kind: str) -> None:
    if torch.version.hip is not None:
        pytest.skip("CUDA alone")
    ours = steps(kind, launch_cuda, slice(0, 4), device="cuda")
    with forced("torch"):
        truth = steps(kind, optimizer_step_, slice(0, 4))
    assert_same(kind, ours, truth)
