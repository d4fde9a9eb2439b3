"""FLUX.1 against the diffusers network on random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttune.errors import ModelError
from fasttune.models.flux import FLUX, Flux, build_flux, pack_latents, unpack_latents
from fasttune.models.layers import set_recompute
from fasttune.models.rope import rope_table
from fasttune.models.weights import load_denoiser

CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 12,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}
SHAPES = [(1, 8, 8, 5), (2, 6, 14, 9)]  # batch, latent height and width, text tokens
TOLERANCE = 1e-4


def diffusers_flux(**changes: Any) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(**{**CONFIG, **changes})
    with torch.no_grad():
        for p in model.parameters():  # norms and biases away from one and zero
            p.add_(0.1 * torch.randn(p.shape))
    return model


def tiny_flux(**changes: Any) -> Flux:
    torch.manual_seed(0)
    return build_flux({**CONFIG, **changes})


def inputs(batch: int, height: int, width: int, num_text: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    return {
        "noisy_latents": torch.randn(batch, 4, height, width, generator=g),
        "timestep": torch.rand(batch, generator=g),
        "conditions": {
            "text_embeddings": torch.randn(batch, num_text, 20, generator=g),
            "pooled_text_embeddings": torch.randn(batch, 12, generator=g),
        },
        "sizes": torch.zeros(batch, 6),
        "guidance": torch.rand(batch, generator=g) * 4 + 1,
    }


def run_diffusers(model: nn.Module, x: dict[str, Any], mask: Tensor | None = None) -> Tensor:
    """Packs, builds ids and unpacks with the reference pipeline's own functions."""
    from diffusers import FluxPipeline

    latents, text = x["noisy_latents"], x["conditions"]["text_embeddings"]
    batch, channels, height, width = latents.shape
    ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, CPU, torch.float32)
    kwargs = {}
    if mask is not None:
        image = torch.ones(batch, height * width // 4, dtype=torch.bool)
        kwargs["attention_mask"] = torch.cat([mask, image], dim=1)[:, None, None]
    out = model(
        FluxPipeline._pack_latents(latents, batch, channels, height, width),
        encoder_hidden_states=text,
        pooled_projections=x["conditions"]["pooled_text_embeddings"],
        timestep=x["timestep"],
        guidance=x["guidance"] if model.config.guidance_embeds else None,
        img_ids=ids,
        txt_ids=torch.zeros(text.shape[1], 3),
        joint_attention_kwargs=kwargs,
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(out, height * 8, width * 8, vae_scale_factor=8)


def relative(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).norm() / theirs.norm())


def loss(out: Tensor) -> Tensor:
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return ((out - target) ** 2).mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_forward_and_gradients_match_diffusers(
    guidance: bool,
    shape: tuple[int, int, int, int],
    tmp_path: Path,
    record_property: Any,
) -> None:
    theirs = diffusers_flux(guidance_embeds=guidance)
    theirs.save_pretrained(tmp_path / "transformer")
    ours = load_denoiser(FLUX, tmp_path, dtype=torch.float32, device=CPU)
    x, y = inputs(*shape), inputs(*shape)
    for z in (x, y):
        z["noisy_latents"].requires_grad_()
        z["conditions"]["text_embeddings"].requires_grad_()
        z["conditions"]["pooled_text_embeddings"].requires_grad_()
    out, expected = FLUX.predict(ours, **x), run_diffusers(theirs, y)
    loss(out).backward()
    loss(expected).backward()
    found, truth = gradients(ours), gradients(theirs)
    assert found.keys() == truth.keys() == {name for name, _ in theirs.named_parameters()}
    errors = {name: relative(found[name], truth[name]) for name in truth}
    errors["output"] = relative(out, expected)
    errors["latents"] = relative(x["noisy_latents"].grad, y["noisy_latents"].grad)
    for name in ("text_embeddings", "pooled_text_embeddings"):
        errors[name] = relative(x["conditions"][name].grad, y["conditions"][name].grad)
    worst = max(errors, key=errors.__getitem__)
    record_property("max_relative_error", f"{errors[worst]:.2e} {worst}")
    assert errors[worst] < TOLERANCE, worst


def test_text_mask_matches_diffusers_attention_mask() -> None:
    theirs = diffusers_flux()
    ours = tiny_flux()
    ours.load_state_dict(theirs.state_dict())
    x = inputs(2, 8, 6, 7)
    mask = torch.arange(7)[None] < torch.tensor([[3], [7]])
    with torch.no_grad():
        unmasked = FLUX.predict(ours, **x)
        x["conditions"]["text_mask"] = mask
        out = FLUX.predict(ours, **x)
        assert relative(out, run_diffusers(theirs, x, mask)) < TOLERANCE
    assert relative(out[0], unmasked[0]) > 1e-3  # the mask matters where it masks
    assert relative(out[1], unmasked[1]) < 1e-5


def test_rope_table_matches_float64_at_the_largest_training_size() -> None:
    from diffusers import FluxPipeline
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    axes = (16, 56, 56)
    ids = FluxPipeline._prepare_latent_image_ids(1, 64, 96, CPU, torch.float32)
    truth = FluxPosEmbed(theta=10000, axes_dim=list(axes))(torch.cat([torch.zeros(512, 3), ids]))
    table = rope_table(64, 96, 512, axes=axes, device=CPU)
    for ours, theirs in zip(table, truth, strict=True):
        assert ours.dtype == torch.float32
        assert (ours[:, 0] - theirs[:, ::2]).abs().max() < 1e-5


def test_packing_is_the_reference_pipelines() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 6, 10)
    packed = pack_latents(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(unpack_latents(packed, 3, 5), latents)


def test_bf16_compute_on_fp32_and_on_bf16_weights() -> None:
    model = tiny_flux()
    x = inputs(2, 8, 8, 5)
    with torch.no_grad():
        truth = FLUX.predict(model, **x)
    x["noisy_latents"] = x["noisy_latents"].bfloat16()
    mixed = FLUX.predict(model, **x)
    loss(mixed.float()).backward()
    assert mixed.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        low = FLUX.predict(model.to(torch.bfloat16), **x)
    assert low.dtype == torch.bfloat16
    # bf16 rounds at 2^-9; the errors of about 30 layers in sequence stay below 3 %
    assert relative(mixed.float(), truth) < 0.03
    assert relative(low.float(), truth) < 0.03


class WithDropout(nn.Module):
    """As an adapter puts it: dropout inside a block."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + nn.functional.dropout(x, 0.5, self.training)


def test_recomputation_gives_identical_gradients_and_keeps_less() -> None:
    model = tiny_flux()
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.attn.to_q = WithDropout(block.attn.to_q)
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
            value = loss(FLUX.predict(model, **inputs(2, 8, 8, 5)))
        value.backward()
        results.append({**gradients(model), "loss": value.detach()})
        kept.append(sum(sizes))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert kept[1] < 0.2 * kept[0]


def test_table_made_while_sampling_serves_training() -> None:
    model = tiny_flux()
    with torch.inference_mode():
        FLUX.predict(model, **inputs(1, 8, 8, 5))
    loss(FLUX.predict(model, **inputs(1, 8, 8, 5))).backward()
    assert len(model._rope_tables) == 1


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    torch.compiler.reset()
    model = tiny_flux()
    x = inputs(2, 8, 8, 5)
    eager = FLUX.predict(model, **x)
    model.compile(backend="eager", fullgraph=True)
    for enabled in (False, True):
        set_recompute(model, enabled)
        out = FLUX.predict(model, **x)
        loss(out).backward()
        assert torch.allclose(out, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"in_channels": 96, "out_channels": 16}, "in_channels = 96"),
        ({"axes_dims_rope": [4, 6, 8]}, "axes_dims_rope"),
        ({"axes_dims_rope": [8, 8]}, "axes_dims_rope"),
    ],
)
def test_config_of_another_kind_is_refused_by_its_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelError, match=key):
        build_flux({**CONFIG, **changes})
