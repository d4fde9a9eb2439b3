"""diffusion_loss against its definition: PyTorch and Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import huber_loss, l1_loss, mse_loss
from torch.testing import assert_close

from fasttune_kernels.diffusion_loss import (
    LAUNCHES,
    DiffusionLossConfig,
    diffusion_loss,
    diffusion_loss_backward,
    diffusion_loss_forward,
    diffusion_loss_ref,
)
from fasttune_kernels.dispatch import Backend, forced
from fasttune_kernels.launch import TARGETS

BACKENDS: tuple[Backend, ...] = ("torch", "triton")
KINDS = ("mse", "l1", "huber")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "unpacked": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "slice": lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
    "expanded": lambda x: x[:, :1, :1].expand_as(x),
}


def operands(shape: tuple[int, ...] = (2, 4, 6, 5)) -> dict[str, Any]:
    B = shape[0]
    return {
        "clean": torch.randn(shape),
        "noise": torch.randn(shape),
        "clean_factor": torch.randn(B),
        "noise_factor": torch.randn(B),
        "weight": torch.rand(B),
        "mask": torch.rand(B, *(1,) * (len(shape) - 2), shape[-1]),
    }


def eager(prediction: Tensor, **given: Any) -> Tensor:
    """What a training script writes, with torch's losses."""
    like = (-1, *[1] * (prediction.dim() - 1))
    target = given["noise_factor"].view(like) * given["noise"]
    target = target + given["clean_factor"].view(like) * given["clean"]
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    if given["kind"] == "huber":
        loss = 2 * huber_loss(prediction, target, reduction="none", delta=given["huber_delta"])
    else:
        loss = (mse_loss if given["kind"] == "mse" else l1_loss)(
            prediction, target, reduction="none"
        )
    return (loss * given["mask"]).flatten(1).mean(1) * given["weight"]


def with_gradient(
    function: Callable[..., Tensor], prediction: Tensor, dloss: Tensor, given: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    x = prediction.detach().requires_grad_()
    loss = function(x, **given)
    loss.backward(dloss.to(loss.dtype))
    assert x.grad is not None
    return loss.detach(), x.grad


def check(prediction: Tensor, given: dict[str, Any], dloss: Tensor | None = None) -> None:
    """Loss and gradient are as near to the truth as eager PyTorch's, within a tolerance. Loss: float32
    sums of positive terms whose errors are some 2^-24 each, 1e-6 of it. Gradient: one rounding to the
    dtype, eps / 2 of the value (eps, as the interpreter's bfloat16 is cut off), and where the error
    is small, the rounding of a prediction and target of at most 10: 2^-24 * 10, times 2 weight / n."""
    B, n = len(prediction), prediction[0].numel()
    dloss = torch.randn(B) if dloss is None else dloss
    ours = with_gradient(diffusion_loss, prediction, dloss, given)
    plain = with_gradient(eager, prediction, dloss, given)
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
    truth = with_gradient(diffusion_loss_ref, prediction.double(), dloss.double(), exact)
    assert ours[0].dtype is torch.float32 and ours[1].dtype is prediction.dtype
    smallest = torch.finfo(prediction.dtype).smallest_normal
    tolerances = (
        1e-6 * truth[0].abs(),
        torch.finfo(prediction.dtype).eps * truth[1].abs() + 4e-6 / n + smallest,
    )
    for own, other, true, tolerance in zip(ours, plain, truth, tolerances, strict=True):
        assert torch.all((own - true).abs() <= 2 * (other - true).abs() + tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_near_the_truth(backend: Backend, kind: str, dtype: torch.dtype) -> None:
    with forced(backend):
        given = operands() | {"kind": kind, "huber_delta": 0.7}
        check(torch.randn(2, 4, 6, 5, dtype=dtype), given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (8, 3), (3, 7, 5), (1, 4, 3, 130), (2, 2, 2, 3, 5)])
def test_shapes(backend: Backend, shape: tuple[int, ...]) -> None:
    with forced(backend):
        check(torch.randn(shape), operands(shape) | {"kind": "mse", "huber_delta": 1.0})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["prediction", "clean", "noise", "mask", "dloss"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, name: str, layout: str) -> None:
    given = operands() | {"kind": "mse", "huber_delta": 1.0}
    prediction, dloss = torch.randn(2, 4, 6, 5), torch.randn(2)
    if name == "prediction":
        prediction = LAYOUTS[layout](prediction)
    elif name == "dloss":
        dloss = dloss[:1].expand(2)
    else:
        given[name] = LAYOUTS[layout](torch.rand(2, 4, 6, 5))
    with forced(backend):
        check(prediction, given, dloss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 1, 6, 5), (2, 1, 6, 1), (2, 4, 1, 1), (1, 1, 1, 1)])
def test_masks_are_broadcast(backend: Backend, shape: tuple[int, ...]) -> None:
    given = operands() | {"kind": "l1", "huber_delta": 1.0}
    for dtype in (torch.float32, torch.bool):
        given["mask"] = (torch.rand(shape) > 0.5).to(dtype)
        with forced(backend):
            check(torch.randn(2, 4, 6, 5).to(memory_format=torch.channels_last), given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_left_out_is_zero_and_one(backend: Backend) -> None:
    given = operands()
    prediction, zeros, ones = torch.randn(2, 4, 6, 5), torch.zeros(2), torch.ones(2)
    full = {"clean_factor": zeros, "noise_factor": ones, "weight": ones}
    with forced(backend):
        ours = diffusion_loss(prediction, None, given["noise"])
        assert_close(ours, diffusion_loss(prediction, given["clean"], given["noise"], **full))
        velocity = diffusion_loss(prediction, given["clean"], given["noise"], clean_factor=-ones)
        ours = diffusion_loss(prediction, given["noise"] - given["clean"], None)
        assert_close(ours, velocity)
        assert_close(
            ours,
            mse_loss(prediction, given["noise"] - given["clean"], reduction="none")
            .flatten(1)
            .mean(1),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_of_any_dtype(backend: Backend) -> None:
    given, prediction = operands((2, 3, 4)), torch.randn(2, 3, 4)
    for dtype in (torch.float64, torch.bfloat16):
        rounded = {k: v.to(dtype) for k, v in given.items()}
        with forced(backend):
            ours = with_gradient(diffusion_loss, prediction, torch.ones(2), rounded)
            same = {k: v.float() for k, v in rounded.items()}
            assert_close(ours, with_gradient(diffusion_loss, prediction, torch.ones(2), same))


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_partial_sums(backend: Backend) -> None:
    # more blocks than the second stage adds at once, and a last one that is not full
    n = DiffusionLossConfig.from_heuristic("sm_80").block ** 2 // 128 + 1
    prediction = torch.randn(1, n)
    with forced(backend):
        loss = diffusion_loss(prediction, torch.zeros(1, n), None)
    assert_close(loss, prediction.double().square().mean(1).float(), rtol=1e-6, atol=0)


def test_float16_gradients_do_not_vanish() -> None:
    # 2 e / n = 2e-8 is below float16, which a scaled loss is there for
    prediction = torch.full((1, 1024), 1e-5, dtype=torch.float16, requires_grad=True)
    for backend in BACKENDS:
        prediction.grad = None
        with forced(backend):
            (65536 * diffusion_loss(prediction, torch.zeros(1, 1024), None)).sum().backward()
        assert prediction.grad is not None
        assert_close(
            prediction.grad.float(), torch.full((1, 1024), 65536 * 2e-5 / 1024), rtol=1e-2, atol=0
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_nan(backend: Backend, kind: Any) -> None:
    with forced(backend):
        x = torch.tensor([[float("nan"), 1.0], [0.0, 0.0]], requires_grad=True)
        loss = diffusion_loss(x, torch.zeros(2, 2), None, kind=kind)
        loss.sum().backward()
    assert x.grad is not None
    assert loss.isnan().tolist() == [True, False]
    if (kind, backend) != ("l1", "torch"):  # torch's sign of NaN is 0
        assert x.grad.isnan().tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: Backend) -> None:
    with forced(backend):
        x = torch.zeros(0, 4, 2, 2, requires_grad=True)
        loss = diffusion_loss(x, x.detach(), None)
        loss.sum().backward()
        nothing = diffusion_loss(torch.zeros(2, 0), torch.zeros(2, 0), None)
    assert loss.shape == (0,) and x.grad is not None and x.grad.shape == x.shape
    assert nothing.isnan().all()  # torch's mean of nothing


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: Any) -> None:
    given = {k: v.double() for k, v in operands((2, 3, 2, 2)).items()}
    prediction = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    for backend in BACKENDS:  # float64 takes the PyTorch implementation
        with forced(backend):
            assert torch.autograd.gradcheck(
                lambda x: diffusion_loss(x, **given, kind=kind, huber_delta=0.5), (prediction,)
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ops_are_what_they_say(backend: Backend, layout: str) -> None:
    given = operands((2, 3, 2, 4))
    x = LAYOUTS[layout](torch.randn(2, 3, 2, 4).bfloat16()).detach()
    with forced(backend):
        for wants_gradient in (True, False):
            rest = (*given.values(), "huber", 0.5, wants_gradient)
            inputs = x.clone(memory_format=torch.preserve_format).requires_grad_(wants_gradient)
            torch.library.opcheck(diffusion_loss_forward, (inputs, *rest))
        _, gradient = diffusion_loss_forward(x, *given.values(), "huber", 0.5, True)
        dloss = torch.ones(1).expand(2)
        for weight in (None, given["weight"]):
            torch.library.opcheck(diffusion_loss_backward, (dloss, gradient, weight, x.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_and_weight_are_all_that_is_kept(backend: Backend) -> None:
    given = operands()
    x = torch.randn(2, 4, 6, 5).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    kept: list[Tensor] = []
    with forced(backend):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = diffusion_loss(x, **given)
        loss.sum().backward(retain_graph=True)
        first, x.grad = x.grad, None
        loss.sum().backward()
    assert [(t.shape, t.dtype) for t in kept] == [(x.shape, torch.float32), ((2,), torch.float32)]
    assert kept[1].data_ptr() == given["weight"].data_ptr()
    assert x.grad is not None and first is not None and torch.equal(x.grad, first)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        diffusion_loss(x, **given)
    assert len(kept) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time_and_in_any_batch(backend: Backend) -> None:
    given, prediction = operands((3, 4, 30, 9)), torch.randn(3, 4, 30, 9)
    with forced(backend):
        first = with_gradient(diffusion_loss, prediction, torch.ones(3), given)
        again = with_gradient(diffusion_loss, prediction, torch.ones(3), given)
        alone = with_gradient(
            diffusion_loss, prediction[1:2], torch.ones(1), {k: v[1:2] for k, v in given.items()}
        )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a[1:2], b) for a, b in zip(first, alone, strict=True))


def test_compiles_without_a_break() -> None:
    given, prediction = operands(), torch.randn(2, 4, 6, 5)
    compiled = torch.compile(diffusion_loss, fullgraph=True, backend="aot_eager")
    ours = with_gradient(compiled, prediction, torch.ones(2), given)
    plain = with_gradient(diffusion_loss, prediction, torch.ones(2), given)
    assert_close(ours, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": None, "noise": None}, "a target needs one of them"),
        ({"clean": torch.zeros(2, 3)}, r"clean is \(2, 3\) and prediction \(2, 4, 6, 5\)"),
        ({"weight": torch.zeros(2, 1)}, r"weight is \(2, 1\)"),
        ({"noise_factor": torch.zeros(())}, r"noise_factor is \(\)"),
        ({"mask": torch.zeros(2, 6, 5)}, r"mask is \(2, 6, 5\)"),
        ({"mask": torch.zeros(2, 3, 6, 5)}, r"mask is \(2, 3, 6, 5\)"),
        ({"noise": torch.zeros(2, 4, 6, 5, requires_grad=True)}, "noise requires a gradient"),
        ({"kind": "mae"}, "'mae'; give mse, l1, huber"),
        ({"kind": "huber", "huber_delta": 0.0}, "huber_delta is 0.0"),
        ({"prediction": torch.zeros(2, 4, 6, 5, dtype=torch.int64)}, "torch.int64"),
        ({"prediction": torch.zeros(2)}, r"\(2,\)"),
    ],
)
def test_what_it_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diffusion_loss(**({"prediction": torch.zeros(2, 4, 6, 5)} | operands() | changes))


def test_launches_are_for_all_targets() -> None:
    for name in {launch.name for launch in LAUNCHES}:
        targets = [t for launch in LAUNCHES if launch.name == name for t in launch.targets]
        assert sorted(targets) == sorted(TARGETS)
    for target in TARGETS:
        wave = 64 if target in ("gfx942", "gfx950") else 32
        assert DiffusionLossConfig.from_heuristic(target).num_warps * wave == 128
