"""CUDA C++ by NVRTC: compiled once, kept on disk, and errors that say what to do. Needs no GPU."""

import dataclasses
import sys
from pathlib import Path

import pytest

from fasttune_kernels import cuda_source
from fasttune_kernels.cuda_source import (
    Cubin,
    CudaSourceError,
    cached_cubin,
    compile_cubin,
    identity,
)
from fasttune_kernels.launch import CudaLaunch
from fasttune_kernels.optimizer_step_cuda import LAUNCHES

SOURCE = """
#include "half.cuh"
template <typename T>
__global__ void scale(T* x) { x[threadIdx.x] *= HALF; }
"""
SCALE = CudaLaunch(name="scale", source="scale.cu", entry="scale<float>", threads=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for wheel in ("cuda.core", "cuda.bindings.nvrtc"):
        pytest.importorskip(wheel)
    (tmp_path / "scale.cu").write_text(SOURCE)
    (tmp_path / "half.cuh").write_text("#define HALF 0.5f\n")
    return tmp_path


def test_compiles_and_names_the_kernel(folder: Path) -> None:
    made = compile_cubin(SCALE, "sm_90", folder)
    assert made.code[:4] == b"\x7fELF" and made.symbol.encode() in made.code
    assert "scale" in made.symbol and made.symbol != SCALE.entry


def test_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept_in = folder / "cache" / "cuda"
    first = cached_cubin(SCALE, "sm_89", folder, kept_in=kept_in)
    (kept,) = kept_in.iterdir()  # and nothing half written
    assert kept.name.startswith("scale-sm_89-")
    with monkeypatch.context() as patch:
        patch.setattr(cuda_source, "compile_cubin", None)
        assert cached_cubin(SCALE, "sm_89", folder, kept_in=kept_in) == first
    kept.write_bytes(b"no such file")
    assert cached_cubin(SCALE, "sm_89", folder, kept_in=kept_in) == first
    (folder / "half.cuh").write_text("#define HALF 0.25f\n")
    assert cached_cubin(SCALE, "sm_89", folder, kept_in=kept_in).code != first.code
    assert len(list(kept_in.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_no_error(folder: Path) -> None:
    (folder / "file").write_text("")
    made = cached_cubin(SCALE, "sm_80", folder, kept_in=folder / "file" / "cuda")
    assert made == compile_cubin(SCALE, "sm_80", folder)


def test_identity_has_all_that_the_code_depends_on(folder: Path) -> None:
    def changed(**fields: object) -> str:
        return identity(dataclasses.replace(SCALE, **fields), "sm_89", folder)  # type: ignore[arg-type]

    first = changed()
    assert first == changed(name="other") == changed(targets=("sm_80",))
    others = {
        changed(entry="scale<double>"),
        changed(defines={"A": "1"}),
        changed(fast_math=True),
        identity(SCALE, "sm_90", folder),
    }
    (folder / "unused.cuh").write_text("")
    others.add(changed())
    (folder / "scale.cu").write_text(SOURCE + "\n")
    others.add(changed())
    assert len(others | {first}) == 7


def test_what_does_not_compile_shows_the_compilers_log(folder: Path) -> None:
    (folder / "scale.cu").write_text(SOURCE.replace("HALF", "HALVE"))
    with pytest.raises(CudaSourceError, match=r'(?s)scale<float> of scale.cu, sm_80: .*"HALVE"'):
        compile_cubin(SCALE, "sm_80", folder)
    with pytest.raises(CudaSourceError, match="absent.cu"):
        compile_cubin(dataclasses.replace(SCALE, source="absent.cu"), "sm_80", folder)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)  # import raises ImportError
    with pytest.raises(
        CudaSourceError, match="pip install cuda-core, cuda-bindings, nvidia-cuda-n"
    ):
        cached_cubin(LAUNCHES[0], "sm_80", kept_in=tmp_path)


def test_what_ships_is_found_without_any_header_of_cuda(tmp_path: Path) -> None:
    for wheel in ("cuda.core", "cuda.bindings.nvrtc"):
        pytest.importorskip(wheel)
    made = cached_cubin(LAUNCHES[0], "sm_80", kept_in=tmp_path)
    assert isinstance(made, Cubin) and "optimizer_step" in made.symbol
