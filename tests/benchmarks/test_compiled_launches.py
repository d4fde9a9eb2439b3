"""Launches of compiled blocks are counted from Inductor's schedule; an added copy shows."""
# ruff: noqa: E402  # torch's compiler warns when it is imported

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

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
from benchmarks.static import compiled_launches
from benchmarks.static.compiled_launches import Call, row_of, schedule_of
from benchmarks.static.costs import CountCosts
from benchmarks.static.graphs import shrunk_case
from benchmarks.static.stand_in import Like, stand_in
from benchmarks.static.step import costs_of_a_step, rehearsed
from fasttune.models.flux import Projections, SingleBlock

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


def test_own_operations_are_counted_as_custom() -> None:
    @torch.library.custom_op("fasttune::twice_for_a_test", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    @twice.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    found = schedule.Schedule()
    torch.compile(lambda x: twice(x.sin()).cos(), backend=found)(torch.empty(64, 8))
    assert found.forward.launches == Counter(custom=1, pointwise=2)


def test_a_step_with_compiled_blocks_multiplies_products_by_what_runs() -> None:
    with shrunk_case("flux-lora-32gb", repeats=2) as case:
        path = case.folder / "transformer" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 0}))
        config = replace(case.config, adapter=replace(case.config.adapter, targets=("*.to_[qkv]",)))
        row = row_of(case.name, config, case.folder)
        with rehearsed(config, case.folder, micro_batches=1) as rehearsal:
            eager = costs_of_a_step(rehearsal, 1).launches
    # two single blocks, each run forward twice and backward once
    assert config.memory.activations == "recompute"
    assert row["attention"] == eager["attention"] == 2 * 3
    assert row["launches"] == sum(row[kind] for kind in compiled_launches.LAUNCHED)
    assert row["gemm"] == eager["gemm"]
    assert row["pointwise"] < eager["pointwise"]
    assert row["graphs"] == 2  # the first block takes inputs without gradients


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
