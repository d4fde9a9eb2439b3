"""FusedAdamW beside torch's AdamW, `clip_by_global_norm_` and `Ema`, which do the same one after another."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.static.models import config_named
from fasttune.device import place
from fasttune.errors import CheckpointError
from fasttune.models.projection import pack_, projection
from fasttune.optim import fused_adamw, load_state_tensors, set_lr, state_tensors
from fasttune.optim.clip import clip_by_global_norm_, clip_factor
from fasttune.optim.ema import Ema
from fasttune.optim.fused_adamw import FusedAdamW
from fasttune.optim.loss_scale import LossScaler
from fasttune.rehearsal import rehearse
from fasttune.seeds import generator_for
from fasttune_kernels.gradient_norm import gradient_norm

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart" / "model"
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
STATES = [torch.float32, torch.bfloat16, torch.uint8]
Named = list[tuple[str, nn.Parameter]]


def grouped(named: Named, **options: object) -> list[dict[str, object]]:
    """The norm and the scale without decay, at another rate; `options` of theirs."""
    return [{"params": named[:3]}, {"params": named[3:], "weight_decay": 0.0, **options}]


def one_pass(
    optimizer: FusedAdamW,
    named: Named,
    *,
    max_norm: float | None = 1.0,
    scaler: LossScaler | None = None,
    ema: Ema | None = None,
    step: int = 0,
) -> Tensor:
    """As `Trained.update`."""
    grads = [p.grad for _, p in named if p.grad is not None]
    norm, factor = clip_factor(gradient_norm(grads), max_norm, scaler and scaler.scale)
    optimizer.update(
        factor=factor,
        found_inf=scaler and scaler.adapt(norm),
        ema_decay=ema and ema.decay_at(step),
    )
    return norm


@pytest.mark.parametrize("options", [{}, {"betas": (0.0, 0.9), "eps": 1e-6}])
def test_twenty_clipped_steps_are_torchs(
    weights: Callable, set_gradients: Callable, options: dict[str, object]
) -> None:
    """With groups, also of other constants, a schedule, and averages. float32 rounding of what is of
    size 1 is 1.2e-7 a step; divisions by sqrt(v) near 0 magnify it early."""
    ours, theirs = weights(), weights()
    a = FusedAdamW(grouped(ours, **options), **OPTIONS)
    b = torch.optim.AdamW(
        [
            {**group, "params": [p for _, p in group["params"]]}
            for group in grouped(theirs, **options)
        ],
        **OPTIONS,
    )
    ema, expected = Ema(ours, decay=0.9, shadow=a.average()), Ema(theirs, decay=0.9)
    norms = set()
    for step in range(1, 21):
        for optimizer in (a, b):
            set_lr(optimizer, 1e-2 * (1 - step / 25))
        for named in (ours, theirs):
            set_gradients(named, step, 0.002 * step)  # norms of 0.2 to 4, clipped at 1
        norm = one_pass(a, ours, ema=ema, step=step)
        torch.testing.assert_close(norm, clip_by_global_norm_([p for _, p in theirs], 1.0))
        norms.add(bool(norm > 1))
        b.step()
        expected.update(step)
    assert norms == {True, False}
    for (_, p), (_, q), s, t in zip(ours, theirs, ema.shadow, expected.shadow, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(s, t, rtol=2e-6, atol=2e-6)
        assert not torch.equal(s, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_leaves_weights_state_and_average(
    weights: Callable, set_gradients: Callable, dtype: torch.dtype, bad: float
) -> None:
    named, plain = weights(dtype), weights(dtype)
    a, b = FusedAdamW(named, **OPTIONS), FusedAdamW(plain, **OPTIONS)
    ours = Ema(named, decay=0.9, shadow=a.average())
    theirs = Ema(plain, decay=0.9, shadow=b.average())
    scaler, other = (LossScaler("cpu", initial_scale=64.0) for _ in range(2))
    for step in range(1, 5):
        set_gradients(named, 100 + step)
        named[0][1].grad[0] = bad
        one_pass(a, named, scaler=scaler, ema=ours, step=step)
        assert scaler.scale == other.scale / 2
        scaler.scale.mul_(2)
        for pairs, optimizer, scale, ema in ((named, a, scaler, ours), (plain, b, other, theirs)):
            set_gradients(pairs, step, 0.64)
            one_pass(optimizer, pairs, scaler=scale, ema=ema, step=step)
    for (_, p), (_, q) in zip(named, plain, strict=True):
        assert torch.equal(p, q) and p.isfinite().all()
    for s, t in zip(ours.shadow, theirs.shadow, strict=True):
        assert torch.equal(s, t)
    x, y = state_tensors(a)[0], state_tensors(b)[0]
    assert all(torch.equal(x[key], y[key]) for key in y)
    assert x["step/scale"] == 4


@pytest.mark.parametrize("kahan", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", STATES)
def test_resuming_is_bitwise(
    weights: Callable,
    set_gradients: Callable,
    state: torch.dtype,
    dtype: torch.dtype,
    kahan: bool,
) -> None:
    """Sizes that leave blocks of 8-bit state and tiles half empty; one weight is without a gradient at first."""

    def make(seed: int = 3) -> tuple[Named, FusedAdamW, Ema]:
        named = weights(dtype)
        optimizer = FusedAdamW(named, **OPTIONS, state_dtype=state, kahan=kahan, seed=seed)
        return named, optimizer, Ema(named, decay=0.9, shadow=optimizer.average())

    def go(made: tuple[Named, FusedAdamW, Ema], begin: int, end: int) -> None:
        named, optimizer, ema = made
        for step in range(begin, end):
            set_gradients(named, step)
            if step < 6:
                named[3][1].grad = None
            one_pass(optimizer, named, ema=ema, step=step)

    whole, part = make(), make()
    go(part, 1, 5)
    tensors, numbers = state_tensors(part[1])
    assert numbers["without_state"] == ["norm.bias"]
    resumed = make()
    load_state_tensors(resumed[1], {k: t.clone() for k, t in tensors.items()}, numbers)
    assert state_tensors(resumed[1])[1] == numbers
    for (_, p), (_, q) in zip(resumed[0], part[0], strict=True):
        p.data.copy_(q.data)
    resumed[2].load_state_tensors({k: t.clone() for k, t in part[2].state_tensors().items()})
    go(whole, 1, 10)
    go(resumed, 5, 10)
    for (_, p), (_, q) in zip(resumed[0], whole[0], strict=True):
        assert torch.equal(p, q)
    for s, t in zip(resumed[2].shadow, whole[2].shadow, strict=True):
        assert torch.equal(s, t)
    x, y = state_tensors(resumed[1])[0], state_tensors(whole[1])[0]
    assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in y)
    other = make(seed=4)
    go(other, 1, 10)
    same = all(torch.equal(p, q) for (_, p), (_, q) in zip(other[0], whole[0], strict=True))
    random = state == torch.bfloat16 or (dtype == torch.bfloat16 and not kahan)
    assert same is not random


def test_the_state_of_torchs_adamw_goes_on(weights: Callable, set_gradients: Callable) -> None:
    """Under the names and shapes that earlier checkpoints have; and other states are refused."""
    theirs, ours = weights(), weights()
    b = torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for step in range(5):
        set_gradients(theirs, step)
        b.step()
    tensors, numbers = state_tensors(b)
    a = FusedAdamW(ours, **OPTIONS)
    load_state_tensors(a, tensors, numbers)
    for (_, p), (_, q) in zip(ours, theirs, strict=True):
        p.data.copy_(q.data)
    for step in range(5, 8):
        for named, optimizer in ((theirs, b), (ours, a)):
            set_gradients(named, step)
            optimizer.step()
    for (_, p), (_, q) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
    for dtype, message in (
        (torch.bfloat16, r"expected torch.bfloat16 \(96, 64\)"),
        (torch.uint8, "exp_avg.codes/block.0.weight is missing"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_state_tensors(
                FusedAdamW(weights(), **OPTIONS, state_dtype=dtype), tensors, numbers
            )


def test_8_bit_codes_of_another_memory_order_are_refused() -> None:
    def stateful(memory_format: torch.memory_format) -> FusedAdamW:
        w = nn.Parameter(torch.ones(8, 4, 3, 3).to(memory_format=memory_format))
        w.grad = torch.ones_like(w)
        optimizer = FusedAdamW([("w", w)], state_dtype=torch.uint8)
        optimizer.step()
        return optimizer

    last = stateful(torch.channels_last)
    tensors, numbers = state_tensors(last)
    assert tensors["exp_avg.codes/w"].shape == (8, 3, 3, 4)
    load_state_tensors(stateful(torch.channels_last), tensors, numbers)
    with pytest.raises(CheckpointError, match=r"expected torch.uint8 \(8, 4, 3, 3\)"):
        load_state_tensors(stateful(torch.contiguous_format), tensors, numbers)


@pytest.mark.parametrize("state", STATES)
def test_a_small_problem_is_learned_as_with_float32(state: torch.dtype) -> None:
    """Least squares with 2048 unknowns whose scales differ by 100."""
    g = generator_for(7)
    x = torch.randn(256, 64, generator=g) * torch.logspace(-1, 1, 64)
    truth = torch.randn(64, 32, generator=g)

    def losses(dtype: torch.dtype) -> list[float]:
        w = nn.Parameter(torch.zeros(64, 32))
        optimizer = FusedAdamW([("w", w)], lr=0.03, weight_decay=0.0, state_dtype=dtype)
        found = []
        for _ in range(150):
            loss = (x @ w - x @ truth).square().mean()
            w.grad = None
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    found, expected = losses(state), losses(torch.float32)
    assert expected[-1] < 1e-2 * expected[0]
    assert found[-1] < 2e-2 * found[0]
    assert abs(found[50] - expected[50]) < 0.1 * expected[50]


@pytest.mark.parametrize("kahan", [False, True])
def test_bf16_weights_move_at_a_small_rate(kahan: bool) -> None:
    """From 1 by 1e-5 a step; bf16 has nothing between 1 and 1 - 2^-8. After 100 steps of a gradient that
    is always 1, the mean is 1 - 1e-3: to within 5 deviations of 2^-8 / 2 / sqrt(16384) when rounded
    stochastically, and with compensation to where the nearest is, 1 again."""
    w = nn.Parameter(torch.ones(128, 128, dtype=torch.bfloat16))
    optimizer = FusedAdamW([("w", w)], lr=1e-5, weight_decay=0.0, kahan=kahan, seed=11)
    w.grad = torch.ones_like(w)
    for _ in range(100):
        optimizer.step()
    held = w.double()
    if kahan:
        held = held + optimizer.state[w]["compensation"].double()
    assert held.mean().item() == pytest.approx(1 - 1e-3, abs=5 * 2**-9 / 128)
    assert kahan or len(w.unique()) > 1


def test_views_of_a_packed_buffer_are_updated_in_place(set_gradients: Callable) -> None:
    """q, k and v of odd sizes, so that those after the first begin at odd addresses."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, width in (("q", 5), ("k", 3), ("v", 7)):
                self.add_module(name, nn.Linear(3, width))

    torch.manual_seed(0)
    block, plain = Block(), Block()
    plain.load_state_dict(block.state_dict())
    buffers = pack_(block, projection(block, "q", "k", "v"))
    assert block.get_parameter("k.weight").data_ptr() % 16
    named, other = list(block.named_parameters()), list(plain.named_parameters())
    a, b = FusedAdamW(named, **OPTIONS), FusedAdamW(other, **OPTIONS)
    for step in range(3):
        for pairs, optimizer in ((named, a), (other, b)):
            set_gradients(pairs, step)
            optimizer.step()
    for (_, p), (_, q) in zip(named, other, strict=True):
        assert torch.equal(p, q)
    joint = torch.cat([plain.get_parameter(f"{name}.weight") for name in "qkv"])
    assert torch.equal(buffers["q+k+v.weight"], joint)


def test_an_average_goes_on_where_there_is_no_gradient(
    weights: Callable, set_gradients: Callable
) -> None:
    named = weights()
    optimizer = FusedAdamW(named, **OPTIONS)
    ema, expected = Ema(named, decay=0.5, shadow=optimizer.average()), Ema(named, decay=0.5)
    for step in range(1, 6):
        set_gradients(named, step)
        if step > 2:
            named[1][1].grad = named[4][1].grad = None
        before = named[1][1].detach().clone()
        one_pass(optimizer, named, ema=ema, step=step)
        expected.update(step)
        assert torch.equal(before, named[1][1]) is (step > 2)
    for s, t in zip(ema.shadow, expected.shadow, strict=True):
        torch.testing.assert_close(s, t)


def test_parameters_are_given_once(weights: Callable) -> None:
    optimizer = FusedAdamW(weights()[:2], **OPTIONS)
    with pytest.raises(RuntimeError, match="when it is made"):
        optimizer.add_param_group({"params": weights()[2:]})


def test_a_run_is_what_it_is_with_torchs_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart's steps on a random batch, by losses, weights and averages. Adam divides by
    sqrt(v): where a gradient is all rounding, a weight may differ by parts of lr."""
    config = config_named("quickstart")
    config = replace(
        config,
        train=replace(config.train, batch_size=2, max_grad_norm=0.05),
        ema=replace(config.ema, enabled=True),
    )
    placement = place(device="cpu", base="fp32", compute="fp32", adapter=True)

    def go(reason: str | None) -> tuple[list[float], list[Tensor], list[Tensor]]:
        monkeypatch.setattr(fused_adamw, "why_not", lambda params, **options: reason)
        run = rehearse(config, QUICKSTART, placement=placement)
        assert isinstance(run.trained._optimizer, FusedAdamW) is (reason is None)
        losses = [run.take_step().item() for _ in range(6)]
        with run.trained.averaged():
            averages = [p.detach().clone() for p in run.trained.parameters.values()]
        return losses, list(run.trained.parameters.values()), averages

    ours, theirs = go(None), go("switched off")
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for mine, others in zip(ours[1:], theirs[1:], strict=True):
        far = torch.cat([(a - b).flatten() for a, b in zip(mine, others, strict=True)])
        size = torch.cat([b.flatten() for b in others])
        assert far.norm() < 1e-4 * size.norm()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_operations_beside_the_step(groups: int, scaled: bool) -> None:
    """Each is a launch on a GPU: what the module says that they are."""
    counted: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "aten" and not func.is_view:
                counted.append(str(func))
            return func(*args, **(kwargs or {}))

    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(groups)]
    optimizer = FusedAdamW([{"params": [p]} for p in params])
    for p in params:
        p.grad = torch.ones_like(p)
    factor, found_inf = torch.ones(()), torch.zeros(()) if scaled else None
    optimizer.update(factor=factor, found_inf=found_inf)
    with Count():
        optimizer.update(factor=factor, found_inf=found_inf)
    assert len(counted) == 10 + scaled + 2 * groups, counted
