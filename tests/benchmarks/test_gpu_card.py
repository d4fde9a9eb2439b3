"""The card: its driver and state, by whatever can tell."""

import sys
from types import SimpleNamespace

import pytest

from benchmarks.gpu import card
from fasttune.errors import HardwareError


def test_no_gpu_is_said() -> None:
    with pytest.raises(HardwareError, match="--smoke"):
        card.device_for(smoke=False)


def test_the_driver_is_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "_uuid", lambda: None)
    done = SimpleNamespace(stdout="550.120, 1980, 2619, 41, [N/A]\n", returncode=0)
    monkeypatch.setattr(card.subprocess, "run", lambda *a, **k: done)
    found = card._smi()
    assert found["driver"] == "550.120" and found["clock_mhz"] == 1980
    assert found["power_w"] is None


def test_old_pynvml_wants_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_uuid(uuid: bytes) -> str:
        if not isinstance(uuid, bytes):
            raise TypeError("bytes or integer address expected instead of str instance")
        return uuid.decode()

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlSystemGetDriverVersion=lambda: b"550.120",
        nvmlDeviceGetClockInfo=lambda card, which: 1980,
        nvmlDeviceGetTemperature=lambda card, which: 41,
        nvmlDeviceGetPowerUsage=lambda card: 300_000,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        NVMLError=RuntimeError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(card, "_uuid", lambda: "GPU-1")
    assert card._nvml()["driver"] == "550.120"
