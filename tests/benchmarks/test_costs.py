"""FLOPs, bytes and launches counted op by op, against arithmetic done by hand."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness import ROOT
from benchmarks.static import step
from benchmarks.static.costs import FLOPS, Costs, CountCosts
from benchmarks.static.graphs import shrunk_case
from benchmarks.static.models import MODEL_FOLDERS, config_named
from fasttune.models.formulas import FORMULAS
from fasttune.models.fused import unfuse
from fasttune.models.unet import TransformerBlock
from fasttune.models.unet_formulas import TRANSFORMER
from fasttune.rehearsal import rehearse
from fasttune_kernels import attention
from fasttune_kernels.lora_linear import lora_linear_backward, lora_linear_forward

B, L, H, D = 2, 48, 3, 16


def counted(run: Callable[[], Any]) -> Costs:
    with CountCosts() as count:
        run()
    return count.costs


def test_a_linear_forward_and_backward() -> None:
    x, w = torch.randn(5, 7, requires_grad=True), torch.randn(11, 7, requires_grad=True)
    dy = torch.ones(5, 11)
    costs = counted(lambda: F.linear(x, w).backward(dy))
    assert costs.flops == 3 * 2 * 5 * 7 * 11
    assert costs.launches == {"gemm": 3}  # transposes are views
    # y = x w; dw = dy x, dx = dy w: each reads two of the three and writes the third
    assert costs.bytes == 3 * 4 * (5 * 7 + 11 * 7 + 5 * 11)


def test_attention_on_the_cpu_is_counted() -> None:
    q, k, v = (torch.randn(B, L, H, D, requires_grad=True) for _ in range(3))
    forward = counted(lambda: attention(q, k, v))
    product = 2 * B * H * L * L * D
    assert forward.flops == 2 * product and forward.launches["attention"] == 1
    both = counted(lambda: attention(q, k, v).sum().backward())
    # the backward recomputes the scores: five products beside the forward's two
    assert both.flops == 7 * product and both.launches["attention"] == 2


def test_views_cost_nothing_and_copies_what_they_move() -> None:
    x = torch.randn(4, 6)
    assert counted(lambda: x[1:].t().unsqueeze(0).expand(3, 6, 3)).launches.total() == 0
    assert counted(lambda: x.t().contiguous()).bytes == 2 * x.nbytes
    assert counted(lambda: torch.cat([x, x])).launches == {"copy": 1}
    # one float is read, whatever the shape
    expanded = torch.zeros(1).expand(1000)
    assert counted(lambda: expanded + 1).bytes == 4 + 4000


def test_a_multi_tensor_op_is_one_launch_over_all_its_bytes() -> None:
    xs = [torch.randn(8), torch.randn(24)]
    costs = counted(lambda: torch._foreach_mul_(xs, 2.0))
    assert costs.launches.total() == 1 and costs.bytes == 2 * 4 * 32


def test_sums_and_multiples() -> None:
    one = counted(lambda: torch.ones(3) @ torch.ones(3, 3))
    assert one.times(3) == one + one + one


@pytest.mark.slow
def test_flux_has_the_flops_of_the_arithmetic() -> None:
    """74.4 TFLOP a forward at 4096 + 512 tokens: 59.5 in linear layers, 14.9 in attention."""
    config = config_named("flux-lora-32gb")
    config = replace(config, memory=replace(config.memory, activations="save"))
    folder, size = MODEL_FOLDERS["flux-dev"], (1024, 1024)
    with step.rehearsed(config, folder, size=size) as rehearsal:
        generator = torch.Generator()
        with CountCosts() as count, torch.no_grad():
            rehearsal.forward.loss(rehearsal.batch, generator)
        unfuse(rehearsal.denoiser)
        with CountCosts() as plain, torch.no_grad():
            rehearsal.forward.loss(rehearsal.batch, generator)
    tokens, width, blocks = 4096 + 512, 3072, 19 + 38
    attention_flops = blocks * 4 * tokens**2 * width
    by_kind = {
        kind: sum(op.flops for op in count.costs.ops if op.kind == kind)
        for kind in ("gemm", "attention")
    }
    assert by_kind["attention"] == attention_flops
    assert count.costs.launches["attention"] == blocks
    # per token: 12 width^2 multiply-adds a block; the rest are modulation, LoRA, input and output
    assert by_kind["gemm"] == pytest.approx(2 * 12 * width**2 * tokens * blocks, rel=0.02)
    assert count.costs.flops == pytest.approx(74.4e12, rel=0.01)
    assert count.costs.flops == plain.costs.flops
    assert count.costs.bytes < plain.costs.bytes / 2


def rows_with(
    monkeypatch: pytest.MonkeyPatch | None = None, **planted: Callable[..., Any]
) -> dict[str, Any]:
    """The gate's rows of a small U-Net, with something planted in the formula of its transformers."""
    config = config_named("quickstart")
    (folder,) = [f for name, _, f in step.shipped_configs() if name == "quickstart"]
    if monkeypatch is not None:
        monkeypatch.setitem(FORMULAS, TransformerBlock, replace(TRANSFORMER, **planted))
    memory, flops, launches = step.rows_of("x", config, folder)
    return {**memory, **flops, **launches}


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_rows_are_those_of_a_whole_step(count: int) -> None:
    config = config_named("quickstart")
    config = replace(config, train=replace(config.train, gradient_accumulation=count))
    (folder,) = [f for name, _, f in step.shipped_configs() if name == "quickstart"]
    _, flops, launches = step.rows_of("x", config, folder)
    with FakeTensorMode():
        whole = rehearse(config, folder, placement=step.gpu_placement(config), device_type="cuda")
        whole.take_step()  # makes tables and the optimizer's state
        with CountCosts() as counted:
            whole.take_step()
    expected = step.flops_row("x", whole, counted.costs)
    assert flops["tflop"] == expected["tflop"] > 0
    assert flops["moved_gib"] == pytest.approx(expected["moved_gib"], abs=2e-6)
    # All but stacking the losses of the micro-batches and their sum.
    assert launches["launches"] == counted.costs.launches.total() - 2


def test_a_planted_copy_and_a_planted_upcast_change_the_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = rows_with()

    def copying(c: Any, t: Any) -> Any:
        return TRANSFORMER.forward(c, {**t, "x": t["x"].clone()})

    def upcasting(c: Any, t: Any, kept: Any, gradients: Any) -> Any:
        (gradient,) = gradients
        return TRANSFORMER.backward(c, t, kept, [gradient.double().to(gradient.dtype)])

    copied = rows_with(monkeypatch, forward=copying)
    assert copied["copy"] > before["copy"] and copied["moved_gib"] > before["moved_gib"]
    assert copied["tflop"] == before["tflop"]
    upcast = rows_with(monkeypatch, backward=upcasting)
    assert upcast["copy"] > before["copy"] and upcast["moved_gib"] > before["moved_gib"]


def lora(dropout: float = 0.0) -> dict[str, Any]:
    """Two adapted targets of three in one product."""
    x, weight = torch.randn(2, 5, 8), torch.randn(12, 8)
    return {
        "x": x, "x2": None, "weight": weight, "bias": None, "lora_A": torch.randn(6, 8),
        "lora_B": torch.randn(8, 3), "slices": [0, 4, 8, 12], "scale": 1.0, "dropout": dropout,
        "seed": None,
    }  # fmt: skip


def test_lora_linear_has_the_flops_of_its_products() -> None:
    given = lora()
    tokens, base, down, up = 2 * 5, 12 * 8, 6 * 8, 8 * 3
    forward = counted(lambda: lora_linear_forward(**given))
    assert forward.flops == 2 * tokens * (base + down + up)
    # of float32 the vendor's: the base product, x A^T, and one for each of two targets
    assert forward.launches == {"gemm": 4}
    # each input once, y and low once
    assert forward.bytes == 4 * (tokens * 8 + base + down + up + tokens * 12 + tokens * 6)
    del given["bias"]
    dy, low = torch.randn(2, 5, 12), torch.randn(2, 5, 6)

    def backward(**changed: Any) -> Costs:
        wanted = {"residual": None, "wants_x": True, "wants_weight": False, "wants_bias": False}
        call = {"dy": dy, "low": low, **given, **wanted, **changed}
        return counted(lambda: lora_linear_backward(**call))

    # dlow and dlora_B from dy, dlora_A from the input; dx from dy and dlow
    assert backward().flops == 2 * tokens * (2 * up + down + base + down)
    assert backward(wants_x=False).flops == 2 * tokens * (2 * up + down)
    assert backward(wants_weight=True).flops - backward().flops == 2 * tokens * base
    frozen = {"lora_A": None, "lora_B": None, "low": torch.empty(0), "slices": []}
    assert backward(**frozen).flops == 2 * tokens * base
    # dy, weight and dx: of the input nothing is read
    assert backward(**frozen).bytes == 4 * (tokens * 12 + base + tokens * 8)
    assert backward(**frozen, wants_weight=True).bytes == 4 * (tokens * 28 + 2 * base)


NO_PRODUCTS = frozenset(
    f"fasttune::{name}"
    for name in """
    diffusion_loss_forward diffusion_loss_backward ema_step_ gradient_norm optimizer_step_
    gated_residual_forward gated_residual_norm_forward gated_residual_backward
    geglu_forward geglu_backward gelu_tanh_forward gelu_tanh_backward
    group_norm_silu_forward group_norm_silu_backward norm_modulate_forward norm_modulate_backward
    qk_norm_rope_forward qk_norm_rope_backward quantize_rows dequantize_rows
    """.split()
)


def test_every_operation_of_ours_has_its_flops_or_none() -> None:
    for path in (ROOT / "kernels" / "fasttune_kernels").glob("*.py"):
        importlib.import_module(f"fasttune_kernels.{path.stem}")
    # other tests define some under the same namespace
    ours = {
        name
        for name, op in OPDEFS.items()
        if name.startswith("fasttune::") and op._init_fn.__module__.startswith("fasttune_kernels.")
    }
    assert ours == NO_PRODUCTS | set(FLOPS)
    assert not NO_PRODUCTS & set(FLOPS)


def test_activations_by_what_becomes_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with shrunk_case("flux-lora-32gb", repeats=2) as case:
        monkeypatch.setattr(
            step, "shipped_configs", lambda: [(case.name, case.config, case.folder)]
        )
        plain, saved, int8, offloaded = step.activation_rows("flux")
    assert plain["case"] == "flux-lora-32gb, activations saved, plain blocks"
    assert saved["case"] == "flux-lora-32gb, activations saved"
    sizes = [row["saved_gib"] for row in (plain, saved, int8, offloaded)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert saved["saved_percent_of_plain"] == round(100 * sizes[1] / sizes[0])
    assert {row["width"] for row in (plain, saved, int8, offloaded)} == {1024}
