"""The command line: what it passes on, what it says about errors, and what it does not load."""

import errno
import logging
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fasttune import __version__, errors
from fasttune.cli import main
from fasttune.config_file import load_config, to_toml

MINIMAL = '[model]\nfamily = "sdxl"\npath = "owner/name"\n[[data]]\npath = "photos"\n'


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    logger = logging.getLogger("fasttune")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    path = tmp_path / "config.toml"
    path.write_text(MINIMAL)
    return path


@pytest.fixture
def run_dir(config: Path) -> Path:
    """A run folder with three checkpoints."""
    run = config.parent / "runs" / "dog"
    for step in ("step-000500", "step-001000", "step-1000000"):
        (run / "checkpoints" / step).mkdir(parents=True)
        (run / "checkpoints" / step / "state.json").write_text("{}")
    (run / "config.toml").write_text(to_toml(load_config(config)))
    return run


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, function: str, result: Any) -> list[Any]:
    """Puts a module in the place of fasttune.<name>; returns the calls of its function."""
    calls = []

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        if isinstance(result, BaseException):
            raise result
        return result

    module = types.ModuleType(f"fasttune.{name}")
    setattr(module, function, called)
    monkeypatch.setitem(sys.modules, f"fasttune.{name}", module)
    return calls


def test_train(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "train", "train", 130)
    # key=value may stand before and after other options.
    argv = ["train", str(config), "train.steps=3", "--resume", "latest", "data.repeats=2", "-v"]
    assert main(argv) == 130
    ((given,), options) = calls[0]
    assert (given.train.steps, given.data[0].repeats) == (3, 2)
    assert options == {"resume": "latest", "verbose": True}


def test_prepare(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "prepare", "prepare", None)
    assert main(["prepare", str(config), "cache.dir=elsewhere"]) == 0
    assert calls[0][0][0].cache.dir == "elsewhere"


def test_sample(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "sample", "main", [])
    flags = "--prompt a --prompt b --seed 3 --resolution 64x64 --steps 4 --guidance 2 --out x.png"
    assert main(["sample", str(run_dir), *flags.split(), "--negative-prompt", "c"]) == 0
    assert calls[0][1] == {
        "checkpoint": run_dir / "checkpoints" / "step-1000000",
        "weights": None,
        "prompts": ["a", "b"],
        "negative_prompt": "c",
        "seeds": [3],
        "resolutions": ["64x64"],
        "steps": 4,
        "guidance_scale": 2.0,
        "out": Path("x.png"),
    }


def test_sample_from_a_config_or_weights(
    config: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stand_in(monkeypatch, "sample", "main", [])
    weights = config.parent / "lora.safetensors"
    weights.touch()
    assert main(["sample", str(config)]) == 0
    assert main(["sample", str(run_dir), "--weights", str(weights)]) == 0
    found = [(options["checkpoint"], options["weights"]) for _, options in calls]
    assert found == [(None, None), (None, weights)]
    assert main(["sample", str(run_dir), "--weights", "nowhere"]) == 2
    assert "--weights nowhere: no such file" in capsys.readouterr().err


def test_export(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "export", "main", [])
    checkpoint = run_dir / "checkpoints" / "step-000500"
    flags = ["--format", "kohya", "--format", "peft", "--dtype", "fp32", "--out", "here"]
    assert main(["export", str(checkpoint), *flags]) == 0
    assert calls[0][1] == {
        "checkpoint": checkpoint,
        "formats": ("kohya", "peft"),
        "dtype": "fp32",
        "out": Path("here"),
    }
    assert calls[0][0][0].model.path == "owner/name"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["export", "nowhere"], "nowhere: no such run folder, checkpoint or config file"),
        (["export", "photos"], "photos: not a run folder"),
        (["export", "config.toml"], "config.toml: no checkpoint here"),
        (["export", "runs/dog", "--format", "single_file"], '"single_file" does not go with'),
        (["export", "runs/dog", "--dtype", "int8"], 'export.dtype = int8: expected one of "bf16"'),
        (["sample", "empty"], "empty: no checkpoint yet"),
        (["train", "config.toml", "train.stepz=3"], "did you mean train.steps?"),
        (["train", "config.tml"], "no such file; did you mean config.toml?"),
        (["prepare", "config.toml", "data.path=nowhere"], 'data.0.path = "nowhere"'),
        (["init", "--yes"], "missing: "),
    ],
)
def test_user_errors(
    run_dir: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    (run_dir.parent.parent / "empty").mkdir()
    (run_dir.parent.parent / "empty" / "config.toml").write_text(MINIMAL)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "error", [getattr(errors, name) for name in dir(errors) if name.endswith("Error")]
)
def test_every_error_of_ours_is_a_message(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[Exception],
) -> None:
    stand_in(monkeypatch, "prepare", "prepare", error(["it is broken"]))
    assert main(["prepare", str(config)]) == 2
    message = capsys.readouterr().err
    assert "it is broken" in message
    assert "Traceback" not in message


def test_a_bug_shows_its_traceback(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "prepare", "prepare", ZeroDivisionError("ours"))
    assert main(["prepare", str(config)]) == 1
    message = capsys.readouterr().err
    assert "bug in fasttune" in message
    assert "ZeroDivisionError: ours" in message


def os_error(number: int, *names: str) -> OSError:
    return OSError(number, os.strerror(number), *names)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (os_error(errno.ENOSPC, "a/b.bin"), "a/b.bin: No space left on device; free some space"),
        (os_error(errno.ENOSPC), "No space left on device; free some space"),  # write(2) says this
        (
            os_error(errno.EACCES, "run"),
            "run: Permission denied; check who owns it and its permissions",
        ),
        (os_error(errno.EIO, "x.png"), "x.png: Input/output error; check the disk"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "from", None, "to"),
            "from -> to: No such file or directory",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", b"raw"),
            "raw: No such file or directory",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: OSError,
    message: str,
) -> None:
    stand_in(monkeypatch, "prepare", "prepare", error)
    assert main(["prepare", str(config)]) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")
    assert main(["prepare", str(config), "-v"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and f"error: {message}\n" in shown


def test_an_os_error_without_a_file_is_a_bug(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "prepare", "prepare", OSError("odd"))
    assert main(["prepare", str(config)]) == 1
    assert "bug in fasttune" in capsys.readouterr().err


def test_results_are_printed_on_stdout(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "sample", "main", [Path("a.png"), Path("grid.png")])
    assert main(["sample", str(run_dir)]) == 0
    assert capsys.readouterr() == ("a.png\ngrid.png\n", "")
    stand_in(monkeypatch, "export", "main", [Path("dog.safetensors")])
    assert main(["export", str(run_dir)]) == 0
    assert capsys.readouterr() == ("dog.safetensors\n", "")


def test_sample_of_a_lora_file_names_the_flag(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "lora.safetensors").write_bytes(b"\xff\x00")
    assert main(["sample", "lora.safetensors"]) == 2
    message = capsys.readouterr().err
    assert "weights alone do not say which model" in message
    assert "--weights lora.safetensors" in message


@pytest.mark.parametrize(
    "error", [MemoryError("host"), type("OutOfMemoryError", (RuntimeError,), {})("CUDA")]
)
def test_out_of_memory_says_what_takes_less(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    stand_in(monkeypatch, "prepare", "prepare", error)
    assert main(["prepare", str(config)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: out of memory: {error}\n")
    assert "train.batch_size" in message
    assert "Traceback" not in message


def test_interrupt(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "prepare", "prepare", KeyboardInterrupt())
    assert main(["prepare", str(config)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("flags", "expected"), [([], "shown\n"), (["-v"], "debug: hidden\nshown\n")]
)
def test_messages_go_to_stderr(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    expected: str,
) -> None:
    def prepare(_: object) -> None:
        logger = logging.getLogger("fasttune.prepare")
        logger.debug("hidden")
        logger.info("shown")
        logger.warning("mind")

    module = types.ModuleType("fasttune.prepare")
    module.prepare = prepare  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fasttune.prepare", module)
    for _ in range(2):  # a second call must not add a second handler
        assert main(["prepare", str(config), *flags]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", (expected + "warning: mind\n") * 2)


@pytest.mark.parametrize(
    "argv", [["train"], ["nonsense"], [], ["doctor", "a=1"], ["train", "c.toml", "--nonsense"]]
)
def test_usage_errors(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: fasttune" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fasttune {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["train", "config.toml", "train.steps=x"], 2),
        (["init"], 2),
        (["schema"], 0),
    ],
)
def test_loads_nothing_heavy(config: Path, argv: list[str], status: int) -> None:
    # A module that refuses the imports, in a fresh interpreter.
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        heavy = {'torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'safetensors'}\n"
        "        assert name not in heavy, name\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from fasttune.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr


def test_python_m(config: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fasttune", "train", "config.toml", "train.steps=x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == (
        "error: 1 problem in config.toml:\n  - train.steps = x: expected an integer\n"
    )
