"""LoRA files read back by diffusers, and round trips of the three layouts."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from fasttune.adapters.formats import (
    LAYOUTS,
    Layout,
    load_lora,
    lora_tensors,
    parse_lora,
    read_lora,
)
from fasttune.adapters.lora import (
    LoraPair,
    apply_lora,
    lora_state,
    module_shapes,
)
from fasttune.adapters.original_layout import fused_modules, original_places
from fasttune.errors import ConfigError
from fasttune.models import MODELS
from fasttune.models.weights import load_denoiser

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ATTENTION = ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0")
ALL = ("*",)
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module")
def flux_shapes() -> dict[str, tuple[int, ...]]:
    """FLUX.1-dev at real size."""
    config = {"guidance_embeds": True}
    with torch.device("meta"):
        ours = module_shapes(MODELS["flux"].build(config))
        assert ours == module_shapes(FluxTransformer2DModel(**config))
    return ours


@pytest.fixture(scope="module")
def sdxl_shapes() -> dict[str, tuple[int, ...]]:
    """SDXL at real size."""
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**SDXL)
        ours = module_shapes(MODELS["sdxl"].build(theirs.config))
        assert ours == module_shapes(theirs)
    return ours


def randomize(model: nn.Module, std: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for pair in lora_state(model).values():
            for half in (pair.A, pair.B):
                half.copy_(std * torch.randn(half.shape, generator=generator))


def random_lora(
    shapes: dict[str, tuple[int, ...]], rank: int = 2, alpha: float = 3.0
) -> dict[str, LoraPair]:
    generator = torch.Generator().manual_seed(4)

    def pair(shape: tuple[int, ...]) -> LoraPair:
        A = torch.randn(rank, *shape[1:], generator=generator)
        B = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator)
        return LoraPair(A, B, alpha)

    return {name: pair(shape) for name, shape in shapes.items()}


def delta(pair: LoraPair) -> Tensor:
    return pair.scale * (pair.B.flatten(1).double() @ pair.A.flatten(1).double())


def assert_same_deltas(
    actual: dict[str, LoraPair], expected: dict[str, LoraPair], rtol: float = 0.0
) -> None:
    assert set(actual) == set(expected)
    for name, pair in expected.items():
        torch.testing.assert_close(
            delta(actual[name]),
            delta(pair),
            rtol=rtol,
            atol=rtol,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def batch_for(config: Any) -> dict[str, Tensor]:
    """Two samples for a tiny network with this config.json."""
    torch.manual_seed(0)
    flux = "joint_attention_dim" in config
    width = config["joint_attention_dim" if flux else "cross_attention_dim"]
    pooled = config["pooled_projection_dim"] if flux else 0
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * 8
    return {
        "latents": torch.randn(2, 16 if flux else 4, 8, 8),
        "timestep": torch.tensor([0.2, 0.9]) if flux else torch.tensor([20.0, 700.0]),
        "text": torch.randn(2, 5, width),
        "pooled": torch.randn(2, pooled),
        "sizes": torch.tensor([[96.0, 80.0, 4.0, 0.0, 64.0, 64.0]] * 2),
        "guidance": torch.tensor([1.0, 3.5]),
    }


def our_output(family: str, network: nn.Module, config: Any) -> Tensor:
    batch = batch_for(config)
    conditions = {"text_embeddings": batch["text"], "pooled_text_embeddings": batch["pooled"]}
    with torch.no_grad():
        return MODELS[family].predict(
            network,
            batch["latents"],
            batch["timestep"],
            conditions,
            batch["sizes"],
            batch["guidance"],
        )


def pipeline_output(pipeline: DiffusionPipeline) -> Tensor:
    """The same from the network of a diffusers pipeline."""
    if not isinstance(pipeline, FluxPipeline):
        network = pipeline.unet.eval()
        batch = batch_for(network.config)
        added = {"text_embeds": batch["pooled"], "time_ids": batch["sizes"]}
        with torch.no_grad():
            return network(
                batch["latents"], batch["timestep"], batch["text"], added_cond_kwargs=added
            ).sample
    network = pipeline.transformer.eval()
    batch = batch_for(network.config)
    with torch.no_grad():
        packed = network(
            pipeline._pack_latents(batch["latents"], 2, 16, 8, 8),
            encoder_hidden_states=batch["text"],
            pooled_projections=batch["pooled"],
            timestep=batch["timestep"],
            guidance=batch["guidance"],
            img_ids=pipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32),
            txt_ids=torch.zeros(5, 3),
        ).sample
    return pipeline._unpack_latents(packed, 64, 64, 8)


def our_network(family: str, folder: Path) -> nn.Module:
    cpu = torch.device("cpu")
    return load_denoiser(MODELS[family], folder, dtype=torch.float32, device=cpu)


@pytest.fixture(scope="module")
def open_pipeline(
    tiny_sdxl: Path, tiny_sd1: Path, tiny_sd2: Path, tiny_flux: Path
) -> Callable[[str], DiffusionPipeline]:
    """The tiny pipeline of a family, without a LoRA."""
    folders = {"sdxl": tiny_sdxl, "sd1": tiny_sd1, "sd2": tiny_sd2, "flux": tiny_flux}

    @cache
    def load(family: str) -> DiffusionPipeline:
        return DiffusionPipeline.from_pretrained(folders[family])

    def clean(family: str) -> DiffusionPipeline:
        pipeline = load(family)
        pipeline.unload_lora_weights()
        return pipeline

    return clean


def adapted_output(
    family: str, pipeline: DiffusionPipeline, targets: tuple[str, ...], alpha: float
) -> tuple[dict[str, LoraPair], dict[str, tuple[int, ...]], Tensor, Tensor]:
    """Adapter, shapes, and the outputs of our network with and without it."""
    config = (pipeline.transformer if family == "flux" else pipeline.unet).config
    network = our_network(family, Path(pipeline.config._name_or_path)).eval()
    before = our_output(family, network, config)
    apply_lora(network, targets=targets, rank=4, alpha=alpha)
    randomize(network)
    after = our_output(family, network, config)
    return lora_state(network), module_shapes(network), after, before


def assert_equals(actual: Tensor, expected: Tensor, unadapted: Tensor) -> None:
    assert (expected - unadapted).norm() > 0.05 * unadapted.norm()  # the adapter does something
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("targets", "alpha"), [(ATTENTION, 4.0), (ALL, 3.0)], ids=["attention", "all"]
)
@pytest.mark.parametrize("layout", ["peft", "kohya"])
@pytest.mark.parametrize("family", ["sdxl", "sd1", "sd2", "flux"])
def test_in_a_diffusers_pipeline(
    family: str,
    layout: Layout,
    targets: tuple[str, ...],
    alpha: float,
    open_pipeline: Callable[[str], DiffusionPipeline],
    tmp_path: Path,
) -> None:
    if layout == "kohya" and family == "flux":
        targets = (
            "transformer_blocks.*",
        )  # of single blocks its converter knows the real width alone
    pipeline = open_pipeline(family)
    lora, shapes, expected, unadapted = adapted_output(family, pipeline, targets, alpha)
    tensors = lora_tensors(lora, shapes, layout=layout, dtype=torch.float32)
    if layout == "kohya":
        assert any("input_blocks" in key for key in tensors) == (family == "sdxl")
        assert any("qkv" in key for key in tensors) == (family == "flux")
    save_file(tensors, tmp_path / "lora.safetensors", {"fasttune.version": "0"})
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    assert_equals(pipeline_output(pipeline), expected, unadapted)


def comfyui_to_kohya(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI itself knows a module by both spellings: the name of the checkpoint with dots, and
    lora_unet_ with underscores."""
    kinds = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    renamed = {}
    for key, tensor in tensors.items():
        module, _, kind = key.partition(".lora_") if ".lora_" in key else key.rpartition(".")
        kind = kinds[f"lora_{kind}"] if ".lora_" in key else kind
        renamed[f"lora_unet_{module.removeprefix('diffusion_model.').replace('.', '_')}.{kind}"] = (
            tensor
        )
    return renamed


@pytest.mark.parametrize(
    ("family", "targets"), [("sdxl", ALL), ("flux", ("transformer_blocks.*",))]
)
def test_comfyui_in_a_diffusers_pipeline(
    family: str, targets: tuple[str, ...], open_pipeline: Callable[[str], DiffusionPipeline]
) -> None:
    pipeline = open_pipeline(family)
    lora, shapes, expected, unadapted = adapted_output(family, pipeline, targets, 3.0)
    tensors = lora_tensors(lora, shapes, layout="comfyui", dtype=torch.float32)
    pipeline.load_lora_weights(comfyui_to_kohya(tensors))
    assert_equals(pipeline_output(pipeline), expected, unadapted)


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_real_size_flux_through_diffusers_converter(
    layout: Layout, flux_shapes: dict[str, tuple[int, ...]]
) -> None:
    # One input column a module: the converter looks at rows alone.
    narrow = {name: (shape[0], 1) for name, shape in flux_shapes.items()}
    lora = random_lora(narrow)
    tensors = lora_tensors(lora, narrow, layout=layout, dtype=torch.float32)
    kohya = tensors if layout == "kohya" else comfyui_to_kohya(tensors)
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(kohya))
    assert len(theirs) == 2 * len(lora)
    for name, pair in lora.items():
        # The converter forgets the prefix of the modules outside the blocks.
        prefix = "transformer." if f"transformer.{name}.lora_A.weight" in theirs else ""
        A, B = (theirs[f"{prefix}{name}.lora_{kind}.weight"] for kind in "AB")
        torch.testing.assert_close((B @ A).double(), delta(pair), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", ["flux", "sdxl"])
def test_every_module_of_the_real_networks_has_a_key_of_its_own(
    network: str, request: pytest.FixtureRequest
) -> None:
    shapes = request.getfixturevalue(f"{network}_shapes")
    places = original_places(shapes)
    assert set(places) == set(shapes)
    # 19 double blocks with two qkv of three parts, 38 single ones with four parts.
    joined = 19 * 2 * 2 + 38 * 3 if network == "flux" else 0
    assert len({place.module for place in places.values()}) == len(shapes) - joined
    assert sum(len(names) for names in fused_modules(places).values()) == len(shapes)
    narrow = {name: (shape[0], 1) for name, shape in shapes.items()}
    lora = random_lora(narrow, rank=1)
    for layout in LAYOUTS:
        tensors = lora_tensors(lora, narrow, layout=layout, dtype=torch.float32)
        back, aside = parse_lora(tensors, narrow, origin=Path(layout))
        assert not aside
        assert list(back) == list(lora)


def test_names_of_the_released_checkpoints(
    flux_shapes: dict[str, tuple[int, ...]], sdxl_shapes: dict[str, tuple[int, ...]]
) -> None:
    """Spot checks of the names in flux1-dev.safetensors and sd_xl_base_1.0.safetensors."""
    flux, sdxl = original_places(flux_shapes), original_places(sdxl_shapes)
    assert flux["single_transformer_blocks.37.proj_mlp"].module == "single_blocks.37.linear1"
    assert flux["transformer_blocks.18.attn.add_k_proj"] == (
        "double_blocks.18.txt_attn.qkv",
        1,
        False,
    )
    assert flux["norm_out.linear"].halves_swapped
    for ours, theirs in {
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k": (
            "input_blocks.8.1.transformer_blocks.9.attn2.to_k"
        ),
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.attentions.2.proj_out": "output_blocks.5.1.proj_out",
        "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_out": "out.2",
    }.items():
        assert sdxl[ours].module == theirs


@pytest.mark.parametrize("alpha", [4.0, 2.0, 3.0])
@pytest.mark.parametrize("family", ["sdxl", "sd1", "flux"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(
    layout: Layout, family: str, alpha: float, open_pipeline: Callable[[str], DiffusionPipeline]
) -> None:
    shapes = tiny_shapes(open_pipeline, family)
    q_and_v = {name: shape for name, shape in shapes.items() if name.endswith((".to_q", ".to_v"))}
    for chosen in (q_and_v, shapes):
        lora = random_lora(chosen, rank=4, alpha=alpha)
        tensors = lora_tensors(lora, shapes, layout=layout, dtype=torch.float32)
        back, aside = parse_lora(tensors, shapes, origin=Path("file"))
        assert not aside
        # Where alpha is folded into B, a scale of 3/4 rounds; all else comes back exactly.
        folded = {
            name for name in lora if layout == "peft" or name in ("norm_out.linear", "proj_out")
        }
        exact = {name: lora[name] for name in lora if name not in folded or alpha != 3.0}
        assert_same_deltas({name: back[name] for name in exact}, exact)
        assert_same_deltas(back, lora, rtol=1e-6)
        assert {pair.rank for pair in back.values()} == {4}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_of_any_layout_fills_the_adapter(
    layout: Layout, load_network: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    for family in ("sdxl", "flux"):
        model, other = load_network(family), load_network(family)
        for network, rank in ((model, 4), (other, 6)):
            apply_lora(network, targets=("*.to_q", "*.to_v", "*.proj_out"), rank=rank, alpha=3.0)
        randomize(model)
        path = tmp_path / f"{family}.safetensors"
        tensors = lora_tensors(
            lora_state(model), module_shapes(model), layout=layout, dtype=torch.float32
        )
        save_file(tensors, path)
        load_lora(other, path)
        assert_same_deltas(lora_state(other), lora_state(model), rtol=1e-6)


def tiny_shapes(
    open_pipeline: Callable[[str], DiffusionPipeline], family: str
) -> dict[str, tuple[int, ...]]:
    pipeline = open_pipeline(family)
    return module_shapes(pipeline.transformer if family == "flux" else pipeline.unet)


@pytest.fixture
def load_network(request: pytest.FixtureRequest) -> Callable[[str], nn.Module]:
    def load(family: str) -> nn.Module:
        return our_network(family, request.getfixturevalue(f"tiny_{family}"))

    return load


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtype_and_alphas(layout: Layout, load_network: Callable[[str], nn.Module]) -> None:
    shapes = module_shapes(load_network("flux"))
    tensors = lora_tensors(random_lora(shapes), shapes, layout=layout, dtype=torch.bfloat16)
    assert {t.dtype for k, t in tensors.items() if not k.endswith(".alpha")} == {torch.bfloat16}
    assert any(k.endswith(".alpha") for k in tensors) == (layout != "peft")


@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize("kind", ["alpha", "pattern", "rank_stabilised"])
def test_alpha_in_the_metadata_of_diffusers(
    family: str, kind: str, open_pipeline: Callable[[str], DiffusionPipeline], tmp_path: Path
) -> None:
    """Trained by PEFT, written by diffusers, with alpha other than the rank: our network with the
    file read back does what theirs does."""
    pipeline = open_pipeline(family)
    prefix = "transformer" if family == "flux" else "unet"
    network = getattr(pipeline, prefix)
    unadapted = pipeline_output(pipeline)
    settings = {
        "alpha": {},
        "pattern": {"alpha_pattern": {"attn1?.to_q": 2.0}},
        "rank_stabilised": {"use_rslora": True},
    }[kind]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"], **settings)
    network.add_adapter(config)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    expected = pipeline_output(pipeline)
    type(pipeline).save_lora_weights(
        tmp_path,
        **{f"{prefix}_lora_layers": get_peft_model_state_dict(network)},
        **{
            f"{prefix}_lora_adapter_metadata": _collate_lora_metadata({prefix: network})[
                f"{prefix}_lora_adapter_metadata"
            ]
        },
    )
    ours = our_network(family, Path(pipeline.config._name_or_path)).eval()
    apply_lora(ours, targets=("*.to_q", "*.to_v"), rank=4, alpha=4.0)
    load_lora(ours, tmp_path / "pytorch_lora_weights.safetensors")
    assert_equals(our_output(family, ours, network.config), expected, unadapted)


def test_alpha_in_adapter_config_of_peft(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    theirs = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    layer.lora_B["default"].weight.data.normal_()
    theirs.save_pretrained(tmp_path)
    lora, _ = read_lora(tmp_path / "adapter_model.safetensors", {"0": (5, 6)})
    torch.testing.assert_close(delta(lora["0"]).float(), layer.get_delta_weight("default"))


def test_damaged_metadata_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {"unet.0.lora_A.weight": torch.ones(2, 6), "unet.0.lora_B.weight": torch.ones(5, 2)}
    for text in (
        "{",
        '{"unet.lora_alpha": "much"}',
        '{"unet.lora_alpha": null}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}',
    ):
        save_file(tensors, path, {"lora_adapter_metadata": text})
        with pytest.raises(ConfigError, match=r"lora\.safetensors has damaged PEFT settings"):
            read_lora(path, {"0": (5, 6)})
    save_file(tensors, path, {"lora_adapter_metadata": '{"text_encoder.lora_alpha": 9}'})
    assert read_lora(path, {"0": (5, 6)})[0]["0"].alpha == 2.0  # said of another network


def test_a_dense_pair_on_a_joined_module(load_network: Callable[[str], nn.Module]) -> None:
    """As kohya's own trainer writes them: one pair of rank r for the whole qkv."""
    shapes = module_shapes(load_network("flux"))
    A, B = torch.randn(4, 32), torch.randn(3 * 32, 4)
    name = "lora_unet_double_blocks_1_img_attn_qkv"
    tensors = {
        f"{name}.lora_down.weight": A,
        f"{name}.lora_up.weight": B,
        f"{name}.alpha": torch.tensor(2.0),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(2.0),
    }
    lora, aside = parse_lora(tensors, shapes, origin=Path("file"))
    assert aside == ["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"]
    names = [f"transformer_blocks.1.attn.to_{x}" for x in "qkv"]
    assert list(lora) == names
    joined = torch.cat([delta(lora[name]) for name in names])
    torch.testing.assert_close(joined, 0.5 * B.double() @ A.double())


def test_parts_of_different_rank_and_scale(load_network: Callable[[str], nn.Module]) -> None:
    shapes = module_shapes(load_network("flux"))
    names = [f"single_transformer_blocks.0.attn.to_{x}" for x in "qv"]
    lora = {
        names[0]: LoraPair(torch.randn(2, 32), torch.randn(32, 2), 1.0),
        names[1]: LoraPair(torch.randn(3, 32), torch.randn(32, 3), 9.0),
    }
    tensors = lora_tensors(lora, shapes, layout="kohya", dtype=torch.float32)
    assert tensors["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (5, 32)
    back, _ = parse_lora(tensors, shapes, origin=Path("file"))
    assert_same_deltas(back, lora, rtol=1e-6)


def test_refuses_what_is_not_a_lora_of_this_network(
    load_network: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    flux, sdxl = module_shapes(load_network("flux")), module_shapes(load_network("sdxl"))
    path = tmp_path / "lora.safetensors"
    with pytest.raises(ConfigError, match=r"init_from: .*lora\.safetensors cannot be read"):
        read_lora(path, flux)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_lora(path, flux)
    save_file(lora_tensors(random_lora(sdxl), sdxl, layout="kohya", dtype=torch.float32), path)
    with pytest.raises(ConfigError, match=r"keys such as lora_unet_.*same family"):
        read_lora(path, flux)
    halved = {"transformer.x_embedder.lora_A.weight": torch.zeros(2, 64)}
    with pytest.raises(ConfigError, match="one half of the pair of x_embedder"):
        parse_lora(halved, flux, origin=path)
    wide = {**halved, "transformer.x_embedder.lora_B.weight": torch.zeros(99, 2)}
    with pytest.raises(ConfigError, match=r"\(99, 2\) for x_embedder, whose weight is \(32, 64\)"):
        parse_lora(wide, flux, origin=path)
    with pytest.raises(ConfigError, match="has no LoRA keys"):
        parse_lora({}, flux, origin=path)


def test_load_lora_refuses_a_higher_rank(
    load_network: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    model = load_network("sdxl")
    apply_lora(model, targets=("*.to_q",), rank=2, alpha=2.0)
    shapes = module_shapes(model)
    wanted = {name: shape for name, shape in shapes.items() if name.endswith("to_q")}
    path = tmp_path / "lora.safetensors"
    save_file(
        lora_tensors(random_lora(wanted, 8), shapes, layout="peft", dtype=torch.float32), path
    )
    with pytest.raises(ConfigError, match=r"set adapter\.rank = 8 or more"):
        load_lora(model, path)
