"""qk_norm_rope against its definition: both implementations, forward and every gradient."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from fasttune.models.rope import rotate
from fasttune_kernels.dispatch import Backend, forced
from fasttune_kernels.qk_norm_rope import (
    qk_norm_rope,
    qk_norm_rope_backward,
    qk_norm_rope_forward,
    qk_norm_rope_ref,
)
from fasttune_kernels.qk_norm_rope_kernels import SUM_TILE, QkNormRopeConfig, sum_kernel

BACKENDS: tuple[Backend, ...] = ("torch", "triton")
TENSORS = ("qkv", "q_weight", "k_weight", "cos", "sin")


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    text: int | None
    heads: int
    width: int


SHAPES = {
    "flux": Shape(1, 5, 3, 3, 128),
    "one buffer": Shape(2, 4, None, 5, 64),
    "one token": Shape(8, 1, 1, 1, 2),
    "text of none": Shape(1, 3, 0, 2, 16),
    "odd width": Shape(3, 11, None, 3, 6),
    "several blocks of tokens": Shape(1, 9, 9, 1, 10),
}


def made(
    shape: Shape, dtype: torch.dtype, weight_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Arguments of qk_norm_rope; weights away from 0 and 1, tokens of very different size."""
    torch.manual_seed(0)

    def qkv(tokens: int) -> Tensor:
        x = torch.randn(shape.batch, tokens, 3, shape.heads, shape.width)
        return (x * torch.logspace(-2, 2, tokens)[:, None, None, None]).to(dtype)

    def weight() -> Tensor:
        return (1 + 0.5 * torch.rand(shape.width)).to(weight_dtype or dtype)

    angle = 6 * torch.rand((shape.text or 0) + shape.tokens, shape.width // 2)
    values = qkv(shape.tokens), weight(), weight(), angle.cos(), angle.sin()
    arguments = dict(zip(TENSORS, values, strict=True))
    if shape.text is not None:
        text = {"text_q_weight": weight(), "text_k_weight": weight()}
        arguments |= {"text_qkv": qkv(shape.text), **text}
    return arguments


def raw(arguments: dict[str, Tensor]) -> tuple[Any, ...]:
    """Arguments of the forward op."""
    names = ("qkv", "q_weight", "k_weight", "text_qkv", "text_q_weight", "text_k_weight")
    return (*map(arguments.get, names), arguments["cos"], arguments["sin"], 1e-6)


def eager(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    text_qkv: Tensor | None = None,
    text_q_weight: Tensor | None = None,
    text_k_weight: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As the plain blocks compute it."""
    width = (qkv.shape[-1],)
    q, k, v = qkv.unbind(2)
    q, k = F.rms_norm(q, width, q_weight, 1e-6), F.rms_norm(k, width, k_weight, 1e-6)
    if text_qkv is not None:
        text_q, text_k, text_v = text_qkv.unbind(2)
        q = torch.cat([F.rms_norm(text_q, width, text_q_weight, 1e-6), q], dim=1)
        k = torch.cat([F.rms_norm(text_k, width, text_k_weight, 1e-6), k], dim=1)
        v = torch.cat([text_v, v], dim=1)
    cos, sin = cos[:, None], sin[:, None]
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def results(
    function: Any, arguments: dict[str, Tensor], gradients: tuple[Tensor, ...], dtype: Any = None
) -> dict[str, Tensor]:
    """q, k, v and the gradients of all that has one."""
    leaves = {
        name: x if name in ("cos", "sin") else x.detach().to(dtype or x.dtype).requires_grad_()
        for name, x in arguments.items()
    }
    outputs = function(**leaves)
    named = {name: x for name, x in leaves.items() if x.requires_grad}
    found = torch.autograd.grad(
        outputs, named.values(), [g.to(y.dtype) for g, y in zip(gradients, outputs, strict=True)]
    )
    return dict(zip("qkv", outputs, strict=True)) | {
        f"d{name}": gradient for name, gradient in zip(named, found, strict=True)
    }


def check(
    arguments: dict[str, Tensor], gradients: tuple[Tensor, ...], backend: Backend
) -> dict[str, Tensor]:
    """|ours - truth| <= 2 |eager in the same dtype - truth| + tolerance, in the largest error of a
    tensor. Ours rounds to the dtype once, which is half an epsilon of the largest value (one where
    the interpreter cuts bfloat16 off instead); float32 has sums of up to 128 * 5 terms on top,
    whose rounding errors add up to about sqrt(640) half epsilons."""
    dtype = arguments["qkv"].dtype
    epsilon = torch.finfo(dtype).eps * (24 if dtype is torch.float32 else 1)
    with forced(backend):
        ours = results(qk_norm_rope, arguments, gradients)
    plain = results(eager, arguments, gradients)
    truth = results(qk_norm_rope_ref, arguments, gradients, torch.float64)
    for name, exact in truth.items():
        assert ours[name].dtype is arguments.get(name[1:], arguments["qkv"]).dtype
        assert ours[name].shape == exact.shape, name
        if exact.numel() == 0:
            continue
        error, eager_error = ((x[name].double() - exact).abs().max() for x in (ours, plain))
        assert error <= 2 * eager_error + epsilon * exact.abs().max(), name
    return ours


def random_gradients(arguments: dict[str, Tensor]) -> tuple[Tensor, ...]:
    qkv = arguments["qkv"]
    shape = (len(qkv), len(arguments["cos"]), *qkv.shape[3:])
    return tuple(torch.randn(shape).to(qkv.dtype) for _ in range(3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_as_near_to_the_truth_as_eager(
    shape: Shape, dtype: torch.dtype, backend: Backend
) -> None:
    arguments = made(shape, dtype)
    check(arguments, random_gradients(arguments), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_may_be_float32_beside_bfloat16(backend: Backend) -> None:
    arguments = made(SHAPES["flux"], torch.bfloat16, torch.float32)
    with forced(backend):
        ours = results(qk_norm_rope, arguments, random_gradients(arguments))
    assert ours["q"].dtype is torch.bfloat16
    assert ours["dtext_q_weight"].dtype is torch.float32
    # all is float32 up to the outputs: no rounding but theirs, by half of 2^-7 or cut off
    for actual, exact in zip(map(ours.get, "qkv"), qk_norm_rope_ref(**arguments), strict=True):
        assert_close(actual.float(), exact, rtol=2**-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "text_qkv",
    [
        torch.randn(2, 3, 2, 3, 8).permute(0, 2, 3, 1, 4),  # by heads, tokens and q, k, v
        torch.randn(2, 2, 3, 8, 3).transpose(3, 4),  # channels that are not neighbours
    ],
    ids=["by heads", "by channels"],
)
def test_reads_by_stride(text_qkv: Tensor, backend: Backend) -> None:
    """A slice of a wider projection, another layout of the text, weights and tables of columns;
    gradients that are transposed, expanded over tokens, and expanded over all."""
    arguments = made(Shape(2, 3, 2, 3, 8), torch.float32)
    wide = torch.randn(2, 3, 7 * 24)
    arguments["qkv"] = wide[..., 24 : 4 * 24].unflatten(-1, (3, 3, 8))
    arguments["text_qkv"] = text_qkv
    arguments["text_q_weight"] = torch.rand(16)[::2]
    arguments["cos"] = arguments["cos"].T.contiguous().T
    gradients = (
        torch.randn(2, 3, 5, 8).transpose(1, 2),
        torch.randn(2, 1, 3, 8).expand(2, 5, 3, 8),
        torch.ones(()).expand(2, 5, 3, 8),
    )
    check(arguments, gradients, backend)
    with forced(backend):
        q, k, v = qk_norm_rope_forward(*raw(arguments))
        dqkv, dtext_qkv, *_ = qk_norm_rope_backward(*gradients, *raw(arguments), True)
    for x in (q, k, v, dqkv, dtext_qkv):
        assert x.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [Shape(0, 3, 2, 2, 4), Shape(1, 0, 2, 2, 4), Shape(2, 0, None, 2, 4)], ids=str
)
def test_empty(shape: Shape, backend: Backend) -> None:
    arguments = made(shape, torch.float32)
    ours = check(arguments, random_gradients(arguments), backend)
    assert_close(ours["dq_weight"], torch.zeros(4))


@pytest.mark.parametrize("shape", [Shape(2, 2, 2, 2, 4), Shape(1, 3, None, 2, 4)], ids=str)
def test_gradcheck(shape: Shape) -> None:
    arguments = made(shape, torch.float64)
    arguments |= {
        name: x.requires_grad_() for name, x in arguments.items() if name not in ("cos", "sin")
    }

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return qk_norm_rope(**dict(zip(arguments, values, strict=True)))

    assert_close(qk_norm_rope(**arguments), qk_norm_rope_ref(**arguments))
    assert torch.autograd.gradcheck(function, tuple(arguments.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", ["q", "k", "v"])
@pytest.mark.parametrize("text", [2, None])
def test_an_output_that_is_not_used_has_no_gradient(
    text: int | None, used: str, backend: Backend
) -> None:
    arguments = made(Shape(1, 2, text, 2, 4), torch.float32)
    arguments["qkv"].requires_grad_()
    slot = "qkv".index(used)
    with forced(backend):
        qk_norm_rope(**arguments)[slot].square().sum().backward()
    gradient = arguments["qkv"].grad
    assert gradient is not None
    arguments["qkv"].grad = None
    qk_norm_rope_ref(**arguments)[slot].square().sum().backward()
    # float32, and gradients that cancel to 0 where q^2 sums to a constant: absolute by their terms
    assert_close(gradient, arguments["qkv"].grad, rtol=1e-5, atol=1e-3)
    unused = [i for i in range(3) if i != slot]
    assert not gradient[:, :, unused].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_wanted_is_empty(backend: Backend) -> None:
    arguments = made(Shape(1, 2, None, 2, 4), torch.float32)
    dq, dk, dv = random_gradients(arguments)
    with forced(backend):
        _, _, v = qk_norm_rope_forward(*raw(arguments))
        dqkv, *others = qk_norm_rope_backward(dq, dk, dv, *raw(arguments), False)
        with_weights = qk_norm_rope_backward(dq, dk, None, *raw(arguments), True)
    assert [x.shape for x in (v, *others)] == [(0,)] * 6
    assert torch.equal(dqkv[:, :, 2], dv)
    assert torch.equal(with_weights[0][:, :, :2], dqkv[:, :, :2])
    assert not with_weights[0][:, :, 2].any()
    assert [x.shape for x in with_weights[1:]] == [(0,), (4,), (4,), (0,), (0,)]


def test_values_are_where_the_projection_left_them() -> None:
    arguments = made(SHAPES["one buffer"], torch.float32)
    v = qk_norm_rope(**arguments)[2]
    assert v.data_ptr() == arguments["qkv"][:, :, 2].data_ptr()


def test_the_gradient_is_written_once() -> None:
    """By the op: autograd has no gradient of the view v that it would add."""
    arguments = made(SHAPES["one buffer"], torch.float32)
    arguments["qkv"].requires_grad_()
    outputs = qk_norm_rope(**arguments)
    nodes = {x.grad_fn for x in outputs}
    assert len(nodes) == 1
    (last,) = nodes
    assert last is not None and type(last.next_functions[0][0]).__name__ == "AccumulateGrad"


@pytest.mark.parametrize("text", [2, None])
def test_saves_its_inputs_alone(text: int | None) -> None:
    arguments = made(Shape(1, 2, text, 2, 4), torch.float32)
    for x in arguments.values():
        x.requires_grad_(x is not arguments["cos"] and x is not arguments["sin"])
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        qk_norm_rope(**arguments)
    assert sorted(saved) == sorted(x.data_ptr() for x in arguments.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("text", [1, None])
def test_opcheck(text: int | None, backend: Backend) -> None:
    arguments = made(Shape(1, 2, text, 1, 2), torch.float32)
    dq, dk, dv = random_gradients(arguments)
    leaves = {
        name: x if name in ("cos", "sin") else x.clone().requires_grad_()
        for name, x in arguments.items()
    }
    with forced(backend):
        torch.library.opcheck(qk_norm_rope_forward, raw(leaves))
        inputs = (dq, dk, dv if text else None, *raw(arguments), text is not None)
        torch.library.opcheck(qk_norm_rope_backward, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_repeat_bit_by_bit(backend: Backend) -> None:
    arguments = made(SHAPES["several blocks of tokens"], torch.float32)
    gradients = random_gradients(arguments)
    with forced(backend):
        first, second = (results(qk_norm_rope, arguments, gradients) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_break(backend: Backend) -> None:
    arguments = made(Shape(1, 2, 1, 2, 4), torch.float32)
    gradients = random_gradients(arguments)
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend="aot_eager")
    with forced(backend):
        found = results(compiled, arguments, gradients)
        assert_close(found, results(qk_norm_rope, arguments, gradients))
    torch.compiler.reset()


def test_second_stage_sums_more_rows_than_a_tile() -> None:
    rows, text_rows = 2 * SUM_TILE["ROWS"] + 7, 3
    sums = torch.randn(rows, 2, 10)
    found = torch.empty(4, 10)
    sum_kernel[2, 4](*found, sums, text_rows, rows, WIDTH=10, **SUM_TILE)
    image, text = sums[text_rows:].double().sum(0), sums[:text_rows].double().sum(0)
    # float32 sums of 1028 terms of 1: about sqrt(1028) roundings of 6e-8 of at most 100
    assert_close(found.double(), torch.cat([image, text]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("heads", "width", "arch", "tile_heads", "num_warps"),
    [
        (24, 128, "sm_90", 8, 4),
        (24, 128, "gfx1100", 8, 4),
        (24, 128, "gfx942", 8, 2),
        (10, 64, "sm_90", 16, 4),
        (1, 2, "sm_90", 1, 1),
        (3, 1024, "gfx942", 1, 2),
    ],
)
def test_a_thread_loads_16_bytes(
    heads: int, width: int, arch: str, tile_heads: int, num_warps: int
) -> None:
    config = QkNormRopeConfig.from_heuristic(heads, width, 2, arch)
    assert (config.tile_heads, config.num_warps) == (tile_heads, num_warps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": torch.zeros(1, 2, 3, 2, 4, dtype=torch.int32)}, "qkv is .* give float16"),
        ({"qkv": torch.zeros(1, 2, 3, 2, 4, dtype=torch.float8_e4m3fn)}, "qkv is .* give float16"),
        ({"qkv": torch.zeros(1, 2, 2, 2, 4)}, r"qkv is \(1, 2, 2, 2, 4\)"),
        ({"qkv": torch.zeros(1, 2, 3, 2, 5)}, "an even E"),
        ({"text_qkv": torch.zeros(2, 1, 3, 2, 4)}, r"text_qkv is .* give \(1, T, 3, 2, 4\)"),
        ({"text_qkv": torch.zeros(1, 1, 3, 2, 4).half()}, "text_qkv is .*float16; give"),
        ({"text_qkv": None}, "all or none"),
        ({"text_k_weight": None}, "all or none"),
        ({"k_weight": torch.zeros(3)}, r"k_weight is \(3,\) .* give \(4,\)"),
        ({"q_weight": torch.zeros(4).half()}, "q_weight is .*float16; give"),
        ({"text_q_weight": torch.zeros(4).half()}, "text_q_weight is .*float16; give"),
        ({"cos": torch.zeros(2, 2)}, r"cos is .* give \(3, 2\) torch.float32"),
        ({"sin": torch.zeros(3, 2).double()}, "sin is .*float64; give"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = made(Shape(1, 2, 1, 2, 4), torch.float32)
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**arguments | changes)
