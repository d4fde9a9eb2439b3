"""Who may import whom, how long a file may be, and names and calls that the project does without."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "fasttune").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
EVERYTHING = sorted(
    [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
)

CONFIG = {"fasttune.config", "fasttune.config_checks", "fasttune.config_conditions"}
CONFIG |= {
    "fasttune.config_file",
    "fasttune.config_template",
    "fasttune.config_values",
    "fasttune.schema",
}
"""The config and what works on it; needs the standard library alone."""

READ_CONFIG = {"build", "cli", "doctor", "export", "init", "prepare", "sample", "train"}
READ_CONFIG |= {"rehearsal", "trained", "validate"}
"""The composition roots: below them, functions take flat keyword arguments."""

COMMANDS = {
    f"fasttune.{name}" for name in READ_CONFIG - {"build", "rehearsal", "trained", "validate"}
}
CALLED_BY = {
    "fasttune.prepare": {"train", "validate", "cli"},
    "fasttune.sample": {"train", "validate", "cli"},
    "fasttune.export": {"train", "cli"},
    "fasttune.cli": {"__main__"},
}
"""Commands are called by `cli` alone, but for the parts of a run that `train` goes through."""

# Folder or module -> what of the project it may import, as prefixes.
ALLOWED = {
    "kernels/fasttune_kernels": {"fasttune_kernels"},
    "fasttune/models": {
        "fasttune.models",
        "fasttune.memory.activations",
        "fasttune.memory.offload",
        "fasttune.errors",
        "fasttune_kernels",
    },
    "fasttune/data": {"fasttune.data", "fasttune.errors", "fasttune.seeds"},
    "fasttune/optim": {"fasttune.optim", "fasttune.errors", "fasttune_kernels"},
    "fasttune/memory": {"fasttune.memory", "fasttune.errors", "fasttune_kernels"},
    "fasttune/adapters": {"fasttune.adapters", "fasttune.errors", "fasttune_kernels"},
    "fasttune/config.py": set(),
    "fasttune/errors.py": set(),
    "fasttune/seeds.py": set(),
    "fasttune/losses.py": {"fasttune.errors", "fasttune_kernels"},
    "fasttune/flow_matching.py": {"fasttune.errors", "fasttune.losses", "fasttune_kernels"},
    "fasttune/ddpm.py": {"fasttune.errors", "fasttune.losses", "fasttune_kernels"},
    "fasttune/reconstruction.py": {"fasttune.errors", "fasttune.losses", "fasttune.seeds"},
    "fasttune/checkpoint.py": {"fasttune.errors", "fasttune.tensor_files"},
    "fasttune/tensor_files.py": {"fasttune.errors"},
    **{f"{name.replace('.', '/')}.py": CONFIG | {"fasttune.errors"} for name in sorted(CONFIG)},
}

LIGHT = {f"{name.replace('.', '/')}.py" for name in CONFIG} | {
    f"fasttune/{name}.py"
    for name in "__init__ __main__ bench cli doctor environment errors init libraries".split()
}
"""Load in milliseconds: their imports, outside of functions, are the standard library's."""

# Needed by some users only, or slow to load: imported where they are used.
LATE = {"accelerate", "bitsandbytes", "diffusers", "huggingface_hub", "jsonschema"}
LATE |= {"peft", "pyarrow", "tensorboard", "torchao", "transformers", "wandb"}

SOFT_LIMIT = 400
# File -> its own limit, with a reason beside it.
LONGER: dict[str, int] = {}

BANNED_NAMES = {"utils", "util", "common", "helpers", "base", "misc", "tools"}
BANNED_CALLS = {"torch.load", "torch.save", "torch.autocast", "os.environ", "os.getenv"}
# File -> calls that are its purpose.
CALLS_OF = {"fasttune/environment.py": {"os.environ"}}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def name_of(path: Path) -> str:
    """fasttune/models/flux.py -> fasttune.models.flux"""
    parts = path.with_suffix("").relative_to(ROOT).parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in SOURCES}


def statements(node: ast.AST, *, inside_functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if inside_functions or not is_function:
            yield from statements(child, inside_functions=inside_functions)


def imports(path: Path, *, inside_functions: bool = True) -> set[str]:
    """Full names of imported modules; `from package import module` counts as the module."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in statements(tree, inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else str(node.module))
    return found


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in ("fasttune", "fasttune_kernels")}


@pytest.mark.parametrize("place", ALLOWED)
def test_what_has_a_rule_exists(place: str) -> None:
    path = ROOT / place
    assert path.is_file() or [p for p in SOURCES if p.is_relative_to(path) and p.stem[0] != "_"]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_import_directions(path: Path) -> None:
    for place, allowed in ALLOWED.items():
        if relative(path) == place or relative(path).startswith(f"{place}/"):
            for name in own(imports(path)):
                assert any(name == a or name.startswith(f"{a}.") for a in allowed), (
                    f"{relative(path)} imports {name}; {place} may import {sorted(allowed)}"
                )
    is_root = path.parent.name == "fasttune" and path.stem in READ_CONFIG
    if not is_root and name_of(path) not in CONFIG:
        read = own(imports(path)) & CONFIG
        assert not read, f"{relative(path)} imports {read}; pass it flat keyword arguments"
    for name in own(imports(path)) & COMMANDS:
        callers = CALLED_BY.get(name, {"cli"})
        assert path.stem in callers, f"{relative(path)} imports {name}, a command of {callers}"


def test_no_import_cycles() -> None:
    graph = {name_of(path): own(imports(path)) & MODULES for path in SOURCES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in graph[name] - {name}:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_late_imports(path: Path) -> None:
    eager = {name.split(".")[0] for name in imports(path, inside_functions=False)}
    assert not eager & LATE, f"{relative(path)}: import {eager & LATE} where it is used"
    if relative(path) in LIGHT:
        others = eager - sys.stdlib_module_names - {"fasttune"}
        assert not others, f"{relative(path)}: imports {others} before it is needed"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_length(path: Path) -> None:
    length = len(path.read_text(encoding="utf-8").splitlines())
    limit = LONGER.get(relative(path), SOFT_LIMIT)
    assert length <= limit, f"{relative(path)} has {length} lines, the limit is {limit}"


def test_longer_files_are_still_longer() -> None:
    for name in LONGER:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) > SOFT_LIMIT, name


@pytest.mark.parametrize("path", EVERYTHING, ids=relative)
def test_names(path: Path) -> None:
    parts = {path.stem, *path.relative_to(ROOT).parts[:-1]}
    assert not parts & BANNED_NAMES, f"{relative(path)}: name a file after what it holds"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_calls_the_project_does_without(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found = used & BANNED_CALLS - CALLS_OF.get(relative(path), set())
    assert not found, f"{relative(path)}: {found}"
    assert not imports(path) & {"pickle", "torch.load", "dill", "joblib"}, relative(path)


def test_no_package_shadows_another() -> None:
    # `kernels` and `tests` with an __init__.py would hide packages of these names.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_package_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    settings = settings["tool"]["setuptools"]
    sources = {"fasttune_kernels.cuda"}  # no Python
    listed = set(settings["packages"])
    assert listed == {name_of(path.parent / "__init__.py") for path in SOURCES} | sources
    for name in listed - sources:
        place = ROOT / ("kernels" if name == "fasttune_kernels" else "") / name.replace(".", "/")
        assert (place / "__init__.py").is_file(), f"{name} has no __init__.py"


def test_the_loop_is_short() -> None:
    # train.py is the file to read first.
    assert len((ROOT / "fasttune" / "train.py").read_text(encoding="utf-8").splitlines()) <= 300
