"""The identity of a model's files: any byte counts, and large files are read once."""

import logging
import os
from pathlib import Path

import pytest

from fasttune.data import identity
from fasttune.data.cache import Cache
from fasttune.data.identity import folder_identity
from fasttune.errors import ModelError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text("{}")
    (tmp_path / "vae/w.safetensors").write_bytes(os.urandom(2**20 * 3))
    (tmp_path / "unet").mkdir()
    return tmp_path


def bytes_read() -> int:
    counters = Path("/proc/self/io")
    if not counters.exists():
        pytest.skip("counts bytes read as Linux does")
    return int(counters.read_text().split("rchar: ")[1].split()[0])


def test_any_byte_counts(model: Path) -> None:
    weights = model / "vae/w.safetensors"
    content = bytearray(weights.read_bytes())
    first = folder_identity(model, ("vae",), "fp32")
    assert folder_identity(model, ("vae",), "fp32") == first
    assert folder_identity(model, ("vae",), "bf16") != first
    os.utime(weights, (1, 1))
    assert folder_identity(model, ("vae",), "fp32") == first  # a copy is the same model
    seen = {first}
    for start in (100, 2**19 + 12345, 2**20 + 77777, 3 * 2**20 - 1):
        changed = content.copy()
        changed[start] ^= 1
        weights.write_bytes(changed)
        seen.add(folder_identity(model, ("vae",), "fp32"))
    weights.write_bytes(content)
    (model / "vae/config.json").write_text("{ }")
    seen.add(folder_identity(model, ("vae",), "fp32"))
    assert len(seen) == 6
    with pytest.raises(ModelError, match=r"has none of text_encoder\*"):
        folder_identity(model, ("text_encoder*",))


def test_large_files_are_read_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = model / "vae/w.safetensors"
    monkeypatch.setattr(identity, "SLOW_SECONDS", -1.0)
    with caplog.at_level(logging.INFO), Cache(tmp_path / "cache") as cache:
        first = folder_identity(model, ("vae",), cache=cache)
    assert "to identify the weights" in caplog.text
    with Cache(tmp_path / "cache") as cache:
        before = bytes_read()
        assert folder_identity(model, ("vae",), cache=cache) == first
        assert bytes_read() - before < 2**20
        # same size, another time: read again
        changed = bytearray(weights.read_bytes())
        changed[2**20] ^= 1
        weights.write_bytes(changed)
        os.utime(weights, ns=(1, 1))
        assert folder_identity(model, ("vae",), cache=cache) != first
    assert folder_identity(model, ("vae",)) != first
