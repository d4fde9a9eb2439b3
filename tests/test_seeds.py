"""Seeds stay what they are: a change would change every run."""

import math

import torch

from fasttune.seeds import derive_seed, dropped, generator_for, seed_default


def test_seeds_are_stable_and_distinct() -> None:
    # Written down once; a different value would break the resuming of older runs.
    assert derive_seed(42, "noise", 17) == 4012229088984118144
    many = {derive_seed(s, name, i) for s in range(5) for name in ("a", "b") for i in range(500)}
    assert len(many) == 5000 and all(0 <= seed < 2**63 for seed in many)
    assert (
        len({derive_seed(1, 23), derive_seed(12, 3), derive_seed(1, "23"), derive_seed(123)}) == 4
    )


def test_generators_repeat_and_differ() -> None:
    a = torch.rand(4, generator=generator_for(1, "noise", 0))
    assert torch.equal(a, torch.rand(4, generator=generator_for(1, "noise", 0)))
    assert not torch.equal(a, torch.rand(4, generator=generator_for(1, "noise", 1)))


def test_default_generators_draw_as_after_manual_seed() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = torch.rand(4)
        seed_default(torch.device("cpu"), 5)
        assert torch.equal(torch.rand(4), expected)


def test_caption_dropout_has_its_rate_and_is_a_function_of_the_micro_batch() -> None:
    masks = torch.stack([dropped(7, i, 4, 0.1) for i in range(5000)])
    assert masks.dtype == torch.bool and masks.shape == (5000, 4)
    assert abs(masks.double().mean() - 0.1) < 5 * math.sqrt(0.09 / masks.numel())
    assert torch.equal(masks[123], dropped(7, 123, 4, 0.1))
    assert not dropped(7, 0, 1000, 0.0).any() and dropped(7, 0, 1000, 1.0).all()
