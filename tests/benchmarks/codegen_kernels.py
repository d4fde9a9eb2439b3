"""Small Triton kernels with launches that are sound, that spill, that are too large somewhere, or
that lost their matrix instruction, for test_codegen.py."""

import triton
import triton.language as tl

from fasttune_kernels.launch import TARGETS, Launch


@triton.jit
def offsets(rows, columns, stride):
    return rows[:, None] * stride + columns[None, :]


@triton.jit
def matmul(
    a_ptr, b_ptr, c_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c = a b for a (M, K), b (K, N), c (M, N), row-major; M and N are multiples of the blocks."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offsets(m, k + start, K), mask=k[None, :] < K - start, other=0.0)
        b = tl.load(b_ptr + offsets(k + start, n, N), mask=k[:, None] < K - start, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(c_ptr + offsets(m, n, N), acc.to(c_ptr.dtype.element_ty))


@triton.jit
def mean_square(x, width):
    return tl.sum(x * x) / width


@triton.jit
def row_norm(x_ptr, y_ptr, width, eps, BLOCK: tl.constexpr):
    """y = x / rms(x), row by row."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(mean_square(x, width) + eps)
    tl.store(y_ptr + row * width + column, y.to(tl.bfloat16), mask=column < width)


def matmul_launch(name, blocks, num_warps, num_stages, targets, dtype="bf16", precision=None):
    pointers, sizes = ("a_ptr", "b_ptr", "c_ptr"), ("M", "N", "K")
    return Launch(
        name=name,
        kernel=lambda: matmul,
        signature=dict.fromkeys(pointers, f"*{dtype}") | dict.fromkeys(sizes, "i32"),
        constants=dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True))
        | {"PRECISION": precision},
        aligned=(*pointers, *sizes),
        num_warps=num_warps,
        num_stages=num_stages,
        enable_fp_fusion=True,
        targets=targets,
        matrix=True,
    )


LAUNCHES = (
    matmul_launch("sound", (64, 64, 32), 4, 2, TARGETS),
    matmul_launch("large", (128, 256, 64), 8, 3, ("sm_80", "sm_90", "sm_100", "gfx942")),
    matmul_launch("deep", (64, 64, 128), 4, 5, ("sm_80", "sm_89")),
    matmul_launch("few warps", (128, 256, 64), 4, 2, ("sm_80",)),
    matmul_launch("few warps", (64, 128, 32), 1, 2, ("gfx1201",)),
    matmul_launch("no matrix", (32, 32, 16), 4, 2, ("sm_80", "gfx942"), "fp32", "ieee"),
    Launch(
        name="row_norm D=3072 bf16",
        kernel=lambda: row_norm,
        signature={"x_ptr": "*bf16", "y_ptr": "*bf16", "width": "i32", "eps": "fp32"},
        constants={"BLOCK": 4096},
        aligned=("x_ptr", "y_ptr", "width"),
        num_warps=8,
        num_stages=1,
        enable_fp_fusion=True,
        targets=("sm_80", "gfx942"),
    ),
)
