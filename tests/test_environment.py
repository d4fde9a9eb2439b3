"""Variables that libraries read: set before torch is imported, and never over a user's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fasttune import environment

AT_IMPORT = """
import json, os, sys
found = {}
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            found.update({k: os.environ.get(k) for k in sys.argv[1].split()})
            raise ImportError("seen")
sys.meta_path.insert(0, Watch())
from fasttune.cli import main
main(["train", sys.argv[2]])
print(json.dumps(found))
"""
NAMES = (environment.AOTRITON, *environment.CACHES)


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what a test sets is put back
        monkeypatch.delenv(name)


def test_in_place_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    config = tmp_path / "config.toml"
    config.write_text(
        '[model]\nfamily = "sdxl"\npath = "owner/name"\n[[data]]\npath = "photos"\ncaptions = "constant"\ncaption = "a"\n'
    )
    inherited = {k: v for k, v in os.environ.items() if k not in NAMES}
    result = subprocess.run(
        [sys.executable, "-c", AT_IMPORT, " ".join(NAMES), str(config)],
        env=inherited | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TRITON_CACHE_DIR": "mine"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert json.loads(result.stdout.splitlines()[-1]) == {
        environment.AOTRITON: None if sys.platform == "darwin" else "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache" / "fasttune" / "inductor"),
        "TRITON_CACHE_DIR": "mine",
    }, result.stderr


def test_a_users_own_value_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.AOTRITON, "0")
    environment.prepare()
    assert os.environ[environment.AOTRITON] == "0"


def test_there_is_no_rocm_for_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    environment.prepare()
    assert environment.AOTRITON not in os.environ
    assert environment.value_of("TRITON_CACHE_DIR") is not None


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "relative"):  # the XDG specification has relative paths ignored
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert environment.cache_folder() == tmp_path / ".cache" / "fasttune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert environment.cache_folder() == tmp_path / ".cache" / "fasttune"
    environment.prepare()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / ".cache" / "fasttune" / "triton")
    assert not list(tmp_path.iterdir())  # nothing is made before it is needed


def test_no_cache_folder_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container whose user has no entry: "~" stays as it is, and is no folder to make."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    environment.prepare()
    assert not set(environment.CACHES) & os.environ.keys()


def test_one_of_the_cache_folders_may_be_anothers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    inductor = tmp_path / "fasttune" / "inductor"
    inductor.mkdir(parents=True)
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != inductor
    )  # root may write anywhere
    environment.prepare()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "fasttune" / "triton")


def test_no_cache_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    environment.prepare()
    assert not set(environment.CACHES) & os.environ.keys()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    environment.prepare()
    assert not set(environment.CACHES) & os.environ.keys()
