"""Optimizer state through safetensors and back: a resumed run is bitwise the one not stopped."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fasttune.errors import CheckpointError, ConfigError
from fasttune.optim import (
    adamw8bit,
    build_optimizer,
    fused_adamw,
    load_state_tensors,
    set_lr,
    state_tensors,
)

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """torchao compiles each shape, which takes longer than the test."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(
    ("name", "library", "dtype"),
    [
        ("adamw", None, torch.float32),
        ("adamw", None, torch.bfloat16),
        ("adafactor", None, torch.float32),
        ("adafactor", None, torch.bfloat16),
        ("lion", None, torch.float32),
        ("lion", None, torch.bfloat16),
        ("adamw8bit", "bitsandbytes", torch.float32),
        ("adamw8bit", "torchao", torch.float32),
        ("adamw8bit", "torchao", torch.bfloat16),
        ("adamw8bit", None, torch.float32),
        ("adamw8bit", None, torch.bfloat16),
    ],
)
def test_resuming_is_bitwise(
    name: str,
    library: str | None,
    dtype: torch.dtype,
    weights: Callable,
    set_gradients: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if library:
        pytest.importorskip(library)
        monkeypatch.setattr(fused_adamw, "why_not", lambda params, **options: "switched off")
        only = {library: adamw8bit.LIBRARIES[library]}
        monkeypatch.setattr(adamw8bit, "LIBRARIES", only)
    named = weights(dtype)
    optimizer = build_optimizer(name, named, **OPTIONS)
    for step in range(4):
        set_gradients(named, step)
        optimizer.step()

    tensors, scalars = state_tensors(optimizer)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    (tmp_path / "scalars.json").write_text(json.dumps(scalars))

    resumed = weights(dtype)
    for (_, p), (_, q) in zip(resumed, named, strict=True):
        p.data.copy_(q.data)
    other = build_optimizer(name, resumed, **OPTIONS)
    load_state_tensors(
        other,
        load_file(tmp_path / "optimizer.safetensors"),
        json.loads((tmp_path / "scalars.json").read_text()),
    )
    for (_, p), (_, q) in zip(resumed, named, strict=True):
        assert torch.equal(p, q) and p.grad is None  # loading moves no weight
    assert state_tensors(other)[1] == scalars

    for step in range(4, 8):
        for pairs, o in ((named, optimizer), (resumed, other)):
            set_gradients(pairs, step)
            set_lr(o, 1e-2 / step)
            o.step()
    for (_, p), (_, q) in zip(resumed, named, strict=True):
        assert torch.equal(p, q)
    first, second = state_tensors(optimizer)[0], state_tensors(other)[0]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_without_state_the_same_start(weights: Callable, set_gradients: Callable) -> None:
    """A checkpoint of step 0, and a parameter that never had a gradient."""
    named, resumed = weights(), weights()
    optimizer = build_optimizer("adamw", named, **OPTIONS)
    tensors, scalars = state_tensors(optimizer)
    assert tensors == {} and len(scalars["without_state"]) == 5
    other = build_optimizer("adamw", resumed, **OPTIONS)
    load_state_tensors(other, tensors, scalars)
    for step in range(2):
        for pairs, o in ((named, optimizer), (resumed, other)):
            set_gradients(pairs, step)
            pairs[0][1].grad = None
            o.step()
    for (_, p), (_, q) in zip(resumed, named, strict=True):
        assert torch.equal(p, q)
    assert state_tensors(other)[1]["without_state"] == ["block.0.weight"]


def test_eps_zero_survives_loading(weights: Callable) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        named = weights(dtype)
        optimizer = build_optimizer("adamw", named, **{**OPTIONS, "eps": 0.0})
        load_state_tensors(optimizer, *state_tensors(optimizer))
        assert all(p.isfinite().all() for _, p in named)


def test_foreign_state_is_refused(weights: Callable, set_gradients: Callable) -> None:
    named = weights()
    optimizer = build_optimizer("adamw", named, **OPTIONS)
    set_gradients(named, 0)
    optimizer.step()
    tensors, scalars = state_tensors(optimizer)

    def load(name: str = "adamw", **changes: torch.Tensor | None) -> None:
        changed = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
        load_state_tensors(build_optimizer(name, weights(), **OPTIONS), changed, scalars)

    load()
    with pytest.raises(CheckpointError, match=r"exp_avg/norm.bias is missing"):
        load(**{"exp_avg/norm.bias": None})
    with pytest.raises(CheckpointError, match=r"exp_avg/other is unknown"):
        load(**{"exp_avg/other": torch.zeros(2)})
    with pytest.raises(
        CheckpointError, match=r"torch.float32 \(2,\), expected torch.float32 \(24,\)"
    ):
        load(**{"exp_avg/norm.bias": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"is torch.float16 \(24,\), expected"):
        load(**{"exp_avg/norm.bias": torch.zeros(24, dtype=torch.float16)})
    with pytest.raises(CheckpointError, match=r"does not fit Lion: momentum/block.0.weight"):
        load("lion")


def test_an_unknown_name_is_refused(weights: Callable) -> None:
    with pytest.raises(ConfigError, match="adamw, adamw8bit, adafactor, lion"):
        build_optimizer("sgd", weights(), **OPTIONS)
