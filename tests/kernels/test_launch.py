"""What a kernel file declares about its launches."""

import dataclasses
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

from fasttune_kernels import launch
from fasttune_kernels.launch import AMD, NVIDIA, TARGETS, CudaLaunch, Launch

NORM: dict[str, Any] = {
    "name": "norm D=3072 bf16",
    "kernel": lambda: None,
    "signature": {"x_ptr": "*bf16", "y_ptr": "*bf16", "width": "i32"},
    "constants": {"BLOCK": 4096, "bias_ptr": None},
    "aligned": ("x_ptr", "width"),
    "num_warps": 8,
    "num_stages": 1,
    "enable_fp_fusion": True,
}
DEQUANTIZE: dict[str, Any] = {
    "name": "dequantize",
    "source": "dequantize.cu",
    "entry": "dequantize<64>",
    "threads": 256,
}


def test_launches_are_for_all_targets_unless_they_say_so() -> None:
    assert Launch(**NORM).targets == TARGETS == NVIDIA + AMD
    assert CudaLaunch(**DEQUANTIZE).targets == NVIDIA
    assert CudaLaunch(**DEQUANTIZE, targets=("sm_90a",)).targets == ("sm_90a",)


def test_what_is_locked_is_what_is_launched() -> None:
    made = Launch(**NORM, options={"waves_per_eu": 2}, targets=AMD)
    assert made.keywords() == {
        "num_warps": 8,
        "num_stages": 1,
        "enable_fp_fusion": True,
        "waves_per_eu": 2,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("sm_80", "sm_75")}, r"targets \['sm_75'\]; there are sm_80, "),
        ({"targets": ("sm_90a",)}, "targets"),
        ({"targets": ()}, "targets none"),
        ({"aligned": ("z_ptr",)}, r"not \['z_ptr'\]"),
        ({"aligned": ("BLOCK",)}, r"not \['BLOCK'\]"),
        ({"over_2_gib": ("z_ptr",)}, r"not \['z_ptr'\]"),
        ({"constants": {"width": 1}}, r"\['width'\] are in signature and in constants"),
        ({"signature": NORM["signature"] | {"N": "constexpr"}}, "go into constants"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Launch(**NORM | changes)


def test_cuda_targets_are_nvidias() -> None:
    with pytest.raises(ValueError, match="gfx942"):
        CudaLaunch(**DEQUANTIZE, targets=("gfx942",))


def test_launches_come_in_the_order_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, dequantize = Launch(**NORM), CudaLaunch(**DEQUANTIZE)
    for name, entries in (("planted_b", (norm,)), ("planted_a", (dequantize, norm))):
        module = ModuleType(f"fasttune_kernels.{name}")
        vars(module)["LAUNCHES"] = entries
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert launch.launches(("planted_b", "planted_a")) == (norm, dequantize, norm)


def test_every_launch_of_the_package_has_a_name_of_its_own_on_each_target() -> None:
    cases = [(made.name, target) for made in launch.launches() for target in made.targets]
    assert len(cases) == len(set(cases))


def test_declaring_needs_neither_triton_nor_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "torch"):
        monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError
    spec = importlib.util.spec_from_file_location("launch_alone", str(launch.__file__))
    assert spec is not None and spec.loader is not None
    alone = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "launch_alone", alone)
    spec.loader.exec_module(alone)
    made = alone.Launch(**NORM)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.num_warps = 4
