"""Flow matching against diffusers' scheduler and pipeline and the SD3 paper."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, np, retrieve_timesteps

from fasttune import flow_matching
from fasttune.errors import ConfigError, ModelError
from fasttune.flow_matching import FlowMatching, sampling_sigmas
from fasttune.seeds import generator_for

FLUX_DEV = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


def scheduler(**config: object) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{k: v for k, v in config.items() if k[0] != "_"})


@pytest.mark.parametrize("num_steps", [1, 4, 28, 50])
@pytest.mark.parametrize("seq_len", [256, 1024, 4096, 4200])
def test_sampling_sigmas_are_those_of_the_flux_pipeline(num_steps: int, seq_len: int) -> None:
    theirs = scheduler(**FLUX_DEV)
    mu = calculate_shift(seq_len, 256, 4096, 0.5, 1.15)
    retrieve_timesteps(theirs, num_steps, sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    ours = sampling_sigmas(num_steps, seq_len, shift="resolution")
    assert ours.dtype == torch.float32 and ours[-1] == 0
    assert torch.equal(ours, theirs.sigmas)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampling_sigmas_with_a_static_shift(shift: float) -> None:
    theirs = scheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 4, 4))
    assert torch.equal(sampling_sigmas(4, 256, shift=shift), theirs.sigmas)
    if shift == 1.0:  # FLUX.1-schnell
        assert torch.equal(sampling_sigmas(4, 256, shift="none"), theirs.sigmas)


def test_interpolation_is_scale_noise() -> None:
    theirs = scheduler(shift=3.0)
    g = generator_for(0)
    x_0, eps = torch.randn(2, 8, 4, 6, 2, generator=g)
    index = torch.tensor([0, 1, 10, 300, 500, 900, 998, 999])
    expected = theirs.scale_noise(x_0, theirs.timesteps[index], eps)
    torch.testing.assert_close(
        flow_matching.interpolate(x_0, eps, theirs.sigmas[index]), expected, rtol=0, atol=1e-6
    )


def test_a_whole_denoising_loop_equals_the_schedulers() -> None:
    theirs = scheduler(**FLUX_DEV)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7), mu=0.8)
    x = expected = torch.randn(2, 3, 4, 4, generator=generator_for(1))
    for i, t in enumerate(theirs.timesteps):
        sigma, sigma_next = theirs.sigmas[i], theirs.sigmas[i + 1]
        expected = theirs.step(torch.sin(3 * expected), t, expected, return_dict=False)[0]
        x = flow_matching.euler_step(x, torch.sin(3 * x), sigma, sigma_next)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


def test_true_velocity_leads_from_noise_to_the_image_in_any_number_of_steps() -> None:
    x_0, eps = torch.randn(2, 1, 4, 4, 4, generator=generator_for(2))
    x = eps
    sigmas = sampling_sigmas(5, 1024, shift="resolution")
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = flow_matching.euler_step(x, flow_matching.velocity(x_0, eps), sigma, sigma_next)
    torch.testing.assert_close(x, x_0, rtol=0, atol=1e-5)


def test_resolution_mu_runs_from_half_to_1_15() -> None:
    mu = flow_matching.resolution_mu
    assert mu(256) == pytest.approx(0.5)
    assert mu(4096) == pytest.approx(1.15)
    assert mu(2176) == pytest.approx(0.825)
    for seq_len in (64, 1024, 4200, 9216):
        assert mu(seq_len) == calculate_shift(seq_len, 256, 4096, 0.5, 1.15)


def test_exponential_shift_is_the_static_shift_by_its_exponential() -> None:
    sigma = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(
        flow_matching.time_shift(1.15, sigma), flow_matching.static_shift(math.exp(1.15), sigma)
    )
    # SD3 paper, figure 6: with s = 3 half the noise becomes three quarters.
    assert flow_matching.static_shift(3.0, torch.tensor(0.5)) == 0.75


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.81, 1.29, 1.75])
def test_mode_sampling_is_equation_20(scale: float) -> None:
    # Independent form: cos^2(x) = (1 + cos 2x) / 2.
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    expected = 1 - u - scale * (torch.cos(math.pi * u) / 2 - 0.5 + u)
    ours = flow_matching.mode(u, scale=scale)
    torch.testing.assert_close(ours, expected)
    assert ours[0] == 1 and abs(ours[-1]) < 1e-15 and ours[500] == pytest.approx(0.5)
    assert (ours.diff() <= 1e-12).all()  # monotonic, as the paper says for this range of s


def draw(n: int = 200_000, seq_len: int = 1024, **kwargs: object) -> torch.Tensor:
    objective = FlowMatching(**{"shift": "none", **kwargs})  # type: ignore[arg-type]
    return objective.sample_times(n, seq_len, generator_for(3), "cpu")


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.6), (1.0, 2.0)])
def test_logit_normal_quantiles(mean: float, std: float) -> None:
    t = draw(timestep_sampling="logit_normal", logit_mean=mean, logit_std=std)
    logits = torch.logit(t.double())
    n = len(t)
    # Standard errors std / sqrt(n) and std / sqrt(2 n); five of them.
    assert abs(logits.mean() - mean) < 5 * std / math.sqrt(n)
    assert abs(logits.std() - std) < 5 * std / math.sqrt(2 * n)
    for z, p in ((-1.0, 0.158655), (0.0, 0.5), (1.0, 0.841345), (2.0, 0.977250)):
        below = (t < 1 / (1 + math.exp(-(mean + std * z)))).double().mean()
        assert abs(below - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_uniform_and_mode_densities() -> None:
    t = draw(timestep_sampling="uniform")
    assert abs(t.mean() - 0.5) < 5 / math.sqrt(12 * len(t))
    # P(t < f(u)) = 1 - u for a falling f: the fraction below f(0.8) is 0.2.
    t = draw(timestep_sampling="mode", mode_scale=1.29)
    for u in (0.2, 0.5, 0.8):
        edge = flow_matching.mode(torch.tensor(u), scale=1.29)
        assert abs((t < edge).double().mean() - (1 - u)) < 5 * math.sqrt(u * (1 - u) / len(t))
    middle = ((t > 0.25) & (t < 0.75)).double().mean()
    assert middle > 0.6  # the middle is favoured


def test_shift_is_applied_after_sampling_and_depends_on_the_size() -> None:
    plain = draw(timestep_sampling="logit_normal", n=1000)
    static = draw(timestep_sampling="logit_normal", shift=3.0, n=1000)
    torch.testing.assert_close(static, 3 * plain / (1 + 2 * plain), rtol=1e-5, atol=0)
    # In logits the exponential shift is an addition of mu.
    for seq_len, mu in ((256, 0.5), (4096, 1.15)):
        moved = draw(timestep_sampling="logit_normal", shift="resolution", n=1000, seq_len=seq_len)
        difference = torch.logit(moved.double()) - torch.logit(plain.double())
        torch.testing.assert_close(difference, torch.full_like(difference, mu), rtol=0, atol=1e-4)


def test_times_stay_inside_the_open_interval() -> None:
    for kwargs in (
        {"timestep_sampling": "logit_normal", "logit_mean": 30.0},
        {"timestep_sampling": "logit_normal", "logit_mean": -30.0},
        {"timestep_sampling": "uniform", "shift": 1e9},
        {"timestep_sampling": "mode", "mode_scale": 1.75},
    ):
        t = draw(n=50_000, **kwargs)
        assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1


def test_explicit_times_are_used_as_given() -> None:
    t = draw(timestep_sampling="explicit", timesteps=(0.0, 0.25, 1.0), shift=3.0, n=3000)
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == [0.0, 0.25, 1.0]
    assert (counts - 1000).abs().max() < 5 * math.sqrt(3000 * 2 / 9)


def test_explicit_times_go_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From host memory in each micro-batch they would be a synchronisation."""
    objective = FlowMatching(timestep_sampling="explicit", timesteps=(0.0, 0.25), shift="none")
    first = objective.sample_times(8, 256, generator_for(9), "cpu")
    monkeypatch.setattr(torch, "tensor", None)
    assert torch.equal(objective.sample_times(8, 256, generator_for(9), "cpu"), first)


def test_same_seed_same_times() -> None:
    assert torch.equal(
        draw(timestep_sampling="logit_normal", n=8), draw(timestep_sampling="logit_normal", n=8)
    )


def test_held_out_times_cover_the_range() -> None:
    objective = FlowMatching(timestep_sampling="logit_normal", shift="resolution")
    assert objective.held_out_times(4) == [0.125, 0.375, 0.625, 0.875]
    assert objective.held_out_times(1) == [0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_the_mean_squared_velocity_error_in_float32(dtype: torch.dtype) -> None:
    g = generator_for(4)
    x_0, eps = torch.randn(2, 3, 4, 4, 4, generator=g)
    t = torch.tensor([0.1, 0.5, 0.9])
    seen = []

    def predict(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.append((noisy, timestep))
        return (0.5 * noisy).to(dtype)

    objective = FlowMatching(timestep_sampling="uniform", shift="none")
    loss = objective.loss(predict, x_0.to(dtype), eps, t)
    noisy, timestep = seen[0]
    x, e, s = x_0.to(dtype).double(), eps.double(), t.double().view(3, 1, 1, 1)
    expected = ((0.5 * noisy).to(dtype).double() - (e - x)).square().mean((1, 2, 3))
    assert noisy.dtype == loss.dtype == torch.float32 and timestep is t
    torch.testing.assert_close(noisy.double(), (1 - s) * x + s * e, rtol=0, atol=1e-6)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_losses_by_name() -> None:
    x_0 = torch.zeros(1, 1, 1, 2)
    eps = torch.zeros(1, 1, 1, 2)
    error = torch.tensor([[[[0.05, 0.5]]]])
    for name, expected in (
        ("mse", (0.0025 + 0.25) / 2),
        ("l1", 0.275),
        ("huber", (0.0025 + 0.1 * (2 * 0.5 - 0.1)) / 2),
    ):
        objective = FlowMatching(
            timestep_sampling="uniform", shift="none", loss_name=name, huber_delta=0.1
        )
        loss = objective.loss(lambda x, t: error, x_0, eps, torch.tensor([0.5]))
        assert loss.item() == pytest.approx(expected)


def test_scheduler_config_of_flux_and_schnell() -> None:
    numbers = flow_matching.from_scheduler_config(FLUX_DEV)
    assert numbers == flow_matching.SchedulerNumbers(
        shift="resolution", base_shift=0.5, max_shift=1.15, base_seq_len=256, max_seq_len=4096
    )
    schnell = {**FLUX_DEV, "shift": 1.0, "use_dynamic_shifting": False}
    assert flow_matching.from_scheduler_config(schnell).shift == "none"
    assert flow_matching.from_scheduler_config({"shift": 3.0}).shift == 3.0
    saved = dict(scheduler(**FLUX_DEV).config)  # with every default written out
    assert flow_matching.from_scheduler_config(saved) == numbers
    with pytest.raises(ModelError, match="shift_terminal = 0.1"):
        flow_matching.from_scheduler_config({**FLUX_DEV, "shift_terminal": 0.1})


def test_wrong_values_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        FlowMatching(timestep_sampling="explicit", timesteps=(0.5, 500.0), shift=-1.0)
    assert len(caught.value.problems) == 2
    assert "500.0" in str(caught.value) and "objective.shift = -1.0" in str(caught.value)
    with pytest.raises(ConfigError, match="needs noise levels"):
        FlowMatching(timestep_sampling="explicit", shift="none")
    with pytest.raises(ConfigError, match="mode_scale = 2.0"):
        FlowMatching(timestep_sampling="mode", shift="none", mode_scale=2.0)
    with pytest.raises(ConfigError, match="logit_std = 0.0"):
        FlowMatching(timestep_sampling="logit_normal", shift="none", logit_std=0.0)
