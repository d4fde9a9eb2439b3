"""The U-Net against the diffusers network on random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttune.errors import ModelError
from fasttune.models import MODELS
from fasttune.models.layers import GroupNorm, LayerNorm, RMSNorm, set_recompute
from fasttune.models.unet import UNet, build_unet
from fasttune.models.weights import load_denoiser

CPU = torch.device("cpu")
TOLERANCE = 1e-4
DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

# The structure of each released model, at small widths. attention_head_dim is the number of heads.
SD15: dict[str, Any] = {
    "down_block_types": [DOWN, DOWN, DOWN, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", UP, UP, UP],
    "block_out_channels": [16, 32, 48, 48],
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
SD21 = {
    **SD15,
    "attention_head_dim": [2, 4, 6, 6],
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL: dict[str, Any] = {
    "down_block_types": ["DownBlock2D", DOWN, DOWN],
    "up_block_types": [UP, UP, "UpBlock2D"],
    "block_out_channels": [16, 32, 48],
    "transformer_layers_per_block": [1, 2, 3],
    "attention_head_dim": [2, 4, 6],
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 10 + 6 * 8,
    "upcast_attention": None,
}
REFINER = {
    **SDXL,
    "down_block_types": ["DownBlock2D", DOWN, DOWN, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", UP, UP, "UpBlock2D"],
    "block_out_channels": [16, 32, 48, 48],
    "transformer_layers_per_block": 2,
    "attention_head_dim": [2, 4, 6, 6],
    "projection_class_embeddings_input_dim": 10 + 5 * 8,
}
KOLORS = {**SDXL, "encoder_hid_dim": 28, "encoder_hid_dim_type": "text_proj"}
TINY = {  # as a small network trained from nothing might be
    **SDXL,
    "block_out_channels": [32, 64, 128],
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": [2, 2, 4],
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-4,
}
CONFIGS = {
    "sd15": SD15,
    "sd21": SD21,
    "sdxl": SDXL,
    "refiner": REFINER,
    "kolors": KOLORS,
    "tiny": TINY,
}
SHAPES = [(1, 16, 8), (2, 8, 24)]


def diffusers_unet(config: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(**config)
    with torch.no_grad():
        for p in model.parameters():  # norms and biases away from one and zero
            p.add_((0.1 if p.ndim == 1 else 0.02) * torch.randn(p.shape))
    return model


def tiny_unet(config: dict[str, Any]) -> UNet:
    torch.manual_seed(0)
    return build_unet(config)


def inputs(config: dict[str, Any], batch: int, height: int, width: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    text_width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    x = {
        "noisy_latents": torch.randn(batch, 4, height, width, generator=g),
        "timestep": torch.tensor([17.0, 803.0])[:batch],
        "text_embeddings": torch.randn(batch, 5, text_width, generator=g),
    }
    if config.get("addition_embed_type"):
        num_sizes = (config["projection_class_embeddings_input_dim"] - 10) // 8
        x["pooled_text_embeddings"] = torch.randn(batch, 10, generator=g)
        x["sizes"] = torch.randint(0, 1024, (batch, num_sizes), generator=g).float()
    return x


def run_diffusers(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    added = None
    if "sizes" in x:
        added = {"text_embeds": x["pooled_text_embeddings"], "time_ids": x["sizes"]}
    return model(
        x["noisy_latents"], x["timestep"], x["text_embeddings"], added_cond_kwargs=added
    ).sample


def relative(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).norm() / theirs.norm())


def loss(out: Tensor) -> Tensor:
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return ((out - target) ** 2).mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_gradients_match_diffusers(
    name: str, shape: tuple[int, int, int], record_property: Any
) -> None:
    config = CONFIGS[name]
    theirs, ours = diffusers_unet(config), tiny_unet(config)
    ours.load_state_dict(theirs.state_dict())
    x, y = inputs(config, *shape), inputs(config, *shape)
    traced = [key for key in x if key not in ("timestep", "sizes")]
    for key in traced:
        x[key].requires_grad_()
        y[key].requires_grad_()
    out, expected = ours(**x), run_diffusers(theirs, y)
    loss(out).backward()
    loss(expected).backward()
    found, truth = gradients(ours), gradients(theirs)
    assert found.keys() == truth.keys() == {name for name, _ in theirs.named_parameters()}
    errors = {key: relative(found[key], truth[key]) for key in truth}
    errors["output"] = relative(out, expected)
    errors |= {key: relative(x[key].grad, y[key].grad) for key in traced}
    worst = max(errors, key=errors.__getitem__)
    record_property("max_relative_error", f"{errors[worst]:.2e} {worst}")
    assert errors[worst] < TOLERANCE, worst


@pytest.mark.parametrize("size", [(7, 9), (13, 18)])
def test_odd_sizes_match_diffusers(size: tuple[int, int]) -> None:
    theirs, ours = diffusers_unet(SD15), tiny_unet(SD15)
    ours.load_state_dict(theirs.state_dict())
    x = inputs(SD15, 2, *size)
    with torch.no_grad():
        assert relative(ours(**x), run_diffusers(theirs, x)) < TOLERANCE


@pytest.mark.parametrize(("family", "config"), [("sdxl", SDXL), ("sd1", SD15), ("sd2", SD21)])
def test_predict_of_a_saved_model_matches_diffusers(
    family: str, config: dict[str, Any], tmp_path: Path
) -> None:
    theirs = diffusers_unet(config)
    theirs.save_pretrained(tmp_path / "unet")
    spec = MODELS[family]
    ours = load_denoiser(spec, tmp_path, dtype=torch.float32, device=CPU)
    x = inputs(config, 2, 8, 16)
    with torch.no_grad():
        out = spec.predict(
            ours,
            x["noisy_latents"],
            x["timestep"],
            {k: v for k, v in x.items() if k.endswith("embeddings")},
            x.get("sizes", torch.zeros(2, 6)),
            torch.ones(2),
        )
        assert relative(out, run_diffusers(theirs, x)) < TOLERANCE


@pytest.mark.parametrize("config", [SDXL, SD15], ids=["sdxl", "sd15"])
def test_bf16_compute_on_fp32_and_on_bf16_weights(config: dict[str, Any]) -> None:
    model = tiny_unet(config)
    x = inputs(config, 2, 8, 16)
    with torch.no_grad():
        truth = model(**x)
    for key in ("noisy_latents", "text_embeddings"):
        x[key] = x[key].bfloat16()
    mixed = model(**x)
    loss(mixed.float()).backward()
    assert mixed.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        low = model.to(torch.bfloat16)(**x)
    assert low.dtype == torch.bfloat16
    # bf16 rounds at 2^-9; the errors of about 50 layers in sequence stay below 5 %
    assert relative(mixed.float(), truth) < 0.05
    assert relative(low.float(), truth) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_take_statistics_in_float32(dtype: torch.dtype) -> None:
    # mean 40, deviation 1: in 16-bit sums the variance would be lost altogether
    x = (40 + torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))).to(dtype)
    exact = x.double()
    layer, group, rms = LayerNorm(32), GroupNorm(4, 64), RMSNorm(32, eps=1e-6)
    step = torch.finfo(dtype).eps
    for norm in (layer, group, rms):
        truth = type(norm).__mro__[1].forward(norm.double(), exact)  # torch's own, in float64
        error = (norm.float()(x).double() - truth).abs() / truth.abs().clamp(min=1)
        assert error.max() < step


def test_recomputation_gives_identical_gradients_and_keeps_less() -> None:
    model = tiny_unet(SDXL)
    for block in model.mid_block.attentions[0].transformer_blocks:
        block.attn1.to_out[0] = nn.Sequential(block.attn1.to_out[0], nn.Dropout(0.5))
    results, kept = [], []
    for enabled in (False, True):
        set_recompute(model, enabled)
        model.zero_grad()
        torch.manual_seed(3)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss(model(**inputs(SDXL, 2, 16, 16)))
        value.backward()
        results.append({**gradients(model), "loss": value.detach()})
        kept.append(sum(sizes))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert kept[1] < 0.4 * kept[0]


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    torch.compiler.reset()
    model = tiny_unet(TINY)
    x = inputs(TINY, 2, 8, 8)
    eager = model(**x)
    model.compile(backend="eager", fullgraph=True)
    for enabled in (False, True):
        set_recompute(model, enabled)
        out = model(**x)
        loss(out).backward()
        assert torch.allclose(out, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_embed_type", "timestep"),
        ("addition_embed_type", "image"),
        ("time_cond_proj_dim", 256),
        ("only_cross_attention", [True, False, False]),
        ("down_block_types", ["DownBlock2D", "AttnDownBlock2D", DOWN]),
        ("up_block_types", [UP, UP]),
        ("transformer_layers_per_block", [[1, 2], 2, 2]),
        ("attention_head_dim", [3, 4, 6]),
        ("norm_num_groups", 5),
        ("mid_block_type", "UNetMidBlock2D"),
        ("addition_time_embed_dim", None),
    ],
)
def test_values_that_are_not_implemented_are_refused_by_their_key(key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=key):
        build_unet({**SDXL, key: value})


def test_families_tell_each_other_apart() -> None:
    with pytest.raises(ModelError, match=r'family = "sd1" or "sd2"'):
        MODELS["sdxl"].build(SD21)
    with pytest.raises(ModelError, match=r'family = "sdxl"'):
        MODELS["sd1"].build(SDXL)
    with pytest.raises(ModelError, match="in_channels = 9"):
        MODELS["sd1"].build({**SD15, "in_channels": 9})


def test_keys_that_say_nothing_of_the_network_are_left_alone() -> None:
    build_unet({**SDXL, "_class_name": "UNet2DConditionModel", "decay": 0.9999, "sample_size": 16})
