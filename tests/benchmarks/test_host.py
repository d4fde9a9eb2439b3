"""The host gate sees imports, calls and instructions, the same ones in every process."""

import dis
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from benchmarks.harness import ROOT, environment
from benchmarks.static import host

PACKAGE = ROOT / "fasttune"


def own(source: str, name: str, **names: Any) -> Any:
    """A function whose code seems to be in fasttune's folder."""
    space: dict[str, Any] = dict(names)
    exec(compile(source, str(PACKAGE / "planted.py"), "exec"), space)
    return space[name]


def all_rows(hash_seed: str) -> list[dict[str, Any]]:
    """The rows of a fresh process that has neither diffusers nor transformers."""
    code = (
        "import sys, json\n"
        "sys.modules |= {'diffusers': None, 'transformers': None, 'accelerate': None}\n"
        "from benchmarks.static import host\n"
        "print('rows', json.dumps(list(host.rows())))\n"
    )
    env = environment() | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    return json.loads(done.stdout.splitlines()[-1].removeprefix("rows "))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return all_rows("1")


def test_rows_do_not_depend_on_the_process(rows: list[dict[str, Any]]) -> None:
    assert all_rows("2") == rows


def test_commands_import_nothing_heavy(rows: list[dict[str, Any]]) -> None:
    found = {r["case"]: r for r in rows if "modules" in r}
    assert len(found) == len(host.COMMANDS)
    for row in found.values():
        assert row["modules_of_others"] == 0, row
        assert "fasttune.cli" in row["modules"]
    assert found["imports of fasttune a config error"]["exit_status"] == 2
    assert found["imports of fasttune --help"]["exit_status"] == 0


def test_counts_are_there(rows: list[dict[str, Any]]) -> None:
    from fasttune.config_file import key_types

    assert len({row["case"] for row in rows}) == len(rows)
    counted = [row for row in rows if "instructions" in row]
    assert [row["case"] for row in counted] == [
        "load a config",
        "batch of 4",
        "step, empty network",
        "step that logs, empty network",
    ]
    assert all(row["instructions"] > row["calls"] > 50 for row in counted)
    assert counted[2]["instructions"] < counted[3]["instructions"]
    assert counted[0]["config_keys"] == len(key_types())


def test_a_planted_import_is_seen(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "fasttune", ignore=without)
    cli = tmp_path / "fasttune" / "cli.py"
    clean = host.imports_of(("--help",), root=tmp_path)
    text = cli.read_text(encoding="utf-8")
    cli.write_text(text.replace("import sys\n", "import sys\nimport torch\n", 1), encoding="utf-8")
    planted = host.imports_of(("--help",), root=tmp_path)
    expected = next(row for row in rows if row["case"] == "imports of fasttune --help")
    assert clean == {key: value for key, value in expected.items() if key != "case"}
    assert planted != clean
    assert "torch" in planted["modules"]
    assert planted["modules_of_others"] > 100


def test_a_command_that_breaks_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "fasttune").mkdir()
    (tmp_path / "fasttune" / "__init__.py").touch()
    (tmp_path / "fasttune" / "cli.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(RuntimeError, match="nothing_of_this_name"):
        host.imports_of(("--help",), root=tmp_path)


def straight(statements: int) -> Callable[[int], int]:
    """A function without branches, so that it executes each of its instructions once."""
    body = "\n".join(["    a = a + 1"] * statements)
    return own(f"def f(a):\n{body}\n    return a\n", "f")


def test_instructions_are_those_of_the_bytecode() -> None:
    short, long = straight(3), straight(10)
    expected = len(list(dis.get_instructions(long))) - len(list(dis.get_instructions(short)))
    found = (
        host.count(lambda: long(1))["instructions"] - host.count(lambda: short(1))["instructions"]
    )
    assert found == expected > 0


def test_calls_are_those_of_own_code() -> None:
    function = own(
        "def f(values, other):\n    len(values)\n    g()\n    other()\n    return sorted(values)\n"
        "def g():\n    return abs(-1)\n",
        "f",
    )

    def other() -> None:
        """Not of fasttune: what it calls is not counted."""
        max([1, 2])
        max([1, 2])

    assert host.count(lambda: function([2, 1], other))["calls"] == 5  # len, g, abs, other, sorted


def test_code_of_others_is_not_counted() -> None:
    assert host.count(lambda: json.dumps({"a": [1, 2]})) == {"instructions": 0, "calls": 0}


def test_an_error_ends_the_counting() -> None:
    before = sys.gettrace(), sys.getprofile()
    with pytest.raises(ZeroDivisionError):
        host.count(lambda: 1 / 0)
    assert (sys.gettrace(), sys.getprofile()) == before


SLOWER = """
def planted(*args):
    for _ in range(20):
        len(args)
    return before(*args)
"""


def slower(module: ModuleType, name: str) -> Any:
    """`module.name` with some more to do, in fasttune's own code."""
    return mock.patch.object(module, name, own(SLOWER, "planted", before=getattr(module, name)))


def test_more_work_a_batch_is_seen(tmp_path: Path) -> None:
    from fasttune.data import loader

    clean = host.batch_row(tmp_path)
    with slower(loader, "_finish"):
        planted = host.batch_row(tmp_path)
    # The wrapper calls len twenty times and then the function itself.
    assert planted["calls"] == clean["calls"] + 21
    assert planted["instructions"] > clean["instructions"]


def test_one_call_more_in_a_config_is_seen(tmp_path: Path) -> None:
    from fasttune import config_file

    clean = host.config_row(tmp_path)
    source = "def planted(*args, **kwargs):\n    return before(*args, **kwargs)\n"
    before = config_file.load_config
    with mock.patch.object(config_file, "load_config", own(source, "planted", before=before)):
        planted = host.config_row(tmp_path)
    assert planted["calls"] == clean["calls"] + 1
    assert planted["config_keys"] == clean["config_keys"]


def test_more_work_a_step_is_seen(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    from fasttune import train

    with slower(train, "seed_default"):
        planted = list(host.step_rows(tmp_path))
    clean = [row for row in rows if row["case"].startswith("step")]
    for row, before in zip(planted, clean, strict=True):
        assert row["case"] == before["case"]
        assert row["calls"] == before["calls"] + 21
