"""The JSON schema agrees with the loader, and every key is documented."""

import json
import tomllib

import jsonschema
import pytest

from fasttune.config_file import config_from_tables, key_types, section_types, to_toml
from fasttune.errors import ConfigError
from fasttune.schema import field_docs, json_schema, schema_text

MINIMAL = {"model": {"family": "flux", "path": "a/b"}, "data": [{"path": "x"}]}


def test_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert json.loads(schema_text()) == json_schema()


def test_every_section_and_key_is_documented() -> None:
    assert field_docs().keys() == {*key_types(), *section_types()}
    assert all(len(text) > 5 and "\n" not in text for text in field_docs().values())


def test_accepts_a_resolved_config() -> None:
    text = to_toml(config_from_tables(MINIMAL, check_files=False))
    jsonschema.validate(tomllib.loads(text), json_schema())


def test_defaults_fit_their_own_schema() -> None:
    for name, section in json_schema()["properties"].items():
        table = section["items"] if name == "data" else section
        for key, entry in table["properties"].items():
            if "default" in entry:
                jsonschema.validate(entry["default"], entry)
            else:
                assert key in table["required"], f"{name}.{key}"


@pytest.mark.parametrize(
    ("section", "table"),
    [
        ("train", {"steps": "x"}),
        ("train", {"steps": 0}),
        ("train", {"steps": 1.5}),
        ("train", {"steps": True}),
        ("train", {"stepz": 1}),
        ("train", {"max_grad_norm": "nothing"}),
        ("train", {"caption_dropout": 2}),
        ("trian", {}),
        ("adapter", {"rank": 0}),
        ("adapter", {"targets": 3}),
        ("optimizer", {"name": "adam"}),
        ("optimizer", {"betas": [0.9]}),
        ("optimizer", {"betas": [0.9, 1.0]}),
        ("optimizer", {"lr": 0}),
        ("objective", {"shift": "x"}),
        ("objective", {"shift": -1}),
        ("objective", {"timesteps": [2000]}),
        ("validation", {"prompts": "x"}),
        ("export", {"formats": ["x"]}),
        ("model", {}),
        ("data", []),
        ("data", [{}]),
        ("data", {"path": "x"}),
        ("run", 3),
    ],
)
def test_refuses_what_the_loader_refuses(section: str, table: object) -> None:
    tables = MINIMAL | {section: table}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tables, json_schema())
    if table != {} or section == "model":
        with pytest.raises(ConfigError):
            config_from_tables(tables, check_files=False)


@pytest.mark.parametrize(
    ("section", "table"),
    [
        ("train", {"max_grad_norm": "none"}),
        ("train", {"max_grad_norm": 1}),
        ("objective", {"shift": "none"}),
        ("objective", {"shift": 3}),
        ("adapter", {"targets": ["*.to_q", "*.to_k"]}),
        ("adapter", {"init_from": "none"}),
        ("objective", {"timestep_sampling": "explicit", "timesteps": [0, 0.5]}),
        ("export", {"formats": ["peft", "kohya"]}),
    ],
)
def test_accepts_what_the_loader_accepts(section: str, table: object) -> None:
    tables = MINIMAL | {section: table}
    jsonschema.validate(tables, json_schema())
    config_from_tables(tables, check_files=False)
