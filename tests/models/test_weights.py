"""Finding model folders, strict loading, and what host memory holds meanwhile."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fasttune.errors import ModelError
from fasttune.models import MODELS
from fasttune.models.flux import FLUX, build_flux
from fasttune.models.weights import (
    INDEX,
    WEIGHTS,
    component_patterns,
    init_random,
    load_denoiser,
    read_config,
    resolve_model,
)

CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 8,
    "axes_dims_rope": [4, 6, 6],
}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return load_denoiser(FLUX, folder, dtype=dtype, device=CPU)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in build_flux(CONFIG).state_dict().items()}


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    """A bundle with one file of weights."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, tmp_path / "transformer" / WEIGHTS)
    return tmp_path


def shard(folder: Path, tensors: dict[str, Tensor], count: int) -> list[Path]:
    """Replaces the one file by `count` shards and their index."""
    component = folder / "transformer"
    (component / WEIGHTS).unlink()
    paths, weight_map = [], {}
    for i in range(count):
        name = f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::count]}
        save_file(part, component / name)
        weight_map |= dict.fromkeys(part, name)
        paths.append(component / name)
    (component / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


@pytest.mark.parametrize("num_shards", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_every_tensor_cast_and_off_meta(
    folder: Path, tensors: dict[str, Tensor], num_shards: int, dtype: torch.dtype
) -> None:
    if num_shards:
        shard(folder, tensors, num_shards)
    model = load(folder, dtype)
    loaded = model.state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name].to(dtype)) for name in tensors)
    assert all(p.device == CPU and p.requires_grad for p in model.parameters())


def test_weights_are_private_memory(folder: Path, tensors: dict[str, Tensor]) -> None:
    before = (folder / "transformer" / WEIGHTS).read_bytes()
    model = load(folder)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    assert (folder / "transformer" / WEIGHTS).read_bytes() == before
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == len(list(model.parameters()))
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


def test_missing_shard_is_named(folder: Path, tensors: dict[str, Tensor]) -> None:
    lost = shard(folder, tensors, 3)[1]
    lost.unlink()
    with pytest.raises(ModelError, match=f"1 of 3 shards are missing: {lost.name}"):
        load(folder)


def test_damaged_index_is_named(folder: Path, tensors: dict[str, Tensor]) -> None:
    shard(folder, tensors, 2)
    (folder / "transformer" / INDEX).write_text('{"weight_map": {')
    with pytest.raises(ModelError, match=INDEX):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 40, 3000, -1])
def test_truncated_file_is_named(folder: Path, keep: int) -> None:
    path = folder / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="damaged or incomplete") as error:
        load(folder)
    assert str(path) in str(error.value)


def test_truncated_shard_is_found_before_a_weight_is_read(
    folder: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    last = shard(folder, tensors, 3)[-1]
    last.write_bytes(last.read_bytes()[:-1])
    monkeypatch.setattr("fasttune.models.weights.set_tensor", lambda *_: pytest.fail("read"))
    with pytest.raises(ModelError, match=last.name):
        load(folder)


def test_all_faults_of_the_tensors_come_in_one_error(
    folder: Path, tensors: dict[str, Tensor]
) -> None:
    path = folder / "transformer" / WEIGHTS
    blocks = [name for name in tensors if name.startswith("single_transformer_blocks")]
    for name in blocks:
        del tensors[name]
    tensors["x_embedder.weight"] = torch.zeros(32, 17)
    tensors["extra.weight"] = torch.zeros(1)
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.int8)
    save_file(tensors, path)
    with pytest.raises(ModelError) as error:
        load(folder)
    message = str(error.value)
    assert str(path) in message
    assert f"{len(blocks)} missing: " in message and f"and {len(blocks) - 8} more" in message
    assert "1 unexpected: extra.weight" in message
    assert "1 of another shape: x_embedder.weight [32, 17] instead of [32, 16]" in message
    assert "1 quantized: proj_out.weight (I8)" in message


def test_config_of_another_family_is_refused(folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**CONFIG, "_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(ModelError, match='SD3Transformer2DModel.*"flux" is FluxTransformer2D'):
        load(folder)
    with pytest.raises(ModelError, match="has transformer.*model.family"):
        load_denoiser(MODELS["sdxl"], folder, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "original Flux layout"),
        ("model.diffusion_model.input_blocks.0.0.weight", "single-file checkpoint"),
        ("add_embedding.linear_1.weight", "SDXL U-Net"),
    ],
)
def test_weights_of_another_family_are_recognised(
    folder: Path, name: str, description: str
) -> None:
    save_file({name: torch.zeros(2)}, folder / "transformer" / WEIGHTS)
    with pytest.raises(ModelError, match=description):
        load(folder)


def test_an_sd1_unet_in_an_sdxl_run_names_the_family(tiny_sd1: Path) -> None:
    with pytest.raises(ModelError, match="model.family"):
        load_denoiser(MODELS["sdxl"], tiny_sd1, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("diffusion_pytorch_model.bin", "safetensors only"),
        ("diffusion_pytorch_model.fp16.safetensors", "variants are not read"),
    ],
)
def test_other_formats_are_explained(folder: Path, name: str, reason: str) -> None:
    component = folder / "transformer"
    (component / WEIGHTS).rename(component / name)
    with pytest.raises(ModelError, match=reason):
        load(folder)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_config_is_named(folder: Path, content: str) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(folder, "transformer")


@pytest.mark.parametrize("family", ["flux", "sdxl", "sd1", "sd2"])
def test_every_family_loads_its_bundle(family: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(f"tiny_{family}")
    spec = MODELS[family]
    model = load_denoiser(spec, bundle, dtype=torch.float32, device=CPU)
    stored = load_file(bundle / spec.denoiser_folder / WEIGHTS)
    assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters())


def test_random_weights_follow_the_seed_alone(folder: Path) -> None:
    def init(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        model = init_random(FLUX, folder, dtype=dtype, device=CPU, seed=seed)
        return model.state_dict()

    state = torch.random.get_rng_state()
    first, again, other, low = init(1), init(1), init(2), init(1, torch.bfloat16)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name].bfloat16(), low[name]) for name in first)
    assert not torch.equal(first["proj_out.weight"], other["proj_out.weight"])
    # torch's Linear draws uniformly within 1 / sqrt(in_features): deviation 1 / sqrt(3 * 12)
    weight = first["context_embedder.weight"]
    assert weight.abs().max() <= 12**-0.5 and weight.std() == pytest.approx(36**-0.5, rel=0.1)


def test_blocks_and_adapter_targets_match_modules() -> None:
    from fnmatch import fnmatch

    for family in ("flux", "sdxl", "sd1", "sd2"):
        spec = MODELS[family]
        config = read_config(CONFIGS / NAMES[family], spec.denoiser_folder)
        with torch.device("meta"):
            model = spec.build(config)
        names = dict(model.named_modules())
        kinds = (nn.Linear, nn.Conv2d)
        for patterns in spec.adapter_targets.values():
            for pattern in patterns:
                hit = [n for n, m in names.items() if fnmatch(n, pattern) and isinstance(m, kinds)]
                assert hit, f"{family}: {pattern}"
        assert spec.latent_multiple(config) == {"flux": 2, "sdxl": 4, "sd1": 8, "sd2": 8}[family]


CONFIGS = Path(__file__).parents[2] / "benchmarks" / "models"
NAMES = {"flux": "flux-dev", "sdxl": "sdxl", "sd1": "sd15", "sd2": "sd21"}

MEASURE = """
import sys
from pathlib import Path
import torch
from fasttune.models.flux import FLUX
from fasttune.models.weights import load_denoiser

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024

peak = before = anonymous()
import fasttune.models.weights as weights
inner = weights.set_tensor
def set_tensor(*args):  # looked at after every tensor
    global peak
    inner(*args)
    peak = max(peak, anonymous())
weights.set_tensor = set_tensor
dtype = getattr(torch, sys.argv[2])
model = load_denoiser(FLUX, Path(sys.argv[1]), dtype=dtype, device=torch.device("cpu"))
size = sum(p.nbytes for p in model.parameters())
print(size, max(peak, anonymous()) - before, anonymous() - before)
"""


@pytest.fixture(scope="module")
def large_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 300 MB of float32 weights."""
    config = {**CONFIG, "attention_head_dim": 128, "num_attention_heads": 6}
    config |= {"axes_dims_rope": [16, 56, 56], "num_layers": 3, "num_single_layers": 3}
    component = tmp_path_factory.mktemp("large") / "transformer"
    component.mkdir()
    (component / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in build_flux(config).state_dict().items()}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, component / WEIGHTS)
    assert 250e6 < (component / WEIGHTS).stat().st_size < 450e6
    return component.parent


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux only")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_host_memory_never_holds_a_second_copy(large_bundle: Path, dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large_bundle), dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    size, peak, final = map(int, done.stdout.split())
    assert 0.99 * size < final < 1.05 * size  # private memory, not pages of the file
    assert peak < 1.1 * size


def test_local_folders_and_wrong_paths(tmp_path: Path) -> None:
    patterns = component_patterns("transformer")
    assert resolve_model(str(tmp_path), "main", patterns) == tmp_path
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="single file"):
        resolve_model(str(tmp_path / "model.safetensors"), "main", patterns)
    for missing in (str(tmp_path / "nowhere"), "./nowhere", "~/no/where", "nowhere"):
        with pytest.raises(ModelError, match="does not exist"):
            resolve_model(missing, "main", patterns)


def hub_failure(name: str) -> Exception:
    from huggingface_hub import errors

    kind = getattr(errors, name)
    if not issubclass(kind, errors.HfHubHTTPError):
        return kind("failure")
    import httpx

    request = httpx.Request("GET", "https://huggingface.co")
    return kind("failure", response=httpx.Response(403, request=request))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("GatedRepoError", "accept its licence"),
        ("RevisionNotFoundError", "model.revision"),
        ("RepositoryNotFoundError", "not on the hub"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("HfHubHTTPError", "cannot be downloaded"),
    ],
)
def test_hub_failures_say_what_to_do(
    failure: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise hub_failure(failure)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match=message) as error:
        resolve_model("someone/some-model", "main", component_patterns("unet"))
    assert "someone/some-model" in str(error.value)


def test_hub_download_takes_only_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def download(hub_id: str, **kwargs: Any) -> str:
        asked.update(kwargs, hub_id=hub_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    patterns = component_patterns("unet", "tokenizer")
    assert resolve_model("a/b", "v1", patterns) == tmp_path
    files = [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "tokenizer/merges.txt",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/model.onnx",
        "vae/diffusion_pytorch_model.safetensors",
        "sd_xl_base_1.0.safetensors",
    ]
    kept = filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == files[:4]
    assert (asked["hub_id"], asked["revision"]) == ("a/b", "v1")


def test_a_tensor_left_on_meta_is_our_own_error(folder: Path) -> None:
    class WithBuffer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            for name, child in inner.named_children():
                self.add_module(name, child)
            self.register_buffer("table", torch.zeros(2), persistent=False)

    build: Callable[..., nn.Module] = lambda config: WithBuffer(build_flux(config))  # noqa: E731
    with pytest.raises(AssertionError, match="still on meta: table"):
        load_denoiser(replace(FLUX, build=build), folder, dtype=torch.float32, device=CPU)
