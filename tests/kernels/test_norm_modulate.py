"""Normalisation with weights or modulation against its definition."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttune_kernels.dispatch import Backend, forced
from fasttune_kernels.norm_modulate import (
    norm_modulate,
    norm_modulate_backward,
    norm_modulate_forward,
    norm_modulate_ref,
)
from fasttune_kernels.norm_modulate_kernels import MAX_WIDTH, NormConfig

BACKENDS: tuple[Backend, ...] = ("torch", "triton")
ALL = ("scale", "shift", "weight", "bias")


def make(
    shape: tuple[int, int, int],
    vectors: Sequence[str] = ALL,
    dtype: torch.dtype = torch.float32,
    vector_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """x and those of the vectors, all of them trained. Modulation is a chunk of one projection."""
    torch.manual_seed(0)
    samples, _, width = shape
    # A mean that is not small: it must not cost the variance's digits.
    inputs = {"x": (torch.randn(shape) + 3).to(dtype)}
    chunks = torch.randn(samples, 3 * width).to(vector_dtype or dtype).chunk(3, dim=-1)
    rows = torch.randn(2, width).to(vector_dtype or dtype)
    inputs |= {name: chunk for name, chunk in zip(ALL[:2], chunks, strict=False) if name in vectors}
    inputs |= {name: row for name, row in zip(ALL[2:], rows, strict=True) if name in vectors}
    return {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}


def eager(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rms: bool = False,
) -> Tensor:
    """As a model without these kernels computes it, in x's dtype."""
    if rms:
        y = F.rms_norm(x, x.shape[-1:], weight, 1e-6)
        y = y if bias is None else y + bias
    else:
        y = F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)
    y = y if scale is None else y * (1 + scale[:, None])
    return y if shift is None else y + shift[:, None]


def all_results(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], dy: Tensor, rms: bool
) -> list[Tensor]:
    """y and the gradient of each input."""
    y = function(**inputs, rms=rms)
    return [y, *torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype))]


def assert_as_good_as_eager(
    ours: Sequence[Tensor], eagers: Sequence[Tensor], truths: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """At most twice eager's error and a tolerance. That is a unit in the last place for the one
    rounding of a result (half of it on a GPU; Triton's interpreter cuts digits off), and 32 float32
    roundings (2^-24 each) for sums of up to 1000 terms, which add up like a random walk."""
    for ours_i, eager_i, truth in zip(ours, eagers, truths, strict=True):
        largest = truth.abs().max().item()
        tolerance = largest * (torch.finfo(dtype).eps + 32 * 2**-24)
        error = (ours_i.double() - truth).abs().max().item()
        assert error <= 2 * (eager_i.double() - truth).abs().max().item() + tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize(
    ("shape", "vectors", "dtype"),
    [
        ((1, 3, 3), (), torch.float32),
        ((2, 5, 320), ("scale", "shift"), torch.float32),
        ((1, 67, 1000), ALL, torch.float32),  # ranges of several tiles, the last one short
        ((3, 301, 7), ALL, torch.float32),
        ((8, 2, 64), ("scale",), torch.float16),
        ((2, 5, 130), ("weight", "bias"), torch.float16),
        ((3, 4, 320), ("scale", "shift", "weight"), torch.bfloat16),
        ((1, 9, 640), ("weight", "bias"), torch.bfloat16),
        ((1, 3, 1536), ("scale", "shift"), torch.bfloat16),
        ((2, 3, 31), ("shift", "bias"), torch.bfloat16),
    ],
)
def test_forward_and_backward_against_the_truth(
    backend: Backend,
    rms: bool,
    shape: tuple[int, int, int],
    vectors: Sequence[str],
    dtype: torch.dtype,
) -> None:
    inputs = make(shape, vectors, dtype)
    dy = torch.randn(shape).to(dtype)
    truths = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    with forced(backend):
        ours = all_results(norm_modulate, inputs, dy, rms)
    assert [t.dtype for t in ours] == [dtype] * len(ours)
    assert_as_good_as_eager(
        ours,
        all_results(eager, inputs, dy, rms),
        all_results(norm_modulate_ref, truths, dy.double(), rms),
        dtype,
    )


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_gradcheck(rms: bool, batch: int) -> None:
    inputs = make((batch, 4, 5), dtype=torch.float64)
    torch.testing.assert_close(
        norm_modulate(**inputs, rms=rms), norm_modulate_ref(**inputs, rms=rms)
    )
    torch.autograd.gradcheck(lambda *a: norm_modulate(*a, rms=rms), tuple(inputs.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_vectors_of_a_bfloat16_stream(backend: Backend) -> None:
    inputs = make((2, 4, 48), dtype=torch.bfloat16, vector_dtype=torch.float32)
    dy = torch.randn(2, 4, 48).bfloat16()
    with forced(backend):
        y, dx, *vectors = all_results(norm_modulate, inputs, dy, rms=False)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    truth, dx_truth, *truths = all_results(norm_modulate_ref, exact, dy.double(), rms=False)
    assert y.dtype == dx.dtype == torch.bfloat16
    # One rounding is 2^-8 of the value; Triton's interpreter cuts digits off, 2^-7.
    torch.testing.assert_close(y.double(), truth, rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(dx.double(), dx_truth, rtol=2**-7, atol=1e-5)
    for ours, vector in zip(vectors, truths, strict=True):  # never rounded to bfloat16
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), vector, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_many_bfloat16_rows_are_in_float32(backend: Backend) -> None:
    """aten's LayerNorm on a CPU adds them up in bfloat16: 9 % off at 2048 rows."""
    inputs = make((1, 2048, 8), ("weight", "bias"), torch.bfloat16)
    dy = (torch.randn(1, 2048, 8) + 1).bfloat16()
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    with forced(backend):
        _, _, dweight, dbias = all_results(norm_modulate, inputs, dy, rms=False)
    _, _, *truths = all_results(norm_modulate_ref, exact, dy.double(), rms=False)
    for ours, truth in zip((dweight, dbias), truths, strict=True):
        # One rounding to bfloat16, 2^-8 of the value.
        torch.testing.assert_close(ours.double(), truth, rtol=2**-8, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rms", [False, True])
def test_strides_and_expanded_gradients(backend: Backend, rms: bool) -> None:
    inputs = make((2, 6, 10), ("scale", "shift"))
    strided = [
        torch.randn(2, 6, 30)[..., 10:20],  # rows of a wider projection
        torch.randn(6, 2, 10).transpose(0, 1),
        torch.randn(2, 10, 6).transpose(1, 2),
        torch.randn(1, 1, 10).expand(2, 6, 10),
    ]
    with forced(backend):
        for tensor, dy in zip(strided, strided[1:] + strided[:1], strict=True):
            x = tensor.detach().requires_grad_()
            dense = {**inputs, "x": x.detach().contiguous().requires_grad_()}
            ours = all_results(norm_modulate, {**inputs, "x": x}, dy, rms)
            expected = all_results(norm_modulate, dense, dy.contiguous(), rms)
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)])
def test_empty(backend: Backend, shape: tuple[int, int, int]) -> None:
    inputs = make(shape)
    with forced(backend):
        y, *gradients = all_results(norm_modulate, inputs, torch.empty(shape), rms=False)
    assert y.shape == shape
    for gradient, tensor in zip(gradients, inputs.values(), strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_on_every_run(backend: Backend) -> None:
    inputs = make((2, 20, 600))
    dy = torch.randn(2, 20, 600)
    with forced(backend):
        first, second = (all_results(norm_modulate, inputs, dy, rms=False) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rms", [False, True])
def test_the_stream_around_the_norm_joins_its_gradient(backend: Backend, rms: bool) -> None:
    inputs = {name: tensor.detach() for name, tensor in make((2, 5, 12)).items()}
    x, scale, _, weight, bias = inputs.values()
    dy, residual = torch.randn(2, 5, 12), torch.randn(2, 12, 5).transpose(1, 2)
    with forced(backend):
        _, mean, rstd = norm_modulate_forward(*inputs.values(), 1e-6, rms)
        norm = (dy, x, mean, rstd, scale, weight, bias)
        alone = norm_modulate_backward(*norm, None, rms, True, True)
        joined = norm_modulate_backward(*norm, residual, rms, True, True)
        frozen = norm_modulate_backward(*norm, residual, rms, False, False)
    torch.testing.assert_close(joined[0], alone[0] + residual, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(frozen[0], joined[0], rtol=1e-6, atol=1e-6)
    assert all(a.equal(b) for a, b in zip(joined[1:], alone[1:], strict=True))
    assert all(gradient.numel() == 0 for gradient in frozen[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: Backend) -> None:
    inputs = list(make((2, 3, 4)).values())
    x, scale, _, weight, bias = (tensor.detach() for tensor in inputs)
    with forced(backend):
        torch.library.opcheck(norm_modulate_forward, (*inputs, 1e-6, False))
        torch.library.opcheck(norm_modulate_forward, (inputs[0], *[None] * 4, 1e-6, True))
        for rms in (False, True):
            y, mean, rstd = norm_modulate_forward(x, scale, None, weight, bias, 1e-6, rms)
            norm = (y, x, mean, rstd, scale, weight, bias, y)
            torch.library.opcheck(norm_modulate_backward, (*norm, rms, True, False))
            torch.library.opcheck(norm_modulate_backward, (*norm, rms, False, True))


@pytest.mark.parametrize("rms", [False, True])
def test_what_the_backward_keeps(rms: bool) -> None:
    """x, two numbers a row (one for RMSNorm) and inputs that are not copied."""

    def kept(inputs: dict[str, Tensor]) -> list[tuple[int, ...]]:
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            norm_modulate(**inputs, rms=rms)
        own = {tensor.data_ptr() for tensor in inputs.values()}
        return [tuple(t.shape) for t in saved if t.data_ptr() not in own]

    inputs = make((2, 6, 4))
    assert kept(inputs) == [(2, 6)] * (1 if rms else 2)
    assert kept({"x": inputs["x"]}) == [(2, 6)] * (1 if rms else 2)


def test_compiles_without_breaks() -> None:
    inputs = make((2, 3, 4))
    dy = torch.randn(2, 3, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(rms: bool, **inputs: Tensor) -> Tensor:
        return norm_modulate(**inputs, rms=rms)

    for a, b in zip(
        all_results(compiled, inputs, dy, False),
        all_results(norm_modulate, inputs, dy, False),
        strict=True,
    ):
        assert a.equal(b)


def test_wide_rows_are_left_to_pytorch() -> None:
    x = torch.randn(1, 1, MAX_WIDTH + 1)
    with forced("triton"):
        torch.testing.assert_close(norm_modulate(x), norm_modulate_ref(x))


def test_ranges_of_the_backward() -> None:
    config = NormConfig.from_heuristic(3072, "sm_90")
    assert (config.block_rows, config.block_width, config.num_warps) == (1, 4096, 8)
    assert config.rows_of_range(samples=1, tokens=4608, processors=132) == 18  # 256 of 264
    assert config.rows_of_range(samples=1, tokens=3, processors=132) == 4
    assert NormConfig.from_heuristic(3072, "gfx942").num_warps == 4  # of 64 lanes
    narrow = NormConfig.from_heuristic(320, "sm_90")
    assert narrow.rows_of_range(samples=512, tokens=77, processors=4) == 80  # whole tiles of 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(3, 4)}, r"x is torch.float32 \(3, 4\); it has to be float \(B, N, D\)"),
        ({"x": torch.ones(2, 3, 4, dtype=torch.int32)}, "x is torch.int32"),
        ({"scale": torch.ones(1, 4)}, r"scale is torch.float32 \(1, 4\); .* float \(2, 4\)"),
        ({"shift": torch.ones(2, 1, 4)}, "shift is"),
        ({"weight": torch.ones(3)}, r"weight is torch.float32 \(3,\)"),
        ({"bias": torch.ones(4, dtype=torch.int64)}, "bias is torch.int64"),
    ],
)
def test_arguments_are_checked(changed: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norm_modulate(**{**make((2, 3, 4)), **changed})
