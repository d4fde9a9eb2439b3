"""8-bit AdamW: the choice of library, and its steps beside those of 32 bits."""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch

from fasttune.errors import HardwareError
from fasttune.optim import adamw8bit, build_optimizer, fused_adamw
from fasttune.optim.fused_adamw import FusedAdamW

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}

# What the libraries themselves warn of at import and in the first step.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@pytest.fixture
def eager() -> Iterator[None]:
    """torchao compiles each shape, which takes longer than the test."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def libraries_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """FusedAdamW does not run on this device."""
    monkeypatch.setattr(fused_adamw, "why_not", lambda params, **options: "switched off")


def test_needs_no_library(weights: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_adamw, "why_not", lambda params, **options: None)
    monkeypatch.setattr(adamw8bit, "LIBRARIES", {})
    optimizer = build_optimizer("adamw8bit", weights(), **OPTIONS)
    assert type(optimizer) is FusedAdamW
    optimizer.create_state()
    p = optimizer.param_groups[0]["params"][0]
    assert optimizer.state[p]["exp_avg.codes"].dtype == torch.uint8


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao", "fasttune"])
def test_follows_adamw_within_8_bits(
    library: str,
    weights: Callable,
    set_gradients: Callable,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    eager: None,
) -> None:
    if library == "fasttune":
        monkeypatch.setattr(fused_adamw, "why_not", lambda params, **options: None)
    else:
        pytest.importorskip(library)
        request.getfixturevalue("libraries_alone")
        only = {library: adamw8bit.LIBRARIES[library]}
        monkeypatch.setattr(adamw8bit, "LIBRARIES", only)
    ours, theirs = weights(), weights()
    a = build_optimizer("adamw8bit", ours, **OPTIONS)
    b = build_optimizer("adamw", theirs, **OPTIONS)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    stored = [v for p in [ours[0][1]] for v in a.state[p].values() if isinstance(v, torch.Tensor)]
    assert any(
        v.dtype == torch.uint8 or getattr(v, "codes", v).dtype == torch.uint8 for v in stored
    )
    for (_, p), (_, q), (_, start) in zip(ours, theirs, weights(), strict=True):
        moved = (q - start).norm()
        assert (p - q).norm() < 0.05 * moved


def test_falls_through_to_the_next_library_and_says_why(
    weights: Callable,
    libraries_alone: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def missing() -> Callable[..., torch.optim.Optimizer]:
        raise ImportError("No module named 'nothing'")

    libraries = {"nothing": missing, "fine": lambda: torch.optim.AdamW}
    monkeypatch.setattr(adamw8bit, "LIBRARIES", libraries)
    with caplog.at_level(logging.INFO, logger="fasttune"):
        optimizer = build_optimizer("adamw8bit", weights(), **OPTIONS)
    assert type(optimizer) is torch.optim.AdamW
    assert "nothing: not installed" in caplog.text and "using fine" in caplog.text


def test_refused_where_nothing_works(
    weights: Callable, libraries_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Callable[..., torch.optim.Optimizer]:
        raise RuntimeError("no kernel image is available\nmore lines")

    libraries = {"broken": broken, "wrong": lambda: torch.optim.SGD}
    monkeypatch.setattr(adamw8bit, "LIBRARIES", libraries)
    # SGD's first step has the size of the gradient, here by chance that of Adam's sign.
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self: self.param_groups[0]["params"][0].data.zero_()
    )
    with pytest.raises(HardwareError) as caught:
        build_optimizer("adamw8bit", weights(), **OPTIONS)
    message = str(caught.value)
    assert "broken: no kernel image is available." not in message
    assert (
        "fasttune: switched off; broken: no kernel image is available; wrong: its first step"
        in message
    )
    assert 'pip install "fasttune[bitsandbytes]"' in message
