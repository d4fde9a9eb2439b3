"""`pytest benchmarks`: the micro-benchmarks in micro/, under pytest-benchmark.

    pytest benchmarks --benchmark-autosave
    pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:5%

Operations of the device run on the GPU if there is one, at the sizes of real networks and with the
time of the device (micro/event_timer.py); on the CPU they are small and on the host's clock.
"""

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.micro.event_timer import OPTIONS, EventTimer, cuda_timer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cpu", "cuda"), help="of the operations; default: cuda if it is there"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The device is a part of the name, so that --benchmark-compare compares like with like."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [_device_name(metafunc.config)], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Events time what runs on a GPU; settings of a test's own mark are kept."""
    for item in items:
        params = getattr(item, "callspec", None)
        if params is not None and params.params.get("device") == "cuda":
            own = item.get_closest_marker("benchmark")
            settings = {**OPTIONS, "timer": _event_timer(), **(own.kwargs if own else {})}
            item.add_marker(pytest.mark.benchmark(**settings), append=False)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Adds what decides a time, takes out what differs from minute to minute: a comparison warns
    of another machine, and warnings are errors."""
    cpu = machine_info["cpu"]
    for key in [key for key in cpu if key.startswith("hz_actual")]:
        del cpu[key]
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


@cache
def _event_timer() -> EventTimer:
    return cuda_timer()


def _device_name(config: pytest.Config) -> str:
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Of what is measured."""
    return torch.device(request.param)
