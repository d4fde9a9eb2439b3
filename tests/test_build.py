"""What the config says of blocks is done, refused, or said: nothing is ignored."""

import logging
from pathlib import Path

import pytest
import torch

from fasttune.build import check_model, denoiser_for, set_blocks
from fasttune.config import Config
from fasttune.config_file import load_config
from fasttune.device import Placement
from fasttune.errors import ConfigError
from fasttune.models import MODELS

CPU = Placement(
    device=torch.device("cpu"), base_dtype=torch.float32, compute_dtype=torch.float32, reason=""
)


def configured(model: Path, *overrides: str) -> Config:
    given = [f"model.path={model}", "data.path=x", *overrides]
    return load_config(None, given, check_files=False)


def test_a_table_is_checked_before_anything_is_cached(tiny_flux: Path) -> None:
    config = configured(
        tiny_flux, "model.family=flux", 'memory.activations={hidden = "int8", mlp = "int8"}'
    )
    with pytest.raises(ConfigError, match="hidden: no block of family flux keeps that; there is"):
        check_model(config)


@pytest.mark.parametrize(
    ("activations", "recompute", "warned"),
    [
        ("save", False, False),
        ("recompute", True, False),
        ("int8", True, True),
        ('{ default = "save", hidden = "int8" }', True, True),
        ('{ default = "int8", hidden = "save" }', False, False),
    ],
)
def test_blocks_that_stay_plain(
    tiny_sd1: Path,
    caplog: pytest.LogCaptureFixture,
    activations: str,
    recompute: bool,
    warned: bool,
) -> None:
    config = configured(
        tiny_sd1,
        "model.family=sd1",
        'adapter.targets=["*.conv1"]',
        f"memory.activations={activations}",
        "train.compile=blocks",
    )
    denoiser = denoiser_for(config, MODELS["sd1"], tiny_sd1, CPU)
    with caplog.at_level(logging.WARNING):
        set_blocks(config, denoiser, CPU)
    blocks = [m for m in denoiser.modules() if type(m).__name__ == "ResnetBlock"]
    assert blocks and all(block.recompute == recompute for block in blocks)
    assert ("they recompute, whatever" in caplog.text) == warned
    assert f"{len(blocks)} blocks with such adapters are not compiled" in caplog.text


class Theirs(torch.nn.Linear):
    """As a network of diffusers."""

    def disable_gradient_checkpointing(self) -> None:
        self.recomputes = False


def test_a_network_without_blocks_has_no_compiler(
    tiny_sdxl: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(
        tiny_sdxl, "model.family=autoencoder", "adapter.type=none", "memory.activations=save"
    )
    with caplog.at_level(logging.INFO):
        assert set_blocks(config, Theirs(2, 2), CPU) is None
    assert "blocks" not in caplog.text
