"""The memory trace against the allocator's own record, and what it says of planted tensors."""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from benchmarks.static import own_launches
from benchmarks.static.costs import CountCosts
from benchmarks.static.models import MODEL_FOLDERS, config_named, with_lora
from benchmarks.static.own_launches import scratch_of
from benchmarks.static.step_memory import label_rehearsal, take_step, trace_rehearsal
from fasttune.config import Config
from fasttune.device import Placement
from fasttune.memory.trace import CATEGORIES, MemoryTrace, cuda_size, exact_size
from fasttune.models.flux import SingleBlock
from fasttune.models.fused import unfuse
from fasttune.models.layers import set_recompute
from fasttune.optim.fused_adamw import FusedAdamW
from fasttune.rehearsal import Rehearsal, rehearse
from fasttune_kernels.arena import Arena

FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [8, 12, 12],
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [64, 96],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 64,
}
SIZE = (192, 192)
# Kernels whose scratch is a tensor to the allocator and none to the dispatcher: what was held within
# them is not compared, what they leave is.
SCRATCH = {
    "aten::mm",
    "aten::addmm",
    "aten::mkldnn_convolution",
    "aten::convolution_backward",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Make = Callable[..., Rehearsal]


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """What is freed is freed by its last reference, whatever else the process does."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models small in width, not in tokens, so that activations outweigh what is not compared."""
    found = {}
    cases = (("flux", "transformer", FLUX, "flux-dev"), ("sd1", "unet", UNET, "sd15"))
    for family, part, config, real in cases:
        folder = tmp_path_factory.mktemp(family)
        shutil.copytree(MODEL_FOLDERS[real] / "scheduler", folder / "scheduler")
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
        found[family] = folder
    return found


@pytest.fixture
def make(folders: dict[str, Path]) -> Make:
    """make(family, precision, activations, targets, ema, device): a rehearsal of a small model, of plain
    blocks unless `fused`: what PyTorch does inside an operation of ours is no tensor to the trace."""

    def build(
        family: str = "flux",
        precision: str = "fp32",
        activations: str = "save",
        targets: str | None = "all-linear",
        ema: bool = True,
        device: str = "cpu",
        fused: bool = False,
    ) -> Rehearsal:
        config = small(family, activations, targets, ema)
        dtype = DTYPES[precision]
        placement = Placement(
            device=torch.device(device),
            base_dtype=torch.float32 if targets is None else dtype,
            compute_dtype=dtype,
            reason="",
        )
        rehearsal = rehearse(config, folders[family], placement=placement, size=SIZE)
        if not fused:
            unfuse(rehearsal.denoiser)
            set_recompute(rehearsal.denoiser, activations == "recompute")
        return rehearsal

    return build


def small(family: str, activations: str, targets: str | None, ema: bool) -> Config:
    config = config_named({"flux": "flux-lora-32gb", "sd1": "sd1-lora-8gb"}[family])
    config = with_lora(config, targets)
    return replace(
        config,
        memory=replace(config.memory, activations=activations),  # type: ignore[arg-type]
        optimizer=replace(config.optimizer, name="adamw"),
        ema=replace(config.ema, enabled=ema),
        train=replace(config.train, batch_size=1, gradient_accumulation=1 + (family == "flux")),
    )


def allocators_peak(rehearsal: Rehearsal) -> tuple[int, int]:
    """(most that a step held beyond what was there before, what it left), from the profiler's record
    of the CPU allocator."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        rehearsal.take_step()
    events = profiler.profiler.kineto_results.events()
    scratch = [(e.start_ns(), e.end_ns()) for e in events if e.name() in SCRATCH]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    assert len(changes) > 1000
    held = most = 0
    for (at, nbytes), (then, _) in zip(changes, [*changes[1:], (1 << 63, 0)], strict=True):
        held += nbytes
        if held > most and not any(start <= at and then <= end for start, end in scratch):
            most = held
    return most, held


CASES = [
    ("flux", "fp32", "save", "all-linear"),
    ("flux", "bf16", "recompute", "attention"),
    ("flux", "bf16", "save", None),
    ("flux", "fp32", "recompute", None),
    ("sd1", "fp32", "save", None),
    ("sd1", "bf16", "save", "attention"),
    ("sd1", "fp32", "recompute", "all-linear"),
    ("sd1", "bf16", "recompute", None),
]


@pytest.mark.parametrize(("family", "precision", "activations", "targets"), CASES)
def test_the_peak_is_the_allocators(
    make: Make, family: str, precision: str, activations: str, targets: str | None
) -> None:
    plain = make(family, precision, activations, targets)
    plain.take_step()  # makes the optimizer's state
    expected, left = allocators_peak(plain)
    traced = make(family, precision, activations, targets)
    traced.take_step()
    trace = MemoryTrace(traced.denoiser, rounding=exact_size)
    with trace:
        label_rehearsal(trace, traced)
        before = trace.live
        trace.reset_peak()
        take_step(trace, traced)
        found = trace.peak.bytes - before
    assert found == pytest.approx(expected, rel=0.01)
    assert trace.live - before == left == 0


def test_the_breakdown_adds_up_and_nothing_leaks(make: Make) -> None:
    rehearsal = make("sd1", "bf16", "recompute", "attention")
    trace = MemoryTrace(rehearsal.denoiser)
    with trace:
        label_rehearsal(trace, rehearsal)
        lived = []
        for _ in range(3):
            take_step(trace, rehearsal)
            label_rehearsal(trace, rehearsal)
            lived.append((trace.live, trace.breakdown()))
    assert lived[0] == lived[1] == lived[2]
    live, held = lived[-1]
    assert live == sum(held.values())
    assert held["gradients"] == held["recomputed"] == 0
    assert held["saved"] + held["transient"] < 1 << 14
    trained = list(rehearsal.trained.parameters.values())
    assert held["adapters"] > 0
    if isinstance(rehearsal.trained._optimizer, FusedAdamW):
        arena = 4 * Arena.of(trained).total
        assert held["ema"] == arena
        assert held["optimizer"] == 2 * arena + 512 * 6  # what it needs on the device for a step
    else:
        assert held["ema"] == held["adapters"]
        assert held["optimizer"] == 2 * held["adapters"] + 512 * len(trained)  # a step count each
    peak = trace.peak
    assert peak.bytes == sum(peak.breakdown.values()) > live
    assert set(peak.breakdown) == set(CATEGORIES)
    assert peak.phase == "backward" and "transformer_blocks" in peak.module


@pytest.mark.parametrize(("family", "precision", "activations", "targets"), CASES[::3])
def test_the_peak_of_fused_blocks_is_the_allocators(
    make: Make, family: str, precision: str, activations: str, targets: str | None
) -> None:
    """What the bodies of our operations allocate is found by running them on meta tensors."""
    measured = make(family, precision, activations, targets, fused=True)
    measured.take_step()
    expected, left = allocators_peak(measured)
    traced = make(family, precision, activations, targets, fused=True)
    traced.take_step()
    inside = scratch_of(exact_size, backend="torch")

    def scratch(op: Any, args: Any, kwargs: Any) -> int:
        """Of blocks. The update's operations read numbers, which meta tensors lack."""
        is_update = any(x in op.name() for x in ("optimizer_step", "gradient_norm", "ema_step"))
        return 0 if is_update else inside(op, args, kwargs)

    trace = MemoryTrace(traced.denoiser, rounding=exact_size, scratch=scratch)
    with trace:
        label_rehearsal(trace, traced)
        before = trace.live
        trace.reset_peak()
        take_step(trace, traced)
        found = trace.peak.bytes - before
    assert 0.99 * expected < found < 1.01 * expected
    assert trace.live - before == left == 0


def test_a_copy_inside_of_an_operation_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors do not run bodies, and would not see it."""
    x = torch.empty(2, 64, 256)
    backward = torch.ops.fasttune.gelu_tanh_backward.default
    assert scratch_of(exact_size)(backward, (x, x), {}) == x.nbytes  # its output
    definition = OPDEFS["fasttune::gelu_tanh_backward"]
    body = definition._init_fn

    def copies(dout: Tensor, x: Tensor) -> Tensor:
        return body(dout.clone(), x)

    monkeypatch.setattr(definition, "_init_fn", copies)
    own_launches._allocated.cache_clear()
    assert scratch_of(exact_size)(backward, (x, x), {}) == 2 * x.nbytes
    own_launches._allocated.cache_clear()
    assert scratch_of(exact_size)(torch.ops.aten.mm.default, (x[0], x[1]), {}) == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        ("sd1", "fp32", "save"),
        pytest.param(("flux", "bf16", "recompute"), marks=pytest.mark.slow),
    ],
)
def test_fake_tensors_give_the_trace_of_real_ones(
    make: Make, case: tuple[str, str, str], fused: bool
) -> None:
    real = trace_rehearsal(make(*case, fused=fused))
    with FakeTensorMode():
        fake = trace_rehearsal(make(*case, fused=fused))
    assert fake == real
    assert fake.resting["optimizer"] > 0


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[SingleBlock, Tensor], Tensor]) -> None:
    """Has the single blocks of Flux work on `change(block, x)`."""
    plain = SingleBlock.forward

    def forward(block: SingleBlock, x: Tensor, *rest: Any) -> Tensor:
        return plain(block, change(block, x), *rest)

    monkeypatch.setattr(SingleBlock, "forward", forward)


@pytest.mark.parametrize(
    ("activations", "category"), [("save", "saved"), ("recompute", "recomputed")]
)
def test_a_tensor_more_that_is_saved_shows(
    make: Make, monkeypatch: pytest.MonkeyPatch, activations: str, category: str
) -> None:
    with FakeTensorMode():
        before = trace_rehearsal(make(activations=activations), steps=1)
        plant(monkeypatch, lambda _, x: x + torch.zeros_like(x) * x.sigmoid())
        after = trace_rehearsal(make(activations=activations), steps=1)
    hidden = 4 * 400 * 128  # 256 text and 144 image tokens
    blocks = 2 if activations == "save" else 1
    assert after.breakdown[category] - before.breakdown[category] >= 2 * hidden * blocks
    assert after.peak_bytes - before.peak_bytes >= 2 * hidden * blocks
    assert after.resting_bytes == before.resting_bytes


def test_a_full_size_copy_shows(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: dict[SingleBlock, Tensor] = {}

    def copied(block: SingleBlock, x: Tensor) -> Tensor:
        copies[block] = x.detach().clone()
        return x

    with FakeTensorMode():
        before = trace_rehearsal(make(), steps=1)
        plant(monkeypatch, copied)
        after = trace_rehearsal(make(), steps=1)
    more = 2 * 4 * 400 * 128
    assert after.peak_bytes - before.peak_bytes == more
    assert after.breakdown["transient"] - before.breakdown["transient"] == more


def test_sizes_of_the_caching_allocator() -> None:
    assert [cuda_size(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]


def test_views_and_operations_in_place_hold_nothing() -> None:
    with MemoryTrace(rounding=exact_size) as trace:
        x = torch.zeros(8, 8)
        kept = x.t()[2:]
        assert trace.live == 256
        torch._foreach_add_([x, kept], 1.0)
        x.add_(1.0).clamp_(max=1.0)
        assert trace.live == trace.peak.bytes == 256
        del x
        assert trace.live == 256
        several = torch._foreach_mul([kept, kept], 2.0)
        assert trace.live == 3 * 256 - 2 * 64
        del kept, several
        assert trace.live == 0
        assert trace.peak.bytes == 640


def test_a_storage_that_changes_its_size_is_counted_anew() -> None:
    with MemoryTrace(rounding=exact_size) as trace:
        x = torch.zeros(4)
        x.resize_(16)
        assert trace.live == 64
        x.untyped_storage().resize_(0)
        x.detach()  # seen at the next operation
        assert trace.live == 0


def test_tensors_inside_others_are_counted() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    pair = TwoTensor(torch.ones(4), torch.ones(4))
    with MemoryTrace(rounding=exact_size) as trace:
        trace.label("weights", [pair])
        made = pair * 2
        assert trace.breakdown()["weights"] == 32
        assert trace.breakdown()["transient"] == 32
        del made
        assert trace.live == 32


def test_what_storages_are() -> None:
    given, layer = torch.ones(16, 16), nn.Linear(16, 16)
    with MemoryTrace(layer, rounding=exact_size) as trace:
        trace.label("weights", layer.parameters())
        y = checkpoint(lambda x: layer(x.exp()).sin().cos(), given, use_reentrant=False)
        assert trace.breakdown()["inputs"] == 1024  # met as an argument
        assert trace.breakdown()["saved"] == 0  # `given` is an input all the same
        assert trace.peak.module == "" and trace.peak.phase == "forward"
        y = y.sigmoid()
        assert trace.breakdown()["saved"] == 1024
        trace.reset_peak()
        y.sum().backward()
        assert trace.peak.phase == "backward"
        assert trace.peak.breakdown["recomputed"] >= 2 * 1024
        del y
        held = trace.breakdown()
        assert held["gradients"] == held["weights"] == 1024 + 64
        assert held["saved"] == held["recomputed"] == held["transient"] == 0
        with trace.phase("update"):
            more = torch.ones(4096)
        assert trace.peak.phase == "update"
        trace.label("optimizer", [more])  # after the peak, and true of it
        assert trace.peak.breakdown["optimizer"] == 4 * 4096
        assert sum(trace.peak.breakdown.values()) == trace.peak.bytes
        with pytest.raises(ValueError, match="'weight' is unknown; allowed are"):
            trace.label("weight", [more])


def test_the_backward_knows_its_module() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.repeat(64, 1).sin().sum(0, keepdim=True)

    net = nn.Sequential(nn.Linear(8, 8), Wide(), nn.Linear(8, 8))
    with MemoryTrace(net) as trace:
        loss = net(torch.ones(1, 8)).sum()
        trace.reset_peak()
        loss.backward()
        assert (trace.peak.module, trace.peak.phase) == ("1", "backward")


@pytest.mark.parametrize("counting", [False, True])
def test_a_sum_of_gradients_takes_the_place_of_a_term(counting: bool) -> None:
    """Autograd adds into a term that nobody else has. It is told by who called the addition, which a
    mode in between does not hide."""
    x = torch.ones(256, 16, requires_grad=True)
    with MemoryTrace(rounding=exact_size) as trace, CountCosts() if counting else nullcontext():
        y = x * 2.0
        loss = (y * 3.0).sum() + (y * 5.0).sum()
        del y
        before = trace.live
        trace.reset_peak()
        loss.backward()
        assert trace.peak.bytes - before < 3 * x.nbytes  # the terms, no sum beside them


def test_only_the_device_asked_for_counts() -> None:
    with MemoryTrace(device_type="cuda") as trace:
        torch.ones(4)
        assert trace.peak.bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("activations", ["save", "recompute"])
def test_the_peak_on_a_gpu(make: Make, activations: str) -> None:
    # Without convolutions, whose workspaces are the library's choice. What may be missing: the
    # scratch of attention's backward, and blocks of the allocator that were not split.
    rehearsal = make("flux", "bf16", activations, None, device="cuda")
    for _ in range(2):
        rehearsal.take_step()  # optimizer state and the workspaces of cuBLAS
    trace = MemoryTrace(rehearsal.denoiser, device_type="cuda")
    with trace:
        label_rehearsal(trace, rehearsal)
        before = trace.live
        trace.reset_peak()
        take_step(trace, rehearsal)
        found = trace.peak.bytes - before
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    rehearsal.take_step()
    measured = torch.cuda.max_memory_allocated() - allocated
    assert 0.9 * measured <= found <= 1.01 * measured
