"""DDPM objectives against diffusers' schedulers and the papers' numbers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from fasttune import ddpm
from fasttune.ddpm import Ddpm, alphas_cumprod, sampling_schedule
from fasttune.errors import ConfigError, ModelError
from fasttune.seeds import generator_for

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.mark.parametrize("betas", [SD, LINEAR])
def test_alphas_cumprod_equal_diffusers(betas: dict) -> None:
    theirs = DDPMScheduler(**betas).alphas_cumprod
    ours = alphas_cumprod(**betas)
    assert ours.dtype == torch.float64
    # The scheduler multiplies a thousand float32 factors: relative error 1000 * 2^-24 at most.
    torch.testing.assert_close(ours.float(), theirs, rtol=6e-5, atol=0)


def test_zero_terminal_snr_equals_diffusers_and_ends_in_pure_noise() -> None:
    theirs = DDPMScheduler(**SD, rescale_betas_zero_snr=True).alphas_cumprod
    ours = alphas_cumprod(**SD, zero_terminal_snr=True)
    torch.testing.assert_close(ours.float(), theirs, rtol=2e-4, atol=1e-7)
    assert ours[-1] == 0
    torch.testing.assert_close(ours[0], alphas_cumprod(**SD)[0])
    # https://arxiv.org/abs/2305.08891, table 1: Stable Diffusion keeps sqrt(abar_T) = 0.068265.
    assert alphas_cumprod(**SD)[-1].sqrt() == pytest.approx(0.068265, abs=5e-7)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_and_velocity_equal_diffusers(zero_snr: bool) -> None:
    theirs = DDPMScheduler(**SD, rescale_betas_zero_snr=zero_snr)
    g = generator_for(0)
    x_0, eps = torch.randn(2, 6, 4, 3, 5, generator=g)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    abar = alphas_cumprod(**SD, zero_terminal_snr=zero_snr)[t]
    signal, std = abar.sqrt(), (1 - abar).sqrt()
    noisy, velocity = theirs.add_noise(x_0, eps, t), theirs.get_velocity(x_0, eps, t)
    torch.testing.assert_close(ddpm.add_noise(x_0, eps, signal, std), noisy, rtol=0, atol=3e-5)
    torch.testing.assert_close(ddpm.v_target(x_0, eps, signal, std), velocity, rtol=0, atol=3e-5)
    if zero_snr:
        assert torch.equal(ddpm.add_noise(x_0, eps, signal, std)[-1], eps[-1])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss(prediction: str, dtype: torch.dtype) -> None:
    theirs = DDPMScheduler(**SD)
    x_0, eps = torch.randn(2, 3, 4, 4, 4, generator=generator_for(1))
    x_0 = x_0.to(dtype)
    t = torch.tensor([3.0, 500.0, 999.0])
    seen = []

    def predict(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.append((noisy, timestep))
        return (0.5 * noisy).to(dtype)

    loss = Ddpm(prediction=prediction).loss(predict, x_0, eps, t)  # type: ignore[arg-type]
    noisy, timestep = seen[0]
    target = eps if prediction == "epsilon" else theirs.get_velocity(x_0.float(), eps, t.long())
    assert noisy.dtype == loss.dtype == torch.float32 and timestep is t
    torch.testing.assert_close(
        noisy, theirs.add_noise(x_0.float(), eps, t.long()), rtol=0, atol=3e-5
    )
    expected = ((0.5 * noisy).to(dtype).float() - target).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


def test_min_snr_weights_of_the_paper() -> None:
    snr = torch.tensor([0.0, 0.01, 1.0, 5.0, 50.0, 1000.0])
    # Section 3.4: min(SNR, 5) / SNR for epsilon, min(SNR, 5) / (SNR + 1) for v.
    torch.testing.assert_close(
        ddpm.min_snr_weight(snr, gamma=5.0, prediction="epsilon"),
        torch.tensor([1.0, 1.0, 1.0, 1.0, 0.1, 0.005]),
    )
    torch.testing.assert_close(
        ddpm.min_snr_weight(snr, gamma=5.0, prediction="v_prediction"),
        torch.tensor([0.0, 0.01 / 1.01, 0.5, 5 / 6, 5 / 51, 5 / 1001]),
    )


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_both_predictions_weigh_the_error_in_the_image_by_min_snr(gamma: float) -> None:
    """An error d in the implied x_0 costs min(SNR, gamma) d^2 whatever the network predicts."""
    x_0, eps = torch.randn(2, 4, 2, 4, 4, generator=generator_for(2))
    t = torch.tensor([20.0, 200.0, 600.0, 999.0])
    abar = alphas_cumprod(**SD)[t.long()].view(4, 1, 1, 1)
    a, s = abar.sqrt(), (1 - abar).sqrt()
    d = 0.01
    expected = (abar / (1 - abar)).flatten().clamp(max=gamma) * d**2

    def epsilon(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (x_t - a * (x_0 + d)) / s

    def v(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (a * x_t - (x_0 + d)) / s

    for prediction, predict in (("epsilon", epsilon), ("v_prediction", v)):
        objective = Ddpm(prediction=prediction, min_snr_gamma=gamma)  # type: ignore[arg-type]
        loss = objective.loss(predict, x_0, eps, t)
        torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=0)


def test_the_terminal_step_of_a_zero_snr_schedule_is_finite() -> None:
    x_0, eps = torch.randn(2, 2, 1, 2, 2, generator=generator_for(3))
    t = torch.tensor([999.0, 10.0])
    objective = Ddpm(prediction="v_prediction", zero_terminal_snr=True)
    loss = objective.loss(lambda x, t: torch.zeros_like(x), x_0, eps, t)
    # At pure noise v = -x_0.
    torch.testing.assert_close(loss[0], x_0[0].square().mean())
    weighted = Ddpm(prediction="v_prediction", zero_terminal_snr=True, min_snr_gamma=5.0)
    loss = weighted.loss(lambda x, t: torch.zeros_like(x), x_0, eps, t)
    assert loss[0] == 0 and loss[1] > 0 and loss.isfinite().all()


def test_offset_noise_is_one_number_a_channel() -> None:
    noise = torch.randn(3, 4, 8, 6, generator=generator_for(4))
    shifted = ddpm.add_offset_noise(noise, 0.05, generator_for(5))
    offset = shifted - noise
    expected = 0.05 * torch.randn(3, 4, 1, 1, generator=generator_for(5))
    torch.testing.assert_close(offset, expected.expand_as(noise), rtol=0, atol=1e-6)
    many = ddpm.add_offset_noise(torch.zeros(50_000, 4, 1, 1), 0.05, generator_for(6))
    assert abs(many.std() - 0.05) < 5 * 0.05 / math.sqrt(2 * many.numel())


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 7, 28, 50])
def test_sampling_schedule_equals_euler_discrete(
    num_steps: int, spacing: str, offset: int, zero_snr: bool
) -> None:
    theirs = EulerDiscreteScheduler(
        **SD, timestep_spacing=spacing, steps_offset=offset, rescale_betas_zero_snr=zero_snr
    )
    theirs.set_timesteps(num_steps)
    t, sigmas = sampling_schedule(
        num_steps,
        **SD,
        timestep_spacing=spacing,  # type: ignore[arg-type]
        steps_offset=offset,
        zero_terminal_snr=zero_snr,
    )
    assert t.dtype == sigmas.dtype == torch.float32 and sigmas[-1] == 0
    assert torch.equal(t, theirs.timesteps)
    torch.testing.assert_close(sigmas, theirs.sigmas, rtol=2e-4, atol=0)
    ours = ddpm.init_noise_sigma(sigmas, timestep_spacing=spacing)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs.init_noise_sigma, rtol=2e-4, atol=0)
    if zero_snr and spacing == "trailing":
        assert sigmas[0] == pytest.approx(4096, rel=1e-6)


def test_known_timesteps() -> None:
    leading, _ = sampling_schedule(10, timestep_spacing="leading", steps_offset=1)
    trailing, _ = sampling_schedule(10, timestep_spacing="trailing", steps_offset=1)
    # https://arxiv.org/abs/2305.08891, table 2.
    assert leading.tolist() == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert trailing.tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers
@pytest.mark.parametrize(
    ("kind", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_a_whole_denoising_loop_equals_the_schedulers(kind: str, zero_snr: bool) -> None:
    spacing = "trailing" if zero_snr else "leading"
    theirs = EulerDiscreteScheduler(
        **SD,
        timestep_spacing=spacing,
        steps_offset=1,
        prediction_type=kind,
        rescale_betas_zero_snr=zero_snr,
    )
    theirs.set_timesteps(9)
    t, sigmas = sampling_schedule(
        9, timestep_spacing=spacing, steps_offset=1, zero_terminal_snr=zero_snr
    )
    noise = torch.randn(2, 4, 3, 3, generator=generator_for(7))
    x = noise * ddpm.init_noise_sigma(sigmas, timestep_spacing=spacing)  # type: ignore[arg-type]
    expected = noise * theirs.init_noise_sigma

    def network(x_t: torch.Tensor) -> torch.Tensor:
        return 0.7 * x_t + 0.2 * torch.tanh(x_t)

    for i, step in enumerate(theirs.timesteps):
        x_t = ddpm.scale_model_input(x, sigmas[i])
        torch.testing.assert_close(
            x_t, theirs.scale_model_input(expected, step), rtol=1e-3, atol=1e-4
        )
        out = theirs.step(network(theirs.scale_model_input(expected, step)), step, expected)
        image = ddpm.denoised(x, network(x_t), sigmas[i], kind=kind)  # type: ignore[arg-type]
        x = ddpm.euler_step(x, network(x_t), sigmas[i], sigmas[i + 1], kind=kind)  # type: ignore[arg-type]
        expected = out.prev_sample
        torch.testing.assert_close(image, out.pred_original_sample, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_true_prediction_leads_back_to_the_image(kind: str) -> None:
    x_0, eps = torch.randn(2, 1, 4, 4, 4, generator=generator_for(8)).double()
    _, sigmas = sampling_schedule(6)
    sigmas = sigmas.double()
    x = x_0 + sigmas[0] * eps
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        abar = (1 / (1 + sigma**2)).view(1)
        velocity = ddpm.v_target(x_0, eps, abar.sqrt(), (1 - abar).sqrt())
        prediction = eps if kind == "epsilon" else velocity
        torch.testing.assert_close(
            ddpm.denoised(x, prediction, sigma, kind=kind).double(),  # type: ignore[arg-type]
            x_0,
            rtol=0,
            atol=1e-4,
        )
        x = ddpm.euler_step(x, prediction, sigma, sigma_next, kind=kind).double()  # type: ignore[arg-type]
    torch.testing.assert_close(x, x_0, rtol=0, atol=1e-5)


def test_sampled_timesteps_are_uniform_integers() -> None:
    t = Ddpm(prediction="epsilon").sample_times(100_000, 0, generator_for(9), "cpu")
    assert t.dtype == torch.float32 and torch.equal(t, t.round())
    assert t.min() == 0 and t.max() == 999
    counts = torch.histc(t, bins=10, min=0, max=999)
    assert (counts - 10_000).abs().max() < 5 * math.sqrt(100_000 * 0.09)
    chosen = Ddpm(prediction="epsilon", timestep_sampling="explicit", timesteps=(10.0, 900.0))
    drawn = chosen.sample_times(64, 0, generator_for(9), "cpu")
    assert drawn.unique().tolist() == [10.0, 900.0] and drawn.dtype == torch.float32


def test_explicit_timesteps_go_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From host memory in each micro-batch they would be a synchronisation."""
    chosen = Ddpm(prediction="epsilon", timestep_sampling="explicit", timesteps=(10.0, 900.0))
    first = chosen.sample_times(8, 0, generator_for(9), "cpu")
    monkeypatch.setattr(torch, "tensor", None)
    assert torch.equal(chosen.sample_times(8, 0, generator_for(9), "cpu"), first)


def test_held_out_times_cover_the_range() -> None:
    objective = Ddpm(prediction="epsilon")
    assert objective.held_out_times(4) == [125.0, 375.0, 625.0, 875.0]
    assert len(set(objective.held_out_times(8))) == 8


@pytest.mark.filterwarnings("ignore:.*was not found in config.*:UserWarning")
def test_scheduler_config() -> None:
    sdxl = EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1)
    numbers = ddpm.from_scheduler_config(dict(sdxl.config))
    assert numbers == ddpm.SchedulerNumbers(
        prediction="epsilon",
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        zero_terminal_snr=False,
        timestep_spacing="leading",
        steps_offset=1,
    )
    # SD 1.5 and 2.1 ship PNDM files without spacing, which means "leading" there.
    sd2 = {"_class_name": "PNDMScheduler", **SD, "prediction_type": "v_prediction"}
    assert ddpm.from_scheduler_config(sd2).timestep_spacing == "leading"
    assert ddpm.from_scheduler_config(sd2).prediction == "v_prediction"
    # Absent keys take the defaults of the class.
    for cls in (DDIMScheduler, EulerDiscreteScheduler):
        bare = ddpm.from_scheduler_config({"_class_name": cls.__name__})
        assert bare == ddpm.from_scheduler_config(
            {**{k: v for k, v in cls().config.items() if k != "steps_offset"}, "steps_offset": 0}
        )
    for key, value in (
        ("beta_schedule", "squaredcos_cap_v2"),
        ("prediction_type", "sample"),
        ("trained_betas", [0.1]),
    ):
        with pytest.raises(ModelError, match=key):
            ddpm.from_scheduler_config({**SD, key: value})


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="v_prediction"):
        Ddpm(prediction="epsilon", zero_terminal_snr=True)
    with pytest.raises(ConfigError, match="is for flow matching"):
        Ddpm(prediction="epsilon", timestep_sampling="logit_normal")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"holds 0.5"):
        Ddpm(prediction="epsilon", timestep_sampling="explicit", timesteps=(0.5,))
    with pytest.raises(ConfigError, match="needs integers"):
        Ddpm(prediction="epsilon", timestep_sampling="explicit")
    with pytest.raises(ConfigError, match="min_snr_gamma = 0.0"):
        Ddpm(prediction="epsilon", min_snr_gamma=0.0)
