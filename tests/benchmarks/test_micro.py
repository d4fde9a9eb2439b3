"""`pytest benchmarks`, and the timer that reads a device's clock, against a device that is made up."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.timers import compute_timer_precision

import fasttune_kernels
from benchmarks.harness import ROOT, environment
from benchmarks.micro.event_timer import HEAD_START_S, RESOLUTION_S, EventTimer, occupier

WRITE_S = 0.2e-3
EVENT_S = 1.5e-6


class Device:
    """A stream's clock. Work advances it when it is queued: what the host does takes no time."""

    def __init__(self, start: float = 0.0, event_s: float = EVENT_S) -> None:
        self.now = start
        self.event_s = event_s
        self.waits = 0

    def work(self, seconds: float) -> None:
        self.now += seconds

    def write(self) -> None:
        self.work(WRITE_S)

    def event(self) -> "Event":
        return Event(self)

    def timer(self) -> EventTimer:
        return EventTimer(self.event, occupier(self.event, self.write))


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.waited_for = False

    def record(self) -> None:
        self.device.work(self.device.event_s)
        self.at = self.device.now
        self.waited_for = False

    def synchronize(self) -> None:
        self.device.waits += 1
        self.waited_for = True

    def elapsed_time(self, end: "Event") -> float:
        assert end.waited_for, "CUDA refuses events that have not been reached"
        # float32 as torch returns it
        return float(np.float32(1000 * (end.at - self.at)))


def test_a_round_takes_the_devices_time_and_not_the_head_start() -> None:
    device = Device()
    timer = device.timer()
    for seconds in (3e-3, 20e-6, 1.0):
        start = timer()
        device.work(seconds)
        end = timer()
        assert end - start == pytest.approx(seconds + EVENT_S, rel=1e-6)


def test_the_device_is_kept_busy_before_each_round() -> None:
    device = Device()
    timer = device.timer()
    before = device.now
    timer()
    assert device.now - before >= HEAD_START_S
    assert device.now - before < HEAD_START_S + WRITE_S + 3 * EVENT_S
    waits = device.waits
    timer()
    assert device.waits == waits + 1  # the end of a round is waited for, the start of one is not


def test_hours_do_not_wear_the_clock_out() -> None:
    """Milliseconds in float32 since a first event would tick in steps of 8 ms after a day."""
    device = Device()
    timer = device.timer()
    timer()
    device.work(86400.0)
    start = timer()
    device.work(20e-6)
    assert timer() - start == pytest.approx(20e-6 + EVENT_S, rel=1e-3)


def test_precision_is_what_two_events_take() -> None:
    assert compute_timer_precision(Device().timer()) == pytest.approx(EVENT_S, rel=1e-3)
    # events too close to be told apart: neither no time at all nor an endless calibration
    assert compute_timer_precision(Device(event_s=0.0).timer()) == pytest.approx(RESOLUTION_S)


FAKE_CONFTEST = """
import importlib.util

import pytest

from benchmarks import conftest as real
from benchmarks.conftest import (
    pytest_addoption, pytest_benchmark_update_machine_info, pytest_collection_modifyitems,
    pytest_generate_tests,
)

spec = importlib.util.spec_from_file_location("fakes", {fakes!r})
fakes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fakes)
stream = fakes.Device()
real.cuda_timer = stream.timer


@pytest.fixture
def device(request):
    assert request.param == "cuda"
    return stream
"""

FAKE_BENCHMARKS = """
import time

import pytest


def test_kernel(benchmark, device):
    benchmark(device.work, 3e-3)


@pytest.mark.benchmark(min_rounds=50)
def test_own_settings(benchmark, device):
    benchmark(device.work, 3e-3)


def test_host(benchmark):
    benchmark(time.sleep, 0.01)
"""


def run_pytest(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False
    )


def test_pytest_benchmark_on_a_device(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(FAKE_CONFTEST.format(fakes=__file__))
    (tmp_path / "test_fake.py").write_text(FAKE_BENCHMARKS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    done = run_pytest("--device=cuda", "--benchmark-json=out.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {b["name"]: b for b in json.loads((tmp_path / "out.json").read_text())["benchmarks"]}
    kernel, own, host = (
        found[n] for n in ("test_kernel[cuda]", "test_own_settings[cuda]", "test_host")
    )
    assert kernel["options"]["timer"] == "cuda_events"
    # by the host's clock it takes microseconds
    assert kernel["stats"]["median"] == pytest.approx(3e-3 + EVENT_S, rel=1e-4)
    assert (kernel["stats"]["iterations"], kernel["stats"]["rounds"]) == (1, 34)  # 0.1 s / 3 ms
    assert own["options"]["timer"] == "cuda_events" and own["stats"]["rounds"] == 50
    assert host["options"]["timer"] == "perf_counter"
    assert 0.01 < host["stats"]["median"]


def test_micro_benchmarks_run_and_compare(tmp_path: Path) -> None:
    """Those of the host and the device, twice, with results saved and compared."""
    select = ("benchmarks", "--device=cpu", "-k", "clip or rope or cache_read or loss or block")
    few = ("--benchmark-max-time=0.001", f"--benchmark-storage={tmp_path}")
    out = tmp_path / "out.json"
    first = run_pytest(*select, *few, "--benchmark-autosave", f"--benchmark-json={out}")
    assert first.returncode == 0, first.stdout + first.stderr
    saved = json.loads(out.read_text())
    names = {b["name"].split("[")[0] for b in saved["benchmarks"]}
    assert names == {
        "test_clip",
        "test_rope",
        "test_cache_read",
        "test_loss",
        "test_operation",
        "test_flux_single_block",
    }
    assert all(b["stats"]["median"] > 0 for b in saved["benchmarks"])
    assert saved["machine_info"]["torch"] and "gpu" in saved["machine_info"]
    # the saved run gets impossibly fast
    (path,) = tmp_path.glob("*/0001_*.json")
    data = json.loads(path.read_text())
    for b in data["benchmarks"]:
        b["stats"]["median"] = 1e-9
    path.write_text(json.dumps(data))
    again = ("benchmarks", "--device=cpu", "-k", "clip")
    slower = run_pytest(*again, *few, "--benchmark-compare", "--benchmark-compare-fail=median:5%")
    assert slower.returncode != 0
    assert "(NOW)" in slower.stdout
    assert "Performance has regressed" in slower.stdout + slower.stderr


def test_every_public_operation_has_one() -> None:
    """Those of an optimizer's step are in test_steps.py, attention in test_layers.py."""
    elsewhere = {"Arena", "attention", "ema_step_", "gradient_norm", "optimizer_step_"}
    done = run_pytest("--collect-only", "benchmarks/micro/test_operations.py", "--device=cpu")
    names = {
        "norm_modulate": "norm modulate",
        "gated_residual": "gated residual",
        "gated_residual_norm_modulate": "gated residual norm",
        "diffusion_loss": "flow loss",
        "group_norm_silu": "group norm silu channels last",
    }
    for operation in set(fasttune_kernels.__all__) - elsewhere:
        name = names.get(operation, operation.replace("_", " "))
        assert f"test_operation[cpu-{name}-forward]" in done.stdout
        assert f"test_operation[cpu-{name}-both]" in done.stdout
    assert "test_operation[cpu-quantize rows-forward]" in done.stdout


def test_pytest_alone_leaves_them_out() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests"]
    done = run_pytest("--collect-only", "benchmarks", "--device=cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(collected) > 20
    assert all(line.startswith("benchmarks/micro/test_") for line in collected)
