"""Exported models, read back by diffusers and transformers."""

import dataclasses
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasttune.adapters.lora import apply_lora
from fasttune.checkpoint import save_checkpoint
from fasttune.config import Adapter, Config, Data, Export, Model, Objective, Run
from fasttune.errors import CheckpointError, ConfigError, ModelError, StorageError
from fasttune.export import export_folder, main
from fasttune.models import MODELS
from fasttune.models.weights import load_denoiser
from fasttune.single_file import denoiser_to_original
from fasttune.tensor_files import lazy, open_tensors, stored, write_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

FOLDERS = {"flux": "transformer", "sdxl": "unet", "sd1": "unet", "sd2": "unet"}


def config_for(family: Any, model: Path, tmp_path: Path, **adapter: Any) -> Config:
    return Config(
        run=Run(name="dog", output_dir=str(tmp_path / "runs")),
        model=Model(family=family, path=str(model)),
        adapter=Adapter(**(adapter or {"type": "none"})),
        data=(Data(path="images", resolution=512),),
        export=Export(dtype="fp32"),
    )


def checkpoint_of(config: Config, groups: dict[str, dict[str, Tensor]], step: int = 3) -> Path:
    root = Path(config.run.output_dir) / config.run.name / "checkpoints"
    return save_checkpoint(root, step, groups, {"base_dtype": "bf16"})


@pytest.fixture
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Any]:
    """(config, model folder, trained state, checkpoint) of a run that trained a whole network."""

    def make(family: str) -> Any:
        folder = request.getfixturevalue(f"tiny_{family}")
        path = folder / FOLDERS[family] / "diffusion_pytorch_model.safetensors"
        generator = torch.Generator().manual_seed(1)
        state = {
            name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in load_file(path).items()
        }
        config = config_for(family, folder, tmp_path)
        return config, folder, state, checkpoint_of(config, {"trainable": state})

    return make


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("family", ["flux", "sdxl", "sd1", "sd2"])
def test_diffusers_folder_in_a_pipeline(family: str, trained: Callable[[str], Any]) -> None:
    config, folder, state, _ = trained(family)
    (written,) = main(config)
    assert written == Path(config.run.output_dir) / "dog" / "weights" / "dog"
    name = FOLDERS[family]
    assert (written / name / "config.json").read_bytes() == (
        folder / name / "config.json"
    ).read_bytes()
    pipeline = DiffusionPipeline.from_pretrained(written)
    assert_same(getattr(pipeline, name).state_dict(), state)
    original = DiffusionPipeline.from_pretrained(folder)
    assert set(pipeline.components) == set(original.components)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        if part in original.components:
            assert_same(getattr(pipeline, part).state_dict(), getattr(original, part).state_dict())
    assert not list(written.parent.glob(".*"))


def test_sharded_folder(trained: Callable[[str], Any], tmp_path: Path) -> None:
    _, folder, state, _ = trained("sdxl")
    out = tmp_path / "model"
    for _ in range(2):  # the second one replaces the first
        export_folder(
            {name: lazy(tensor) for name, tensor in state.items()},
            out,
            source=folder,
            component="unet",
            metadata={"format": "pt"},
            shard_bytes=200_000,
        )
    shards = list((out / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    assert max(sum(t.nbytes for t in load_file(p).values()) for p in shards) <= 200_000
    assert_same(UNet2DConditionModel.from_pretrained(out / "unet").state_dict(), state)
    ours = load_denoiser(
        MODELS["sdxl"], out, dtype=torch.float32, device=torch.device("cpu")
    ).state_dict()
    assert_same(ours, state)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "runs"}


def test_components_are_copied_without_variants(tiny_sd1: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_sd1, source)
    for name in ("model.fp16.safetensors", "pytorch_model.bin"):
        (source / "text_encoder" / name).write_bytes(b"another form")
    (source / "onnx").mkdir()
    out = tmp_path / "out"
    export_folder({"a": lazy(torch.ones(1))}, out, source=source, component="unet", metadata={})
    assert {p.name for p in (out / "text_encoder").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    before = (source / "text_encoder" / "model.safetensors").read_bytes()
    with (out / "text_encoder" / "model.safetensors").open("r+b") as file:
        assert file.read() == before
        file.write(b"edited in place")
    assert (source / "text_encoder" / "model.safetensors").read_bytes() == before
    assert not (out / "onnx").exists()


@pytest.mark.parametrize("family", ["sdxl", "sd1", "sd2"])
def test_single_file_in_a_pipeline(family: str, trained: Callable[[str], Any]) -> None:
    config, folder, state, _ = trained(family)
    (written,) = main(config, formats=("single_file",))
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipeline = kind.from_single_file(str(written), config=str(folder), local_files_only=True)
    original = DiffusionPipeline.from_pretrained(folder)
    assert_same(pipeline.unet.state_dict(), state)
    assert_same(pipeline.vae.state_dict(), original.vae.state_dict())
    assert_same(pipeline.text_encoder.state_dict(), original.text_encoder.state_dict())
    if family == "sdxl":
        theirs = original.text_encoder_2.state_dict()
        assert_same(pipeline.text_encoder_2.state_dict(), theirs)


def test_single_file_names_of_sdxl(trained: Callable[[str], Any]) -> None:
    """Names and shapes as in sd_xl_base_1.0.safetensors."""
    config, *_ = trained("sdxl")
    (written,) = main(config, formats=("single_file",))
    tensors = load_file(written)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes["model.diffusion_model.label_emb.0.0.weight"] == (64, 68)
    big = "conditioner.embedders.1.model"
    assert shapes[f"{big}.transformer.resblocks.2.attn.in_proj_weight"] == (72, 24)
    assert shapes[f"{big}.transformer.resblocks.2.attn.in_proj_bias"] == (72,)
    assert shapes[f"{big}.text_projection"] == (24, 20)
    assert shapes[f"{big}.positional_embedding"] == (77, 24)
    clip = "conditioner.embedders.0.transformer.text_model"
    assert f"{clip}.encoder.layers.2.self_attn.q_proj.weight" in shapes
    vae = "first_stage_model"
    assert shapes[f"{vae}.decoder.mid.attn_1.q.weight"] == (8, 8, 1, 1)
    for name in (
        "encoder.down.2.downsample.conv.weight",
        "decoder.up.3.upsample.conv.bias",  # the coarsest level; 0 has no upsampling
        "decoder.up.0.block.1.norm2.weight",
        "encoder.mid.block_2.conv1.weight",
        "decoder.norm_out.bias",
        "quant_conv.weight",
    ):
        assert f"{vae}.{name}" in shapes
    assert f"{vae}.decoder.up.0.upsample.conv.bias" not in shapes


def test_original_unet_of_the_real_size(tmp_path: Path) -> None:
    """diffusers' converter, on all names of SDXL with one value a tensor."""
    config = {
        "layers_per_block": 2,
        "addition_embed_type": "text_time",
        "class_embed_type": None,
    }
    with torch.device("meta"):
        network = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    state = {name: torch.tensor([float(i)]) for i, name in enumerate(network.state_dict())}
    original = denoiser_to_original({name: lazy(tensor) for name, tensor in state.items()})
    checkpoint = {f"model.diffusion_model.{name}": t.load() for name, t in original.items()}
    assert_same(convert_ldm_unet_checkpoint(checkpoint, config), state)


def test_original_flux_of_the_real_size() -> None:
    """diffusers' converter, on all names of FLUX.1-dev with one column a matrix."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(guidance_embeds=True)
    state = {}
    for i, (name, tensor) in enumerate(network.state_dict().items()):
        state[name] = i + torch.arange(tensor.shape[0], dtype=torch.float32)
        state[name] = state[name][:, None] if tensor.ndim == 2 else state[name]
    original = denoiser_to_original({name: lazy(tensor) for name, tensor in state.items()})
    assert len(original) == 780  # tensors in flux1-dev.safetensors
    assert original["double_blocks.0.img_attn.qkv.weight"].shape == (3 * 3072, 1)
    assert original["single_blocks.37.linear1.bias"].shape == (21504,)
    assert original["single_blocks.37.norm.key_norm.scale"].shape == (128,)
    checkpoint = {name: tensor.load() for name, tensor in original.items()}
    assert_same(convert_flux_transformer_checkpoint_to_diffusers(checkpoint), state)


def test_another_objective_is_told_to_samplers(trained: Callable[[str], Any]) -> None:
    config, folder, state, _ = trained("sdxl")
    objective = Objective(prediction="v_prediction", zero_terminal_snr=True)
    config = dataclasses.replace(config, objective=objective)
    model, file = main(config, formats=("diffusers", "single_file"))
    scheduler = DiffusionPipeline.from_pretrained(model).scheduler.config
    assert scheduler.prediction_type == "v_prediction"
    assert scheduler.rescale_betas_zero_snr and scheduler.timestep_spacing == "trailing"
    assert scheduler.beta_schedule == "scaled_linear"
    assert metadata_of(file)["modelspec.prediction_type"] == "v"
    tensors = load_file(file)
    assert tensors["v_pred"].numel() == tensors["ztsnr"].numel() == 0
    loaded = UNet2DConditionModel.from_single_file(
        str(file), config=str(folder), subfolder="unet", local_files_only=True
    )
    assert_same(loaded.state_dict(), state)


def test_flux_single_file(trained: Callable[[str], Any]) -> None:
    """The file of the tiny model, taken apart by hand: diffusers' converter knows the real width
    alone."""
    config, _, state, _ = trained("flux")
    (written,) = main(config, formats=("single_file",), dtype="bf16")
    tensors = load_file(written)
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    block = "single_transformer_blocks.1"
    names = [f"{block}.attn.to_{x}.weight" for x in "qkv"] + [f"{block}.proj_mlp.weight"]
    linear1 = tensors["single_blocks.1.linear1.weight"]
    assert torch.equal(linear1, torch.cat([state[name] for name in names]))
    scale, shift = state["norm_out.linear.weight"].chunk(2)
    modulation = tensors["final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(modulation, torch.cat([shift, scale]))


@pytest.mark.parametrize("format_", ["peft", "kohya", "comfyui"])
def test_lora_from_a_checkpoint(format_: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    config = config_for("sdxl", tiny_sdxl, tmp_path, rank=4, alpha=3.0)
    network = load_denoiser(
        MODELS["sdxl"], tiny_sdxl, dtype=torch.float32, device=torch.device("cpu")
    )
    targets = MODELS["sdxl"].adapter_targets["attention"]
    names = apply_lora(network, targets=targets, rank=4, alpha=3.0)
    parameters = {k: torch.randn_like(v) for k, v in network.named_parameters() if v.requires_grad}
    averaged = {k: torch.randn_like(v) for k, v in parameters.items()}
    checkpoint = checkpoint_of(config, {"trainable": parameters})
    checkpoint_of(config, {"trainable": parameters, "ema": averaged}, step=4)

    # the given checkpoint, then the newest one, which has averaged weights
    (path,) = main(config, checkpoint=checkpoint, formats=(format_,), out=tmp_path / "first")
    (newest,) = main(config, formats=(format_,))
    assert path.parent == tmp_path / "first" and newest.parent.name == "weights"
    for file, expected in ((path, parameters), (newest, averaged)):
        pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
        if format_ == "comfyui":
            tensors = load_file(file)
            assert len(tensors) == 3 * len(names)
            key = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"
            name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
            assert torch.equal(tensors[f"{key}.lora_B.weight"], expected[f"{name}.lora_B"])
            assert tensors[f"{key}.alpha"] == 3.0
            continue
        pipeline.load_lora_weights(file)
        for name in names:
            layer = pipeline.unet.get_submodule(name)
            delta = layer.get_delta_weight("default_0")
            by_hand = 0.75 * expected[f"{name}.lora_B"] @ expected[f"{name}.lora_A"]
            torch.testing.assert_close(delta, by_hand, rtol=1e-5, atol=1e-5)


def test_metadata(tiny_sdxl: Path, tiny_sd2: Path, tiny_flux: Path, tmp_path: Path) -> None:
    def exported(family: str, folder: Path, format_: str, **adapter: Any) -> dict[str, str]:
        config = config_for(family, folder, tmp_path / family / format_, **adapter)
        name = "x_embedder" if family == "flux" else "conv_in"
        shapes = {k: v.shape for k, v in open_tensors([_weights(folder, family)]).items()}
        if adapter:
            out, *ins = shapes[f"{name}.weight"]
            B = torch.ones(out, 4, *(1 for _ in ins[1:]))
            state = {f"{name}.lora_A": torch.ones(4, *ins), f"{name}.lora_B": B}
        else:
            state = load_file(_weights(folder, family))
        checkpoint_of(config, {"trainable": state}, step=40)
        (path,) = main(config, formats=(format_,))
        metadata = metadata_of(path)
        data = path.read_bytes()
        body = data[8 + int.from_bytes(data[:8], "little") :]
        assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(body).hexdigest()}"
        assert metadata["modelspec.sai_model_spec"] == "1.0.1"
        assert metadata["modelspec.title"] == "dog" and metadata["format"] == "pt"
        assert metadata["modelspec.resolution"] == "512x512"
        assert metadata["fasttune.base_precision"] == "bf16" and metadata["fasttune.step"] == "40"
        return metadata

    lora = {"rank": 4, "alpha": 3.0}
    peft = exported("sdxl", tiny_sdxl, "peft", **lora)
    assert peft["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert peft["modelspec.implementation"] == "diffusers"
    assert peft["modelspec.prediction_type"] == "epsilon"
    assert (peft["fasttune.rank"], peft["fasttune.alpha"]) == ("4", "3.0")
    assert "ss_network_alpha" not in peft
    kohya = exported("flux", tiny_flux, "kohya", **lora)
    assert kohya["modelspec.architecture"] == "flux-1-dev/lora"
    assert "modelspec.prediction_type" not in kohya
    assert (kohya["ss_network_dim"], kohya["ss_network_alpha"]) == ("4", "3.0")
    assert kohya["ss_base_model_version"] == "flux1"
    whole = exported("sd2", tiny_sd2, "single_file")
    assert whole["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert whole["modelspec.prediction_type"] == "v"


def _weights(folder: Path, family: str) -> Path:
    return folder / FOLDERS[family] / "diffusion_pytorch_model.safetensors"


def test_autoencoder_folder(tiny_sdxl: Path, tmp_path: Path) -> None:
    state = {
        name: tensor + 1
        for name, tensor in load_file(tiny_sdxl / "vae/diffusion_pytorch_model.safetensors").items()
    }
    config = config_for("autoencoder", tiny_sdxl, tmp_path)
    checkpoint_of(config, {"trainable": state})
    (written,) = main(config)
    assert_same(AutoencoderKL.from_pretrained(written / "vae").state_dict(), state)
    with pytest.raises(ConfigError, match='"single_file" does not go with'):
        main(config, formats=("single_file",))


def test_refuses(trained: Callable[[str], Any], tiny_flux: Path, tmp_path: Path) -> None:
    config, *_, checkpoint = trained("sdxl")
    with pytest.raises(ConfigError, match='"kohya" does not go with adapter.type = "none"'):
        main(config, formats=("diffusers", "kohya"))
    with pytest.raises(CheckpointError, match="no checkpoint to export"):
        main(config_for("sdxl", tiny_flux, tmp_path / "elsewhere"))
    with pytest.raises(CheckpointError, match="does not hold the network of model.path"):
        main(config_for("flux", tiny_flux, tmp_path), checkpoint=checkpoint)
    (checkpoint / "trainable.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"trainable\.safetensors has 0 bytes"):
        main(config)
    assert not (checkpoint.parent.parent / "weights").exists()


@pytest.mark.parametrize("format_", ["diffusers", "single_file"])
def test_a_full_disk_leaves_the_earlier_export(
    format_: str, trained: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, *_ = trained("sd1")
    (written,) = main(config, formats=(format_,))

    def contents() -> dict[str, bytes]:
        files = [path for path in written.parent.rglob("*") if path.is_file()]
        return {str(path): path.read_bytes() for path in files}

    before = contents()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="dog.*cannot be written.*No space left"):
        main(config, formats=(format_,))
    assert contents() == before


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    tensors = stored({"a.weight": lazy(torch.tensor([1e5]))}, torch.float16)
    with pytest.raises(ModelError, match=r"a\.weight holds values up to 1e\+05, beyond fp16"):
        write_tensors(tmp_path / "file.safetensors", tensors, {})
    assert not list(tmp_path.iterdir())


def test_written_files_are_what_safetensors_itself_reads(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(2.5),
        "half": torch.randn(3, 5).bfloat16(),
        "transposed": torch.randn(4, 6).T,
        "empty": torch.zeros(0, 3),
        "whole": torch.arange(7),
        "bits": torch.tensor([True, False]),
        "ünïcode": torch.randn(2).half(),
    }
    path = tmp_path / "file.safetensors"
    write_tensors(path, {k: lazy(v) for k, v in tensors.items()}, {"note": "grüße"})
    back = load_file(path)
    assert_same(back, tensors)
    assert {k: v.dtype for k, v in back.items()} == {k: v.dtype for k, v in tensors.items()}
    assert metadata_of(path) == {"note": "grüße"}
    theirs = tmp_path / "theirs.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, theirs)
    assert_same({k: v.load() for k, v in open_tensors([theirs]).items()}, tensors)
