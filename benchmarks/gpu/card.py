"""The device that is measured: which one, what it is, and the state it is in.

`python -m benchmarks.gpu.card` prints one row of facts. It is asked in a process of its own, because
asking makes a CUDA context, which would lie on the card beside everything measured after it.
"""

import argparse
import subprocess
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from fasttune.errors import HardwareError

if TYPE_CHECKING:
    import torch

_SMI = {
    "driver": "driver_version",
    "clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
}
"""Our names -> the fields of `nvidia-smi --query-gpu`."""
_SMI_TIMEOUT_S = 20


def device_for(*, smoke: bool) -> "torch.device":
    """What is measured: CUDA or ROCm, then MPS; the CPU under `smoke` alone. HardwareError without."""
    import torch

    if smoke:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    raise HardwareError(
        f"torch {torch.__version__} finds no GPU here; run `fasttune doctor` to see why, or give "
        "--smoke to try the benchmarks out on the CPU at tiny sizes"
    )


def synchronize(device: "torch.device") -> None:
    """Waits for everything queued on the device."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's allocator raised it, or the compiler or MPS in its own words."""
    return "out of memory" in str(error).lower()


def missing(device: "torch.device") -> list[str]:
    """What this kind of device does not let us measure, in words."""
    import torch

    found = []
    if device.type == "mps":
        found += [
            "MPS has no events between kernels, graphs or allocator peaks here: times are the host's"
            " around a synchronisation, with warm caches, and peaks and memory caps are left out"
        ]
    if device.type == "cuda" and torch.version.hip is not None:
        found += ["ROCm: no clocks, temperature and power (they are read through NVML)"]
    elif device.type == "cuda" and not state():
        found += ["neither pynvml nor nvidia-smi works: no clocks, temperature and power"]
    return found


def state() -> dict[str, Any]:
    """Clocks, temperature and power at this moment; empty where nothing can tell."""
    import torch

    if not torch.cuda.is_available() or torch.version.hip is not None:
        return {}
    found = _nvml() or _smi()
    return {key: found[key] for key in found if key != "driver"}


def facts() -> harness.Row:
    """`harness.machine()`, and what there is to know of the card. None where nothing can tell."""
    import torch

    row = harness.machine()
    row |= {"triton": _triton(), "driver": None, "cuda": torch.version.cuda or torch.version.hip}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        row |= {
            "driver": None if torch.version.hip else (_nvml() or _smi()).get("driver"),
            "memory_gib": round(p.total_memory / 2**30, 2),
            "processors": p.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
        }
    return row


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _uuid() -> str | None:
    """Of the card that torch calls 0, as NVML names it, whatever CUDA_VISIBLE_DEVICES hides."""
    import torch

    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    if uuid is None:
        return None
    return text if (text := str(uuid)).startswith("GPU-") else f"GPU-{text}"


def _nvml() -> dict[str, Any]:
    try:
        import pynvml as nvml
    except ImportError:
        return {}
    try:
        nvml.nvmlInit()
        uuid = _uuid()
        # bytes: older versions take nothing else, newer ones take both
        card = (
            nvml.nvmlDeviceGetHandleByIndex(0)
            if uuid is None
            else nvml.nvmlDeviceGetHandleByUUID(uuid.encode())
        )
        driver = nvml.nvmlSystemGetDriverVersion()
        return {
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "clock_mhz": nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_MEM),
            "temperature_c": nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU),
            "power_w": round(nvml.nvmlDeviceGetPowerUsage(card) / 1000, 1),
        }
    except nvml.NVMLError:  # a driver may refuse single fields: nvidia-smi gives the others
        return {}


def _smi() -> dict[str, Any]:
    which = [] if (uuid := _uuid()) is None else [f"--id={uuid}"]
    fields = f"--query-gpu={','.join(_SMI.values())}"
    command = ["nvidia-smi", *which, fields, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = (
        [value.strip() for value in done.stdout.splitlines()[0].split(",")] if done.stdout else []
    )
    if done.returncode != 0 or len(values) != len(_SMI):
        return {}
    found = dict(zip(_SMI, values, strict=True))
    # "550.120" is the name of a driver, not a number
    return {name: v if name == "driver" else _number(v) for name, v in found.items()}


def _number(text: str) -> Any:
    """A number where it is one; None for "[N/A]"."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return None if text.startswith("[") else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="the CPU stands in for the GPU")
    args = parser.parse_args()
    for text in missing(device_for(smoke=args.smoke)):
        print(f"note: {text}", flush=True)
    harness.emit("card", **facts())


if __name__ == "__main__":
    main()
