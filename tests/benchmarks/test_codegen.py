"""The codegen gate, on small kernels of its own: it finds what cannot launch and what is slow, on the
targets where it is so and there alone, and compiles nothing twice."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks import harness
from benchmarks.static import codegen, nvrtc_offline
from benchmarks.static.compile_jobs import Job, results_of
from benchmarks.static.machine_code import matrix_class, read_amdgcn
from benchmarks.static.targets import TARGETS, Resources, problems
from benchmarks.static.unlisted import entry_kernels
from fasttune.errors import FasttuneError
from fasttune_kernels.launch import NVIDIA, CudaLaunch, Launch

KERNELS = Path(__file__).with_name("codegen_kernels.py")
COMMAND = [sys.executable, "-u", "-m", "benchmarks.static.codegen", "--rows"]
FORKS = "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
"""Python 3.12 and later, where a test runner has threads of its own. Workers only compute here."""

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is for Linux"
)


class Gate(NamedTuple):
    """One run of the gate."""

    rows: dict[str, dict[str, Any]]
    compiled: int
    kept: int
    said: str = ""
    """What the assembler said."""

    def problems(self) -> dict[str, str]:
        return {case: row["problem"] for case, row in self.rows.items() if row["problem"]}


def run_gate(folder: Path) -> Gate:
    """In a process of its own, which compiles even if this one interprets Triton's kernels."""
    options = {"--launches": "kernels.py", "--cache": "cache", "--allowed": "allowed.toml"}
    arguments = [part for name, file in options.items() for part in (name, str(folder / file))]
    env = harness.environment() | {"TRITON_DUMP_PTXAS_LOG": "1"}
    env.pop("TRITON_INTERPRET", None)
    command = [*COMMAND, *arguments, "--cuda-files", str(folder)]
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [json.loads(x.removeprefix(harness.ROW)) for x in lines if x.startswith(harness.ROW)]
    counts = rows.pop()
    found = {row.pop("case"): row for row in rows}
    return Gate(found, counts["compiled"], counts["kept"], done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a copy of the kernels, exceptions, and the cache."""
    folder = tmp_path_factory.mktemp("codegen")
    shutil.copy(KERNELS, folder / "kernels.py")
    (folder / "allowed.toml").write_text(
        textwrap.dedent("""
            [[allowed]]
            case = "few warps / gfx1201"
            kind = "spill"
            reason = "planted"

            [[allowed]]
            case = "sound / sm_80"
            kind = "shared"
            reason = "was planted once"
        """)
    )
    return folder


@pytest.fixture(scope="module")
def gate(folder: Path) -> Gate:
    return run_gate(folder)


@needs_triton
def test_a_sound_kernel_passes_everywhere(gate: Gate) -> None:
    assert set(TARGETS) == {case.split(" / ")[1] for case in gate.rows if case.startswith("sound")}
    for name, target in TARGETS.items():
        row = gate.rows[f"sound / {name}"]
        assert row["problem"] == row["allowed"] == ""
        assert (row["spill_bytes"], row["spilled_registers"]) == (0, 0)
        assert row["matrix"] == target.matrix
        assert 16 < row["registers"] < 256
        assert 100 < row["instructions"] < 1000
        # A block of a and one of b, 64 x 32 bf16 each. Two stages hold one or two of them.
        assert row["shared_bytes"] // 8192 in (1, 2)
    assert gate.rows["sound / sm_100"]["tensor_memory"] == 64  # columns: one a column of c


@needs_triton
def test_shared_memory_is_what_the_tiles_take(gate: Gate) -> None:
    # 128 x 64 of a and 64 x 256 of b, bf16. Where the tensor core reads shared memory itself, the
    # third stage needs room of its own; barriers on sm_100 take 16 bytes more.
    tile = (128 * 64 + 64 * 256) * 2
    found = {case.split(" / ")[1]: row for case, row in gate.rows.items() if case[:5] == "large"}
    assert {target: row["shared_bytes"] for target, row in found.items()} == {
        "sm_80": 2 * tile,
        "sm_90": 3 * tile,
        "sm_100": 3 * tile + 16,
        "gfx942": 2 * tile,
    }


@needs_triton
def test_each_planted_fault_is_found_where_it_is_and_nowhere_else(gate: Gate) -> None:
    found = gate.problems()
    spill = found.pop("few warps / sm_80")
    assert re.fullmatch(r"spill: 1\d\d\d bytes a thread in memory", spill)
    assert found == {
        "large / gfx942": "shared: 98304 bytes a block of 65536",
        "deep / sm_89": "shared: 131072 bytes a block of 101376",
        "no matrix / sm_80": "matrix: none where mma.sync is expected",
        "allowed: sound / sm_80, shared": "codegen_allowed.toml excuses a problem that is not "
        "there; remove the entry",
    }
    allowed = gate.rows["few warps / gfx1201"]
    assert allowed["allowed"] == "spill: planted"
    assert allowed["spill_bytes"] > 0 and allowed["spilled_registers"] > 0


@needs_triton
def test_registers_and_spills_are_those_that_the_assembler_tells(gate: Gate) -> None:
    said = re.findall(
        r"for 'sm_(\d+)a?'\n.*\n\s+(\d+) bytes stack frame.*\n.*Used (\d+) registers", gate.said
    )
    read = [
        (case.rpartition("sm_")[2], str(row["spill_bytes"]), str(row["registers"]))
        for case, row in gate.rows.items()
        if re.search(r" / sm_\d+$", case)
    ]
    assert len(read) >= 10 and sorted(said) == sorted(read)


@needs_triton
def test_what_did_not_change_is_not_compiled_again(gate: Gate, folder: Path) -> None:
    assert (gate.compiled, gate.kept) == (len(gate.rows) - 2, 0)
    # A function that row_norm calls, and a kernel without a launch.
    kernels = folder / "kernels.py"
    source = kernels.read_text().replace("tl.sum(x * x) / width", "tl.sum(x * x * x) / width")
    kernels.write_text(f"{source}\n\n@triton.jit\ndef forgotten(x_ptr):\n    tl.store(x_ptr, 0)\n")
    changed = run_gate(folder)
    assert (changed.compiled, changed.kept) == (2, gate.compiled - 2)
    different = {case for case, row in changed.rows.items() if row != gate.rows[case]}
    norms = {"row_norm D=3072 bf16 / sm_80", "row_norm D=3072 bf16 / gfx942"}
    assert different == {"kernels"} | norms
    assert all(gate.rows[c]["instructions"] < changed.rows[c]["instructions"] for c in norms)
    assert changed.rows["kernels"]["problem"] == "unlisted: no launch for kernels.forgotten"


CUDA_SOURCE = r"""
#include "mask.cuh"

template <typename T, int THREADS>
__global__ void swap(const T* x, T* y) {
    __shared__ float row[THREADS];
    row[threadIdx.x] = float(x[threadIdx.x]);
    __syncthreads();
    y[threadIdx.x] = T(row[threadIdx.x ^ MASK] * FACTOR);
}

extern "C" __global__ void indexed(const float* x, const int* at, float* y) {
    float a[64];
    for (int i = 0; i < 64; i++) a[i] = x[i];
    for (int i = 0; i < 64; i++) a[at[i] & 63] += a[i];
    for (int i = 0; i < 64; i++) y[i] = a[i];
}

extern "C" __global__ void product(const unsigned* x, float* y) {
    const unsigned* p = x + 6 * threadIdx.x;
    float c[4] = {};
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(p[4]), "r"(p[5]));
    y[threadIdx.x] = c[0] + c[1] + c[2] + c[3];
}
"""


def cuda_launch(name: str, entry: str, **changes: Any) -> CudaLaunch:
    given = {"source": "kernels.cu", "threads": 256, "targets": ("sm_80",)} | changes
    return CudaLaunch(name=name, entry=entry, defines={"FACTOR": "2.f"}, **given)


def inspect(launches: list[Any], folder: Path, **changes: Any) -> Gate:
    """In this process."""
    counts: list[int] = []
    given = {"op_files": [], "cuda_files": folder, "allowed": {}, "cache": folder / "cache"}
    given["tell"] = lambda *both: counts.extend(both)
    rows = list(codegen.inspect(launches, **given | changes))
    return Gate({row.pop("case"): row for row in rows}, *counts)


@needs_triton
@pytest.mark.filterwarnings(FORKS)
def test_cuda_kernels(tmp_path: Path) -> None:
    for wheel in ("cuda.core", "cuda.bindings.nvrtc"):
        pytest.importorskip(wheel, exc_type=ImportError)
    (tmp_path / "kernels.cu").write_text(CUDA_SOURCE)
    (tmp_path / "bf16.cu").write_text(f"#include <cuda_bf16.h>\n{CUDA_SOURCE}")
    (tmp_path / "mask.cuh").write_text("#define MASK 1\n")
    bf16 = cuda_launch("swap bf16", "swap<__nv_bfloat16, 256>", source="bf16.cu", targets=NVIDIA)
    large = {"threads": 512, "dynamic_shared": 100_000, "targets": ("sm_80", "sm_89")}
    launches = [
        bf16,
        cuda_launch("swap large", "swap<float, 512>", **large),
        cuda_launch("indexed", "indexed"),
        cuda_launch("product", "product", matrix=True, targets=("sm_80", "sm_90a")),
        cuda_launch("misspelt", "swop<float, 512>"),
    ]
    gate = inspect(launches, tmp_path)
    for target in NVIDIA:
        row = gate.rows[f"swap bf16 / {target}"]
        assert (row["shared_bytes"], row["spill_bytes"], row["matrix"]) == (256 * 4, 0, "none")
        assert row["compiler"].startswith("nvrtc ")
        assert 4 <= row["registers"] <= 32
    found = gate.problems()
    misspelt = found.pop("misspelt / sm_80")
    assert "compile: " in misspelt and 'identifier "swop" is undefined' in misspelt
    assert found == {
        "swap large / sm_89": "shared: 102048 bytes a block of 101376",
        "indexed / sm_80": "spill: 256 bytes a thread in memory",
        "product / sm_90a": "matrix: mma.sync where wgmma is expected",
    }
    again = inspect(launches[:-1], tmp_path)
    assert (gate.compiled, again.compiled, again.kept) == (12, 0, 11)
    (tmp_path / "mask.cuh").write_text("#define MASK 3\n")
    assert inspect([cuda_launch("indexed", "indexed")], tmp_path).compiled == 1


def test_missing_compilers_are_problems_where_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)  # import raises ImportError
    with pytest.raises(RuntimeError, match="pip install cuda-core, cuda-bindings, nvidia-cuda-n"):
        nvrtc_offline.nvrtc_version()
    empty = {
        "launches": 0,
        "launches_in_steps": 0,
        "cuda_launches": 0,
        "cuda_files": 0,
        "problem": "",
    }
    assert inspect([], tmp_path) == Gate({"kernels": empty}, 0, 0)
    (tmp_path / "kernels.cu").write_text(CUDA_SOURCE)
    assert inspect([], tmp_path).problems() == {"kernels": "unlisted: no launch for kernels.cu"}
    if importlib.util.find_spec("triton"):
        missing = inspect([cuda_launch("indexed", "indexed")], tmp_path).problems()
        assert missing["kernels"].startswith("nvrtc: NVRTC cannot be used (")


@pytest.mark.slow
def test_the_tree_as_it_is_has_launches_for_all_its_kernels() -> None:
    """In a process that does not interpret them; the first row needs no compilation."""
    show = "import json; from benchmarks.static import codegen; print(json.dumps(next(codegen.rows())))"
    env = harness.environment()
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", show], env=env, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["case"] == "kernels" and row["launches"] > 100
    assert row["launches_in_steps"] > 150
    assert "unlisted" not in row["problem"]


def test_launches_of_one_name_and_launches_that_cannot_be_tried(tmp_path: Path) -> None:
    absent = cuda_launch("absent", "absent")
    jobs, failures = codegen._jobs([absent, absent], tmp_path)
    assert not jobs and set(failures) == {"absent / sm_80", "absent / sm_80, again"}


FITS = Resources(128, 0, 0, 65536, 0, 512, "none", 100)


@pytest.mark.parametrize(
    ("target", "changes", "kinds"),
    [
        *((name, {}, set()) for name in TARGETS if name not in ("gfx1100", "gfx1201")),
        ("sm_80", {"registers": 129}, {"registers"}),  # 136 x 512 > 65536
        ("sm_80", {"registers": 255, "threads": 256}, set()),
        ("sm_80", {"registers": 168, "threads": 288}, set()),  # 9 warps: 3 in one partition
        ("sm_80", {"registers": 176, "threads": 288}, {"registers"}),  # 50688 of 65536, and yet
        ("sm_80", {"registers": 32, "threads": 1056}, {"threads"}),
        ("sm_80", {"shared_bytes": 101377}, set()),
        ("sm_89", {"shared_bytes": 101377}, {"shared"}),
        ("sm_90", {"shared_bytes": 232449}, {"shared"}),
        ("gfx942", {"shared_bytes": 65537}, {"shared"}),
        ("gfx942", {"registers": 512, "threads": 256}, set()),
        ("gfx942", {"registers": 512, "threads": 512}, {"registers"}),
        ("gfx950", {"shared_bytes": 65537}, set()),
        ("gfx1100", {"registers": 192, "threads": 1024}, set()),  # 8 waves a SIMD: 1536
        ("gfx1100", {"registers": 193, "threads": 1024}, {"registers"}),
        ("sm_100", {"tensor_memory": 513}, {"tensor_memory"}),
        ("gfx1201", {"spilled_registers": 1}, {"spill"}),
        ("sm_86", {"spill_bytes": 8}, {"spill"}),
    ],
)
def test_limits(target: str, changes: dict[str, int], kinds: set[str]) -> None:
    used = dataclasses.replace(FITS, **changes)
    assert set(problems(used, TARGETS[target], matrix=False)) == kinds
    assert set(problems(used, TARGETS[target], matrix=True)) == kinds | {"matrix"}


@pytest.mark.parametrize(
    ("opcodes", "found"),
    [
        (["HMMA", "FFMA"], "mma.sync"),
        (["QMMA"], "mma.sync"),
        (["IGMMA"], "wgmma"),
        (["UTCQMMA"], "tcgen05"),
        (["HMMA", "HGMMA"], "wgmma+mma.sync"),
        (["v_mfma_f32_32x32x8_bf16_1k"], "mfma"),
        (["v_smfmac_f32_32x32x16_bf16"], "mfma"),
        (["v_wmma_f32_16x16x16_bf16"], "wmma"),
        (["v_fma_f32", "v_mul_f32", "HFMA2", "UTCBAR"], "none"),
    ],
)
def test_matrix_class(opcodes: list[str], found: str) -> None:
    assert matrix_class(opcodes) == found


def test_assembly_without_metadata_is_no_empty_kernel() -> None:
    with pytest.raises(RuntimeError, match="no .vgpr_count"):
        read_amdgcn("\ts_endpgm\n", threads=64, shared_bytes=0)


def test_kernels_are_found_in_source(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        textwrap.dedent("""
            @triton.jit
            def helper(x): return x
            @triton.jit(noinline=True)
            def kernel(x): helper(x); recursive.other(x)
            @triton.jit
            def other(x): other(x)
            @torch.compile
            def no_kernel(x): kernel(x)
        """)
    )
    (tmp_path / "b.py").write_text("from triton import jit\n@jit\ndef lonely(x): lonely(x)\n")
    found = entry_kernels(sorted(tmp_path.iterdir()))
    assert found == {("a", "kernel"), ("b", "lonely")}


@pytest.mark.filterwarnings(FORKS)
def test_a_compiler_that_dies_takes_one_result_along(tmp_path: Path) -> None:
    def fail() -> Resources:
        raise ValueError("first\nquoted source\nerror: what is wrong")

    def job(case: str, compile_it: Any) -> Job:
        launch = cuda_launch(case, case)
        return Job(case, launch, "sm_80", case, compile_it)

    jobs = [job("sound", lambda: FITS), job("dies", lambda: os._exit(6)), job("fails", fail)]
    results, compiled = results_of([*jobs, job("last", lambda: FITS)], tmp_path, 2)
    assert results == {
        "sound": FITS,
        "dies": "the compiler ended its process",
        "fails": "ValueError: first ... error: what is wrong",
        "last": FITS,
    }
    assert compiled == 4
    # Only what compiled is kept, and a damaged file is not believed.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.json", "sound.json"]
    assert results_of(jobs[:1], tmp_path, 2) == ({"sound": FITS}, 0)
    (tmp_path / "sound.json").write_text('{"resources": {"registers": 1')
    assert results_of(jobs[:1], tmp_path, 2) == ({"sound": FITS}, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[allowed]]\ncase = "a / sm_80"\nkind = "spill"\nreason = ""\n', "case, kind and reason"),
        ('[[allowed]]\ncase = "a / sm_80"\nkind = "spill"\nreason = 3\n', "case, kind and reason"),
        ('allowed = ["a / sm_80"]\n', "case, kind and reason"),
        ('[allowed]\ncase = "a / sm_80"\n', "tables alone"),
        ('[[alowed]]\ncase = "a / sm_80"\n', "tables alone"),
        ("[[allowed\n", "no TOML"),
    ],
)
def test_exceptions_need_their_reason(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "allowed.toml"
    path.write_text(text)
    with pytest.raises(FasttuneError, match=message):
        codegen.read_allowed(path)


def test_the_exceptions_of_the_tree_can_be_read() -> None:
    assert codegen.read_allowed(codegen.ALLOWED) is not None


@needs_triton
def test_a_launch_has_to_fit_its_kernel(tmp_path: Path) -> None:
    interpreted = Launch(
        name="interpreted",
        kernel=lambda: print,
        signature={},
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
        targets=("sm_80",),
    )
    found = inspect([interpreted], tmp_path).problems()["interpreted / sm_80"]
    assert "not a @triton.jit function" in found
