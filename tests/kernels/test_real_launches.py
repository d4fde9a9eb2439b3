"""Launching code and Triton's own specialisation of its arguments, compiled for GPUs that are not here.

The interpreter runs kernels with Python's integers and never specialises. `LAUNCHES` are compiled as
they are declared, not as they are launched. Only the way in between finds that an argument which is 1
is a constant there, without methods, or that a launch passes what its kernel does not take.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("real_launches.py")


def launched(folder: Path, *arguments: str) -> str:
    """What the script prints. In a process of its own: here, kernels are interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    return ended.stdout


@pytest.mark.slow  # gate codegen compiles what steps launch, with a batch of 1 among them
def test_a_batch_of_one_compiles_as_it_is_launched(tmp_path: Path) -> None:
    said = launched(tmp_path, "sm_89", "1", "short_attention", "gelu_tanh", "quantize_rows")
    assert said.count("bytes shared") == 9, said


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_89", "gfx1100"])
def test_every_operation_compiles_as_it_is_launched(target: str, tmp_path: Path) -> None:
    launched(tmp_path, target, "1,2")
