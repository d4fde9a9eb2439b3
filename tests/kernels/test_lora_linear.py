"""lora_linear against its definition: PyTorch's products, and the kernels in Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck
from torch.testing import assert_close

from fasttune_kernels import lora_linear_launches, lora_linear_products
from fasttune_kernels.dispatch import Backend, forced
from fasttune_kernels.lora_linear import (
    lora_linear,
    lora_linear_backward,
    lora_linear_backward_into,
    lora_linear_forward,
    lora_linear_ref,
)
from fasttune_kernels.lora_linear_products import dropout_mask, pairs

Case = dict[str, Any]
CASES: dict[str, Case] = {
    "plain": {},
    "one": {"rank": 4, "slices": [0, 70]},
    "targets": {"rank": 3, "slices": [1, 33, 33, 40, 69, 70], "split": 24},
    "dropout": {"rank": 3, "slices": [2, 69], "split": 16, "dropout": 0.3},
    "rank 40": {"rank": 40, "slices": [0, 30, 30, 70]},
}


def inputs(
    case: Case, dtype: torch.dtype, tokens: tuple[int, ...], channels: int = 40, outputs: int = 70
) -> Case:
    """Arguments of lora_linear; y is of size 1."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, fan: int = 1) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64) / fan**0.5
        return x.to(dtype).requires_grad_()

    split = case.get("split", channels)
    found: Case = {"x": draw(*tokens, split), "bias": draw(outputs)}
    found["weight"] = draw(outputs, channels, fan=channels)
    if split < channels:
        found["x2"] = draw(*tokens, channels - split)
    if "rank" in case:
        slices, rank = case["slices"], case["rank"]
        found["lora_A"] = draw(rank * len(slices) // 2, channels, fan=channels)
        found["lora_B"] = draw(sum(slices[1::2]) - sum(slices[::2]), rank, fan=rank)
        found |= {"slices": slices, "scale": 0.5}
    if "dropout" in case:
        found |= {"dropout": case["dropout"], "seed": torch.tensor([-11])}
    return found


def eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    slices: list[int] | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    x2: Tensor | None = None,
) -> Tensor:
    """A Linear a target, with adapters as separate layers have them, in the dtype of the arguments."""
    x = x if x2 is None else torch.cat([x, x2], dim=-1)
    if lora_A is None or lora_B is None or slices is None:
        return F.linear(x, weight, bias)
    dropped = x
    if seed is not None:
        kept = dropout_mask(seed, x.numel() // x.shape[-1], 0, x.shape[-1], dropout)
        dropped = x * kept.view_as(x) / (1 - dropout)
    parts, done = [], 0
    lengths = [end - begin for begin, end in pairs(slices)]
    adapters = zip(lora_A.chunk(len(lengths)), lora_B.split(lengths), strict=True)
    for (begin, end), (A, B) in zip(pairs(slices), adapters, strict=True):
        if begin > done:
            parts.append(
                F.linear(x, weight[done:begin], None if bias is None else bias[done:begin])
            )
        base = F.linear(x, weight[begin:end], None if bias is None else bias[begin:end])
        parts.append(base + F.linear(F.linear(dropped, A) * scale, B))
        done = end
    if done < len(weight):
        parts.append(F.linear(x, weight[done:], None if bias is None else bias[done:]))
    return torch.cat(parts, dim=-1)


def run(op: Callable[..., Tensor], given: Case, dy: Tensor) -> dict[str, Tensor]:
    """y and all gradients, in float64."""
    leaves = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.requires_grad}
    y = op(**given)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach().double()} | {
        name: gradient.double() for name, gradient in zip(leaves, gradients, strict=True)
    }


def check(given: Case, dy: Tensor) -> None:
    """|ours - truth| <= 2 |eager - truth| + tol, by the largest element of each.

    tol: where eager happens to be exact, we may be off by the rounding of the result and of low and
    dlow, three roundings of at most eps / 2 of the largest value."""
    truth_given = {
        k: v.detach().double().requires_grad_() if isinstance(v, Tensor) and v.requires_grad else v
        for k, v in given.items()
    }
    truth = run(lora_linear_ref, truth_given, dy)
    eagers, ours = run(eager, given, dy), run(lora_linear, given, dy)
    eps = torch.finfo(given["x"].dtype).eps
    for name, exact in truth.items():
        error = (ours[name] - exact).abs().max().item()
        allowed = (
            2 * (eagers[name] - exact).abs().max().item() + 1.5 * eps * exact.abs().max().item()
        )
        assert error <= allowed, f"{name}: {error} of {allowed}"


def pretend(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    """Launch configs and choices of another GPU."""
    for module in (lora_linear_launches, lora_linear_products):
        monkeypatch.setattr(module, "arch", lambda device: arch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_torch_is_as_exact_as_separate_layers(name: str, dtype: torch.dtype) -> None:
    given = inputs(CASES[name], dtype, (2, 11))
    with forced("torch"):
        check(given, torch.randn(2, 11, 70))


@pytest.mark.parametrize(
    ("name", "dtype", "arch"),
    [
        ("one", torch.float32, "sm_80"),
        ("one", torch.float16, "sm_100"),
        ("targets", torch.float16, "sm_89"),
        ("targets", torch.float32, "sm_90"),
        ("targets", torch.float16, "gfx1100"),
        ("dropout", torch.float32, "gfx1201"),
        ("dropout", torch.float16, "sm_80"),
        ("dropout", torch.float32, "gfx942"),
        ("rank 40", torch.float16, "gfx1100"),
    ],
)
def test_kernels_are_as_exact_as_separate_layers(
    name: str, dtype: torch.dtype, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, arch)
    given = inputs(CASES[name], dtype, (2, 11))
    with forced("triton"):
        check(given, torch.randn(2, 11, 70))


@pytest.mark.parametrize("rank", [16, 17, 72, 256])
def test_kernels_at_any_rank(rank: int) -> None:
    case = {"rank": rank, "slices": [0, 20]}
    with forced("triton"):
        check(inputs(case, torch.float32, (16,), outputs=20), torch.randn(16, 20))


@pytest.mark.parametrize(
    ("tokens", "channels", "outputs"),
    [((1, 1), 1, 1), ((8, 3), 5, 129), ((65,), 33, 3), ((), 4, 6)],
)
def test_kernels_at_odd_and_tiny_sizes(
    tokens: tuple[int, ...], channels: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "gfx1100")
    case = {"rank": 2, "slices": [0, outputs]}
    given = inputs(case, torch.float32, tokens, channels, outputs)
    with forced("triton"):
        check(given, torch.randn(*tokens, outputs))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strided_and_expanded_tensors(backend: Backend) -> None:
    case = {"rank": 3, "slices": [3, 20]}
    given = inputs(case, torch.float32, (4, 9), channels=12, outputs=20)
    with forced(backend):
        expected = run(lora_linear, given, torch.ones(4, 9, 20))
        strided = given | {
            "x": torch.randn(4, 12, 20)[:, 2:11, 5:17].copy_(given["x"].detach()).requires_grad_(),
            "weight": given["weight"].detach().t().contiguous().t().requires_grad_(),
            "lora_A": given["lora_A"].detach().t().contiguous().t().requires_grad_(),
        }
        found = run(lora_linear, strided, torch.ones(1).expand(4, 9, 20))
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("tokens", [(0, 5), (3, 0)])
def test_empty_batches(backend: Backend, tokens: tuple[int, ...]) -> None:
    given = inputs(CASES["targets"], torch.float32, tokens)
    with forced(backend):
        found = run(lora_linear, given, torch.ones(*tokens, 70))
    assert found["y"].shape == (*tokens, 70)
    assert all(found[name].eq(0).all() for name in ("weight", "bias", "lora_A", "lora_B"))


@pytest.mark.parametrize("name", ["plain", "targets", "dropout"])
def test_gradients_are_those_of_the_definition(name: str) -> None:
    slices = {"targets": [1, 4, 4, 5, 8, 9], "dropout": [0, 9]}
    case = CASES[name] | ({"slices": slices[name], "rank": 2, "split": 2} if name in slices else {})
    given = inputs(case, torch.float64, (2, 2), channels=5, outputs=9)
    names = [n for n, value in given.items() if isinstance(value, Tensor) and value.requires_grad]

    def call(*tensors: Tensor) -> Tensor:
        return lora_linear(**given | dict(zip(names, tensors, strict=True)))

    assert_close(lora_linear(**given), lora_linear_ref(**given))
    assert torch.autograd.gradcheck(call, [given[n] for n in names])


def raw(given: Case) -> tuple[Any, ...]:
    """Arguments of lora_linear_forward."""
    optional = (given.get(name) for name in ("lora_A", "lora_B"))
    return (
        given["x"], given.get("x2"), given["weight"], given["bias"], *optional, given.get("slices", []),
        given.get("scale", 1.0), given.get("dropout", 0.0), given.get("seed"),
    )  # fmt: skip


def backward_arguments(given: Case, *wants: bool) -> tuple[Any, ...]:
    """Arguments of lora_linear_backward, with a residual."""
    x, x2, weight, bias, A, B, *settings = (
        a.detach() if isinstance(a, Tensor) else a for a in raw(given)
    )
    y, low = lora_linear_forward(x, x2, weight, bias, A, B, *settings)
    return torch.ones_like(y), x, x2, weight, A, B, low, *settings, torch.ones_like(x), *wants


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["plain", "dropout"])
def test_ops_are_as_registered(backend: Backend, name: str) -> None:
    given = inputs(CASES[name], torch.float32, (1, 2))
    with forced(backend):
        opcheck(lora_linear_forward, raw(given))
        opcheck(lora_linear_backward, backward_arguments(given, True, True, True))
        opcheck(lora_linear_backward, backward_arguments(given, False, False, False))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["plain", "one", "rank 40"])
@pytest.mark.parametrize("batch", [1, 2])
def test_dx_is_written_into_a_part(backend: Backend, name: str, batch: int) -> None:
    """Of one sample where it belongs, of several by a copy; the rest of the tensor stays as it is."""
    given = inputs(CASES[name], torch.float32, (batch, 5))
    with forced(backend):
        dy, x, _, *rest = backward_arguments(given, True, True, True)
        dx, _, *others = lora_linear_backward(dy, x, None, *rest[:-4], None, True, True, True)
        whole = torch.full((batch, 9, x.shape[-1]), 7.0)
        arguments = (whole[:, 3:8], dy, x, *rest[:-4], True, True)
        opcheck(lora_linear_backward_into, arguments)
        assert_close(lora_linear_backward_into(*arguments), tuple(others), rtol=0, atol=0)
    assert torch.equal(whole[:, 3:8], dx)
    assert (whole[:, :3] == 7).all() and (whole[:, 8:] == 7).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_residual_is_added_and_what_is_not_wanted_is_empty(backend: Backend) -> None:
    with forced(backend):
        arguments = backward_arguments(
            inputs(CASES["targets"], torch.float32, (20,)), True, False, False
        )
        dx, dx2, dweight, dbias, dA, dB = lora_linear_backward(*arguments)
        unadded, *_ = lora_linear_backward(*arguments[:-4], None, True, True, True)
    assert_close(dx, unadded + 1)
    assert dx2.shape == (20, 16) and dA.dtype == dB.dtype == torch.float32
    assert dweight.numel() == dbias.numel() == 0


def test_a_frozen_layer_without_adapters_reads_no_input() -> None:
    arguments = list(backward_arguments(inputs({}, torch.float32, (2, 3)), True, False, True))
    dx, *_ = lora_linear_backward(*arguments)
    arguments[1] = torch.full((1,), torch.nan).expand(2, 3, 40)
    assert_close(lora_linear_backward(*arguments)[0], dx)


@pytest.mark.parametrize("name", ["plain", "dropout"])
def test_what_is_saved(name: str) -> None:
    given = inputs(CASES[name], torch.float32, (2, 11))
    frozen = given | {"weight": given["weight"].detach(), "bias": given["bias"].detach()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        lora_linear(**frozen)
    shapes = [tuple(x.shape) for x in saved]
    if name == "plain":
        assert shapes == [(70, 40)]
    else:  # x, x2, weight, A, B, low, seed
        expected = [(2, 11, 16), (2, 11, 24), (70, 40), (3, 40), (67, 3), (2, 11, 3), (1,)]
        assert shapes == expected


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_runs_are_the_same_bit_for_bit(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "gfx1100")
    given = inputs(CASES["dropout"], torch.float16, (40,))
    with forced(backend):
        first, second = (run(lora_linear, given, torch.ones(40, 70)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_in_several_groups_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "gfx1100")
    monkeypatch.setattr(lora_linear_launches, "num_processors", lambda device: 1)
    config = lora_linear_launches.GradientConfig.from_heuristic("gfx1100")
    assert config.group_rows(100, 1, 1) == 2 * config.block_m  # 64 rows and 36, in blocks of 32
    with forced("triton"):
        check(inputs(CASES["dropout"], torch.float32, (100,)), torch.randn(100, 70))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_dropout_mask(backend: Backend) -> None:
    """low of an identity for A is the mask, whose bits are the same in the kernel."""
    x, identity = torch.ones(20, 16), torch.eye(24)
    arguments = (x, x[:, :8], torch.zeros(2, 24), None, identity, torch.ones(2, 24), [0, 2], 1.0)
    for seed in (0, -1, 2**40 + 5):
        tensor = torch.tensor([seed])
        with forced(backend):
            low = lora_linear_forward(*arguments, 0.2, tensor)[1]
        assert_close(low, dropout_mask(tensor, 20, 0, 24, 0.2) / 0.8)


def test_dropout_masks_are_independent() -> None:
    """Seeds, rows and columns next to each other agree as often as chance has it: 0.25^2 + 0.75^2."""
    first, second = (dropout_mask(torch.tensor([seed]), 300, 0, 400, 0.25) for seed in (7, 8))
    sigma = (0.625 * 0.375 / first.numel()) ** 0.5
    assert first.float().mean().item() == pytest.approx(0.75, abs=4 * sigma)
    for a, b in (
        (first, second),
        (first[1:], second[:-1]),
        (first[1:], first[:-1]),
        (first[:, 1:], first[:, :-1]),
        (first[:, 1:], second[:, :-1]),
    ):
        assert (a == b).float().mean().item() == pytest.approx(0.625, abs=4 * sigma)


def test_compiles_as_one_graph() -> None:
    given = inputs(CASES["dropout"], torch.float32, (2, 4))
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    dy = torch.randn(2, 4, 70)
    expected, found = run(lora_linear, given, dy), run(compiled, given, dy)
    for name, value in expected.items():
        assert_close(found[name], value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 41)}, r"x \(2, 41\)"),
        ({"x": torch.ones(2, 40).half()}, "float16"),
        ({"bias": torch.ones(3)}, r"bias \(3,\)"),
        ({"lora_B": None}, "or neither"),
        ({"slices": [0, 70, 60, 70]}, "increasing"),
        ({"slices": [0, 71]}, "of 70 outputs"),
        ({"slices": [0, 60]}, r"\(60, rank\)"),
        ({"dropout": 1.0}, "dropout < 1"),
        ({"dropout": 0.1}, "seed"),
    ],
)
def test_wrong_arguments_are_named(changes: Case, message: str) -> None:
    given = inputs(CASES["one"], torch.float32, (2,))
    with pytest.raises(ValueError, match=message):
        lora_linear(**given | changes)
