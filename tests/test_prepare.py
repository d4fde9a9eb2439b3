"""prepare as a whole, with encoders that count and can be killed, and with the tiny models."""

import dataclasses
import errno
import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fasttune.config import Cache as CacheConfig
from fasttune.config import Config, Data, Run, Validation
from fasttune.config import Model as ModelConfig
from fasttune.data import cache as cache_module
from fasttune.data import encode as encode_module
from fasttune.data import samples as samples_module
from fasttune.data.encode import Encoders
from fasttune.errors import DatasetError, StorageError
from fasttune.prepare import Model, Prepared, prepare, write_bad_files

ROOT = Path(__file__).parents[1]


class Fake:
    """A model whose encoders are cheap functions of their input, and that keeps count."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.alive: set[str] = set()
        self.captions: list[str] = []
        self.num_images = 0

    def open_autoencoder(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        self.opened.append("autoencoder")

        def encode(images: Tensor) -> tuple[Tensor, Tensor]:
            self.num_images += len(images)
            pooled = torch.nn.functional.avg_pool2d(images.float() / 127.5 - 1, 8)
            mean = torch.cat([pooled, pooled.mean(1, keepdim=True)], dim=1)
            return mean, mean.abs() / 10 + 0.01

        return encode

    def open_text(self, name: str, width: int) -> Callable[[], Callable[[list[str]], dict]]:
        def opener() -> Callable[[list[str]], dict[str, Tensor]]:
            self.opened.append(name)

            def encode(captions: list[str]) -> dict[str, Tensor]:
                self.captions += [f"{name}: {caption}" for caption in captions]
                rows = [torch.full((4, width), float(len(caption))) for caption in captions]
                return {"text_embeddings": torch.stack(rows)}

            return encode

        return opener

    def model(self) -> Model:
        def merge(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {"text_embeddings": torch.cat([p["text_embeddings"] for p in parts], dim=-1)}

        encoders = Encoders(
            image_identity="fake",
            text_identity="fake",
            open_autoencoder=self.open_autoencoder,
            open_text=(self.open_text("one", 2), self.open_text("two", 3)),
            merge_text=merge,
            empty_caption_is_zero=False,
            text_storage="fp32",
        )
        return Model(folder=Path("model"), multiple=16, encoders=encoders)


def config_for(folder: Path, cache: Path, **data: object) -> Config:
    options = {"resolution": 64, **data}
    return Config(
        run=Run(device="cpu"),
        model=ModelConfig(family="sdxl", path="model"),
        data=(Data(path=str(folder), **options),),  # type: ignore[arg-type]
        cache=CacheConfig(dir=str(cache), batch_size=2, workers=2),
    )


def contents(prepared: Prepared) -> dict[str, list[Tensor]]:
    """All that is cached, by path."""
    found = {}
    for cached in [*prepared.train, *prepared.held_out]:
        batch = prepared.reader.read([cached])
        assert batch.latent_std is not None
        name = f"{cached.sample.name} {cached.sample.repeat}"
        found[name] = [batch.latent_mean, batch.latent_std, batch.conditions["text_embeddings"]]
    return found


def assert_same(one: Prepared, other: Prepared) -> None:
    first, second = contents(one), contents(other)
    assert first.keys() == second.keys()
    for name, tensors in first.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, second[name], strict=True)), name


def test_each_encoder_opens_once_and_only_when_something_is_missing(
    tmp_path: Path, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder(count=7)
    for name in ("image_002.txt", "image_004.txt"):
        (folder / name).write_text("the same\n")
    config = dataclasses.replace(
        config_for(folder, tmp_path / "cache"), validation=Validation(prompts=("a prompt",))
    )
    fake = Fake()
    first = prepare(config, model=fake.model())
    assert fake.opened == ["one", "two", "autoencoder"]
    assert fake.num_images == 7
    # seven captions of which two are equal, the empty one, a prompt
    assert len(fake.captions) == 2 * (6 + 1 + 1)
    assert len(set(fake.captions)) == len(fake.captions)
    assert [s.sample.name for s in first.train] == [f"image_{i:03d}.png" for i in range(7)]
    conditions = first.conditions(["a prompt", ""])["text_embeddings"]
    assert conditions[:, 0, 0].tolist() == [8, 0]
    assert conditions.shape == (2, 4, 5)

    def never(*args: object) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(samples_module, "measure", never)
    monkeypatch.setattr(encode_module, "load_image", never)
    again = Fake()
    second = prepare(config, model=again.model())
    assert again.opened == []
    assert (second.summary.num_encoded_images, second.summary.num_encoded_captions) == (0, 0)
    assert_same(first, second)
    monkeypatch.undo()

    (folder / "image_001.txt").write_text("new words")
    Image.new("RGB", (64, 64)).save(folder / "image_000.png")
    changed = Fake()
    third = prepare(config, model=changed.model())
    assert changed.opened == ["one", "two", "autoencoder"]
    assert changed.captions == ["one: new words", "two: new words"]
    assert changed.num_images == 1
    assert torch.equal(third.reader.read([third.train[0]]).latent_mean, -torch.ones(1, 4, 8, 8))


def test_crops_repeats_and_held_out(tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    folder = image_folder(count=12, sizes=((200, 100),))
    held_out = image_folder(count=3, name="other")
    config = config_for(
        folder, tmp_path / "cache", crop="random", repeats=3, max_aspect=1.0, held_out=0.3
    )
    fake = Fake()
    prepared = prepare(config, model=fake.model())
    inside = {c.sample.name for c in prepared.held_out}
    assert 0 < len(inside) < 12
    assert len(prepared.train) == 3 * (12 - len(inside))
    lefts = {(c.sample.name, c.plan.left) for c in prepared.train}
    assert len(lefts) > len(prepared.train) / 2
    assert all(c.plan.left == 32 for c in prepared.held_out)  # 128 wide, 64 kept: the middle
    again = Fake()
    prepare(config, model=again.model())
    assert again.num_images == 0
    # without random crops the repeats share one entry
    fixed = Fake()
    config = config_for(folder, tmp_path / "fixed", repeats=3)
    config = dataclasses.replace(config, validation=Validation(held_out_path=str(held_out)))
    prepared = prepare(config, model=fixed.model())
    assert fixed.num_images == 12 + 3
    assert len(prepared.train) == 36
    assert [c.sample.path for c in prepared.held_out] == sorted(map(str, held_out.glob("*.png")))


def test_several_sources_with_their_own_resolution(
    tmp_path: Path, image_folder: Callable[..., Path]
) -> None:
    one = image_folder(count=2, name="one", sizes=((90, 90),))
    two = image_folder(count=3, name="two", sizes=((90, 90),), captions=False)
    config = config_for(one, tmp_path / "cache")
    second = Data(path=str(two), resolution=32, captions="constant", caption="a disc", repeats=2)
    config = dataclasses.replace(config, data=(*config.data, second))
    prepared = prepare(config, model=Fake().model())
    assert prepared.summary.images_per_source == ((str(one), 2), (str(two), 3))
    assert prepared.summary.buckets == {(64, 64): 2, (32, 32): 6}
    assert prepared.summary.tokens == (4, 16)
    assert {c.sample.caption for c in prepared.train if c.sample.source == 1} == {"a disc"}
    assert "5 images, 8 samples an epoch" in str(prepared.summary)


def test_sample_storage_keeps_one_reproducible_draw(
    tmp_path: Path, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(count=3)
    config = config_for(folder, tmp_path / "cache")
    moments = prepare(config, model=Fake().model())
    config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, latents="sample"))
    draws = prepare(config, model=Fake().model())
    config = dataclasses.replace(
        config, cache=dataclasses.replace(config.cache, dir=str(tmp_path / "other"), batch_size=3)
    )
    again = prepare(config, model=Fake().model())
    z = []
    for a, b, c in zip(moments.train, draws.train, again.train, strict=True):
        known, drawn = moments.reader.read([a]), draws.reader.read([b])
        assert known.latent_std is not None
        assert drawn.latent_std is None
        assert torch.equal(drawn.latent_mean, again.reader.read([c]).latent_mean)
        z.append(((drawn.latent_mean - known.latent_mean) / known.latent_std).flatten())
    together = torch.cat(z)
    assert abs(float(together.mean())) < 0.2  # 768 draws: standard error 0.036
    assert abs(float(together.std()) - 1) < 0.15
    assert float((z[0][:100] - z[1][:100]).abs().max()) > 0.1


def damage_some(folder: Path) -> None:
    path = folder / "image_001.png"
    path.write_bytes(path.read_bytes()[:-200])  # the header is fine
    (folder / "image_002.png").write_bytes(b"")
    (folder / "image_003.txt").unlink()
    (folder / "lonely.txt").write_text("no image")
    (folder / "image_004.txt").write_text("")


def test_bad_files_are_skipped_counted_and_listed(
    tmp_path: Path, image_folder: Callable[..., Path]
) -> None:
    folder = image_folder(count=6)
    damage_some(folder)
    config = config_for(folder, tmp_path / "cache")
    prepared = prepare(config, model=Fake().model())
    assert [c.sample.name for c in prepared.train] == [f"image_00{i}.png" for i in (0, 4, 5)]
    summary = str(prepared.summary)
    assert "3 files skipped:" in summary
    assert "is empty (0 bytes)" in summary
    assert "1 caption not used:" in summary
    assert "1 images with an empty one" in summary
    write_bad_files(tmp_path / "bad_files.json", prepared)
    listed = json.loads((tmp_path / "bad_files.json").read_text(encoding="utf-8"))
    reasons = {Path(bad["path"]).name: bad["reason"] for bad in listed["bad_files"]}
    assert reasons.keys() == {"image_001.png", "image_002.png", "image_003.png"}
    assert reasons["image_001.png"].startswith("is damaged or cut off")
    assert [Path(w["path"]).name for w in listed["warnings"]] == ["lonely.txt"]
    # known now: neither decoded again nor a reason to load the autoencoder
    again = Fake()
    second = prepare(config, model=again.model())
    assert again.opened == []
    assert {b.path for b in second.bad_files} == {b.path for b in prepared.bad_files}
    assert_same(prepared, second)


@pytest.mark.parametrize("name", ["image_001.png", "image_002.png", "image_003.png"])
def test_bad_files_can_stop_the_run(
    tmp_path: Path, image_folder: Callable[..., Path], name: str
) -> None:
    folder = image_folder(count=6)
    damage_some(folder)
    for other in ("image_001", "image_002", "image_003"):
        if not name.startswith(other):
            (folder / f"{other}.png").unlink()
            (folder / f"{other}.txt").unlink(missing_ok=True)
    config = config_for(folder, tmp_path / "cache", on_bad_file="fail")
    with pytest.raises(DatasetError, match=f'{folder}/{name}: .*on_bad_file = "skip"'):
        prepare(config, model=Fake().model())


def test_nothing_usable(tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    folder = image_folder(count=3)
    for path in folder.glob("*.png"):
        path.write_bytes(path.read_bytes()[:-200])
    config = config_for(folder, tmp_path / "cache")
    with pytest.raises(DatasetError, match="no image can be used") as caught:
        prepare(config, model=Fake().model())
    assert "image_002.png: is damaged" in str(caught.value)
    with pytest.raises(DatasetError, match="no image can be used"):  # all known by now
        prepare(config, model=Fake().model())
    whole = image_folder(count=3, name="whole")
    with pytest.raises(DatasetError, match=r"all 3 usable images are held out"):
        prepare(config_for(whole, tmp_path / "cache", held_out=1.0), model=Fake().model())
    with pytest.raises(DatasetError, match="does not exist"):
        prepare(config_for(tmp_path / "no", tmp_path / "cache"), model=Fake().model())


def test_a_full_disk_keeps_what_was_encoded(
    tmp_path: Path, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder(count=8)
    monkeypatch.setattr(cache_module, "SHARD_ITEMS", 2)
    reference = prepare(config_for(folder, tmp_path / "reference"), model=Fake().model())
    config = config_for(folder, tmp_path / "cache")
    real, calls = cache_module.save_file, []

    def full_at_the_eleventh(tensors: dict, path: Path) -> None:
        calls.append(path)
        if len(calls) == 11:  # ten shards of text, then one of latents
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(cache_module, "save_file", full_at_the_eleventh)
    with pytest.raises(StorageError, match="No space left"):
        prepare(config, model=Fake().model())
    assert len(calls) == 11
    fake = Fake()
    prepared = prepare(config, model=fake.model())
    assert fake.opened == ["autoencoder"]
    assert fake.num_images == 8
    assert_same(prepared, reference)


KILLED = textwrap.dedent(
    """
    import os, signal, sys

    root, where, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.path[:0] = [root, root + "/kernels", root + "/tests"]
    from fasttune.data import cache
    from test_prepare import Fake, config_for
    from fasttune.prepare import prepare
    from pathlib import Path

    cache.SHARD_ITEMS = 2
    calls = 0

    def dies_in(function, before=None):
        def call(*args, **kwargs):
            global calls
            calls += 1
            if calls == count:
                if before:
                    before(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call

    fake = Fake()
    if where == "encode":
        opener = fake.open_autoencoder
        fake.open_autoencoder = lambda: dies_in(opener())
    elif where == "write":
        half = lambda tensors, path: Path(path).write_bytes(b"half")
        cache.save_file = dies_in(cache.save_file, half)
    elif where == "index":
        original = os.replace
        os.replace = dies_in(original, original)
    prepare(config_for(Path(sys.argv[4]), Path(sys.argv[5])), model=fake.model())
    """
)


def test_killed_anywhere_and_resumed(
    tmp_path: Path, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL while encoding, while writing a shard, and between writing and indexing it."""
    monkeypatch.setattr(cache_module, "SHARD_ITEMS", 2)
    folder = image_folder(count=9)
    reference = prepare(config_for(folder, tmp_path / "reference"), model=Fake().model())
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    # Captions and images left. Text is 5 shards for each of 2 encoders. The 3 images of a bucket are
    # a batch of 2, which fills a shard, and a batch of 1, which is still pending at the kill.
    expected = {
        "write": (10 - 2 * 2, 10, 9),
        "index": (10 - 2 * 2 - 1 * 2, 10, 9),
        "encode": (0, 0, 9 - 2),
    }
    counts = {"write": "3", "index": "3", "encode": "3"}  # index: after bad_files.json's own rename
    for where, (first, second, images) in expected.items():
        command = [sys.executable, str(script), str(ROOT), where, counts[where]]
        command += [str(folder), str(tmp_path / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        with cache_module.Cache(tmp_path / "cache") as cache:
            one, two = (cache.space("text", f"fake-{i}-fp32") for i in range(2))
            latents = cache.space("latents", "fake-1-moments-fp16")
            assert (10 - len(one), 10 - len(two), 9 - len(latents)) == (first, second, images)
    fake = Fake()
    resumed = prepare(config_for(folder, tmp_path / "cache"), model=fake.model())
    assert (fake.opened, fake.num_images) == (["autoencoder"], 9 - 2)
    assert_same(resumed, reference)


def test_ctrl_c_keeps_finished_batches(tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    folder = image_folder(count=9)
    config = config_for(folder, tmp_path / "cache")
    fake = Fake()
    opener = fake.open_autoencoder

    def interrupted() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        encode = opener()

        def call(images: Tensor) -> tuple[Tensor, Tensor]:
            if fake.num_images >= 4:
                raise KeyboardInterrupt
            return encode(images)

        return call

    fake.open_autoencoder = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        prepare(config, model=fake.model())
    rest = Fake()
    prepare(config, model=rest.model())
    assert (rest.opened, rest.num_images) == (["autoencoder"], 9 - fake.num_images)


def test_progress_bars_go_to_stderr_when_asked(
    tmp_path: Path, image_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(count=3)
    prepare(config_for(folder, tmp_path / "quiet"), model=Fake().model())
    assert capsys.readouterr() == ("", "")
    prepare(config_for(folder, tmp_path / "loud"), model=Fake().model(), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "latents: 100%" in err
    assert "text encoder 2 of 2: 100%" in err
    assert "image/s" in err


def run_tiny(family: str, model: Path, folder: Path, cache: Path, **options: object) -> Prepared:
    config = config_for(folder, cache)
    return prepare(
        dataclasses.replace(
            config,
            model=ModelConfig(family=family, path=str(model)),  # type: ignore[arg-type]
            validation=Validation(prompts=("a prompt",)),
            cache=dataclasses.replace(config.cache, **options),  # type: ignore[arg-type]
        )
    )


THIRD_PARTY = "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"


@pytest.mark.filterwarnings(*THIRD_PARTY)
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_tiny_models(
    family: str, tmp_path: Path, image_folder: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    from diffusers import AutoencoderKL

    model = request.getfixturevalue(f"tiny_{family}")
    folder = image_folder(count=3, sizes=((64, 64),))
    prepared = run_tiny(family, model, folder, tmp_path / "cache")
    batch = prepared.reader.read(prepared.train)
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    pixels = np.stack([np.array(Image.open(c.sample.path)) for c in prepared.train])
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    torch.testing.assert_close(
        batch.latent_mean, (posterior.mean - shift) * scale, rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(batch.latent_std, posterior.std * scale, rtol=1e-3, atol=1e-4)
    zero = prepared.conditions(["", "a prompt"])["pooled_text_embeddings"]
    assert bool((zero[0] == 0).all()) == (family == "sdxl")
    assert bool((zero[1] != 0).any())
    stored = run_tiny(family, model, folder, tmp_path / "cache", text_storage="int8")
    assert stored.summary.num_encoded_images == 0
    small = stored.conditions(["a prompt"])["text_embeddings"]
    exact = prepared.conditions(["a prompt"])["text_embeddings"]
    assert (small - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()


@pytest.mark.filterwarnings(*THIRD_PARTY)
def test_the_autoencoder_family_caches_exact_pixels(
    tmp_path: Path, image_folder: Callable[..., Path], tiny_sdxl: Path
) -> None:
    folder = image_folder(count=2, sizes=((64, 64),), captions=False)
    config = config_for(folder, tmp_path / "cache", captions="filename")
    config = dataclasses.replace(
        config, model=ModelConfig(family="autoencoder", path=str(tiny_sdxl))
    )
    prepared = prepare(config)
    batch = prepared.reader.read(prepared.train)
    pixels = np.stack([np.array(Image.open(c.sample.path)) for c in prepared.train])
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 * 2 - 1
    assert torch.equal(batch.latent_mean, expected)
    assert batch.latent_std is None
    assert batch.conditions == {}
    shard = next((tmp_path / "cache").glob("latents-*"))
    assert shard.stat().st_size < 2 * 3 * 64 * 64 + 1000
