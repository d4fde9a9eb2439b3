"""Launches of compiled blocks are counted from Inductor's schedule; an added copy shows."""
# ruff: noqa: E402  # torch's compiler warns when it is imported

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

pytestmark = [  # what torch's own compiler does, and hides by means that an error escapes
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
    from torch._inductor.runtime.hints import DeviceProperties

    from benchmarks.static import schedule
from benchmarks.static import compiled_launches, own_launches
from benchmarks.static.compiled_launches import Call, fused_blocks, rows_of, schedule_of
from benchmarks.static.costs import CountCosts
from benchmarks.static.graphs import shrunk_case
from benchmarks.static.own_launches import launches_of
from benchmarks.static.stand_in import Like, stand_in
from fasttune.config import Config
from fasttune.models.flux import Projections, SingleBlock
from fasttune.models.flux_formulas import SINGLE
from fasttune.models.formulas import FORMULAS
from fasttune_kernels.attention import attention_backward, attention_forward
from fasttune_kernels.lora_linear import lora_linear_forward
from fasttune_kernels.norm_modulate import norm_modulate_backward, norm_modulate_forward

TOKENS, WIDTH, HEADS = 80, 64, 2


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # pytest's handler makes torch write its whole trace of a compilation
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def single_block() -> schedule.Schedule:
    """The schedule of a frozen Flux block."""
    block = SingleBlock(WIDTH, HEADS).requires_grad_(False)
    table = Like.of(torch.empty(TOKENS, 1, WIDTH // HEADS // 2))
    x = Like.of(torch.empty(1, TOKENS, WIDTH).requires_grad_())
    vector = Like.of(torch.empty(1, WIDTH))
    return schedule_of(block, Call("SingleBlock block", (x, vector, table, table, None)))


def test_a_copy_of_all_values_is_one_launch_more(monkeypatch: pytest.MonkeyPatch) -> None:
    without = single_block()
    original = Projections.project

    def project(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = original(self, x)
        return q, k, v.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)

    monkeypatch.setattr(Projections, "project", project)
    planted = single_block()
    assert planted.forward.launches == without.forward.launches + Counter(copy=1)
    assert planted.forward.bytes == without.forward.bytes + 2 * 4 * TOKENS * WIDTH


def test_products_and_attention_of_a_block() -> None:
    found = single_block()
    # q, k, v, mlp, modulation and output; gradients of the inputs of all but the modulation's
    assert found.forward.launches["gemm"] == 6
    assert found.backward.launches["gemm"] == 5
    assert found.forward.launches["attention"] == found.backward.launches["attention"] == 1
    with CountCosts() as eager:
        SingleBlock(WIDTH, HEADS)(
            torch.randn(1, TOKENS, WIDTH),
            torch.randn(1, WIDTH),
            *[torch.randn(TOKENS, 1, 16)] * 2,
            None,
        )
    fused = found.forward.launches["pointwise"] + found.forward.launches["copy"]
    assert fused < (eager.costs.launches["pointwise"] + eager.costs.launches["copy"]) / 2


def test_kinds_of_kernels() -> None:
    def function(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        total = (x @ weight).sin().sum(0)  # a product, a reduction with what goes before
        return total, weight.t().contiguous(), weight.to(torch.bfloat16)

    found = schedule.Schedule()
    torch.compile(function, backend=found)(torch.empty(48, 32), torch.empty(32, 16))
    assert found.forward.launches["gemm"] == 1
    assert found.forward.launches["pointwise"] == 1
    assert found.forward.launches["copy"] in (1, 2)  # both read the weight, and may share a kernel
    assert found.backward.launches.total() == 0


@torch.library.custom_op("fasttune::twice_for_a_test", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x.t().contiguous()


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[::-1])


def test_own_operations_launch_what_their_code_does() -> None:
    found = schedule.Schedule()
    torch.compile(lambda x: twice(x.sin()).cos(), backend=found)(torch.empty(64, 8))
    assert found.forward.launches == Counter(copy=1, pointwise=3)
    assert found.forward.copies == Counter(["inside of fasttune::twice_for_a_test"])


def launched(op: Any, *args: Any) -> Counter[str]:
    return launches_of(op._opoverload, args, {})


def test_launches_inside_of_operations() -> None:
    x, vector = torch.empty(1, 512, 64, dtype=torch.bfloat16), torch.empty(1, 64)
    rows, none = torch.empty(1, 512), (None, None, None)
    # one kernel, and a second stage where gradients of vectors are wanted
    assert launched(norm_modulate_forward, x, *none, None, 1e-6, False) == Counter(custom=1)
    given = (x, x, rows, rows, vector, None, None, None, False)
    assert launched(norm_modulate_backward, *given, False, False) == Counter(custom=1)
    assert launched(norm_modulate_backward, *given, True, False) == Counter(custom=2)
    # an input that is no rows is copied first
    turned = torch.empty(1, 64, 512, dtype=torch.bfloat16).transpose(1, 2)
    found = launched(norm_modulate_forward, turned, *none, None, 1e-6, False)
    assert found == Counter(custom=1, copy=1)

    heads = torch.empty(1, 512, 4, 64, dtype=torch.bfloat16)
    assert launched(attention_forward, heads, heads, heads, None) == Counter(attention=1)
    short, lse = heads[:, :77], torch.empty(1, 4, 512)
    assert launched(attention_forward, heads, short, short, None) == Counter(custom=1)
    found = launched(attention_backward, heads, heads, short, short, heads, lse, None)
    assert found == Counter(custom=2)

    weight, A, B = (
        torch.empty(n, m, dtype=torch.bfloat16) for n, m in ((96, 64), (4, 64), (96, 4))
    )
    frozen = (x, None, weight, None, None, None, [], 1.0, 0.0, None)
    assert launched(lora_linear_forward, *frozen) == Counter(gemm=1)
    adapted = (x, None, weight, None, A, B, [0, 96], 1.0, 0.0, None)
    assert launched(lora_linear_forward, *adapted) == Counter(custom=2)  # low, and the product
    with mock.patch.object(own_launches, "ARCH", "sm_90"):
        own_launches._launches.cache_clear()
        # the vendor's product, updated by a kernel of ours
        assert launched(lora_linear_forward, *adapted) == Counter(gemm=1, custom=2)
    own_launches._launches.cache_clear()


SMALL = {"num_attention_heads": 2, "attention_head_dim": 64, "axes_dims_rope": [16, 24, 24]}
"""A width with which all kernels are used."""


@contextmanager
def two_blocks(choice: Any) -> Iterator[tuple[Config, Path]]:
    """A step of two single blocks with adapters on q, k and v."""
    with shrunk_case("flux-lora-32gb", repeats=2) as case:
        path = case.folder / "transformer" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **SMALL, "num_layers": 0}))
        adapter = replace(case.config.adapter, targets=("*.to_[qkv]",))
        memory = replace(case.config.memory, activations=choice)
        yield replace(case.config, adapter=adapter, memory=memory), case.folder


@pytest.mark.slow
def test_a_step_with_compiled_blocks_multiplies_products_by_what_runs() -> None:
    with two_blocks("recompute") as (config, folder):
        plain, fused = rows_of("two", config, folder, ("recompute",))
    # two single blocks, each run forward twice and backward once
    assert plain["attention"] == fused["attention"] == 2 * 3
    for row in (plain, fused):
        assert row["launches"] == sum(row[kind] for kind in compiled_launches.LAUNCHED)
    assert plain["graphs"] == 4  # the first block takes an input without gradient
    assert fused["graphs"] == 2
    assert fused["pointwise"] < plain["pointwise"]
    percent = round(100 * fused["launches"] / plain["launches"])
    assert fused["launches_percent_of_plain"] == percent < 80
    assert fused["copies_in_blocks"] == 0 and fused["copies"] == []
    assert plain["copies_in_blocks"] > 0


def test_a_planted_copy_and_a_planted_product_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def row() -> dict[str, Any]:
        with two_blocks("save") as (config, folder):
            return fused_blocks(config, folder).row("two")

    clean = row()

    def forward(c: Any, t: Any) -> Any:
        (x,), kept = SINGLE.forward(c, t)
        return (x.transpose(1, 2).contiguous().transpose(1, 2),), kept

    def backward(c: Any, t: Any, kept: Any, gradients: Any) -> Any:
        z = c.project("out", t, kept["attention"].flatten(2), kept["mlp"])[0]
        return SINGLE.backward(c, t, kept, [gradients[0] + z])

    monkeypatch.setitem(FORMULAS, SingleBlock, replace(SINGLE, forward=forward))
    copying = row()
    assert copying["copies_in_blocks"] > clean["copies_in_blocks"]
    assert copying["launches"] > clean["launches"]
    monkeypatch.setitem(FORMULAS, SingleBlock, replace(SINGLE, backward=backward))
    computing = row()
    # of each of two blocks both halves of the input
    assert computing["gemm"] == clean["gemm"] + 2 * 2


def test_what_is_left_out_launches_nothing_and_lets_gradients_through() -> None:
    x, weight = torch.ones(4, 3, requires_grad=True), nn.Parameter(torch.ones(3))
    fixed = torch.ones(2)
    like = Like((4, 5), (5, 1), torch.float32, requires_grad=True)
    with CountCosts() as counted:
        y, z = stand_in([like, Like((2,), (1,), torch.bool, False)], [x, None, weight, fixed])
        grads = torch.autograd.grad(y, [x, weight], torch.empty(4, 5))
    assert counted.costs.launches.total() == 0
    assert (y.shape, y.requires_grad, z.dtype, z.requires_grad) == ((4, 5), True, torch.bool, False)
    assert [g.shape for g in grads] == [x.shape, weight.shape]


def test_this_processor_decides_nothing() -> None:
    with schedule._as_on_a_gpu():
        found = DeviceProperties.create(torch.device("cpu"))
        assert {name: getattr(found, name) for name in schedule.CARD} == schedule.CARD
        assert not torch.backends.mkldnn.is_available()
    assert DeviceProperties.create(torch.device("cpu")).warp_size != schedule.CARD["warp_size"]
