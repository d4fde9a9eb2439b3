"""The autoencoder objective against torch.distributions."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fasttune.errors import ConfigError
from fasttune.reconstruction import Reconstruction, kl_to_standard_normal
from fasttune.seeds import generator_for


def test_kl_equals_torch_distributions() -> None:
    mean, logvar = torch.randn(2, 3, 4, 2, 2, generator=generator_for(0))
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(kl_to_standard_normal(mean, logvar), expected)
    assert kl_to_standard_normal(mean, torch.full_like(mean, 1e4)).isfinite().all()


@pytest.mark.parametrize("name", ["mse", "l1"])
def test_loss(name: str) -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=generator_for(1)) * 2 - 1
    mean, logvar = torch.randn(2, 2, 4, 2, 2, generator=generator_for(2))
    objective = Reconstruction(kl_weight=0.01, loss_name=name)  # type: ignore[arg-type]
    t = objective.sample_times(2, 0, generator_for(3), "cpu")
    assert t.tolist() == [0.0, 0.0] and t.dtype == torch.float32
    assert objective.held_out_times(8) == [0.0]
    loss = objective.loss(lambda x, t: (0.9 * x, mean, logvar), pixels, torch.zeros(2), t)
    error = (0.1 * pixels).abs() if name == "l1" else (0.1 * pixels).square()
    kl = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(loss, error.mean((1, 2, 3)) + 0.01 * kl / (3 * 16 * 16))


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="kl_weight = -1"):
        Reconstruction(kl_weight=-1.0)
