"""Keys that nothing would read are refused, and a resolved config with all defaults is not."""

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from fasttune.config import Config
from fasttune.config_conditions import CONDITIONS
from fasttune.config_file import (
    config_from_tables,
    key_types,
    load_config,
    section_types,
    to_toml,
)
from fasttune.config_values import is_union
from fasttune.errors import ConfigError

FLUX = ("model.family=flux",)
SDXL = ("model.family=sdxl",)
WHOLE = (*SDXL, "adapter.type=none")
AUTOENCODER = ("model.family=autoencoder", "adapter.type=none")
EXPLICIT = (*FLUX, "objective.timestep_sampling=explicit", "objective.timesteps=[0.5]")


def load(*overrides: str) -> Config:
    return load_config(None, ["model.path=a/b", "data.path=x", *overrides], check_files=False)


def load_config_text(text: str) -> Config:
    return config_from_tables(tomllib.loads(text), check_files=False)


# (a key with a value of its own, configs that read it, one that does not, the key that decides)
CASES = [
    ("adapter.rank=4", [SDXL, FLUX], WHOLE, "adapter.type"),
    ("adapter.alpha=4", [SDXL], WHOLE, "adapter.type"),
    ("adapter.targets=all-linear", [SDXL], WHOLE, "adapter.type"),
    ("adapter.dropout=0.5", [SDXL], WHOLE, "adapter.type"),
    ("adapter.init_from=x", [SDXL], WHOLE, "adapter.type"),
    ("data.0.caption=x", [(*SDXL, "data.captions=constant")], SDXL, "data.0.captions"),
    ("data.0.caption_file=x", [(*SDXL, "data.captions=csv")], SDXL, "data.0.captions"),
    ("data.0.image_column=x", [(*SDXL, "data.captions=parquet")], SDXL, "data.0.captions"),
    ("data.0.caption_column=x", [(*SDXL, "data.captions=jsonl")], SDXL, "data.0.captions"),
    ("data.0.max_aspect=3", [SDXL], (*SDXL, "data.aspect_buckets=false"), "data.0.aspect_buckets"),
    ("memory.activations=int8", [SDXL, FLUX], AUTOENCODER, "model.family"),
    ("train.compile=blocks", [SDXL, FLUX], AUTOENCODER, "model.family"),
    ("train.caption_dropout=0.2", [SDXL, FLUX], AUTOENCODER, "model.family"),
    ("objective.logit_mean=1", [FLUX], SDXL, "model.family"),
    (
        "objective.logit_mean=1",
        [FLUX, (*FLUX, "objective.timestep_sampling=logit_normal")],
        (*FLUX, "objective.timestep_sampling=uniform"),
        "objective.timestep_sampling",
    ),
    ("objective.logit_std=2", [FLUX], SDXL, "model.family"),
    ("objective.logit_std=2", [FLUX], EXPLICIT, "objective.timestep_sampling"),
    (
        "objective.mode_scale=1",
        [(*FLUX, "objective.timestep_sampling=mode")],
        SDXL,
        "model.family",
    ),
    (
        "objective.mode_scale=1",
        [(*FLUX, "objective.timestep_sampling=mode")],
        FLUX,
        "objective.timestep_sampling",
    ),
    ("objective.shift=3", [FLUX], SDXL, "model.family"),
    ("objective.shift=3", [FLUX], EXPLICIT, "objective.timestep_sampling"),
    ("objective.shift=resolution", [FLUX], EXPLICIT, "objective.timestep_sampling"),
    ("objective.min_snr_gamma=5", [SDXL], FLUX, "model.family"),
    ("objective.zero_terminal_snr=true", [SDXL], FLUX, "model.family"),
    ("objective.offset_noise=0.1", [SDXL], AUTOENCODER, "model.family"),
    ("objective.huber_delta=0.3", [(*SDXL, "objective.loss=huber")], SDXL, "objective.loss"),
    ("objective.guidance=3.5", [FLUX], SDXL, "model.family"),
    ("objective.text_mask=true", [FLUX], SDXL, "model.family"),
    ("objective.kl_weight=0.1", [AUTOENCODER], SDXL, "model.family"),
    ("optimizer.state_dtype=bf16", [SDXL], (*SDXL, "optimizer.name=lion"), "optimizer.name"),
    (
        "optimizer.betas=[0.5, 0.5]",
        [SDXL, (*SDXL, "optimizer.name=adamw8bit"), (*SDXL, "optimizer.name=lion")],
        (*SDXL, "optimizer.name=adafactor"),
        "optimizer.name",
    ),
    (
        "optimizer.eps=1e-6",
        [SDXL, (*SDXL, "optimizer.name=adamw8bit"), (*SDXL, "optimizer.name=adafactor")],
        (*SDXL, "optimizer.name=lion"),
        "optimizer.name",
    ),
    ("schedule.warmup_steps=5", [SDXL], (*SDXL, "schedule.name=constant"), "schedule.name"),
    ("schedule.min_lr_ratio=0.1", [(*SDXL, "schedule.name=cosine")], SDXL, "schedule.name"),
    (
        "schedule.cycles=2",
        [(*SDXL, "schedule.name=sine"), (*SDXL, "schedule.name=cosine_with_restarts")],
        (*SDXL, "schedule.name=cosine"),
        "schedule.name",
    ),
    ("schedule.power=2", [(*SDXL, "schedule.name=polynomial")], SDXL, "schedule.name"),
    ("ema.decay=0.9", [(*SDXL, "ema.enabled=true")], SDXL, "ema.enabled"),
    ("validation.prompts=x", [SDXL, FLUX], AUTOENCODER, "model.family"),
    ("validation.negative_prompt=x", [SDXL], FLUX, "model.family"),
    ("validation.seeds=[1]", [SDXL, FLUX], AUTOENCODER, "model.family"),
    ("validation.resolutions=64x64", [SDXL], AUTOENCODER, "model.family"),
    ("validation.sampling_steps=9", [SDXL], AUTOENCODER, "model.family"),
    ("validation.guidance_scale=2", [SDXL, FLUX], AUTOENCODER, "model.family"),
    ("validation.held_out_timesteps=2", [SDXL], AUTOENCODER, "model.family"),
    ("logging.wandb_project=x", [(*SDXL, "logging.wandb=true")], SDXL, "logging.wandb"),
    ("logging.wandb_mode=offline", [(*SDXL, "logging.wandb=true")], SDXL, "logging.wandb"),
]


@pytest.mark.parametrize(("override", "reading", "ignoring", "decided_by"), CASES)
def test_a_key_that_nothing_reads_is_refused(
    override: str, reading: list[tuple[str, ...]], ignoring: tuple[str, ...], decided_by: str
) -> None:
    for overrides in reading:
        config = load(*overrides, override)
        assert load_config_text(to_toml(config)) == config
    with pytest.raises(ConfigError) as caught:
        load(*ignoring, override)
    (line,) = caught.value.problems
    key = override.partition("=")[0]
    assert line.startswith(f"{key} = ")
    assert f": is read only with {decided_by} = " in line and ", not with " in line


@pytest.mark.parametrize(
    "overrides",
    [
        FLUX,
        SDXL,
        WHOLE,
        AUTOENCODER,
        EXPLICIT,
        (*SDXL, "optimizer.name=lion", "schedule.name=constant"),
        (*SDXL, "optimizer.name=adafactor", "data.aspect_buckets=false"),
        # asked for, and what happens: no caption is dropped, nothing is shifted
        (*AUTOENCODER, "train.caption_dropout=0", "objective.shift=none"),
        (*EXPLICIT, "objective.shift=none"),
        (*SDXL, "objective.shift=none"),
    ],
)
def test_defaults_pass_everywhere(overrides: tuple[str, ...]) -> None:
    config = load(*overrides)
    assert load_config_text(to_toml(config)) == config


def test_a_wrong_value_is_reported_once() -> None:
    # Whether rank is read is not known where adapter.type is wrong itself.
    with pytest.raises(ConfigError) as caught:
        load(*SDXL, "adapter.type=nonne", "adapter.rank=4", "ema.decay=2")
    assert [line.partition(" ")[0] for line in caught.value.problems] == [
        "adapter.type",
        "ema.decay",
    ]


def test_each_source_is_judged_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        '[model]\nfamily = "sdxl"\npath = "a/b"\n'
        '[[data]]\npath = "x"\ncaptions = "csv"\nimage_column = "file"\n'
        '[[data]]\npath = "y"\nimage_column = "file"\n'
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, check_files=False)
    (line,) = caught.value.problems
    assert line == (
        'data.1.image_column = "file": is read only with data.1.captions = "jsonl", "csv" or '
        '"parquet", not with "textfile"; remove it'
    )


def test_conditions_name_keys_and_values_that_exist() -> None:
    hints = key_types()
    for condition in CONDITIONS:
        assert condition.key in hints, condition
        hint = hints[condition.decided_by]
        assert not is_union(hint)
        choices = get_args(hint) if get_origin(hint) is Literal else (True, False)
        assert set(condition.values) < set(choices), condition  # else nothing is ever refused
        section, _, name = condition.key.partition(".")
        default = {f.name: f.default for f in fields(section_types()[section])}[name]
        assert default not in condition.honoured


def test_every_condition_has_a_case() -> None:
    tested = {(case[0].partition("=")[0].replace("data.0", "data"), case[3]) for case in CASES}
    for condition in CONDITIONS:
        by = condition.decided_by.replace("data.", "data.0.")
        assert (condition.key, by) in tested, condition
