"""What steps launch is found without a list: a launch with another constexpr, other warps or another tensor
is another row, and one that spills is a problem."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness
from benchmarks.static.graphs import shrunk_case
from benchmarks.static.recorded_launches import Given, calls_of_step

PLANTS = Path(__file__).with_name("recorded_plants.py")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is for Linux"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    env = harness.environment()
    env.pop("TRITON_INTERPRET", None)
    env["PYTHONPATH"] = os.pathsep.join([str(harness.ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(PLANTS), str(tmp_path_factory.mktemp("recorded"))]
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def products(launches: dict[str, Any]) -> dict[str, Any]:
    """Name -> what it is specialised on, and where."""
    return {name: value for name, value in launches.items() if ".matmul " in name}


@needs_triton
def test_what_a_launch_is_specialised_on(found: dict[str, Any]) -> None:
    launches = found["as it is"]
    assert found["again"] == launches
    assert len(launches) == 3  # one norm on both cards, and a product on each
    sizes = "M i32 % 16, N i32 % 16, K i32 % 16"
    blocks = "BLOCK_M 64, BLOCK_N 64, BLOCK_K 32, PRECISION None"
    assert sorted(products(launches).values(), key=str) == [
        [
            f"a_ptr *bf16 % 16, b_ptr *bf16 % 16, c_ptr *bf16 % 16, {sizes}, {blocks}, "
            f"num_warps 4, num_stages {stages}, enable_fp_fusion True",
            [target],
            False,
        ]
        for stages, target in ((1, "gfx1100"), (2, "sm_89"))
    ]
    (norm,) = (value for name, value in launches.items() if ".row_norm " in name)
    assert norm[0].startswith("x_ptr *bf16 % 16, y_ptr *bf16 % 16, width i32 % 16, eps fp32")
    assert norm[1] == ["sm_89", "gfx1100"]


@needs_triton
def test_what_is_listed_is_not_recorded_again(found: dict[str, Any]) -> None:
    assert [value[1] for value in products(found["listed"]).values()] == [["gfx1100"]]


@needs_triton
@pytest.mark.parametrize(
    ("plant", "part"),
    [
        ("constexpr", "BLOCK_K 64"),
        ("warps", "num_warps 8"),
        ("unaligned", "a_ptr *bf16, b_ptr"),
        ("odd size", "K i32,"),
    ],
)
def test_a_planted_specialisation_has_another_name(
    found: dict[str, Any], plant: str, part: str
) -> None:
    launches = products(found[plant])
    assert len(launches) == 2 and not launches.keys() & found["as it is"].keys()
    assert all(part in value[0] for value in launches.values())


@needs_triton
def test_storages_of_more_than_2_gib_count_on_amd(found: dict[str, Any]) -> None:
    for text, targets, _ in products(found["large"]).values():
        assert ("a_ptr *bf16 % 16 over 2 GiB" in text) == (targets == ["gfx1100"])


@needs_triton
def test_rows_of_what_is_recorded(found: dict[str, Any]) -> None:
    counts, *rows = found["rows"]
    assert (counts["launches"], counts["launches_in_steps"]) == (0, 3)
    assert len(rows) == 4 and not any(row["problem"] for row in rows)
    spilling = {r["case"]: r["problem"] for r in found["spilling rows"] if ".matmul " in r["case"]}
    (on_nvidia,) = (case for case in spilling if case.endswith(" / sm_89"))
    assert spilling[on_nvidia].startswith("spill: ")
    assert not spilling.keys() & {row["case"] for row in rows}


def test_a_step_says_what_it_calls() -> None:
    with shrunk_case("flux-lora-32gb", repeats=1) as case:
        calls = calls_of_step(case.config, case.folder, ("save", "int8"))
    names = {name.removeprefix("fasttune::") for name, _, _ in calls}
    assert names >= {
        "lora_linear_forward",
        "lora_linear_backward",
        "attention_backward",
        "diffusion_loss_backward",
        "quantize_rows",
        "gradient_norm",
        "optimizer_step_",
    }
    assert any(isinstance(x, Given) for _, leaves, _ in calls for x in leaves)
