"""What users get wrong, through the command line: one clear message with the file or key and the
remedy, exit status 2, no traceback, and earlier results intact."""

import errno
import json
import os
import shutil
import types
from pathlib import Path

import pytest

import fasttune.tensor_files
from fasttune.checkpoint import damage, list_checkpoints
from fasttune.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def config(tmp_path, tiny_sdxl, image_folder):
    """A small SDXL config with its own copy of model and images; returns the file's path."""
    shutil.copytree(tiny_sdxl, tmp_path / "model")
    image_folder(count=3, sizes=((64, 64),))
    path = tmp_path / "config.toml"
    path.write_text(f"""
[run]
name = "r"
output_dir = "{tmp_path / "runs"}"
device = "cpu"
[model]
family = "sdxl"
path = "{tmp_path / "model"}"
[[data]]
path = "{tmp_path / "images"}"
resolution = 64
[cache]
dir = "{tmp_path / "cache"}"
[train]
steps = 2
[validation]
every = 0
""")
    return path


@pytest.fixture
def refused(config, capsys):
    """Runs `fasttune train` and checks the manner of the refusal; returns the message."""

    def run(*arguments: str, contains: tuple[str, ...]) -> str:
        capsys.readouterr()
        assert main(["train", str(config), *arguments]) == 2
        printed = capsys.readouterr()
        text = printed.err[printed.err.index("error: ") :]
        assert "Traceback" not in printed.err + printed.out
        assert printed.err.count("error: ") == 1
        for part in contains:
            assert part in text, text
        return text

    return run


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_missing_folder(refused, tmp_path):
    refused(f"data.path={tmp_path / 'imgaes'}", contains=("data.0.path", "imgaes", str(tmp_path)))


def test_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(f"data.path={tmp_path / 'empty'}", contains=(str(tmp_path / "empty"), "no images"))


def test_no_captions(refused, tmp_path):
    for text in (tmp_path / "images").glob("*.txt"):
        text.unlink()
    refused(contains=(str(tmp_path / "images"), "caption", ".txt"))


def test_a_caption_without_an_image_is_reported_and_the_rest_trains(config, tmp_path, capsys):
    (tmp_path / "images" / "lonely.txt").write_text("no image")
    assert main(["train", str(config)]) == 0
    listed = json.loads((tmp_path / "runs" / "r" / "bad_files.json").read_text())
    assert any("lonely.txt" in entry["path"] for entry in listed["warnings"])
    assert "lonely.txt" in capsys.readouterr().err


def test_unreadable_files_are_listed_or_stop_the_run(config, refused, tmp_path, capsys):
    images = sorted((tmp_path / "images").glob("*.png"))
    images[0].write_bytes(b"")
    images[1].write_bytes(images[1].read_bytes()[:300])
    refused("data.on_bad_file=fail", contains=(images[0].name, "on_bad_file"))
    assert main(["train", str(config)]) == 0
    listed = json.loads((tmp_path / "runs" / "r" / "bad_files.json").read_text())["bad_files"]
    assert [Path(entry["path"]).name for entry in listed] == [images[0].name, images[1].name]
    error = capsys.readouterr().err
    assert images[0].name in error and images[1].name in error


def test_a_missing_shard_or_component_or_a_wrong_shape(refused, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    whole = dict(tensors)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :3].contiguous()
    save_file(tensors, weights)
    refused(contains=("conv_in.weight", "shape"))

    save_file(whole, weights)
    shutil.move(tmp_path / "model" / "text_encoder_2", tmp_path / "elsewhere")
    refused(contains=("text_encoder_2",))
    shutil.move(tmp_path / "elsewhere", tmp_path / "model" / "text_encoder_2")

    weights.unlink()
    names = sorted(whole)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    shards = [f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    save_file({name: whole[name] for name in first}, weights.parent / shards[0])
    index = dict.fromkeys(first, shards[0]) | dict.fromkeys(second, shards[1])
    text = json.dumps({"metadata": {}, "weight_map": index})
    (weights.parent / f"{weights.name}.index.json").write_text(text)
    refused(contains=(shards[1], "missing"))


def test_a_config_of_another_family(refused, tiny_flux):
    refused("model.family=sd1", contains=("sd1",))
    refused("model.family=flux", contains=("transformer", "model.family"))
    refused(f"model.path={tiny_flux}", contains=("unet",))


def test_a_checkpoint_of_another_model(config, refused, tmp_path):
    assert main(["train", str(config)]) == 0
    checkpoint = list_checkpoints(tmp_path / "runs" / "r" / "checkpoints")[-1]
    refused(
        "--resume", "latest", "adapter.rank=4", contains=(checkpoint.name, "shape", "config.toml")
    )
    refused("--resume", str(tmp_path / "nowhere"), contains=("nowhere", "--resume"))
    assert damage(checkpoint) is None


def test_a_full_disk_while_writing_a_checkpoint(config, refused, tmp_path, monkeypatch):
    assert main(["train", str(config)]) == 0
    earlier = list_checkpoints(tmp_path / "runs" / "r" / "checkpoints")[-1]

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # in the writing of tensors alone: the run's small files still fit
    disk = types.SimpleNamespace(getpid=os.getpid, replace=os.replace, fsync=full)
    monkeypatch.setattr(fasttune.tensor_files, "os", disk)
    refused(
        "--resume", "latest", "train.steps=4", contains=("step-000004", "No space left", "resume")
    )
    assert damage(earlier) is None
    monkeypatch.undo()
    assert main(["train", str(config), "--resume", "latest", "train.steps=4"]) == 0


def test_a_full_disk_while_caching(config, refused, tmp_path, monkeypatch):
    import fasttune.data.cache as cache

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "replace", full)
        refused(contains=("cache", "No space left"))
    assert main(["train", str(config)]) == 0


def test_a_folder_without_permission(refused, tmp_path, monkeypatch):
    """As root sees it: root may read everything, so the refusal is simulated."""
    scandir = os.scandir

    def denied(path="."):
        if str(path).startswith(str(tmp_path / "images")):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    refused(contains=(str(tmp_path / "images"), "Permission denied"))


def test_a_damaged_config_or_none_at_all(config, refused, capsys):
    config.write_text(config.read_text() + "\n[train]\n")
    refused(contains=(config.name, "invalid TOML"))
    assert main(["train", str(config.with_name("absent.toml"))]) == 2
    assert "absent.toml" in capsys.readouterr().err
