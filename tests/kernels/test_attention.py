"""Attention as the networks call it, against its definition in float64."""

import sys
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from fasttune_kernels import attention as module_function
from fasttune_kernels.attention import (
    BACKWARD,
    FORWARD,
    attention,
    attention_backward,
    attention_forward,
    attention_ref,
    backward_flops,
    forward_flops,
)
from fasttune_kernels.attention_dispatch import RULES, Backend, Case, available, backend_of, choose
from fasttune_kernels.dispatch import arch, forced

# Rounding of the result itself, 2 units in the last place of values around 1, which a luckier
# eager run may not show: 2 * 2^-8, 2 * 2^-11, and 2^-20 of float32 for sums of tens of products.
TOL = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}


def inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and dout of (B, L, S, H, E)."""
    B, L, S, H, E = shape
    g = torch.Generator().manual_seed(seed)
    sizes = ((B, L, H, E), (B, S, H, E), (B, S, H, E), (B, L, H, E))
    q, k, v, dout = (torch.randn(size, generator=g).to(dtype) for size in sizes)
    return q, k, v, dout


def run(
    function: object, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor | None
) -> list[Tensor]:
    """out, dq, dk, dv."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, mask)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def assert_as_close_as_eager(
    ours: list[Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor | None
) -> None:
    def ref(*arguments: Tensor) -> Tensor:
        return attention_ref(*arguments)[0]

    truth = run(ref, q.double(), k.double(), v.double(), dout.double(), mask)
    eager = run(ref, q, k, v, dout, mask)
    for name, a, e, t in zip(("out", "dq", "dk", "dv"), ours, eager, truth, strict=True):
        assert a.dtype == q.dtype and a.shape == t.shape
        error, allowed = (a.double() - t).abs().max(), (e.double() - t).abs().max()
        limit = 2 * allowed + TOL[q.dtype] * t.abs().max().clamp(min=1)
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"


SHAPES = [(1, 1, 1, 1, 8), (2, 5, 7, 3, 16), (1, 33, 17, 2, 40), (8, 3, 77, 1, 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_its_definition(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, masked: bool
) -> None:
    q, k, v, dout = inputs(shape, dtype)
    mask = torch.rand(k.shape[:2]).argsort(1) < max(k.shape[1] // 2, 1) if masked else None
    assert_as_close_as_eager(run(attention, q, k, v, dout, mask), q, k, v, dout, mask)


def test_it_is_what_the_package_exports() -> None:
    assert module_function is attention


def test_opcheck() -> None:
    q, k, v, dout = inputs((2, 5, 7, 3, 16), torch.float32)
    mask = torch.ones(2, 7, dtype=torch.bool)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for m in (None, mask):
        torch.library.opcheck(attention_forward, (*leaves, m))
        out, lse = attention_forward(q.detach(), k.detach(), v.detach(), m)
        arguments = (dout, q.detach(), k.detach(), v.detach(), out, lse, m)
        torch.library.opcheck(attention_backward, arguments)
    with forced("triton"):
        utils = ("test_schema", "test_faketensor")
        torch.library.opcheck(attention_forward, (q, k, v, mask), test_utils=utils)
        torch.library.opcheck(attention_backward, (*arguments[:-1], None), test_utils=utils)


def test_math_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, dout = inputs((2, 9, 7, 3, 16), torch.float16)
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    module = sys.modules[FORWARD["math"].__module__]  # its name in the package is the function's
    monkeypatch.setattr(module, "_SCORES_BYTES", 4 * 2 * 3 * 7 * 4)  # four queries
    out, lse = FORWARD["math"](q, k, v, mask)
    grads = BACKWARD["math"](dout, q, k, v, out, lse, mask)
    assert_as_close_as_eager([out, *grads], q, k, v, dout, mask)
    truth = attention_ref(q.double(), k.double(), v.double(), mask)[1]
    torch.testing.assert_close(lse.double(), truth, rtol=0, atol=2**-10)


def test_saved_are_the_inputs_the_output_and_its_logsumexp() -> None:
    q, k, v, _ = inputs((2, 5, 7, 3, 16), torch.float32)
    mask = torch.ones(2, 7, dtype=torch.bool)
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    leaves = [x.requires_grad_() for x in (q, k, v)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = attention(*leaves, mask)
    pointers = [x.data_ptr() for x in (*leaves, out, mask)]
    lse = [x for x in saved if x.data_ptr() not in pointers]
    assert {x.data_ptr() for x in saved} == {*pointers, lse[0].data_ptr()}
    assert [(x.shape, x.dtype) for x in lse] == [((2, 3, 5), torch.float32)]


def test_gradcheck() -> None:
    leaves = [x.requires_grad_() for x in inputs((2, 3, 4, 2, 8), torch.float64)[:3]]
    mask = torch.tensor([[True, False, True, True], [True] * 4])
    for m in (None, mask):
        assert torch.autograd.gradcheck(lambda *x, m=m: attention(*x, m), leaves)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_expanded_and_permuted_inputs_and_gradients(backend: Literal["torch", "triton"]) -> None:
    q, k, v, dout = inputs((2, 5, 7, 3, 16), torch.float32)
    k = k[:1].expand(2, -1, -1, -1)
    v = v.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)  # its last dimension is strided
    dout = dout[:, :1, :, :1].expand(dout.shape)
    with forced(backend):
        ours = [attention_forward(q, k, v, None)[0]]
        ours += attention_backward(dout, q, k, v, *attention_forward(q, k, v, None), None)
    assert all(x.is_contiguous() for x in ours)
    assert_as_close_as_eager(ours, q, k, v, dout, None)


@pytest.mark.parametrize("B, L, S", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(B: int, L: int, S: int) -> None:
    q, k, v, dout = inputs((B, L, S, 2, 8), torch.float32)
    out, *grads = run(attention, q, k, v, dout, None)
    assert out.shape == q.shape and [x.shape for x in grads] == [q.shape, k.shape, v.shape]
    assert not any(x.any() for x in (out, *grads))  # no keys: nothing is attended to


@pytest.mark.parametrize("masked", [False, True])
def test_both_kernels_behind_the_op(masked: bool) -> None:
    """77 keys without a mask are the short kernel's, all else the flash kernel's."""
    q, k, v, dout = inputs((1, 18, 20, 1, 16), torch.float16)
    mask = torch.arange(20)[None] < 11 if masked else None
    with forced("triton"):
        assert backend_of(q, k, mask) == ("own_flash" if masked else "short")
        ours = run(attention, q, k, v, dout, mask)
        again = run(attention, q, k, v, dout, mask)
    assert_as_close_as_eager(ours, q, k, v, dout, mask)
    assert all(map(torch.equal, ours, again))


def test_compiled_without_breaks() -> None:
    q, k, v, dout = inputs((2, 5, 7, 3, 16), torch.float32)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    eager = run(attention, q, k, v, dout, None)
    assert all(map(torch.equal, run(compiled, q, k, v, dout, None), eager))


@pytest.mark.parametrize("backend", ["flash", "efficient", "cudnn"])
@pytest.mark.parametrize("masked", [False, True])
def test_backends_of_gpus_take_these_arguments(backend: Backend, masked: bool) -> None:
    """Schemas and shapes, on tensors without data: the ops are PyTorch's, for GPUs alone."""
    if masked and backend != "efficient":
        pytest.skip("not asked for by the table")
    qkv = torch.empty(2, 40, 3, 4, 64, dtype=torch.bfloat16, device="meta")
    q, k, v = qkv.unbind(2)
    mask = torch.empty(2, 40, dtype=torch.bool, device="meta") if masked else None
    out, lse = FORWARD[backend](q, k, v, mask)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 4, 40), torch.float32)
    assert out.is_contiguous()
    grads = BACKWARD[backend](out, q, k, v, out, lse.contiguous(), mask)
    assert all(g.shape == q.shape and g.is_contiguous() for g in grads)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["short", "flash", "efficient", "cudnn", "own_flash", "math"])
@pytest.mark.parametrize(
    "shape", [(2, 256, 77, 10, 64), (1, 384, 384, 24, 128), (2, 70, 70, 8, 40)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu(backend: Backend, shape: tuple[int, int, int, int, int], masked: bool) -> None:
    q, k, v, dout = (x.cuda() for x in inputs(shape, torch.bfloat16))
    mask = (torch.arange(shape[2], device="cuda") < 40).expand(shape[0], -1) if masked else None
    found = available(q.device, q.dtype, shape[4], True) | {"math"}
    limits = [rule for rule in RULES if rule.backend == backend]
    case = Case(
        arch=arch(q.device),
        dtype=q.dtype,
        num_queries=shape[1],
        num_keys=shape[2],
        num_heads=shape[3],
        width=shape[4],
        is_masked=masked,
    )
    if backend not in found or limits and not any(rule.applies(case) for rule in limits):
        pytest.skip("not for this GPU, shape or mask")
    out, lse = FORWARD[backend](q, k, v, mask)
    grads = BACKWARD[backend](dout, q, k, v, out.contiguous(), lse.contiguous(), mask)
    assert_as_close_as_eager([out, *grads], q, k, v, dout, mask)
    truth = attention_ref(q.double(), k.double(), v.double(), mask)[1]
    assert (lse.double() - truth).abs().max() <= 2**-8  # scores of bf16, accumulated in float32


CASE = Case(
    arch="sm_90",
    dtype=torch.bfloat16,
    num_queries=4608,
    num_keys=4608,
    num_heads=24,
    width=128,
    is_masked=False,
)
ALL = frozenset({"short", "cudnn", "flash", "efficient", "own_flash"})


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "cudnn"),
        ({"arch": "sm_100"}, "cudnn"),
        ({"arch": "sm_100", "num_heads": 4}, "flash"),
        ({"num_queries": 4464, "num_keys": 4464}, "flash"),
        ({"num_keys": 4544}, "flash"),
        ({"width": 40}, "flash"),
        ({"is_masked": True}, "efficient"),
        ({"dtype": torch.float32}, "efficient"),
        ({"dtype": torch.float64}, "math"),
        ({"width": 12}, "math"),
        ({"arch": "sm_80"}, "flash"),
        ({"arch": "sm_120"}, "flash"),
        ({"num_keys": 77, "width": 64}, "short"),
        ({"num_keys": 77, "width": 64, "is_masked": True}, "efficient"),
        ({"num_keys": 77, "width": 160}, "flash"),
        ({"arch": "gfx942"}, "flash"),
        ({"arch": "gfx942", "num_keys": 77, "width": 64}, "short"),
        ({"arch": "gfx1100"}, "flash"),  # with the experimental switch, PyTorch has it
    ],
    ids=str,
)
def test_table(changes: dict[str, Any], expected: Backend) -> None:
    assert choose(replace(CASE, **changes), ALL) == expected


@pytest.mark.parametrize("masked", [False, True])
def test_table_where_pytorch_has_none(masked: bool) -> None:
    case = replace(CASE, arch="gfx1201", is_masked=masked)
    own = frozenset({"short", "own_flash"})
    assert choose(case, own) == "own_flash"
    assert choose(replace(case, num_keys=77, width=64), own) == "own_flash"
    assert choose(replace(case, width=160), own) == "math"
    assert choose(case, frozenset()) == "math"


def test_each_rule_has_a_reason_and_a_source() -> None:
    assert all(rule.reason and rule.source for rule in RULES)
    assert {rule.backend for rule in RULES} == set(FORWARD) - {"cpu", "math"} == ALL


def test_flops_are_those_of_pytorchs_counter() -> None:
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    q, k = (2, 5, 3, 16), (2, 7, 3, 16)
    heads_first = ((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16))
    assert forward_flops(q, k) == sdpa_flop_count(*heads_first)
    assert backward_flops(q, k) == sdpa_backward_flop_count(heads_first[0], *heads_first)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 5, 48)}, "expected"),
        ({"k": torch.zeros(2, 7, 2, 16), "v": torch.zeros(2, 7, 2, 16)}, "differ"),
        ({"v": torch.zeros(2, 6, 3, 16)}, "expected"),
        ({"k": torch.zeros(2, 7, 3, 16).half()}, "one floating dtype"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, "bool mask"),
        ({"mask": torch.ones(2, 7)}, "bool mask"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(change: dict[str, Tensor], message: str) -> None:
    q, k, v, _ = inputs((2, 5, 7, 3, 16), torch.float32)
    with pytest.raises(ValueError, match=message):
        attention(**{"q": q, "k": k, "v": v, **change})
