"""The gated residual, alone and with the next norm, against its definition."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttune_kernels.dispatch import Backend, forced
from fasttune_kernels.gated_residual import (
    gated_residual,
    gated_residual_backward,
    gated_residual_forward,
    gated_residual_norm_forward,
    gated_residual_norm_modulate,
    gated_residual_norm_modulate_ref,
    gated_residual_ref,
)
from fasttune_kernels.norm_modulate import norm_modulate, norm_modulate_forward

BACKENDS: tuple[Backend, ...] = ("torch", "triton")
NORM = ("scale", "shift", "weight", "bias")
MODULATION = ("gate", "scale", "shift")


def make(
    shape: tuple[int, int, int],
    vectors: Sequence[str] = ("gate", *NORM),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """x, y and those of the vectors, all of them trained. Modulation is a chunk of one projection."""
    torch.manual_seed(0)
    samples, _, width = shape
    inputs = {"x": torch.randn(shape), "y": torch.randn(shape)}
    chunks = torch.randn(samples, 3 * width).to(dtype).chunk(3, dim=-1)
    rows = torch.randn(2, width)
    inputs |= {name: v for name, v in zip(MODULATION, chunks, strict=True) if name in vectors}
    inputs |= {name: v for name, v in zip(NORM[2:], rows, strict=True) if name in vectors}
    return {name: tensor.to(dtype).detach().requires_grad_() for name, tensor in inputs.items()}


def eager(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """As a model without these kernels computes it, in x's dtype."""
    out = x + y if gate is None else x + gate[:, None] * y
    if rms:
        normed = F.rms_norm(out, out.shape[-1:], weight, 1e-6)
        normed = normed if bias is None else normed + bias
    else:
        normed = F.layer_norm(out, out.shape[-1:], weight, bias, 1e-6)
    normed = normed if scale is None else normed * (1 + scale[:, None])
    return out, normed if shift is None else normed + shift[:, None]


def all_results(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    gradients: Sequence[Tensor],
    **options: bool,
) -> list[Tensor]:
    """Outputs and the gradient of each input."""
    outputs = function(**inputs, **options)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [*outputs, *torch.autograd.grad(outputs, list(inputs.values()), list(gradients))]


def exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}


def assert_as_good_as_eager(
    ours: Sequence[Tensor], eagers: Sequence[Tensor], truths: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """At most twice eager's error and a tolerance. That is a unit in the last place for the one
    rounding of a result (half of it on a GPU; Triton's interpreter cuts digits off), and 32 float32
    roundings (2^-24 each) for sums of up to 1000 terms, which add up like a random walk."""
    for ours_i, eager_i, truth in zip(ours, eagers, truths, strict=True):
        assert ours_i.dtype == dtype
        tolerance = truth.abs().max().item() * (torch.finfo(dtype).eps + 32 * 2**-24)
        error = (ours_i.double() - truth).abs().max().item()
        assert error <= 2 * (eager_i.double() - truth).abs().max().item() + tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 1), torch.float32),
        ((2, 150, 72), torch.float32),  # ranges of several tiles, the last one short
        ((3, 5, 320), torch.float16),
        ((8, 3, 33), torch.bfloat16),
        ((1, 70, 256), torch.bfloat16),
    ],
)
def test_residual_against_the_truth(
    backend: Backend, gated: bool, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    inputs = make(shape, ("gate",) if gated else (), dtype)
    dout = torch.randn(shape).to(dtype)
    with forced(backend):
        ours = all_results(gated_residual, inputs, [dout])
    eagers = all_results(lambda **i: eager(**i)[0], inputs, [dout])
    truths = all_results(gated_residual_ref, exact(inputs), [dout.double()])
    assert_as_good_as_eager(ours, eagers, truths, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize(
    ("shape", "vectors", "dtype"),
    [
        ((1, 3, 3), (), torch.float32),
        ((2, 67, 130), ("gate", *NORM), torch.float32),
        ((3, 4, 320), ("weight", "bias"), torch.float16),
        ((2, 5, 64), ("gate", "scale", "shift"), torch.bfloat16),
        ((1, 3, 1536), ("gate", "scale", "shift"), torch.bfloat16),
    ],
)
def test_residual_and_norm_against_the_truth(
    backend: Backend,
    rms: bool,
    shape: tuple[int, int, int],
    vectors: Sequence[str],
    dtype: torch.dtype,
) -> None:
    inputs = make(shape, vectors, dtype)
    gradients = [torch.randn(shape).to(dtype) for _ in range(2)]
    with forced(backend):
        ours = all_results(gated_residual_norm_modulate, inputs, gradients, rms=rms)
    truths = all_results(
        gated_residual_norm_modulate_ref, exact(inputs), [g.double() for g in gradients], rms=rms
    )
    assert_as_good_as_eager(ours, all_results(eager, inputs, gradients, rms=rms), truths, dtype)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_gradcheck(rms: bool, batch: int) -> None:
    inputs = make((batch, 4, 5), dtype=torch.float64)
    ours = gated_residual_norm_modulate(**inputs, rms=rms)
    truths = gated_residual_norm_modulate_ref(**inputs, rms=rms)
    torch.testing.assert_close(ours, truths)
    torch.autograd.gradcheck(
        lambda *a: gated_residual_norm_modulate(*a, rms=rms), tuple(inputs.values())
    )
    x, y, gate, *_ = inputs.values()
    torch.autograd.gradcheck(gated_residual, (x, y, gate))
    torch.autograd.gradcheck(gated_residual, (x, y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_sees_the_stream_as_it_is_stored(backend: Backend) -> None:
    inputs = [tensor.detach() for tensor in make((2, 5, 40), dtype=torch.bfloat16).values()]
    with forced(backend):
        out, normed, *statistics = gated_residual_norm_forward(*inputs, 1e-6, False)
        assert out.equal(gated_residual_forward(*inputs[:3]))
        alone = norm_modulate_forward(out, *inputs[3:], 1e-6, False)
    assert all(a.equal(b) for a, b in zip((normed, *statistics), alone, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_expanded_gradients(backend: Backend) -> None:
    inputs = make((2, 6, 10))
    strided = [
        torch.randn(2, 6, 30)[..., 10:20],  # rows of a wider projection
        torch.randn(6, 2, 10).transpose(0, 1),
        torch.randn(2, 10, 6).transpose(1, 2),
        torch.randn(1, 1, 10).expand(2, 6, 10),
    ]
    with forced(backend):
        for k in range(4):
            x, y, *gradients = strided[k:] + strided[:k]
            stream = {"x": x.detach().requires_grad_(), "y": y.detach().requires_grad_()}
            dense = {n: t.detach().contiguous().requires_grad_() for n, t in stream.items()}
            dense_gradients = [gradient.contiguous() for gradient in gradients]
            gate = {"gate": inputs["gate"]}
            for a, b in zip(
                all_results(gated_residual, stream | gate, gradients[:1])
                + all_results(gated_residual_norm_modulate, inputs | stream, gradients),
                all_results(gated_residual, dense | gate, dense_gradients[:1])
                + all_results(gated_residual_norm_modulate, inputs | dense, dense_gradients),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)])
def test_empty(backend: Backend, shape: tuple[int, int, int]) -> None:
    inputs = make(shape)
    with forced(backend):
        out, normed, *gradients = all_results(
            gated_residual_norm_modulate, inputs, [torch.empty(shape)] * 2
        )
    assert out.shape == normed.shape == shape
    for gradient, tensor in zip(gradients, inputs.values(), strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_output_alone_has_a_gradient(backend: Backend) -> None:
    inputs = make((2, 3, 8))
    x, y, gate = inputs["x"], inputs["y"], inputs["gate"]
    dy = torch.randn(2, 3, 8)
    with forced(backend):
        out, normed = gated_residual_norm_modulate(x, y, gate)
        for ours, alone in (
            (out, gated_residual_ref(x, y, gate)),
            (normed, norm_modulate(gated_residual_ref(x, y, gate))),
        ):
            torch.testing.assert_close(
                torch.autograd.grad(ours, (x, y, gate), dy, retain_graph=True),
                torch.autograd.grad(alone, (x, y, gate), dy),
                rtol=1e-5,
                atol=1e-5,
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_on_every_run(backend: Backend) -> None:
    inputs = make((2, 70, 40))
    gradients = [torch.randn(2, 70, 40) for _ in range(2)]
    with forced(backend):
        first, second = (
            all_results(gated_residual_norm_modulate, inputs, gradients) for _ in range(2)
        )
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: Backend) -> None:
    inputs = list(make((2, 3, 4)).values())
    x, y, gate, *_ = inputs
    dout = torch.randn(2, 3, 4)
    detached = dout, y.detach(), gate.detach()
    with forced(backend):
        torch.library.opcheck(gated_residual_forward, (x, y, gate))
        torch.library.opcheck(gated_residual_forward, (x, y, None))
        torch.library.opcheck(gated_residual_norm_forward, (*inputs, 1e-6, False))
        torch.library.opcheck(gated_residual_norm_forward, (x, y, *[None] * 5, 1e-6, True))
        torch.library.opcheck(gated_residual_backward, (*detached, True))
        torch.library.opcheck(gated_residual_backward, (dout, None, gate.detach(), False))
        torch.library.opcheck(gated_residual_backward, (dout, None, None, False))


def test_what_the_backward_keeps() -> None:
    """The stream that is handed on, two numbers a row, and inputs that are not copied: y only for
    the gradient of a gate."""
    inputs = make((2, 6, 4))

    def kept(function: Callable[..., object], *arguments: Tensor | None) -> list[object]:
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            function(*arguments)
        own = {tensor.data_ptr(): name for name, tensor in inputs.items()}
        return [own.get(t.data_ptr(), tuple(t.shape)) for t in saved]

    x, y, gate, scale, shift, weight, bias = inputs.values()
    frozen = gate.detach()
    assert kept(gated_residual, x, y) == []
    assert kept(gated_residual, x, y, gate) == ["y", "gate"]
    assert kept(gated_residual, x, y, frozen) == ["gate"]
    statistics = [(2, 6, 4), (2, 6), (2, 6)]
    fused = gated_residual_norm_modulate
    assert kept(fused, x, y) == statistics
    assert kept(fused, x, y, gate, scale, shift) == ["y", "gate", *statistics, "scale"]
    assert kept(fused, x, y, frozen, None, None, weight, bias) == ["gate", *statistics, "weight"]


def test_compiles_without_breaks() -> None:
    inputs = make((2, 3, 4))
    gradients = [torch.randn(2, 3, 4) for _ in range(2)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        out = gated_residual(inputs["x"], inputs["y"], inputs["gate"])
        return gated_residual_norm_modulate(**{**inputs, "x": out})

    def plain(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        out = gated_residual(inputs["x"], inputs["y"], inputs["gate"])
        return gated_residual_norm_modulate(**{**inputs, "x": out})

    for a, b in zip(
        all_results(compiled, inputs, gradients), all_results(plain, inputs, gradients), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(3, 4)}, r"x is torch.float32 \(3, 4\); it has to be float \(B, N, D\)"),
        ({"y": torch.ones(2, 1, 4)}, r"y is torch.float32 \(2, 1, 4\); it has to be as x"),
        ({"y": torch.ones(2, 3, 4).bfloat16()}, "y is torch.bfloat16"),
        ({"gate": torch.ones(4)}, r"gate is torch.float32 \(4,\); .* float \(2, 4\)"),
    ],
)
def test_arguments_are_checked(changed: dict[str, Tensor], message: str) -> None:
    inputs = make((2, 3, 4), ("gate",)) | changed
    with pytest.raises(ValueError, match=message):
        gated_residual(**inputs)
    with pytest.raises(ValueError, match=message):
        gated_residual_norm_modulate(**inputs)
    with pytest.raises(ValueError, match="scale is"):
        gated_residual_norm_modulate(**make((2, 3, 4), ()), scale=torch.ones(4))
