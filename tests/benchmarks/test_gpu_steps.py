"""Training steps on the CPU: cases, rows, memory caps, losses beside those that were recorded."""

import json
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.gpu import bucket_sweep, loss_curves, step_cases, steps
from benchmarks.gpu.step_cases import StepCase
from fasttune.errors import FasttuneError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_step_cases() -> None:
    cases = step_cases.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    for case in cases:
        assert step_cases.parse(case.name) == case
        config = case.config()
        assert config.memory.activations == case.activations
        assert (config.adapter.type == "lora") == (case.train == "lora")
        assert case.fused or case.activations in step_cases.PLAIN_CHOICES
    assert {case.cap_gib for case in cases} == {None, 12, 16, 24}
    assert names[:2] == [
        "flux lora bf16 save b1 1024 compile",
        "flux lora bf16 save b1 1024 compile plain",
    ]
    for mode, model in product(("eager", "compile"), ("flux", "sdxl")):
        for activations in ("save", "int8", "recompute", "offload"):
            assert f"{model} lora bf16 {activations} b1 1024 {mode}" in names
        assert f"{model} lora bf16 recompute b1 1024 {mode} plain" in names


@pytest.mark.parametrize(
    "name",
    [
        "",
        "flux",
        "flux lora bf16 recompute b1 1024 slow",
        "a b c d b1 2 eager",
        "flux lora bf16 recompute b1 1024 eager cap12 plain",
    ],
)
def test_unknown_step_cases(name: str) -> None:
    with pytest.raises(FasttuneError, match="--list"):
        step_cases.parse(name)


def test_steps_are_timed_one_by_one() -> None:
    taken: list[int] = []

    def take_step() -> Tensor:
        taken.append(1)
        time.sleep(0.001)
        return torch.tensor(float(len(taken)))

    row: harness.Row = {}
    losses = steps.timed_steps(take_step, 4, CPU, row, steps=8, seconds=60.0)
    assert losses == [float(i) for i in range(1, 9)]
    assert row["steps"] == 8 and len(row["samples"]["step_ms"]) == 8 - steps.WARM_UP
    assert row["images_per_s"] == pytest.approx(4000 / row["step_ms"], rel=1e-3)
    row = {}
    steps.timed_steps(take_step, 1, CPU, row, steps=100, seconds=0.0)
    assert row["steps"] == steps.WARM_UP + steps.FEWEST
    row = {}
    assert len(steps.timed_steps(take_step, 1, CPU, row, steps=1, seconds=0.0)) == 1
    assert "step_ms" not in row and "first_step_s" in row


def test_steps_on_events(cuda: Any) -> None:
    row: harness.Row = {}
    steps.timed_steps(lambda: torch.tensor(1.0), 1, CUDA, row, steps=7, seconds=60.0)
    assert len(row["samples"]["step_ms"]) == 4
    assert row["peak_gib"] == 3.0 and row["reserved_gib"] == 4.0


def test_out_of_memory_is_a_result() -> None:
    row: harness.Row = {"fits": True}
    with steps.out_of_memory_is_a_result(row, CPU):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert row["fits"] is False and row["ended_in"] == "the first step or before it"
    with (
        pytest.raises(RuntimeError, match="shapes"),
        steps.out_of_memory_is_a_result({}, CPU),
    ):
        raise RuntimeError("shapes do not match")


def test_a_cap_leaves_out_the_context(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: None)
    cuda.free = 78.5 * 2**30
    assert steps._cap(24) == 0.5  # 80 - 78.5 - 1 reserved
    assert cuda.fractions.pop() == pytest.approx((24 - 0.5) / 80)
    cuda.free = 40 * 2**30  # another process has as much
    assert steps._cap(24) == 1.0
    assert cuda.fractions == [pytest.approx((24 - 1) / 80)]
    steps._cap(200)
    assert len(cuda.fractions) == 1  # more than there is: no cap


def test_mfu_and_prediction_stand_in_the_row(tmp_path: Path) -> None:
    case = StepCase()
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({case.name: {"tflop": 98.9, "predicted_peak_gib": 24.7}}))
    row: harness.Row = {"gpu": "NVIDIA H200", "step_ms": 500.0}
    steps.with_plan(row, case, plan, smoke=False)
    assert row["predicted_peak_gib"] == 24.7
    # 197.8 TFLOP/s of H200's 989 or so, whatever the table says to the last digit
    assert row["mfu"] == pytest.approx(0.2, abs=0.003)
    row = {"gpu": "No Such Card", "step_ms": 500.0}
    steps.with_plan(row, case, plan, smoke=False)
    assert row["mfu"] is None and row["tflop"] == 98.9
    row = {"gpu": "NVIDIA H200"}
    steps.with_plan(row, case, tmp_path / "none.json", smoke=False)
    assert row["mfu"] is None and row["tflop"] is None


def test_loss_curves(tmp_path: Path) -> None:
    here = loss_curves.place("G", "2.11.0+cu130")
    assert here == "G, torch 2.11"
    losses = [round(1.0 - i / 100, 2) for i in range(20)]
    new = loss_curves.compared("c", here, losses, {})
    assert new["loss_curve"] == "new" and new["loss_at_20"] == 0.81
    rows = [{"case": "c", "gpu": gpu, "torch": "2.11.1", **new} for gpu in ("G", None)]
    file = tmp_path / "curves.json"
    assert loss_curves.record(rows, file) == ["c"]
    assert loss_curves.record(rows, file) == []
    recorded = loss_curves.read(file)
    assert recorded == {here: {"c": losses}}
    assert loss_curves.compared("c", here, losses, recorded)["loss_curve"] == "as recorded"
    for bad in (0.79, float("nan")):
        bent = [*losses[:-1], bad]
        assert loss_curves.compared("c", here, bent, recorded)["loss_curve"] == "differs"
    assert loss_curves.compared("c", "other", losses, recorded)["loss_curve"] == "new"


def test_a_small_step_end_to_end() -> None:
    row, losses = steps.measure(StepCase(model="flux"), steps=5, seconds=60, smoke=True)
    assert row["fits"] and len(losses) == 5 and row["step_ms"] > 0
    assert all(0 < loss < 10 for loss in losses)
    again, same = steps.measure(StepCase(model="flux"), steps=2, seconds=60, smoke=True)
    assert same == losses[:2]  # a function of the seed


def test_plain_and_fused_steps_have_the_same_losses() -> None:
    case = StepCase(model="flux", activations="save")
    _, fused = steps.measure(case, steps=3, seconds=60, smoke=True)
    _, plain = steps.measure(replace(case, fused=False), steps=3, seconds=60, smoke=True)
    assert plain == pytest.approx(fused, rel=1e-3)


def test_plain_blocks_are_those_of_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttune.models.flux import SingleBlock
    from fasttune.models.layers import Block

    for fused, activations in product((True, False), step_cases.PLAIN_CHOICES):
        case = StepCase(model="flux", activations=activations, fused=fused)
        with step_cases.folder_of(case, True) as folder:
            denoiser = steps.rehearsed(case, folder, CPU, True).denoiser
        blocks = [m for m in denoiser.modules() if isinstance(m, Block)]
        assert any(isinstance(block, SingleBlock) for block in blocks)
        for block in blocks:
            assert ("forward" in vars(block)) == fused
            assert block.recompute == (not fused and activations == "recompute")


class _Rehearsal(SimpleNamespace):
    pass


def test_a_sweep_takes_each_bucket_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that compiles anew for one of the buckets, which shows."""
    taken: list[Any] = []
    graphs = [0]

    def random_batch(config: Any, spec: Any, folder: Any, placement: Any, size: Any) -> Any:
        return size

    monkeypatch.setattr("fasttune.rehearsal.random_batch", random_batch)
    monkeypatch.setattr(bucket_sweep, "compiled_graphs", lambda: graphs[0])
    run = _Rehearsal(
        config=StepCase().config("cpu"), placement=SimpleNamespace(device=CPU), batch=None
    )

    def take_step() -> None:
        graphs[0] += run.batch not in taken or run.batch == (96, 64)
        taken.append(run.batch)

    run.take_step = take_step
    row = bucket_sweep.swept(run, tmp_path, seconds=60, smoke=True)
    assert taken == [(64, 64), (64, 96), (96, 64)] * 2
    assert row["buckets"] == row["all_buckets"] == 3 and row["recompiles"] == 1
    assert set(row["step_ms_by_bucket"]) == {"64x64", "64x96", "96x64"}
    row = bucket_sweep.swept(run, tmp_path, seconds=0, smoke=True)
    assert row["buckets"] == 1  # what there was time for
    row = bucket_sweep.swept(run, StepCase().folder, seconds=60, smoke=False)
    assert row["buckets"] == bucket_sweep.MOST < row["all_buckets"]


def test_spread_buckets_have_both_ends() -> None:
    sizes = [(i, i) for i in range(17)]
    found = bucket_sweep.spread(sizes, 5)
    assert found == [(0, 0), (4, 4), (8, 8), (12, 12), (16, 16)]
    assert bucket_sweep.spread(sizes[:3], 5) == sizes[:3]


def test_the_state_is_read_before_the_device_is_waited_for(
    cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    between = steps._between

    def state() -> dict[str, int]:
        events.append("state")
        return {"clock_mhz": 1980}

    def wait(*given: Any) -> list[float]:
        events.append("wait")
        return between(*given)

    monkeypatch.setattr(steps, "state", state)
    monkeypatch.setattr(steps, "_between", wait)
    row: harness.Row = {}
    steps.timed_steps(lambda: torch.tensor(1.0), 1, CUDA, row, steps=7, seconds=60.0)
    assert events == ["state", "wait"] and row["clock_mhz"] == 1980
