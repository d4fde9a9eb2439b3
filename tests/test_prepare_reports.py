"""What prepare says and refuses: held-out images, bad files, long captions, disk, memory, progress."""

import dataclasses
import json
import logging
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasttune.config import Cache as CacheConfig
from fasttune.config import Config, Data, Run, Validation
from fasttune.config import Model as ModelConfig
from fasttune.config import Train as TrainConfig
from fasttune.data import progress as progress_module
from fasttune.data.encode import Encoders
from fasttune.errors import DatasetError, HardwareError, StorageError
from fasttune.prepare import Model, Prepared, prepare

LIMIT = 40
"""Characters that the text encoder reads."""


class Text:
    """Says which captions it cut, as TextEncoder does."""

    def __init__(self) -> None:
        self.truncated: dict[str, str] = {}

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        long = [caption for caption in captions if len(caption) > LIMIT]
        self.truncated = {c: f"the encoder reads {LIMIT} of its {len(c)} characters" for c in long}
        return {"text_embeddings": torch.ones(len(captions), 4, 3)}


def encode_image(images: Tensor) -> tuple[Tensor, Tensor]:
    pooled = torch.nn.functional.avg_pool2d(images.float() / 255, 8)
    return pooled, pooled / 10


def model(
    images: Callable[[Tensor], tuple[Tensor, Tensor]] = encode_image, **options: object
) -> Model:
    encoders = Encoders(
        image_identity="small",
        text_identity="small",
        open_autoencoder=lambda: images,
        open_text=(Text,),
        merge_text=lambda parts: parts[0],
        empty_caption_is_zero=False,
        text_storage="fp32",
        **options,  # type: ignore[arg-type]
    )
    return Model(folder=Path("model"), multiple=16, encoders=encoders)


def config_for(
    *folders: Path,
    cache: Path,
    held_out_path: Path | None = None,
    batch_size: int = 1,
    **data: object,
) -> Config:
    options = {"resolution": 64, **data}
    return Config(
        run=Run(device="cpu"),
        model=ModelConfig(family="sdxl", path="model"),
        data=tuple(Data(path=str(folder), **options) for folder in folders),  # type: ignore[arg-type]
        cache=CacheConfig(dir=str(cache), batch_size=4, workers=2),
        train=TrainConfig(batch_size=batch_size),
        validation=Validation(held_out_path=None if held_out_path is None else str(held_out_path)),
    )


def listed(cache: Path) -> dict[str, list[dict[str, str]]]:
    return json.loads((cache / "bad_files.json").read_text(encoding="utf-8"))


def paths(prepared: Prepared) -> tuple[set[str], set[str]]:
    return (
        {c.sample.real_path for c in prepared.train},
        {c.sample.real_path for c in prepared.held_out},
    )


def test_the_held_out_folder_is_not_trained_on(
    tmp_path: Path, image_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = image_folder(count=5)
    inside = image_folder(count=2, name="images/val")
    (tmp_path / "link").symlink_to(inside)
    for held_out in (inside, tmp_path / "link"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            config = config_for(folder, cache=tmp_path / "cache", held_out_path=held_out)
            prepared = prepare(config, model=model())
        train, held = paths(prepared)
        assert train == {str(p) for p in folder.glob("*.png")}
        assert held == {str(p) for p in inside.glob("*.png")}
        assert "2 images of the sources lie in validation.held_out_path" in caplog.text
        assert prepared.summary.num_dropped == 2
    with pytest.raises(DatasetError, match=r"nothing is left .* 7 images lie in validation\.held_"):
        prepare(config_for(folder, cache=tmp_path / "cache", held_out_path=folder), model=model())


def test_sources_that_overlap_hold_out_the_same(
    tmp_path: Path, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(count=6)
    inside = image_folder(count=14, name="images/more")
    config = config_for(folder, inside, cache=tmp_path / "cache")
    second = dataclasses.replace(config.data[1], held_out=0.4)
    prepared = prepare(dataclasses.replace(config, data=(config.data[0], second)), model=model())
    train, held_out = paths(prepared)
    assert held_out and not train & held_out
    assert len(train | held_out) == 20


def test_a_held_out_folder_without_its_table_is_named(
    tmp_path: Path, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(count=2, captions=False)
    lines = [json.dumps({"file_name": f"image_00{i}.png", "caption": "a"}) for i in range(2)]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    other = image_folder(count=1, captions=False, name="other")
    config = config_for(folder, cache=tmp_path / "cache", held_out_path=other, captions="jsonl")
    with pytest.raises(DatasetError, match=rf"^validation\.held_out_path = '{other}': captions"):
        prepare(config, model=model())


def test_bad_files_are_listed_before_a_run_stops(
    tmp_path: Path, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(count=3)
    (folder / "image_000.png").write_bytes(b"")
    (folder / "alone.txt").write_text("x")
    (folder / "x.npz").write_bytes(b"x")
    cache = tmp_path / "cache"
    prepared = prepare(config_for(folder, cache=cache), model=model())
    text = str(prepared.summary)
    assert f"listed in {cache}/bad_files.json" in text
    assert "1 other files, no images by their ending, not read (.npz: 1)" in text
    assert [Path(b["path"]).name for b in listed(cache)["bad_files"]] == ["image_000.png"]
    assert [Path(b["path"]).name for b in listed(cache)["warnings"]] == ["alone.txt"]

    strict = tmp_path / "strict"
    with pytest.raises(DatasetError, match=rf"listed in {strict}/bad_files\.json"):
        prepare(config_for(folder, cache=strict, on_bad_file="fail"), model=model())
    assert len(listed(strict)["bad_files"]) == 1

    missing = tmp_path / "missing"  # the second source stops the scan
    with pytest.raises(DatasetError, match="does not exist"):
        prepare(config_for(folder, tmp_path / "no", cache=missing), model=model())
    assert len(listed(missing)["bad_files"]) == 1

    for path in folder.glob("*.png"):  # whole headers, so that only decoding tells
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DatasetError, match="no image can be used"):
        prepare(config_for(folder, cache=tmp_path / "damaged"), model=model())
    assert len(listed(tmp_path / "damaged")["bad_files"]) == 3


def test_truncated_captions_are_listed_on_every_start(
    tmp_path: Path, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(count=4)
    (folder / "image_001.txt").write_text("long " * 20)
    (folder / "image_003.txt").write_text("long " * 20)
    config = config_for(folder, cache=tmp_path / "cache", repeats=2)
    for _ in range(2):
        prepared = prepare(config, model=model())
        prepared.cache.close()
        assert prepared.summary.num_truncated == 2
        assert "2 images have captions longer than a text encoder reads" in str(prepared.summary)
        warnings = listed(tmp_path / "cache")["warnings"]
        assert [Path(w["path"]).name for w in warnings] == ["image_001.png", "image_003.png"]
        assert "the encoder reads 40 of its 99 characters" in warnings[0]["reason"]
        assert [w.path for w in prepared.warnings] == [w["path"] for w in warnings]
    assert prepared.summary.num_encoded_captions == 0
    (folder / "image_001.txt").write_text("short")
    assert prepare(config, model=model()).summary.num_truncated == 1


def test_filled_batches_are_counted_and_heavy_ones_named(
    tmp_path: Path, image_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = image_folder(count=5, sizes=((64, 64),))
    image_folder(count=1, sizes=((128, 64),), name="images/wide")
    config = config_for(folder, cache=tmp_path / "cache", batch_size=4)
    prepared = prepare(config, model=model())
    assert set(prepared.summary.filled.values()) == {3}
    assert "64x64: 5 (+3 to fill the batch)" in str(prepared.summary)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "samples of 2 buckets are visited more than 1.5 times an epoch" in warning
    assert "1 samples, 4.0 times; 64x64: 5 samples, 1.6 times" in warning
    caplog.clear()
    config = config_for(folder, cache=tmp_path / "cache", batch_size=1)
    assert prepare(config, model=model()).summary.filled == {}
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("known", "free"), [(3 / 64, 9000), (None, 9000), (None, 250)])
def test_too_little_disk_is_said_before_it_is_filled(
    tmp_path: Path,
    image_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    known: float | None,
    free: int,
) -> None:
    """Latents: 8 x (3 x 8 x 8 x 2 halves x 2 bytes) = 6144; text: 9 x 48 = 432."""
    folder = image_folder(count=8, sizes=((64, 64),))
    config = config_for(folder, cache=tmp_path / "cache")
    encoded: list[int] = []

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        encoded.append(len(images))
        return encode_image(images)

    small = model(encode, latents_per_pixel=known)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, free - 5000))
    what = "text embeddings" if free == 250 else "latents"
    amount = r"0\.4 KiB of text" if free == 250 else r"6\.0 KiB of latents"
    with pytest.raises(StorageError, match=amount) as caught:
        prepare(config, model=small)
    assert what in str(caught.value)
    assert "are free; free some space, set cache.dir" in str(caught.value)
    assert encoded == ([4] if known is None and free == 9000 else [])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 6600))
    assert prepare(config, model=small).summary.num_encoded_images == 8


def test_the_estimate_is_logged(
    tmp_path: Path, image_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = image_folder(count=2, sizes=((64, 64),))
    config = config_for(folder, cache=tmp_path / "cache")
    with caplog.at_level(logging.INFO):
        prepare(config, model=model(latents_per_pixel=3 / 64))
    assert "about 1.5 KiB of latents to write" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        prepare(config, model=model(latents_per_pixel=3 / 64))
    assert "to write" not in caplog.text


def test_without_a_terminal_progress_is_logged(
    tmp_path: Path,
    image_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = image_folder(count=6, sizes=((64, 64),))
    config = config_for(folder, cache=tmp_path / "cache")
    clock = iter(range(0, 10**6, 20))  # every look at it 20 s later
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO):
        prepare(config, model=model())
    lines = [r.getMessage() for r in caplog.records if r.name == progress_module.__name__]
    assert any(line.startswith("latents: 6 of 6 images, 0:00 left, ") for line in lines)
    assert any(line.startswith("text encoder 1 of 1: ") for line in lines)
    scanned = [line for line in lines if line.startswith(f"scan {folder}: ")]
    assert [line.split(": ")[1].split(",")[0] for line in scanned] == [
        "2 files",
        "4 files",
        "6 files",
    ]
    caplog.clear()
    monkeypatch.undo()
    with caplog.at_level(logging.INFO):  # faster than half a minute
        prepare(config_for(folder, cache=tmp_path / "other"), model=model())
    assert not [r for r in caplog.records if r.name == progress_module.__name__]


def test_out_of_memory_halves_the_batch(
    tmp_path: Path, image_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = image_folder(count=8, sizes=((64, 64),))
    sizes: list[int] = []

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode_image(images)

    tight = prepare(config_for(folder, cache=tmp_path / "tight"), model=model(encode))
    assert sizes == [4, 2] + [1] * 8
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "out of memory while encoding 4 images" in warnings[0]
    roomy = prepare(config_for(folder, cache=tmp_path / "roomy"), model=model())
    one, other = tight.reader.read(tight.train), roomy.reader.read(roomy.train)
    assert torch.equal(one.latent_mean, other.latent_mean)

    def never(images: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(HardwareError, match=r"one image of 64 x 64 pixels .*data\.resolution"):
        prepare(config_for(folder, cache=tmp_path / "never"), model=model(never))
