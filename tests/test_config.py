"""The config file: precedence, types, every problem at once, and back to TOML."""

import random
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from fasttune.config import Config
from fasttune.config_checks import BOUNDS
from fasttune.config_file import key_types, load_config, section_types, to_toml
from fasttune.config_values import convert, is_union, toml_value
from fasttune.errors import ConfigError

MINIMAL = """
[model]
family = "sdxl"
path = "owner/name"
[[data]]
path = "photos"
"""
FLUX = ["model.family=flux"]
WHOLE = ["adapter.type=none"]
AUTOENCODER = ["model.family=autoencoder", *WHOLE]


def load(tmp_path: Path, text: str = MINIMAL, *overrides: str, check_files: bool = False) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides, check_files=check_files)


def problems(
    tmp_path: Path, text: str = MINIMAL, *overrides: str, check_files: bool = False
) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides, check_files=check_files)
    return caught.value.problems


def test_precedence(tmp_path: Path) -> None:
    text = MINIMAL + "[train]\nsteps = 7\nbatch_size = 3\n"
    config = load(tmp_path, text, "train.steps=9")
    assert (config.train.steps, config.train.batch_size) == (9, 3)
    assert config.train.gradient_accumulation == 1


def test_from_overrides_alone() -> None:
    config = load_config(
        None, ["model.family=flux", "model.path=a/b", "data.path=x"], check_files=False
    )
    assert (config.model.family, config.data[0].path) == ("flux", "x")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=12", 12),
        ("optimizer.lr=1", 1.0),
        ("optimizer.lr=3e-4", 3e-4),
        ("optimizer.betas=[0.5, 0]", (0.5, 0.0)),
        ("ema.enabled=true", True),
        ("run.name=42", "42"),  # a string key keeps its digits
        ("model.revision=1e10", "1e10"),
        ('model.revision="1e10"', "1e10"),
        ("run.name=2024-01-31", "2024-01-31"),
        ("validation.negative_prompt=", ""),
        ("validation.negative_prompt=a = b", "a = b"),
        ("validation.prompts=a dog, running", ("a dog, running",)),
        ('validation.prompts=["a", "b"]', ("a", "b")),
        ("validation.seeds=3", (3,)),
        ("train.max_grad_norm=none", None),
        ('train.max_grad_norm="none"', None),
        ("objective.shift=none", "none"),
        ("objective.shift=3", 3.0),
        ("adapter.targets=all-linear", "all-linear"),
        ('adapter.targets=["*.to_q"]', ("*.to_q",)),
        ("data.0.resolution=512", 512),
        ("data.resolution=512", 512),
    ],
)
def test_override_values(tmp_path: Path, override: str, value: Any) -> None:
    family = "sdxl" if "negative_prompt" in override else "flux"
    config = load(tmp_path, MINIMAL, f"model.family={family}", override)
    section, *_, key = override.partition("=")[0].split(".")
    owner = config.data[0] if section == "data" else getattr(config, section)
    assert getattr(owner, key) == value
    assert type(getattr(owner, key)) is type(value)


def test_sources(tmp_path: Path) -> None:
    two = MINIMAL + '[[data]]\npath = "more"\n'
    config = load(tmp_path, two, "data.1.repeats=3")
    assert [source.repeats for source in config.data] == [1, 3]
    (line,) = problems(tmp_path, two, "data.repeats=3")
    assert "data.0.repeats to data.1.repeats" in line
    (line,) = problems(tmp_path, two, "data.2.repeats=3")
    assert "data.0, data.1" in line


def test_home_folder_is_expanded(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL, "data.path=~/photos")
    assert config.data[0].path == str(Path.home() / "photos")


def test_all_problems_together(tmp_path: Path) -> None:
    text = """
    steps = 5
    [model]
    family = "flux2"
    [train]
    step = 10
    steps = 20.0
    batch_size = true
    learning_rate = 1
    [trian]
    steps = 3
    [optimizer]
    name = "adm"
    lr = 0
    betas = [0.9]
    [objective]
    shift = "resolutoin"
    timesteps = [0.5, "x"]
    [validation]
    every = -1
    [[data]]
    captions = "constant"
    """
    expected = [
        "steps = 5: unknown key; did you mean train.steps?",
        "[trian]: unknown section; did you mean [train]? Sections: run, model,",
        'model.family = "flux2": expected one of "flux", "sdxl", "sd1", "sd2", "autoencoder"; '
        'did you mean "flux"?',
        "model.path: missing; expected a string",
        "train.step = 10: unknown key; did you mean train.steps? Keys of [train]: steps,",
        "train.steps = 20.0: expected an integer",
        "train.batch_size = true: expected an integer",
        "train.learning_rate = 1: unknown key; did you mean optimizer.lr?",
        'optimizer.name = "adm": expected one of "adamw"',
        "optimizer.lr = 0: expected a number, above 0",
        "optimizer.betas = [0.9]: expected a list of 2 numbers",
        'objective.shift = "resolutoin": expected one of "auto", "none", "resolution" or a number',
        'objective.timesteps = [0.5, "x"]: expected a list of numbers (item 1 is "x")',
        "validation.every = -1: expected an integer, at least 0",
        "data.0.path: missing",
        "data.0.caption: missing",
        "'nonsense': expected section.key=value",
        "adapter.rnak = 3: unknown key; did you mean adapter.rank?",
    ]
    found = problems(tmp_path, text, "nonsense", "adapter.rnak=3")
    for start in expected:
        assert sum(line.startswith(start) for line in found) == 1, start
    assert len(found) == len(expected), found


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["adapter.rank=0"], ["adapter.rank", "at least 1"]),
        (["train.caption_dropout=1.5"], ["at least 0 and at most 1"]),
        (["optimizer.betas=[0.9, 1.0]"], ["optimizer.betas", "below 1"]),
        (["optimizer.lr=inf"], ["optimizer.lr", "a number"]),
        (["run.seed=-1"], ["run.seed"]),
        (["run.name=a/b"], ["run.name", "one folder"]),
        (["run.output_dir="], ["run.output_dir"]),
        (["schedule.warmup_steps=3000"], ["schedule.warmup_steps", "train.steps = 2000"]),
        (["schedule.name=constant", "schedule.warmup_steps=1"], ["constant_with_warmup"]),
        (["data.captions=constant"], ["data.0.caption"]),
        (["data.caption=x"], ["data.0.caption", "textfile"]),
        (["data.caption_file=x.csv"], ["data.0.caption_file"]),
        (["data.held_out=0.1", "validation.held_out_path=x"], ["held_out_path"]),
        ([*AUTOENCODER[:1]], ["adapter.type", "autoencoder"]),
        ([*AUTOENCODER, "objective.prediction=velocity"], ["objective.prediction"]),
        ([*AUTOENCODER, "objective.timestep_sampling=uniform"], ["no timesteps"]),
        ([*AUTOENCODER, "validation.prompts=x"], ["validation.prompts"]),
        ([*AUTOENCODER, "precision.compute=bf16"], ["autoencoder", "fp32"]),
        ([*FLUX, "validation.negative_prompt=x"], ["validation.negative_prompt", "guidance"]),
        ([*WHOLE, "adapter.init_from=x"], ["adapter.init_from"]),
        ([*WHOLE, "precision.base=fp16", "precision.compute=fp16"], ["precision.base", "fp32"]),
        ([*WHOLE, "export.formats=kohya"], ['"kohya"', '"diffusers", "single_file"']),
        (["export.formats=single_file"], ['"single_file"', '"peft", "kohya", "comfyui"']),
        (['export.formats=["peft", "peft"]'], ["twice"]),
        ([*FLUX, "objective.min_snr_gamma=5"], ["min_snr_gamma", "flux"]),
        ([*FLUX, "objective.prediction=epsilon"], ["objective.prediction", "velocity"]),
        (["objective.prediction=velocity"], ["objective.prediction", "v_prediction"]),
        (["objective.timestep_sampling=mode"], ["timestep_sampling", "uniform"]),
        (
            ["objective.prediction=epsilon", "objective.zero_terminal_snr=true"],
            ["zero_terminal_snr", "v_prediction"],
        ),
        (["objective.timestep_sampling=explicit"], ["objective.timesteps: missing"]),
        (["objective.timesteps=[1]"], ["objective.timesteps", "explicit"]),
        (["objective.timestep_sampling=explicit", "objective.timesteps=[1.5]"], ["1.5"]),
        (["objective.timestep_sampling=explicit", "objective.timesteps=[1000]"], ["at most 999"]),
        (
            [*FLUX, "objective.timestep_sampling=explicit", "objective.timesteps=[0.5, 2]"],
            ["sigmas", "2 is outside"],
        ),
        (["objective.text_mask=true"], ["objective.text_mask", "flux"]),
        (["objective.guidance=3.5"], ["objective.guidance", "flux"]),
        (["objective.shift=3"], ["objective.shift", "flux"]),
        (["validation.resolutions=1024"], ["1024x768"]),
        (["validation.seeds=[]"], ["validation.seeds"]),
        (["adapter.targets=[]"], ["adapter.targets"]),
        (["data.0.x.y=1"], ["section.key=value"]),
        (["=3"], ["section.key=value"]),
    ],
)
def test_refused(tmp_path: Path, overrides: list[str], keys: list[str]) -> None:
    (line,) = problems(tmp_path, MINIMAL, *overrides)
    for key in keys:
        assert key in line


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("[model]\n[model]\n", ":2:"),
        ('[model]\nfamily = "sdxl\n', ":2:"),
        ("[model]\nfamily = sdxl\n", ":2:10: invalid TOML: Invalid value\n        family = sdxl\n"),
        ("[model]\npath = [1,", ":2:"),
    ],
)
def test_invalid_toml_names_the_place(tmp_path: Path, text: str, start: str) -> None:
    (line,) = problems(tmp_path, text)
    assert line.startswith(f"{tmp_path / 'config.toml'}{start}")


def test_unreadable_config(tmp_path: Path) -> None:
    (tmp_path / "sdxl.toml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*sdxl\.toml"):
        load_config(tmp_path / "sdlx.toml")
    with pytest.raises(ConfigError, match="a folder"):
        load_config(tmp_path)
    (tmp_path / "latin.toml").write_bytes("a = 'é'".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8 at byte 5"):
        load_config(tmp_path / "latin.toml")


def test_sections_and_sources_of_the_wrong_shape(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, "train = 3\n" + MINIMAL)
    assert line == "train = 3: expected a section, [train]"
    (line,) = problems(tmp_path, MINIMAL.replace("[[data]]", "[data]"))
    assert "double brackets" in line
    (line,) = problems(tmp_path, MINIMAL.partition("[[data]]")[0])
    assert line.startswith("[[data]]: missing")
    found = problems(tmp_path, "data = 3\n" + MINIMAL.partition("[[data]]")[0])
    assert found == ("data = 3: expected [[data]] tables",)
    found = problems(tmp_path, "data = [3]\n" + MINIMAL.partition("[[data]]")[0])
    assert found == ("data.0 = 3: expected a table, [[data]]",)


def test_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"1 problem in {tmp_path}/config.toml:\n  - train"):
        load(tmp_path, MINIMAL, "train.steps=x")


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = problems(
        tmp_path,
        MINIMAL,
        "model.path=./model",
        "adapter.init_from=lora.safetensors",
        "validation.held_out_path=held",
        check_files=True,
    )
    assert found == (
        f'model.path = "./model": no such folder (from {tmp_path})',
        'adapter.init_from = "lora.safetensors": no such file; expected a LoRA in .safetensors',
        f'data.0.path = "photos": no such folder (from {tmp_path})',
        f'validation.held_out_path = "held": no such folder (from {tmp_path})',
    )


def test_model_path_is_a_folder_or_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "file.safetensors").touch()
    for good in ("owner/name", "model", "./model", str(tmp_path / "model")):
        assert load(tmp_path, MINIMAL, f"model.path={good}", check_files=True).model.path == good
    for bad, why in (
        ("modle", "neither a folder here nor a hub id"),
        ("a/b/c", "no such folder"),
        (
            "file.safetensors",
            "is a single file; expected a folder in diffusers layout, as from_single",
        ),
        ("owner/model.safetensors", "is a single file"),
    ):
        (line,) = problems(tmp_path, MINIMAL, f"model.path={bad}", check_files=True)
        assert why in line


def test_caption_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (line,) = problems(tmp_path, MINIMAL, "data.captions=csv", check_files=True)
    assert "neither captions.csv nor metadata.csv is in photos" in line
    (line,) = problems(
        tmp_path, MINIMAL, "data.captions=csv", "data.caption_file=x.csv", check_files=True
    )
    assert line == 'data.0.caption_file = "x.csv": no such file in photos'
    (tmp_path / "photos" / "metadata.csv").touch()
    load(tmp_path, MINIMAL, "data.captions=csv", check_files=True)


def test_missing_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    monkeypatch.setattr("fasttune.config_checks.find_spec", lambda name: None)
    found = problems(
        tmp_path,
        MINIMAL,
        "logging.wandb=true",
        "logging.tensorboard=true",
        check_files=True,
    )
    assert found[0].startswith("logging.tensorboard: needs tensorboard, not installed here")
    assert found[0].endswith("pip install 'fasttune[tensorboard]'")
    assert found[1].endswith("pip install 'fasttune[wandb]'")


def random_value(hint: Any, key: str, rng: random.Random) -> Any:
    """A value of the annotation, awkward on purpose, within the key's bounds."""
    if is_union(hint):
        return random_value(rng.choice(get_args(hint)), key, rng)
    if hint is type(None):
        return None
    if get_origin(hint) is Literal:
        return rng.choice(get_args(hint))
    if get_origin(hint) is tuple:
        items = get_args(hint)
        count = rng.randrange(4) if items[-1] is Ellipsis else len(items)
        return tuple(random_value(items[0], key, rng) for _ in range(count))
    if hint is bool:
        return rng.random() < 0.5
    if hint is str:
        return "".join(
            rng.choices("aZ \"'\\\n\t\r#=[]é中\U0001f40d\x7f\x01", k=rng.randrange(1, 9))
        )
    bound = BOUNDS.get(key)
    candidates = [1, 17, 2**40] if hint is int else [0.5, 1e-30, 1 / 3, 1e22, 7.0]
    return rng.choice([v for v in candidates if bound is None or bound.holds(v)])


def test_round_trip_of_random_configs(tmp_path: Path) -> None:
    rng = random.Random(0)
    num_equal = 0
    for _ in range(600):
        overrides = ["model.family=" + rng.choice(["flux", "sdxl", "sd1", "sd2"])]
        for key in rng.sample(sorted(key_types()), 4):
            value = random_value(key_types()[key], key, rng)
            if key != "model.family":
                overrides.append(f"{key}={toml_value(value)}")
        try:
            config = load(tmp_path, MINIMAL, *overrides)
        except ConfigError as error:  # a clash: types and bounds were kept
            assert not any(": expected a" in line for line in error.problems), error
            continue
        assert load(tmp_path, to_toml(config)) == config, overrides
        num_equal += 1
    assert num_equal >= 200


def test_every_key_is_written(tmp_path: Path) -> None:
    text = to_toml(load(tmp_path))
    for section, cls in section_types().items():
        block = text.partition(f"[{section}]")[2].partition("\n\n")[0]
        assert [line.split(" = ")[0] for line in block.split("\n") if " = " in line] == [
            field.name for field in fields(cls)
        ]


def test_bounds_belong_to_keys_and_hold_for_defaults() -> None:
    for key, bound in BOUNDS.items():
        section, _, name = key.partition(".")
        default = next(f.default for f in fields(section_types()[section]) if f.name == name)
        items = default if isinstance(default, tuple) else (default,)
        assert all(bound.holds(item) for item in items if isinstance(item, int | float)), key


def test_defaults_are_of_their_own_type() -> None:
    for key, hint in key_types().items():
        section, _, name = key.partition(".")
        info = next(f for f in fields(section_types()[section]) if f.name == name)
        if info.default is not None and not repr(info.default).startswith("<"):
            given = list(info.default) if isinstance(info.default, tuple) else info.default
            assert convert(given, hint) == info.default, key


def test_config_errors_load_nothing_heavy(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(MINIMAL)
    code = (
        "import sys\n"
        "from fasttune.config_file import load_config\n"
        "from fasttune.errors import ConfigError\n"
        "try: load_config(sys.argv[1], ['train.steps=x'])\n"
        "except ConfigError: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
