"""Schedules against those of diffusers and transformers."""

import math

import pytest
import torch
from diffusers import optimization as diffusers_optimization
from transformers import optimization as transformers_optimization

from fasttune.optim.schedule import lr_factor

TOTAL, WARMUP = 50, 7


def reference(library: object, name: str, **kwargs: object) -> list[float]:
    """What the library's scheduler multiplies lr with before each of TOTAL + 1 updates."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = getattr(library, f"get_{name}")(optimizer, **kwargs)
    return [schedule.lr_lambdas[0](step) for step in range(TOTAL + 1)]


@pytest.mark.parametrize("library", [diffusers_optimization, transformers_optimization])
@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize(
    ("name", "theirs", "ours", "extra"),
    [
        ("constant_with_warmup", "constant_schedule_with_warmup", {}, None),
        ("linear", "linear_schedule_with_warmup", {}, {}),
        ("cosine", "cosine_schedule_with_warmup", {}, {}),
        (
            "cosine_with_restarts",
            "cosine_with_hard_restarts_schedule_with_warmup",
            {"cycles": 3},
            {"num_cycles": 3},
        ),
        (
            "polynomial",
            "polynomial_decay_schedule_with_warmup",
            {"power": 2.5, "min_lr_ratio": 0.1},
            {"power": 2.5, "lr_end": 0.1},
        ),
    ],
)
def test_factors_equal_the_libraries(
    library: object, warmup: int, name: str, theirs: str, ours: dict, extra: dict | None
) -> None:
    kwargs: dict = {"num_warmup_steps": warmup}
    if extra is not None:
        kwargs |= {"num_training_steps": TOTAL, **extra}
    expected = reference(library, theirs, **kwargs)
    factors = [
        lr_factor(step, name=name, total_steps=TOTAL, warmup_steps=warmup, **ours)  # type: ignore[arg-type]
        for step in range(TOTAL + 1)
    ]
    assert factors == pytest.approx(expected, abs=1e-12)


def test_min_lr_ratio_equals_cosine_with_min_lr() -> None:
    expected = reference(
        transformers_optimization,
        "cosine_with_min_lr_schedule_with_warmup",
        num_warmup_steps=0,
        num_training_steps=TOTAL,
        min_lr_rate=0.2,
    )
    factors = [
        lr_factor(step, name="cosine", total_steps=TOTAL, min_lr_ratio=0.2)
        for step in range(TOTAL + 1)
    ]
    assert factors == pytest.approx(expected, abs=1e-12)


def test_constant_has_no_warmup() -> None:
    assert lr_factor(0, name="constant", total_steps=10, warmup_steps=5) == 1.0


def test_sine_is_a_wave_from_peak_to_peak() -> None:
    def factor(step: int) -> float:
        return lr_factor(
            step, name="sine", total_steps=90, warmup_steps=10, cycles=2, min_lr_ratio=0.1
        )

    assert [factor(s) for s in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert factor(30) == pytest.approx(0.1) and factor(70) == pytest.approx(0.1)
    assert factor(50) == pytest.approx(1.0) and factor(90) == pytest.approx(1.0)
    assert factor(20) == pytest.approx(0.55)
    # The same wave written with a cosine.
    for step in range(10, 91):
        x = (step - 10) / 80
        assert factor(step) == pytest.approx(0.1 + 0.9 * math.cos(2 * math.pi * x) ** 2)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_endpoints(name: str) -> None:
    def factor(step: int, **kwargs: int) -> float:
        return lr_factor(step, name=name, total_steps=20, min_lr_ratio=0.25, **kwargs)  # type: ignore[arg-type]

    assert factor(0) == 1.0
    assert factor(0, warmup_steps=5) == 0.0 and factor(5, warmup_steps=5) == 1.0
    assert factor(20) == factor(1000) == pytest.approx(0.25)
    assert factor(30, warmup_steps=50) == 0.6  # a warm-up longer than the run


def test_values_lie_between_the_bounds() -> None:
    for name in ("linear", "cosine", "cosine_with_restarts", "polynomial", "sine"):
        for step in range(3, 31):
            factor = lr_factor(
                step,
                name=name,  # type: ignore[arg-type]
                total_steps=30,
                warmup_steps=3,
                min_lr_ratio=0.3,
                cycles=2,
                power=1.7,
            )
            assert 0.3 - 1e-12 <= factor <= 1.0
