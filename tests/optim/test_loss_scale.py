"""Dynamic loss scaling against torch's rule, and skipped updates that leave no trace."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fasttune.errors import CheckpointError
from fasttune.optim import build_optimizer, state_tensors
from fasttune.optim.clip import clip_by_global_norm_
from fasttune.optim.loss_scale import LossScaler
from fasttune.seeds import generator_for

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
CASES = [
    ("adamw", torch.float32),
    ("adamw", torch.float16),
    ("adafactor", torch.float32),
    ("lion", torch.float32),
    ("lion", torch.float16),
]


def test_scale_follows_torch() -> None:
    scaler = LossScaler("cpu", initial_scale=256.0, growth_interval=3)
    scale, tracker = torch.tensor(256.0), torch.tensor(0, dtype=torch.int32)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    for bad in (0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0):
        norm = torch.tensor(float("inf") if bad else 1.0)
        assert scaler.step(optimizer, norm).item() == bad
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(bad)), 2.0, 0.5, 3)
        assert scaler.scale == scale and scaler.good_steps == tracker


@pytest.mark.parametrize("first_is_bad", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_an_overflow_leaves_no_trace(
    weights: Callable,
    set_gradients: Callable,
    name: str,
    dtype: torch.dtype,
    bad: float,
    first_is_bad: bool,
) -> None:
    """Steps with overflows between them equal the same steps without, bitwise."""
    named, plain = weights(dtype), weights(dtype)
    a, b = (build_optimizer(name, pairs, **OPTIONS) for pairs in (named, plain))
    scaler, undisturbed = LossScaler("cpu"), LossScaler("cpu")
    for step in range(4):
        if step or first_is_bad:
            set_gradients(named, 100 + step)
            named[0][1].grad[0] = bad
            norm = clip_by_global_norm_([p for _, p in named], 1.0, loss_scale=scaler.scale)
            assert scaler.step(a, norm) == 1
        for pairs, optimizer in ((named, a), (plain, b)):
            set_gradients(pairs, step)
            assert undisturbed.step(optimizer, torch.tensor(1.0)) == 0
    for (_, p), (_, q) in zip(named, plain, strict=True):
        assert torch.equal(p, q) and p.isfinite().all()
    ours, theirs = state_tensors(a)[0], state_tensors(b)[0]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_good_step_is_the_plain_step(
    weights: Callable, set_gradients: Callable, name: str, dtype: torch.dtype
) -> None:
    named, plain = weights(dtype), weights(dtype)
    a, b = (build_optimizer(name, pairs, **OPTIONS) for pairs in (named, plain))
    scaler = LossScaler("cpu")
    for step in range(3):
        for pairs in (named, plain):
            set_gradients(pairs, step)
        scaler.step(a, torch.tensor(1.0))
        b.step()
    for (_, p), (_, q) in zip(named, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_float16_training_finds_its_scale_and_learns() -> None:
    """Gradients of 1e-8 vanish in float16 without scaling."""
    g = generator_for(5)
    x = torch.randn(64, 8, generator=g)
    truth = torch.randn(8, 1, generator=g)

    def train(scaler: LossScaler | None) -> float:
        w = nn.Parameter(torch.zeros(8, 1))
        optimizer = build_optimizer("adamw", [("w", w)], **{**OPTIONS, "lr": 0.1, "eps": 1e-16})
        for _ in range(300):
            y = (x.half() @ w.half()).float()
            loss = 1e-8 * (y - x @ truth).square().mean()
            (scaler.scaled(loss) if scaler else loss).backward()
            norm = clip_by_global_norm_([w], None, loss_scale=scaler.scale if scaler else None)
            if scaler:
                scaler.step(optimizer, norm)
            else:
                optimizer.step()
            w.grad = None
        return float((x @ (w.detach() - truth)).square().mean())

    scaler = LossScaler("cpu", initial_scale=2.0**24)
    start = float((x @ truth).square().mean())
    assert train(scaler) < 0.05 * start
    assert train(None) > 0.9 * start


def test_state_round_trip() -> None:
    first = LossScaler("cpu", growth_interval=5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    for norm in (1.0, float("inf"), 1.0, 1.0):
        first.step(optimizer, torch.tensor(norm))
    second = LossScaler("cpu", growth_interval=5)
    second.load_state_tensors({k: v.clone() for k, v in first.state_tensors().items()})
    assert second.scale == 2**15 and second.good_steps == 2
    with pytest.raises(CheckpointError, match="precision"):
        second.load_state_tensors({})
