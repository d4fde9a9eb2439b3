"""What is installed: the packages and what they read at run time, and nothing else of the tree."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fasttune_kernels import cuda_source

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc" / "cuda"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel has, but for the library of csrc/cpu."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("packaging")
    command = [sys.executable, "setup.py", "egg_info", "--egg-base", str(folder), "build_py"]
    subprocess.run(
        [*command, "--build-lib", str(folder / "site")], cwd=ROOT, check=True, capture_output=True
    )
    return folder / "site"


def files(folder: Path) -> set[str]:
    """All but caches, relative."""
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def test_has_all_that_is_read_at_run_time(installed: Path) -> None:
    found = files(installed)
    assert {path.split("/")[0] for path in found} == {"fasttune", "fasttune_kernels"}
    sources = {f"fasttune_kernels/cuda/{name}" for name in files(CUDA)}
    templates = {f"fasttune/{path.name}" for path in (ROOT / "fasttune").glob("*.jinja")}
    python = {path for path in files(ROOT / "kernels") if path.endswith(".py")}
    python |= {f"fasttune/{path}" for path in files(ROOT / "fasttune") if path.endswith(".py")}
    assert sources and templates
    assert found == sources | templates | python


def test_a_source_distribution_has_all_that_is_compiled(installed: Path) -> None:
    listed = (installed.parent / "fasttune.egg-info" / "SOURCES.txt").read_text().split()
    wanted = {f"csrc/{path}" for path in files(ROOT / "csrc")}
    assert len(wanted) > 2 and wanted <= set(listed)


def test_cuda_sources_are_found_from_the_tree_and_where_it_is_installed(
    installed: Path, tmp_path: Path
) -> None:
    assert cuda_source.source_folder(ROOT / "kernels" / "fasttune_kernels") == CUDA
    assert cuda_source.source_folder(installed / "fasttune_kernels").is_relative_to(installed)
    # A process that knows nothing of the tree, nor of an editable install of it.
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "from fasttune_kernels import cuda_source\n"
        "from fasttune_kernels.optimizer_step_cuda import LAUNCHES\n"
        "print(*{str(cuda_source.SOURCES / launch.source) for launch in LAUNCHES}, sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    for line in done.stdout.split():
        path = Path(line)
        assert path.parent == installed / "fasttune_kernels" / "cuda"
        assert path.read_bytes() == (CUDA / path.name).read_bytes()
