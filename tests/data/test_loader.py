"""Batches as a pure function of (seed, index), and the thread that prepares them."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasttune.data.buckets import CropPlan
from fasttune.data.cache import Cache, make_key
from fasttune.data.loader import Batch, BatchPlan, CachedSample, Reader, fixed_batches, load
from fasttune.data.samples import Sample
from fasttune.data.storage import pack, split
from fasttune.errors import DatasetError
from fasttune.seeds import dropped

BUCKETS = [(64, 64)] * 7 + [(96, 64)] * 5 + [(64, 96)] * 1 + [(32, 32)] * 8


def test_any_index_equals_the_sequence() -> None:
    plan = BatchPlan(BUCKETS, batch_size=4, seed=1)
    assert plan.batches_per_epoch == 2 + 2 + 1 + 2
    sequence = [plan.batch(i) for i in range(50)]
    for index in (49, 0, 13, 12, 30, 7):
        assert BatchPlan(BUCKETS, batch_size=4, seed=1).batch(index) == sequence[index]
    assert [plan.batch(i) for i in reversed(range(50))] == sequence[::-1]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 16])
def test_an_epoch_has_every_sample_and_batches_of_one_bucket(batch_size: int) -> None:
    plan = BatchPlan(BUCKETS, batch_size=batch_size, seed=5)
    for epoch in range(3):
        start = epoch * plan.batches_per_epoch
        batches = [plan.batch(start + i) for i in range(plan.batches_per_epoch)]
        assert all(len(batch) == batch_size for batch in batches)
        assert all(len({BUCKETS[i] for i in batch}) == 1 for batch in batches)
        counts = Counter(i for batch in batches for i in batch)
        assert set(counts) == set(range(len(BUCKETS)))
        for bucket in set(BUCKETS):
            members = [i for i, b in enumerate(BUCKETS) if b == bucket]
            filled = -(-len(members) // batch_size) * batch_size
            assert sum(counts[i] for i in members) == filled
            assert max(counts[i] for i in members) - min(counts[i] for i in members) <= 1
        if batch_size == 1:
            assert set(counts.values()) == {1}


def test_epochs_and_seeds_differ_and_buckets_mix() -> None:
    plan = BatchPlan([(64, 64)] * 50 + [(32, 32)] * 50, batch_size=1, seed=0)
    epochs = [[plan.batch(100 * e + i)[0] for i in range(100)] for e in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = BatchPlan([(64, 64)] * 50 + [(32, 32)] * 50, batch_size=1, seed=1)
    assert [other.batch(i)[0] for i in range(100)] != epochs[0]
    switches = sum((a < 50) != (b < 50) for a, b in zip(epochs[0], epochs[0][1:], strict=False))
    assert 30 < switches < 70  # 50 expected of a shuffle, standard deviation 5


def test_the_order_is_pinned() -> None:
    """Changing this breaks the resumption of runs that are under way."""
    plan = BatchPlan([(64, 64)] * 6 + [(32, 32)] * 3, batch_size=2, seed=42)
    assert [plan.batch(i) for i in range(6)] == [[7, 8], [0, 2], [6, 7], [1, 4], [5, 3], [4, 5]]


def make_sample(number: int, bucket: tuple[int, int]) -> CachedSample:
    sample = Sample(
        f"/{number}.png", f"{number}.png", 1, 1, 0, 0, f"{number}", 70, 80, False, f"/{number}.png"
    )
    plan = CropPlan(bucket[0] + 4, bucket[1], 4, 0, *bucket)
    return CachedSample(sample, plan, make_key("image", number), make_key(f"{number}"))


def merge(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    first, second = parts
    joined = torch.cat([first["text_embeddings"], second["text_embeddings"]], dim=-1)
    return {"text_embeddings": joined, "text_mask": second["text_mask"]}


@pytest.fixture
def samples() -> list[CachedSample]:
    return [make_sample(number, bucket) for number, bucket in enumerate(BUCKETS)]


@pytest.fixture
def reader(tmp_path: Path, samples: list[CachedSample]) -> Iterator[Reader]:
    """Latents, and embeddings of width 2 and 3 in int8, all full of the sample's number + 1."""
    with Cache(tmp_path) as cache:
        latents = cache.space("latents", "m")
        text = (cache.space("text", "1"), cache.space("text", "2"))
        with latents.writer() as writer, text[0].writer() as one, text[1].writer() as two:
            for number, sample in enumerate(samples):
                width, height = sample.plan.bucket
                mean = torch.full((1, 4, height // 8, width // 8), number + 1.0)
                tensors = pack({"mean": mean, "std": mean / 10}, "fp16")
                writer.add([(sample.latents_key, split(tensors)[0])])
            for number in range(-1, len(samples)):
                key = make_key("" if number < 0 else f"{number}")
                value = number + 1.0 if number >= 0 else 100.0
                mask = torch.ones(1, 5, dtype=torch.bool)
                for writer, width in ((one, 2), (two, 3)):
                    embeddings = torch.full((1, 5, width), value)
                    row = {"text_embeddings": embeddings, "text_mask": mask}
                    writer.add([(key, split(pack(row, "int8"))[0])])
        yield Reader(latents, text, merge, make_key(""), False)


def test_a_batch_holds_what_was_cached(samples: list[CachedSample], reader: Reader) -> None:
    batch = reader.read([samples[2], samples[0]], micro_batch=7)
    assert batch.latent_mean.shape == (2, 4, 8, 8)
    assert batch.latent_mean.dtype == torch.float32
    assert batch.latent_mean[:, 0, 0, 0].tolist() == [3, 1]
    assert batch.latent_std is not None
    torch.testing.assert_close(
        batch.latent_std[:, 0, 0, 0], torch.tensor([0.3, 0.1]), rtol=1e-3, atol=0
    )
    assert batch.conditions["text_embeddings"].shape == (2, 5, 5)
    torch.testing.assert_close(
        batch.conditions["text_embeddings"][:, 0, 0], torch.tensor([3.0, 1.0])
    )
    assert batch.conditions["text_mask"].dtype == torch.bool
    assert batch.sizes.tolist() == [[80, 70, 0, 4, 64, 64]] * 2
    assert batch.sizes.dtype == torch.float32
    assert (batch.paths, batch.micro_batch) == (["/2.png", "/0.png"], 7)


def test_latents_are_drawn_from_the_moments(samples: list[CachedSample], reader: Reader) -> None:
    batch = reader.read([samples[i] for i in range(13, 21)])
    draws = torch.stack(
        [batch.draw_latents(torch.Generator().manual_seed(seed)) for seed in range(200)]
    )
    assert batch.latent_std is not None
    z = (draws - batch.latent_mean) / batch.latent_std
    assert abs(float(z.mean())) < 0.01  # 204,800 draws: standard error 0.002
    assert abs(float(z.std()) - 1) < 0.01
    again = batch.draw_latents(torch.Generator().manual_seed(3))
    assert torch.equal(again, draws[3])


@pytest.mark.parametrize("zero", [False, True])
def test_dropped_captions(samples: list[CachedSample], reader: Reader, zero: bool) -> None:
    from dataclasses import replace

    reader = replace(reader, empty_caption_is_zero=zero)
    batch = reader.read(samples[:2], without_caption=[True, False])
    expected = torch.tensor([0.0 if zero else 100.0, 2.0])
    torch.testing.assert_close(batch.conditions["text_embeddings"][:, 0, 0], expected)
    assert batch.conditions["text_mask"].all()
    conditions = reader.conditions([make_key(""), make_key("4")])
    torch.testing.assert_close(
        conditions["text_embeddings"][:, 4, 4], torch.tensor([expected[0], 5.0])
    )


def test_load_gives_the_planned_batches_from_any_start(
    samples: list[CachedSample], reader: Reader
) -> None:
    plan = BatchPlan([s.plan.bucket for s in samples], batch_size=2, seed=3)
    options = {"seed": 3, "caption_dropout": 0.5}

    def values(start: int, stop: int) -> list[tuple[int, list[str], list[float]]]:
        with load(samples, plan, reader, start=start, stop=stop, **options) as batches:  # type: ignore[arg-type]
            return [
                (b.micro_batch, b.paths, b.conditions["text_embeddings"][:, 0, 0].tolist())
                for b in batches
            ]

    everything = values(0, 30)
    assert [index for index, _, _ in everything] == list(range(30))
    for index, paths, _ in everything:
        assert paths == [samples[i].sample.path for i in plan.batch(index)]
    assert values(17, 23) == everything[17:23]
    for index, _, text in everything:
        empty = [abs(value - 100) < 1e-3 for value in text]
        assert empty == dropped(3, index, 2, 0.5).tolist()


def test_the_thread_runs_ahead_only_so_far_and_ends(
    samples: list[CachedSample], reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = BatchPlan([s.plan.bucket for s in samples], batch_size=1, seed=0)
    asked: list[int] = []
    real = plan.batch
    monkeypatch.setattr(plan, "batch", lambda i: asked.append(i) or real(i))
    before = threading.active_count()
    loader = load(samples, plan, reader, seed=0, prefetch=2)
    assert next(loader).micro_batch == 0
    deadline = time.monotonic() + 10
    while len(asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert asked == [0, 1, 2, 3]  # one taken, two waiting, one in hand
    assert loader.wait_seconds > 0
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(loader)


def test_errors_of_the_thread_reach_the_loop(samples: list[CachedSample], reader: Reader) -> None:
    plan = BatchPlan([s.plan.bucket for s in samples], batch_size=1, seed=0)
    for shard in reader.latents._cache.folder.glob("latents-*"):
        shard.unlink()
    with load(samples, plan, reader, seed=0) as batches:
        with pytest.raises(DatasetError, match="is missing or damaged"):
            next(batches)
        with pytest.raises(StopIteration):
            next(batches)


def test_fixed_batches_have_everything_once(samples: list[CachedSample]) -> None:
    batches = fixed_batches(samples, 3)
    assert sorted(i for batch in batches for i in batch) == list(range(len(samples)))
    assert all(len({samples[i].plan.bucket for i in batch}) == 1 for batch in batches)
    assert sorted(map(len, batches)) == [1, 1, 2, 2, 3, 3, 3, 3, 3]
    assert fixed_batches(samples, 3) == batches
    assert fixed_batches([], 3) == []


@pytest.mark.gpu
def test_batches_on_the_gpu_equal_those_on_the_cpu(
    samples: list[CachedSample], reader: Reader
) -> None:
    plan = BatchPlan([s.plan.bucket for s in samples], batch_size=2, seed=3)

    def tensors(batch: Batch) -> list[Tensor]:
        assert batch.latent_std is not None
        return [batch.latent_mean, batch.latent_std, batch.sizes, *batch.conditions.values()]

    with (
        load(samples, plan, reader, seed=1, stop=40) as on_cpu,
        load(samples, plan, reader, seed=1, stop=40, device="cuda") as on_gpu,
    ):
        for one, other in zip(on_cpu, on_gpu, strict=True):
            for expected, found in zip(tensors(one), tensors(other), strict=True):
                assert found.device.type == "cuda"
                assert torch.equal(found.cpu(), expected)
