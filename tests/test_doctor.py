"""`fasttune doctor`: says what is there and why something is off, whatever is broken."""

import json
import logging
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttune import doctor, environment, optim, probes
from fasttune.doctor import Findings, Line, examine, to_json, to_text
from fasttune.libraries import LIBRARIES
from fasttune.optim.fused_adamw import FusedAdamW
from fasttune_kernels import (
    cpu_library,
    dispatch,
    optimizer_step,
    optimizer_step_cuda,
    optimizer_step_kernels,
)

GPU = {
    "index": 0,
    "name": "NVIDIA GeForce RTX 4090",
    "arch": "sm_89",
    "in_build": True,
    "total_gib": 23.6,
    "free_gib": 23.1,
    "bf16": True,
    "int8": True,
    "fp8": True,
}
TORCH = {
    "version": "2.13.0+cpu",
    "build": "CPU",
    "why_no_gpu": None,
    "cpu_capability": "AVX2",
    "num_threads": 2,
    "mps": False,
    "gpus": [],
}
OPERATIONS = {
    "device": "cpu",
    "placement": "device cpu, compute fp32",
    "dtypes": {"fp32": None, "bf16": None, "fp16": "RuntimeError: no half"},
    "attention": {"cudnn": "RuntimeError: none", "flash": None, "math": None},
}
PLAIN = {"by": None, "error": None}
OTHERS = {"adafactor": {"kind": "Adafactor", **PLAIN}, "lion": {"kind": "Lion", **PLAIN}}
OWN = {"kind": "FusedAdamW", "by": "C++", "error": None}
OPTIMIZERS = {"own": None, "found": {"adamw": OWN, "adamw8bit": OWN, **OTHERS}}
NOT_BUILT = {
    "own": "_cpu.so is not built: install fasttune where there is a C++ compiler",
    "found": {"adamw": {"kind": "AdamW", **PLAIN}, **OTHERS},
}
"""Of a CPU without the library of csrc/cpu."""
VERSIONS = {library.name: library.minimum for library in LIBRARIES}


def found(
    monkeypatch: pytest.MonkeyPatch,
    *,
    torch: dict[str, Any] | None = None,
    operations: dict[str, Any] | None = None,
    optimizers: dict[str, Any] | None = None,
    broken: dict[str, str] | None = None,
    versions: dict[str, str | None] | None = None,
    driver: tuple[str, str] | None = None,
) -> tuple[Findings, dict[str, Line]]:
    """Findings on a machine that answers so, and its lines by name."""

    def answer(name: str, *args: str) -> dict[str, Any]:
        if name == "torch_build":
            return TORCH | (torch or {})
        if name == "device_operations":
            return OPERATIONS | (operations or {})
        if name == "optimizers":
            return optimizers or OPTIMIZERS
        return {"error": (broken or {}).get(args[0].split(".")[0])}

    monkeypatch.setattr(doctor, "probe", answer)
    monkeypatch.setattr(doctor, "installed_version", (VERSIONS | (versions or {})).get)
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: driver)
    findings = examine()
    sections = (findings.system, findings.devices, findings.libraries, findings.features)
    return findings, {line.name: line for section in sections for line in section}


def test_all_well(monkeypatch: pytest.MonkeyPatch) -> None:
    findings, lines = found(monkeypatch)
    assert findings.can_train
    assert {line.status for line in findings.libraries} == {"ok"}
    assert lines["attention"].text.endswith("by flash, math")
    assert lines["precision"].text == "matmuls in fp32, bf16; fp16: RuntimeError: no half"
    for name in ("adamw", "adamw8bit"):
        assert lines[name].status == "ok"
        assert lines[name].text == f"by {doctor.STEPS['FusedAdamW']}, in C++"
    assert lines["lion"].text == "by PyTorch's operations on many tensors at once"
    assert lines["cuda"] == Line(
        name="cuda", status="missing", text="torch 2.13.0+cpu is a CPU build"
    )


def test_cpu_build_beside_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    _, lines = found(monkeypatch, driver=("570.1", "NVIDIA L4"))
    assert lines["cuda"].status == "off"
    assert "sees NVIDIA L4, but torch 2.13.0+cpu is a CPU build" in lines["cuda"].text


def test_driver_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = {"build": "CUDA 13.0", "why_no_gpu": "RuntimeError: driver too old"}
    _, lines = found(monkeypatch, torch=torch, driver=("470.1", "NVIDIA L4"))
    assert lines["cuda"].status == "off"
    assert lines["cuda"].text.endswith("(470.1) sees NVIDIA L4: RuntimeError: driver too old")
    _, lines = found(monkeypatch, torch=torch)
    assert "no driver answers: RuntimeError" in lines["cuda"].text


def test_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    old = GPU | {"index": 1, "name": "P100", "arch": "sm_60", "in_build": False}
    old |= {"bf16": False, "int8": False, "fp8": False}
    torch = {"build": "CUDA 13.0", "gpus": [GPU, old]}
    _, lines = found(monkeypatch, torch=torch, driver=("570.1", "both"))
    assert lines["cuda:0"] == Line(
        name="cuda:0",
        status="ok",
        text="NVIDIA GeForce RTX 4090, sm_89, 23.6 GiB (23.1 free), bf16, int8, fp8, driver 570.1",
    )
    assert lines["cuda:1"].status == "off"
    assert lines["cuda:1"].text.endswith("this torch (CUDA 13.0) has no kernels for sm_60")
    assert lines["torch.compile"].text.startswith("by Triton")


def test_attention_on_rdna(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = GPU | {"name": "AMD Radeon RX 7900 XTX", "arch": "gfx1100"}
    torch = {"build": "ROCm 7.1", "gpus": [gpu]}
    monkeypatch.setenv(environment.AOTRITON, "1")
    _, lines = found(monkeypatch, torch=torch)
    assert lines["attention on RDNA"].status == "ok"
    monkeypatch.setenv(environment.AOTRITON, "0")
    _, lines = found(monkeypatch, torch=torch)
    assert lines["attention on RDNA"].status == "off"
    assert f"{environment.AOTRITON} is 0" in lines["attention on RDNA"].text
    assert "attention on RDNA" not in found(monkeypatch)[1]  # a CPU build does not read it


def test_compile_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fx").mkdir()
    (tmp_path / "fx" / "graph").write_bytes(bytes(3 * 2**19))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "missing"))
    text = found(monkeypatch)[1]["compile cache"].text
    assert text == f"inductor: 1.5 MiB in {tmp_path}, triton: 0.0 MiB in {tmp_path / 'missing'}"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    assert "triton: where its library keeps it" in found(monkeypatch)[1]["compile cache"].text


def test_missing_and_broken_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    findings, lines = found(
        monkeypatch,
        broken={"bitsandbytes": "OSError: libcudart.so: no such file"},
        optimizers=NOT_BUILT,
        versions={"torchao": None, "wandb": None, "tensorboard": "2.1"},
    )
    assert findings.can_train
    assert lines["bitsandbytes"].status == "off"
    assert lines["bitsandbytes"].text.endswith("does not work: OSError: libcudart.so: no such file")
    assert lines["torchao"].status == "missing"
    assert lines["adamw8bit"].status == "off"
    assert lines["adamw8bit"].text.startswith(f"fasttune: {NOT_BUILT['own']}; bitsandbytes: ")
    assert "libcudart" in lines["adamw8bit"].text
    assert "torchao: not installed" in lines["adamw8bit"].text
    assert lines["wandb"].text == "for logging.wandb; pip install 'fasttune[wandb]'"
    assert lines["tensorboard"].text.startswith("2.1, needed is >=2.16")


def test_libraries_step_in_where_our_own_step_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"fasttune: {NOT_BUILT['own']}; "
    _, lines = found(monkeypatch, optimizers=NOT_BUILT)
    assert lines["adamw8bit"].text == f"{own}by bitsandbytes"
    _, lines = found(monkeypatch, optimizers=NOT_BUILT, versions={"bitsandbytes": None})
    assert lines["adamw8bit"].text == f"{own}bitsandbytes: not installed; by torchao"
    assert lines["adamw"].status == "ok"
    assert lines["adamw"].text.startswith("by torch's fused kernel")
    assert lines["adamw"].text.endswith(f"which bf16 and 8-bit state need: {NOT_BUILT['own']}")


@pytest.mark.parametrize(
    ("optimizers", "missing", "tried"),
    [
        (OPTIMIZERS, {}, False),
        (OPTIMIZERS, {"bitsandbytes": None}, False),
        (NOT_BUILT, {}, False),
        (NOT_BUILT, {"bitsandbytes": None}, True),
    ],
)
def test_torchao_compiles_only_where_it_would_be_used(
    monkeypatch: pytest.MonkeyPatch,
    optimizers: dict[str, Any],
    missing: dict[str, str | None],
    tried: bool,
) -> None:
    found(monkeypatch, optimizers=optimizers, versions=missing)
    asked: list[tuple[str, ...]] = []
    answer = doctor.probe
    monkeypatch.setattr(doctor, "probe", lambda *a: asked.append(a) or answer(*a))
    examine()
    assert (("adamw8bit", "torchao", "auto") in asked) is tried


def test_needs_no_library_for_8_bits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {**OWN, "by": "Triton"}
    optimizers = {"own": None, "found": {"adamw": step, "adamw8bit": step, **OTHERS}}
    missing: dict[str, str | None] = {"bitsandbytes": None, "torchao": None}
    _, lines = found(monkeypatch, optimizers=optimizers, versions=missing)
    assert lines["adamw8bit"].status == "ok"
    assert lines["adamw8bit"].text.endswith(", in Triton")
    assert "where fasttune's own operation does not run" in lines["torchao"].text


def test_optimizers_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"kind": None, "by": None, "error": "CompilationError: no ptxas"}
    optimizers = {"own": None, "found": {"adamw": broken, "adamw8bit": broken, **OTHERS}}
    _, lines = found(monkeypatch, optimizers=optimizers)
    for name in ("adamw", "adamw8bit"):
        assert lines[name] == Line(name=name, status="off", text="CompilationError: no ptxas")
    assert lines["lion"].status == "ok"
    _, lines = found(monkeypatch, optimizers={"error": "crashes the process (SIGSEGV)"})
    assert lines["optimizers"].status == "off"
    assert "SIGSEGV" in lines["optimizers"].text
    assert "adamw" not in lines


def test_required_libraries_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    error = {"error": "ImportError: libtorch.so"}
    findings, lines = found(monkeypatch, torch=error, operations=error)
    assert not findings.can_train
    assert lines["training"].status == "off"
    assert "cannot train" in to_text(findings)
    findings, lines = found(monkeypatch, versions={"torch": "2.14.0"})
    assert not findings.can_train
    assert lines["torch"].text.startswith("2.14.0, needed is >=2.11,<2.14")
    findings, lines = found(monkeypatch, broken={"transformers": "ImportError: x"})
    assert not findings.can_train
    assert not found(monkeypatch, versions={"diffusers": None})[0].can_train


def test_text_and_json_hold_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    findings, lines = found(monkeypatch)
    text, tree = to_text(findings), json.loads(to_json(findings))
    for name, line in lines.items():
        assert name in text
        assert line.text in text
    assert tree["can_train"] is True
    assert {row["name"] for part in tree.values() if part is not True for row in part} == set(lines)


def test_versions_are_those_of_the_package() -> None:
    path = Path(__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for library in LIBRARIES:
        wanted = f"{library.name}>={library.minimum}"
        wanted += f",<{library.below}" if library.below else ""
        listed = project["dependencies"] if library.extra is None else extras[library.extra]
        assert any(line.split(";")[0] == wanted for line in listed), wanted
    required = {library.name for library in LIBRARIES if library.extra is None}
    assert required == {re.split("[<>=;]", line)[0] for line in project["dependencies"]}
    assert extras.keys() == {"dev"} | {
        library.extra for library in LIBRARIES if library.extra is not None
    }


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("x = 1", None),
        ("raise ImportError('libfoo.so: not found\\nmore')", "ImportError: libfoo.so: not found"),
        ("import os; os.abort()", "crashes the process (SIGABRT)"),
        ("import sys; sys.exit('gone')", "gone"),
        ("import os; os._exit(3)", "it said nothing"),
        ("print('noise')", None),
        ("import time; time.sleep(60)", "no answer within 2 s"),
    ],
)
def test_probe_survives_what_it_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, error: str | None
) -> None:
    (tmp_path / "suspect.py").write_text(source + "\nx = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(probes, "TIMEOUT_S", 2 if "sleep" in source else 60)
    answer = probes.probe("imports", "suspect", "x")["error"]
    assert answer == error or (error is not None and answer.startswith(error))


def test_probe_of_a_missing_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "suspect.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert "AttributeError" in probes.probe("imports", "suspect", "x")["error"]


def test_what_torch_says_here() -> None:
    build = probes.torch_build()
    assert build["version"] == torch.__version__
    assert len(build["gpus"]) == torch.cuda.device_count()
    operations = probes.device_operations("cpu")
    assert operations["dtypes"]["fp32"] is None
    assert operations["attention"]["math"] is None
    json.dumps([build, operations])


def test_optimizers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "_open", lambda: "planted")
    without = probes.optimizers("cpu")
    assert without["own"] == "planted"
    kinds = {"adamw": "AdamW", "adafactor": "Adafactor", "lion": "Lion"}
    plain = {name: {"kind": kind, **PLAIN} for name, kind in kinds.items()}
    assert without["found"] == plain
    assert set(kinds.values()) | {"FusedAdamW"} == doctor.STEPS.keys()
    monkeypatch.undo()
    if not cpu_library.available():
        pytest.skip(cpu_library.reason())
    with_library = probes.optimizers("cpu")
    assert with_library == {"own": None, "found": {**plain, "adamw": OWN, "adamw8bit": OWN}}
    assert list(with_library["found"]) == list(optim.OPTIMIZERS)
    json.dumps([with_library, without])


def test_the_language_is_that_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for place, name, language in (
        (optimizer_step_kernels, "launch_step", "Triton"),
        (optimizer_step, "launch_cuda", "CUDA C++"),
        (cpu_library, "optimizer_step_", "C++"),
        (optimizer_step, "_step_torch", "PyTorch"),
    ):
        monkeypatch.setattr(place, name, lambda *a, language=language: ran.append(language))
    weight = torch.nn.Parameter(torch.ones(8))
    weight.grad = torch.ones(8)

    def language() -> str:
        optimizer = FusedAdamW([weight])
        optimizer.step()
        return probes._language(optimizer.state[weight]["exp_avg"])

    with monkeypatch.context() as patch:
        patch.setattr(cpu_library, "available", lambda: True)
        assert language() == "C++"
        patch.setattr(cpu_library, "available", lambda: False)
        assert language() == "PyTorch"
    with dispatch.forced("triton"):
        assert language() == "Triton"
        for module in (optimizer_step, optimizer_step_cuda):
            monkeypatch.setattr(module, "is_default", lambda device: True)
        assert language() == "CUDA C++"
    assert ran == ["C++", "PyTorch", "Triton", "CUDA C++"]


def test_an_optimizer_that_steps_wrongly_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
        if name == "lion":
            raise RuntimeError("no kernel\nat all")
        return torch.optim.SGD([p for _, p in params], lr=0.1)

    monkeypatch.setattr(optim, "build_optimizer", build)
    answers = probes.optimizers("cpu")["found"]
    assert "wrong weights" in answers["adamw"]["error"]
    assert answers["lion"]["error"] == "RuntimeError: no kernel"


@pytest.mark.parametrize(
    ("arch", "built", "expected"),
    [
        ("sm_89", ["sm_80", "sm_86", "sm_90"], True),
        ("sm_90", ["sm_80", "sm_86"], False),
        ("sm_61", ["sm_75", "sm_80"], False),
        ("sm_80", ["sm_86"], False),
        ("sm_120", ["sm_90", "sm_120", "compute_120"], True),
    ],
)
def test_kernels_of_an_architecture(arch: str, built: list[str], expected: bool) -> None:
    assert probes._in_build(arch, built) is expected


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("570.1, NVIDIA L4\n570.1, NVIDIA L40S\n", ("570.1", "NVIDIA L4, NVIDIA L40S")),
        ("", None),
        ("NVIDIA-SMI has failed\n", None),
    ],
)
def test_nvidia_driver(
    monkeypatch: pytest.MonkeyPatch, output: str, expected: tuple[str, str] | None
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    monkeypatch.setattr(
        doctor.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 0, stdout=output),
    )
    assert doctor.nvidia_driver() == expected


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fasttune.cli import main

    logger = logging.getLogger("fasttune")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logger.level)
    found(monkeypatch)
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["can_train"] is True
    found(monkeypatch, versions={"torch": None})
    assert main(["doctor"]) == 2
    assert sys.executable in capsys.readouterr().out
