"""`fasttune doctor`: what this machine has, what each feature would use, and why something is off.

Runs with any library missing or broken: what has to be imported to be judged is imported in a
process of its own (probes.py).
"""

import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from fasttune import __version__, environment
from fasttune.libraries import LIBRARIES, Library
from fasttune.probes import probe

log = logging.getLogger(__name__)

Status = Literal["ok", "missing", "off"]


STEPS = {
    "FusedAdamW": "one operation for clipping, update, rounding and average",
    "AdamW": "torch's fused kernel, 16-bit weights by its operations on many tensors at once",
    "Adafactor": "PyTorch's operations on many tensors at once",
    "Lion": "PyTorch's operations on many tensors at once",
}
"""What an optimizer's class takes its step by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One finding: a library, a device or a feature."""

    name: str
    status: Status
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """All of them."""

    system: tuple[Line, ...]
    devices: tuple[Line, ...]
    libraries: tuple[Line, ...]
    features: tuple[Line, ...]

    @property
    def can_train(self) -> bool:
        required = {library.name for library in LIBRARIES if library.extra is None}
        return all(line.status == "ok" for line in self.libraries if line.name in required)


def examine() -> Findings:
    """Looks at the machine. Takes as long as importing torch and trying the optional libraries."""
    log.info("Trying each library in a process of its own ...")
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        pending = {
            library.name: pool.submit(probe, *library.probe)
            for library in LIBRARIES
            if library.probe and installed_version(library.name) is not None
        }
        build = pool.submit(probe, "torch_build")
        operations = pool.submit(probe, "device_operations", "auto")
        steps = pool.submit(probe, "optimizers", "auto")
        errors = {name: future.result().get("error") for name, future in pending.items()}
        torch, device, optimizers = build.result(), operations.result(), steps.result()
    errors["torch"] = torch.get("error")
    unused = optimizers.get("own", "") is None or errors.get("bitsandbytes", "missing") is None
    if not unused and errors.get("torchao", "") is None:
        # Its first step compiles, which takes long: tried only where it would be used.
        errors["torchao"] = probe("adamw8bit", "torchao", "auto").get("error")
    libraries = tuple(_library(library, errors.get(library.name)) for library in LIBRARIES)
    return Findings(
        system=tuple(_system()),
        devices=tuple(_devices(torch)),
        libraries=libraries,
        features=tuple(
            _features(torch, device, optimizers, {line.name: line for line in libraries})
        ),
    )


def to_json(findings: Findings) -> str:
    return json.dumps(asdict(findings) | {"can_train": findings.can_train}, indent=2)


def to_text(findings: Findings) -> str:
    """A table; what is off has its reason."""
    sections = []
    for title, lines in (
        ("System", findings.system),
        ("Devices", findings.devices),
        ("Libraries", findings.libraries),
        ("Features", findings.features),
    ):
        width = max(len(line.name) for line in lines)
        rows = [
            f"  {line.name:<{width}}  {'' if title == 'System' else f'{line.status:<7}  '}{line.text}"
            for line in lines
        ]
        sections.append("\n".join([title, *rows]))
    verdict = "This machine can train."
    if not findings.can_train:
        verdict = "This machine cannot train yet: a required library is missing or off."
    return "\n\n".join([*sections, verdict])


def installed_version(name: str) -> str | None:
    """Version of an installed distribution; None if it is absent."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0)"""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _library(library: Library, error: str | None) -> Line:
    needed = f">={library.minimum}" + (f",<{library.below}" if library.below else "")
    found = installed_version(library.name)
    install = (
        f"pip install 'fasttune[{library.extra}]'" if library.extra else "pip install fasttune"
    )
    if found is None:
        without = f"; {library.without}" if library.without else f"; {install}"
        return Line(name=library.name, status="missing", text=f"for {library.used_for}{without}")
    too_old = _numbers(found) < _numbers(library.minimum)
    if too_old or (library.below and _numbers(found) >= _numbers(library.below)):
        return Line(name=library.name, status="off", text=f"{found}, needed is {needed}: {install}")
    if error is not None:
        return Line(
            name=library.name,
            status="off",
            text=f"{found} is installed and does not work: {error}",
        )
    return Line(name=library.name, status="ok", text=f"{found} ({needed}), for {library.used_for}")


def _system() -> Iterator[Line]:
    def line(name: str, text: str) -> Line:
        return Line(name=name, status="ok", text=text)

    yield line("fasttune", f"{__version__} in {Path(__file__).parent}")
    yield line("python", f"{platform.python_version()} at {sys.executable}")
    yield line("system", f"{platform.system()} {platform.release()} ({platform.machine()})")
    yield line("processor", f"{os.cpu_count()} cores")
    yield line("memory", _memory())
    yield line("disk", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free in {Path.cwd()}")
    yield line("compile cache", ", ".join(_compile_caches()))


def _compile_caches() -> Iterator[str]:
    """What the folders of compiled graphs and kernels take; they may be deleted between runs."""
    for variable, name in environment.CACHES.items():
        folder = environment.value_of(variable)
        if folder is None:
            yield f"{name}: where its library keeps it ({environment.cache_folder()} is read-only)"
        else:
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            mib = sum(path.stat().st_size for path in files) / 2**20
            yield f"{name}: {mib:.1f} MiB in {folder}"


def _memory() -> str:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * page / 2**30
    except (AttributeError, ValueError, OSError):
        return "unknown on this system"
    try:
        return f"{total:.1f} GiB, {os.sysconf('SC_AVPHYS_PAGES') * page / 2**30:.1f} GiB free"
    except (ValueError, OSError):  # macOS
        return f"{total:.1f} GiB"


def nvidia_driver() -> tuple[str, str] | None:
    """(driver version, names of the cards) as the NVIDIA driver says, without torch."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        rows = [line.split(", ", 1) for line in result.stdout.strip().splitlines()]
        return rows[0][0], ", ".join(row[1] for row in rows)
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _devices(torch: dict[str, Any]) -> Iterator[Line]:
    driver = nvidia_driver()
    if torch.get("error"):
        yield Line(name="torch", status="off", text=f"cannot be imported: {torch['error']}")
        return
    yield Line(
        name="cpu",
        status="ok",
        text=f"{torch['cpu_capability']} kernels, {torch['num_threads']} threads",
    )
    for gpu in torch["gpus"]:
        has = [name for name in ("bf16", "int8", "fp8") if gpu[name]]
        text = (
            f"{gpu['name']}, {gpu['arch']}, {gpu['total_gib']} GiB ({gpu['free_gib']} free), "
            f"{', '.join(has) or 'no bf16, int8 or fp8'}"
        )
        text += f", driver {driver[0]}" if driver else ""
        if not gpu["in_build"]:
            text += f"; this torch ({torch['build']}) has no kernels for {gpu['arch']}"
        yield Line(
            name=f"cuda:{gpu['index']}", status="ok" if gpu["in_build"] else "off", text=text
        )
    if torch["mps"]:
        yield Line(name="mps", status="ok", text="Apple GPU, shares the memory of the CPU")
    if not torch["gpus"]:
        yield _why_no_gpu(torch, driver)


def _why_no_gpu(torch: dict[str, Any], driver: tuple[str, str] | None) -> Line:
    if torch["build"] == "CPU" and driver is not None:
        return Line(
            name="cuda",
            status="off",
            text=f"the driver ({driver[0]}) sees {driver[1]}, but torch {torch['version']} is a CPU "
            "build; install a CUDA build, see https://pytorch.org/get-started",
        )
    if torch["build"] == "CPU":
        return Line(name="cuda", status="missing", text=f"torch {torch['version']} is a CPU build")
    seen = f"the driver ({driver[0]}) sees {driver[1]}" if driver else "no driver answers"
    why = f": {torch['why_no_gpu']}" if torch["why_no_gpu"] else ""
    return Line(name="cuda", status="off", text=f"torch is built for {torch['build']}; {seen}{why}")


def _features(
    torch: dict[str, Any],
    device: dict[str, Any],
    optimizers: dict[str, Any],
    libraries: dict[str, Line],
) -> Iterator[Line]:
    if device.get("error"):
        yield Line(name="training", status="off", text=device["error"])
        return
    yield Line(name="run.device = auto", status="ok", text=device["placement"])
    works = [name for name, error in device["dtypes"].items() if error is None]
    failing = [f"{name}: {error}" for name, error in device["dtypes"].items() if error is not None]
    yield Line(
        name="precision",
        status="ok" if "fp32" in works else "off",
        text="; ".join([f"matmuls in {', '.join(works) or 'nothing'}", *failing]),
    )
    backends = [name for name, error in device["attention"].items() if error is None]
    yield Line(
        name="attention",
        status="ok" if backends else "off",
        text=f"scaled_dot_product_attention by {', '.join(backends)}"
        if backends
        else "; ".join(f"{name}: {error}" for name, error in device["attention"].items()),
    )
    if torch["build"].startswith("ROCm"):
        yield _aotriton()
    yield from _optimizers(optimizers, libraries)
    yield _compiler(torch, libraries)


def _aotriton() -> Line:
    """Whether attention on RDNA is more than plain math."""
    name, value = environment.AOTRITON, environment.value_of(environment.AOTRITON)
    if value == "1":
        return Line(name="attention on RDNA", status="ok", text=f"by AOTriton ({name}=1)")
    text = (
        f"plain math in PyTorch, as {name} is {value or 'not set'}; 1 gives it AOTriton's kernels"
    )
    return Line(name="attention on RDNA", status="off", text=text)


def _optimizers(probed: dict[str, Any], libraries: dict[str, Line]) -> Iterator[Line]:
    """What each of optimizer.name is here, and why it is not more."""
    if probed.get("error"):
        yield Line(name="optimizers", status="off", text=probed["error"])
        return
    own = probed["own"]
    for name, found in probed["found"].items():
        if found["error"] is not None:
            yield Line(name=name, status="off", text=found["error"])
            continue
        text = f"by {STEPS[found['kind']]}"
        if found["by"] is not None:
            text += f", in {found['by']}"
        elif name == "adamw":
            text += f"; not by fasttune's own operation, which bf16 and 8-bit state need: {own}"
        yield Line(name=name, status="ok", text=text)
    if own is not None:
        yield _adamw8bit(own, libraries)


def _adamw8bit(own: str, libraries: dict[str, Line]) -> Line:
    """As optim/adamw8bit.py chooses where our own operation does not run: bitsandbytes, then torchao."""
    reasons = [f"fasttune: {own}"]
    for name in ("bitsandbytes", "torchao"):
        line = libraries[name]
        if line.status == "ok":
            return Line(name="adamw8bit", status="ok", text="; ".join([*reasons, f"by {name}"]))
        reasons.append(f"{name}: {'not installed' if line.status == 'missing' else line.text}")
    return Line(name="adamw8bit", status="off", text="; ".join(reasons))


def _compiler(torch: dict[str, Any], libraries: dict[str, Line]) -> Line:
    """What torch.compile needs: Triton on a GPU, a C++ compiler on a CPU."""
    if torch.get("gpus"):
        triton = libraries["triton"]
        if triton.status == "ok":
            return Line(name="torch.compile", status="ok", text=f"by Triton {triton.text}")
        return Line(name="torch.compile", status="off", text=f"Triton: {triton.text}")
    compiler = next((name for name in ("g++", "clang++", "cl") if shutil.which(name)), None)
    if compiler is None:
        return Line(name="torch.compile", status="off", text="no C++ compiler (g++) was found")
    return Line(name="torch.compile", status="ok", text=f"on the CPU, by {compiler}")
