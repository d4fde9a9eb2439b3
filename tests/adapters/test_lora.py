"""LoRA against the formula, in float64, and against PEFT's own layers."""

import copy
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttune.adapters.lora import (
    LoraPair,
    adapted_modules,
    apply_lora,
    lora_from_parameters,
    lora_state,
    module_shapes,
    set_lora_,
)
from fasttune.errors import ConfigError


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, dtype=dtype)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 6, 1, dtype=dtype), nn.GroupNorm(2, 6, dtype=dtype))
            for _ in range(2)
        )
        self.head = nn.Linear(6, 4, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.movedim(1, -1))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def randomize(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def merged(model: nn.Module) -> dict[str, Tensor]:
    """Delta W of each module by the formula, in float64."""
    deltas = {}
    for name, pair in lora_state(model).items():
        delta = pair.B.double().flatten(1) @ pair.A.double().flatten(1)
        shape = (pair.B.shape[0], *pair.A.shape[1:])
        deltas[name] = pair.alpha / pair.rank * delta.reshape(shape)
    return deltas


def test_output_equals_the_network_with_merged_weights() -> None:
    model = Net(torch.float64)
    plain = copy.deepcopy(model)
    names = apply_lora(model, targets=("*",), rank=2, alpha=3.0, seed=0)
    assert names == ["stem", "blocks.0.0", "blocks.1.0", "head"]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-13, atol=1e-13)  # B starts at zero
    randomize(model)
    with torch.no_grad():
        for name, delta in merged(model).items():
            plain.get_submodule(name).weight += delta
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


def test_gradients_equal_those_of_the_formula() -> None:
    layer = nn.Sequential(nn.Linear(5, 3)).double()
    apply_lora(layer, targets=("0",), rank=2, alpha=5.0)
    randomize(layer)
    parameters = adapter_parameters(layer)
    x = torch.randn(7, 5, dtype=torch.float64)
    layer(x).square().sum().backward()
    A = parameters["0.lora_A"].detach().double().requires_grad_()
    B = parameters["0.lora_B"].detach().double().requires_grad_()
    (x @ (layer[0].weight + 2.5 * B @ A).T + layer[0].bias).square().sum().backward()
    assert A.grad is not None and B.grad is not None
    for mine, true in ((parameters["0.lora_A"], A), (parameters["0.lora_B"], B)):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-5, atol=1e-5)
    assert layer[0].weight.grad is None and layer[0].bias.grad is None


def test_only_the_adapter_trains_and_base_keys_stay() -> None:
    model = Net()
    before = dict(model.state_dict())
    weight = model.head.weight
    apply_lora(model, targets=("head", "blocks.*"), rank=2, alpha=2.0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{name}.lora_{half}" for name in ("head", "blocks.0.0", "blocks.1.0") for half in "AB"
    }
    after = model.state_dict()
    assert set(after) == set(before) | trained
    assert all(after[key] is not None and torch.equal(after[key], before[key]) for key in before)
    assert model.head.weight is weight
    assert isinstance(model.head, nn.Linear) and type(model.head).__name__ == "LoraLinear"
    with pytest.raises(ValueError, match="adapter already"):
        apply_lora(model, targets=("head",), rank=2, alpha=2.0)


def test_a_module_starts_the_same_whatever_else_is_adapted() -> None:
    def start(targets: tuple[str, ...], seed: int) -> Tensor:
        model = Net()
        apply_lora(model, targets=targets, rank=2, alpha=2.0, seed=seed)
        return model.head.lora_A.detach()

    assert torch.equal(start(("head",), 7), start(("*",), 7))
    assert not torch.equal(start(("head",), 7), start(("head",), 8))
    # Kaiming uniform with a = sqrt(5): within 1 / sqrt(fan_in), and not far inside it.
    big = nn.Sequential(nn.Linear(400, 8))
    apply_lora(big, targets=("0",), rank=64, alpha=1.0)
    A = big[0].lora_A
    assert 0.99 / 20 < A.abs().max() <= 1 / 20
    assert A.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)


def test_parameters_are_float32_under_a_bfloat16_base() -> None:
    model = Net(torch.bfloat16)
    apply_lora(model, targets=("*",), rank=2, alpha=2.0)
    randomize(model)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert model(torch.randn(1, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_dropout_acts_on_the_adapter_in_training_alone() -> None:
    model = nn.Sequential(nn.Linear(50, 50))
    plain = copy.deepcopy(model)
    apply_lora(model, targets=("0",), rank=4, alpha=4.0, dropout=0.5)
    randomize(model)
    x = torch.randn(3, 50)
    torch.manual_seed(5)
    y = model(x)
    torch.manual_seed(5)
    pair = lora_state(model)["0"]
    expected = plain(x) + F.dropout(x, 0.5) @ pair.A.T @ pair.B.T
    torch.testing.assert_close(y, expected)
    model.eval()
    torch.testing.assert_close(model(x), plain(x) + x @ pair.A.T @ pair.B.T)


def test_on_meta() -> None:
    with torch.device("meta"):
        model = Net()
    assert module_shapes(model)["stem"] == (6, 3, 3, 3)
    apply_lora(model, targets=("*",), rank=2, alpha=2.0)
    parameters = adapter_parameters(model)
    assert all(p.is_meta for p in parameters.values())
    assert parameters["stem.lora_A"].shape == (2, 3, 3, 3)
    assert parameters["stem.lora_B"].shape == (6, 2, 1, 1)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("haed", "nearest: head"),
        ("blocks", 'write "blocks.*"'),
        ("1.0", 'write "*.1.0"'),
        ("*.norm", "matches no Linear or Conv2d"),
    ],
)
def test_a_pattern_without_a_match_is_named(target: str, said: str) -> None:
    model = Net()
    with pytest.raises(ConfigError) as caught:
        apply_lora(model, targets=("head", target), rank=2, alpha=2.0)
    assert len(caught.value.problems) == 1
    assert f'"{target}"' in str(caught.value) and said in str(caught.value)
    assert not adapted_modules(model)  # refused before anything is changed
    assert model.head.weight.requires_grad


def test_refuses_no_targets_and_grouped_convolutions() -> None:
    with pytest.raises(ConfigError, match="empty"):
        apply_lora(Net(), targets=(), rank=2, alpha=2.0)
    with pytest.raises(ConfigError, match="0 is a convolution with groups"):
        apply_lora(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), targets=("0",), rank=2, alpha=2.0)


def test_warns_of_a_rank_above_the_full_one(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        apply_lora(Net(), targets=("head", "stem"), rank=5, alpha=2.0)
    assert "full rank of 1 modules, such as head" in caplog.text


def test_state_from_parameters() -> None:
    model = Net()
    apply_lora(model, targets=("*",), rank=2, alpha=3.0)
    randomize(model)
    saved = {k: v.detach().clone() for k, v in adapter_parameters(model).items()}
    state = lora_from_parameters(saved, alpha=3.0)
    assert list(state) == list(lora_state(model))
    for name, pair in lora_state(model).items():
        assert torch.equal(pair.A, state[name].A) and torch.equal(pair.B, state[name].B)
        assert pair.alpha == state[name].alpha == 3.0


def test_set_lora_keeps_the_delta_at_another_rank_and_alpha() -> None:
    small, large = Net(torch.float64), Net(torch.float64)
    apply_lora(small, targets=("*",), rank=2, alpha=3.0)
    apply_lora(large, targets=("*",), rank=5, alpha=2.0)
    randomize(small)
    fresh = large.head.lora_A.detach().clone()
    set_lora_(large, lora_state(small), origin="file")
    for name, delta in merged(small).items():
        torch.testing.assert_close(merged(large)[name], delta, rtol=1e-6, atol=1e-6)
    assert torch.equal(large.head.lora_A[2:], fresh[2:])  # the added rows can learn
    set_lora_(small, lora_state(small), origin="itself")

    with pytest.raises(ConfigError, match=r"set adapter\.rank = 5 or more"):
        set_lora_(small, lora_state(large), origin="file")
    lora = {"other": LoraPair(torch.zeros(2, 3), torch.zeros(3, 2), 2.0)}
    with pytest.raises(ConfigError, match=r"such as other; add them to adapter\.targets"):
        set_lora_(small, lora, origin="file")


def test_equals_pefts_layers(tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = Net()
    theirs = copy.deepcopy(model)
    names = ["stem", "blocks.0.0", "blocks.1.0", "head"]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=names)
    theirs = inject_adapter_in_model(config, theirs)
    apply_lora(model, targets=names, rank=2, alpha=3.0)
    randomize(model)
    for name, pair in lora_state(model).items():
        module = theirs.get_submodule(name)
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(pair.A)
            module.lora_B["default"].weight.copy_(pair.B)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
