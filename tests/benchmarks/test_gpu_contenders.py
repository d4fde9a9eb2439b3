"""The contenders do the same work as our step: the same layers adapted, the same function."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu import contenders, planning
from benchmarks.gpu.step_cases import SMOKE_SIDE, StepCase, parse
from benchmarks.static.shrunk import write_shrunk
from fasttune import rehearsal
from fasttune.adapters.lora import adapted_modules
from fasttune.build import adapt, placement_for
from fasttune.models import MODELS

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of diffusers' and PEFT's imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(params=sorted(contenders._CLASSES), scope="module")
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[StepCase, Path, nn.Module, nn.Module]]:
    """Case, folder, our adapted network and theirs with the same weights in float32."""
    case = StepCase(model=request.param, precision="fp32")
    folder = write_shrunk(case.folder, tmp_path_factory.mktemp(case.model), repeats=2)
    config = case.config("cpu")
    placement = placement_for(config)
    own = MODELS[case.model]
    theirs_spec = replace(own, build=partial(contenders._build, case.model))
    torch.manual_seed(0)
    ours = rehearsal.network_without_weights(own, folder, placement)
    theirs = rehearsal.network_without_weights(theirs_spec, folder, placement)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    adapt(config, own, ours)
    theirs.requires_grad_(False)
    contenders._adapt(theirs, contenders.CONTENDERS["diffusers peft"], case.model, smoke=True)
    yield case, folder, ours, theirs


def _peft_layers(network: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in network.named_modules() if hasattr(m, "lora_A")}


def test_the_same_layers_are_adapted(pair: tuple[StepCase, Path, nn.Module, nn.Module]) -> None:
    _, _, ours, theirs = pair
    assert set(_peft_layers(theirs)) == set(adapted_modules(ours)) != set()
    counts = [
        sum(p.numel() for p in network.parameters() if p.requires_grad)
        for network in (ours, theirs)
    ]
    assert counts[0] == counts[1] > 0


def test_it_is_the_same_function(pair: tuple[StepCase, Path, nn.Module, nn.Module]) -> None:
    """Outputs and gradients of the adapters, with B drawn, so that the adapters count."""
    case, folder, ours, theirs = pair
    config = case.config("cpu")
    spec, placement = MODELS[case.model], placement_for(config)
    torch.manual_seed(1)
    theirs_by_name = _peft_layers(theirs)
    with torch.no_grad():
        for name, module in adapted_modules(ours).items():
            module.lora_B.normal_(0.0, 0.1)
            theirs_by_name[name].lora_A["default"].weight.copy_(module.lora_A)
            theirs_by_name[name].lora_B["default"].weight.copy_(module.lora_B)
    side = (SMOKE_SIDE, SMOKE_SIDE)
    batch = rehearsal.random_batch(config, spec, folder, placement, side)
    found: list[list[Tensor]] = []
    for network, predict in ((ours, spec.predict), (theirs, contenders._PREDICT[case.model])):
        trained = [p for p in network.parameters() if p.requires_grad]
        output = predict(
            network,
            batch.latent_mean,
            torch.tensor([0.3 if case.model == "flux" else 300.0]),
            batch.conditions,
            batch.sizes,
            torch.tensor([3.5]),
        )
        found.append([output, *torch.autograd.grad(output.square().mean(), trained)])
    assert found[0][0].std() > 1e-3
    assert _off(found[0][0], found[1][0]) <= 1e-6
    norms = [torch.stack([g.norm() for g in grads[1:]]).norm() for grads in found]
    assert _off(norms[0], norms[1]) <= 1e-5


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / a.detach().norm())


def test_contenders_have_the_names_of_their_steps() -> None:
    for name, case in contenders.items():
        row = {"measurement": "contender step", "case": contenders.case_name(case, name)}
        assert planning.case_of(row) == case == parse(case.name)
