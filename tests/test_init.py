"""`fasttune init`: asks or takes flags, and writes a config that loads and fits."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fasttune import init as init_module
from fasttune.config_file import load_config
from fasttune.config_template import CARDS, FAMILIES, METHODS, Choices, config_tables, find_card
from fasttune.errors import ConfigError, StorageError
from fasttune.init import detect_card, find_captions, init


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init_module, "detect_card", lambda: None)
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.txt").write_text("a dog")
    return folder


def script(given: dict[str, str], **kwargs: bool) -> Path:
    return init(given, ask=None, say=pytest.fail, **kwargs)


def answering(*answers: str) -> Callable[[str], str]:
    left = iter(answers)
    return lambda question: next(left)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_family_and_method_loads(photos: Path, family: str, method: str) -> None:
    given = {"family": family, "method": method, "card": "192GiB", "data": str(photos)}
    config = load_config(script(given))
    assert config.model.family == family
    assert (config.adapter.type == "lora") == (method == "lora")
    assert config.data[0].captions == "textfile"
    assert config.validation.prompts == ()


def test_is_commented(photos: Path) -> None:
    path = script({"data": str(photos), "card": "24"}, take_defaults=True)
    lines = path.read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert len(keys) > 30
    assert all(lines[i - 1].startswith("# ") for i in keys)
    assert max(map(len, lines)) <= 100


def test_asks_for_what_is_missing(photos: Path) -> None:
    said: list[str] = []
    path = init(
        {"family": "sd1"},
        ask=answering("", "rtx 4909", "RTX 3060", "nowhere", str(photos), "", "a dog", "my.toml"),
        say=said.append,
    )
    config = load_config(path)
    assert path == Path("my.toml")
    assert config.run.name == "my"
    assert (config.model.family, config.adapter.type) == ("sd1", "lora")
    assert config.model.path == FAMILIES["sd1"].model
    assert config.validation.prompts == ("a dog",)
    assert [line.split()[0] for line in said] == ["not", "no"]


def test_caption_is_asked_for_where_there_is_none(photos: Path) -> None:
    (photos / "a.txt").unlink()
    path = init(
        {"family": "sd1", "method": "lora", "card": "24", "data": str(photos)},
        ask=answering("", "a dog", "", "", ""),
        say=lambda line: None,
    )
    source = load_config(path).data[0]
    assert (source.captions, source.caption) == ("constant", "a dog")


def test_script_lists_what_is_missing(photos: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        script({"family": "sdxl"})
    assert caught.value.problems == ("missing: --method, --card or --vram, --data",)
    (photos / "a.txt").unlink()
    with pytest.raises(ConfigError, match="missing: --card or --vram, --caption"):
        script({"data": str(photos)}, take_defaults=True)


def test_wrong_answers_are_reported_together(photos: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        script({"family": "flu", "card": "x", "data": "nowhere", "out": "config"})
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "--family flu",
        "--card x",
        "--data nowhere",
        "--out config",
    ]


def test_model_that_is_not_there(photos: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path"):
        script({"data": str(photos), "card": "24", "model": "./sdxl"}, take_defaults=True)
    assert not list(photos.parent.glob("*.toml"))


def test_never_overwrites(photos: Path) -> None:
    given = {"data": str(photos), "card": "24"}
    path = script(given, take_defaults=True)
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists already; give another --out, or --force"):
        script(given, take_defaults=True)
    assert path.read_text() == "mine"
    script(given, take_defaults=True, overwrite=True)
    assert load_config(path)


def test_cannot_be_written(photos: Path) -> None:
    (photos.parent / "file").touch()
    with pytest.raises(StorageError, match=r"file/a\.toml"):
        script({"data": str(photos), "card": "24", "out": "file/a.toml"}, take_defaults=True)


def choices(family: str, method: str, card: str) -> Choices:
    return Choices(family=family, method=method, card=find_card(card), data="x", model="a/b")


@pytest.mark.parametrize(
    ("family", "method", "card", "optimizer", "batch_size"),
    [
        # Weights in 16 bits: 2 x 11.9e9 bytes = 22.2 GiB, of 25.6 usable ones.
        ("flux", "lora", "32GiB", "adamw", 1),
        # 2 x 2.57e9 bytes = 4.8 GiB: over a quarter of 12, under a quarter of 24, an eighth of 48.
        ("sdxl", "lora", "12GiB", "adamw", 1),
        ("sdxl", "lora", "24GiB", "adamw", 2),
        ("sdxl", "lora", "48GiB", "adamw", 4),
        # 16 x 2.57e9 = 38.3 GiB, 8 x 2.57e9 = 19.1 GiB.
        ("sdxl", "full", "48GiB", "adamw", 1),
        ("sdxl", "full", "24GiB", "adafactor", 1),
        ("sd1", "lora", "cpu", "adamw", 1),
    ],
)
def test_rules(family: str, method: str, card: str, optimizer: str, batch_size: int) -> None:
    tables = config_tables(choices(family, method, card))
    assert tables["optimizer"]["name"] == optimizer
    assert tables["train"]["batch_size"] == batch_size


@pytest.mark.parametrize(
    ("family", "method", "card", "needed"),
    [("flux", "lora", "24GiB", "28 GiB"), ("sdxl", "full", "16GiB", "24 GiB")],
)
def test_refuses_what_cannot_fit(family: str, method: str, card: str, needed: str) -> None:
    with pytest.raises(ConfigError, match=f"does not fit into .* {needed}"):
        config_tables(choices(family, method, card))


@pytest.mark.parametrize(
    ("text", "gib", "has_bf16"),
    [
        ("NVIDIA GeForce RTX 4090", 24, True),
        ("rtx-3080", 10, True),
        ("RTX 4070 Ti SUPER", 16, True),
        ("RTX 4070", 12, True),
        ("Tesla T4", 16, False),
        ("NVIDIA GeForce RTX 2080 Ti", 11, False),
        ("AMD Radeon RX 7900 XTX", 24, True),
        ("NVIDIA A100-SXM4-80GB", 80, True),
        ("NVIDIA H100 80GB HBM3", 80, True),
        ("24", 24, True),
        ("23.5 gb", 23.5, True),
        ("cpu", 0, True),
    ],
)
def test_cards(text: str, gib: float, has_bf16: bool) -> None:
    card = find_card(text)
    assert (card.gib, card.has_bf16) == (gib, has_bf16)


@pytest.mark.parametrize("text", ["", "RTX 4909", "24 kg", "0", "l400"])
def test_unknown_cards(text: str) -> None:
    with pytest.raises(ConfigError, match="24GiB"):
        find_card(text)


def test_every_card_finds_itself() -> None:
    assert all(find_card(name).gib == gib for name, gib in CARDS.items())


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("NVIDIA GeForce RTX 4090, 24564\n", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA Future 1, 40960\nNVIDIA L4, 23034\n", "40GiB"),
        ("", None),
        ("No devices were found\n", None),
    ],
)
def test_detects_the_card(monkeypatch: pytest.MonkeyPatch, output: str, found: str | None) -> None:
    monkeypatch.setattr(init_module.shutil, "which", lambda name: name)
    monkeypatch.setattr(
        init_module.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 0, stdout=output),
    )
    assert detect_card() == found


def test_finds_captions(tmp_path: Path) -> None:
    assert find_captions(str(tmp_path)) is None
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").touch()
    assert find_captions(str(tmp_path)) == "textfile"
    (tmp_path / "metadata.jsonl").touch()
    assert find_captions(str(tmp_path)) == "jsonl"
