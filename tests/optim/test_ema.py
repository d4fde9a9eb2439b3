"""The weight average against a float64 recurrence."""

import pytest
import torch
from torch import nn

from fasttune.errors import CheckpointError
from fasttune.optim import chunks
from fasttune.optim.ema import Ema
from fasttune.seeds import generator_for


def parameters(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    g = generator_for(0)
    return [
        ("a.weight", nn.Parameter(torch.randn(5, 3, generator=g).to(dtype))),
        ("b.bias", nn.Parameter(torch.randn(4, generator=g).to(dtype))),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_follows_the_recurrence(dtype: torch.dtype) -> None:
    named = parameters(dtype)
    ema = Ema(named, decay=0.3)
    truth = [p.detach().double() for _, p in named]
    g = generator_for(1)
    for step in range(1, 9):
        for _, p in named:
            p.data = torch.randn(p.shape, generator=g).to(dtype)
        ema.update(step)
        # 2/11, 3/12, then 0.3 from 4/13 on.
        decay = [2 / 11, 3 / 12, 0.3][min(step, 3) - 1]
        truth = [
            decay * t + (1 - decay) * p.double() for t, (_, p) in zip(truth, named, strict=True)
        ]
    for shadow, expected in zip(ema.shadow, truth, strict=True):
        assert shadow.dtype == torch.float32
        torch.testing.assert_close(shadow.double(), expected, rtol=1e-6, atol=1e-6)


def test_16_bit_weights_are_widened_in_bounded_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CPU_LIMIT", 100)
    named = [
        (f"{i}", nn.Parameter(torch.full((n,), i, dtype=torch.bfloat16)))
        for i, n in enumerate((60, 30, 60, 150, 10, 90, 1))
    ]
    ema = Ema(named, decay=0.5)
    for _, p in named:
        p.data.add_(1.0)
    widened, lerp = [], torch._foreach_lerp_

    def watched(shadow: list[torch.Tensor], weights: list[torch.Tensor], weight: float) -> None:
        widened.append(sum(w.numel() for w in weights))
        lerp(shadow, weights, weight)

    monkeypatch.setattr(torch, "_foreach_lerp_", watched)
    ema.update(100)
    assert widened == [90, 60, 150, 100, 1]  # a larger one alone
    for i, shadow in enumerate(ema.shadow):
        assert torch.equal(shadow, torch.full_like(shadow, i + 0.5))


def test_a_bf16_weight_still_moves_its_average() -> None:
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    ema = Ema([("p", p)], decay=0.9999)
    p.data.fill_(2.0)
    for step in range(10_000_000, 10_000_100):
        ema.update(step)
    assert ema.shadow[0].item() == pytest.approx(2 - 0.9999**100, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_gives_averages_and_restores_bitwise(dtype: torch.dtype) -> None:
    named = parameters(dtype)
    ema = Ema(named, decay=0.5)
    for _, p in named:
        p.data.add_(1.0)
    ema.update(100)
    weights = [p.detach().clone() for _, p in named]
    averages = [s.clone() for s in ema.shadow]
    pointers = [p.data_ptr() for _, p in named]
    with pytest.raises(RuntimeError, match="inside"), ema.swapped():
        for (_, p), average in zip(named, averages, strict=True):
            assert torch.equal(p, average.to(dtype))
        assert [p.data_ptr() for _, p in named] == pointers
        raise RuntimeError("inside")
    for (_, p), weight in zip(named, weights, strict=True):
        assert torch.equal(p, weight)
    for shadow, average in zip(ema.shadow, averages, strict=True):
        assert torch.equal(shadow, average)


def test_state_round_trip_continues_bitwise() -> None:
    named = parameters()
    first = Ema(named, decay=0.9)
    for _, p in named:
        p.data.mul_(1.7)
    first.update(3)
    state = {k: v.clone() for k, v in first.state_tensors().items()}
    assert list(state) == ["a.weight", "b.bias"]
    second = Ema(parameters(), decay=0.9)
    second.load_state_tensors(state)
    second.params = first.params
    first.update(4)
    second.update(4)
    for a, b in zip(first.shadow, second.shadow, strict=True):
        assert torch.equal(a, b)


def test_wrong_state_is_refused() -> None:
    ema = Ema(parameters(), decay=0.9)
    state = ema.state_tensors()
    with pytest.raises(CheckpointError, match=r"'b.bias'"):
        ema.load_state_tensors({"a.weight": state["a.weight"]})
    with pytest.raises(CheckpointError, match=r"'b.bias'"):
        ema.load_state_tensors({**state, "b.bias": torch.zeros(3)})
