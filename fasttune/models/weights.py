"""Model folders in diffusers layout: finding them, and strict loading of the trained network.

The network is built on meta and filled tensor by tensor from memory-mapped safetensors, so host
memory never holds a second copy. Everything that could be wrong with the files is looked at in
their headers first and reported in one ModelError, before a weight is read.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fasttune.errors import ModelError
from fasttune.models.spec import ModelSpec

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
NUM_NAMED = 8  # offending names that an error lists
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_IGNORE = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.non_ema.*", "*onnx*", "*openvino*", "*flax*")
OTHER_LAYOUTS = (  # a name that gives a checkpoint away, and what it then is
    ("transformer_blocks.0.attn.add_q_proj.weight", "a FluxTransformer2DModel (family flux)"),
    ("double_blocks.0.img_attn.qkv.weight", "the original Flux layout; take the diffusers folder"),
    (
        "model.diffusion_model.input_blocks.0.0.weight",
        "a single-file checkpoint, not a diffusers one",
    ),
    ("add_embedding.linear_1.weight", "an SDXL U-Net (family sdxl)"),
    ("down_blocks.0.resnets.0.time_emb_proj.weight", "an SD 1.x or 2.x U-Net (family sd1 or sd2)"),
    ("decoder.conv_in.weight", "an AutoencoderKL (family autoencoder)"),
)


def component_patterns(*components: str) -> tuple[str, ...]:
    """The files of these sub-folders that a hub download needs: JSON, safetensors, tokenizers."""
    suffixes = ("*.json", "*.safetensors", "*.txt", "*.model")
    return ("model_index.json", *(f"{c}/{suffix}" for c in components for suffix in suffixes))


def resolve_model(path: str, revision: str, patterns: Sequence[str]) -> Path:
    """Folder of a model: `path` itself, or the local snapshot of a hub id.

    patterns: files to download, such as `component_patterns("unet", "vae")`; half-precision and
    non-EMA variants are left out. Raises ModelError for a folder that does not exist, a single
    file, and a hub id that cannot be fetched.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(
            f"{path} is a single file; model.path must be a folder in diffusers layout, as"
            " from_single_file(...).save_pretrained(...) of diffusers writes it, or a hub id such as"
            " black-forest-labs/FLUX.1-dev"
        )
    if not HUB_ID.fullmatch(path):
        raise ModelError(
            f"{path} does not exist; model.path must be a folder in diffusers layout or a hub id"
            " such as black-forest-labs/FLUX.1-dev"
        )
    return _download(path, revision, patterns)


def _download(hub_id: str, revision: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    here = f"{hub_id} (no such folder here, so taken as a hub id, revision {revision})"
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(HUB_IGNORE),
            )
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{here} is gated: accept its licence on https://huggingface.co/{hub_id}, then"
            " `hf auth login` with a token that can read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{here} has no such revision; see model.revision") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{here} is not on the hub, or it is private and needs `hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"{here} is not in the local cache and the hub cannot be reached; connect once, or set"
            " model.path to a downloaded folder"
        ) from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{here} cannot be downloaded: {error}") from error


def read_config(folder: Path, component: str, name: str = "config.json") -> dict[str, Any]:
    """config.json of a sub-folder. Raises ModelError where there is none, or no JSON object."""
    path = folder / component / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        found = sorted(entry.parent.name for entry in folder.glob("*/config.json"))
        raise ModelError(
            f"{path} does not exist; {folder} has {', '.join(found) or 'no component at all'}."
            " model.path must be the folder that holds model_index.json, and model.family must"
            " be the family of that model"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); download the file again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object; download the file again")
    return config


def build_on_meta(spec: ModelSpec, folder: Path) -> nn.Module:
    """The network of a folder's config.json, without weights. Raises ModelError for a folder of
    another family."""
    config = read_config(folder, spec.denoiser_folder)
    found = config.get("_class_name", spec.class_name)
    if found != spec.class_name:
        raise ModelError(
            f"{folder / spec.denoiser_folder / 'config.json'} describes {found}, but model.family ="
            f' "{spec.family}" is {spec.class_name}; change one of model.family and model.path'
        )
    with torch.device("meta"):
        return spec.build(config)


def check_denoiser(spec: ModelSpec, folder: Path) -> nn.Module:
    """The network on meta, after its weight files were found whole and fitting by their headers:
    seconds, whatever the size. Raises ModelError as `load_denoiser` does."""
    denoiser = build_on_meta(spec, folder)
    _check_tensors(spec, denoiser, find_shards(folder / spec.denoiser_folder))
    return denoiser


def load_denoiser(
    spec: ModelSpec, folder: Path, *, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The trained network of a model folder, its weights in `dtype` on `device`.

    Weights are private, writable memory. Raises ModelError, naming the file, for a missing or
    damaged shard and for missing, unexpected, mis-shaped or quantized tensors.
    """
    denoiser = check_denoiser(spec, folder)
    for path in find_shards(folder / spec.denoiser_folder):
        # one shard mapped at a time: its pages are given back before the next one is read
        with _open_shard(path) as shard:
            for name in shard.keys():
                target = torch.empty(shard.get_slice(name).get_shape(), dtype=dtype, device=device)
                set_tensor(denoiser, name, target.copy_(shard.get_tensor(name)))
    _assert_real(denoiser)
    return denoiser


def init_random(
    spec: ModelSpec, folder: Path, *, dtype: torch.dtype, device: torch.device, seed: int
) -> nn.Module:
    """A network of the folder's sizes with new weights, drawn as torch's layers draw theirs.

    A function of the seed alone: drawn in float32 on the CPU, layer by layer, then cast and moved.
    """
    denoiser = build_on_meta(spec, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in denoiser.modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.to_empty(device="cpu", recurse=False)
                module.reset_parameters()  # type: ignore[operator]
                module.to(device=device, dtype=dtype)
    _assert_real(denoiser)
    return denoiser


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Puts a tensor in the place of the parameter or buffer of this dotted name."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._parameters:
        owner.register_parameter(leaf, nn.Parameter(value))
    else:
        owner.register_buffer(leaf, value)


def find_shards(component: Path) -> list[Path]:
    """The safetensors files of a component, by its index where it has one.

    Raises ModelError for missing files and for folders with other formats alone.
    """
    index = component / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read ({error!r}); download it again") from error
        missing = [name for name in names if not (component / name).is_file()]
        if missing:
            raise ModelError(
                f"{component}: {len(missing)} of {len(names)} shards are missing:"
                f" {_some(missing)}; {INDEX} lists them. Download the folder again"
            )
        return [component / name for name in names]
    if (component / WEIGHTS).is_file():
        return [component / WEIGHTS]
    found = sorted(entry.name for entry in component.iterdir() if entry.name != "config.json")
    reason = "fasttune reads safetensors only" if any(n.endswith(".bin") for n in found) else ""
    if any(name.endswith(".safetensors") for name in found):
        reason = f"variants are not read: download the plain one, or rename it to {WEIGHTS}"
    raise ModelError(
        f"{component} has neither {WEIGHTS} nor its index; it has {_some(found) or 'nothing else'}"
        + (f". {reason}" if reason else "")
    )


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} is damaged or incomplete ({error}); download the file again"
        ) from error


def _check_tensors(spec: ModelSpec, denoiser: nn.Module, shards: Sequence[Path]) -> None:
    """Compares names, shapes and dtypes in the shards' headers with the network."""
    expected = {name: tuple(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    quantized = []
    with ExitStack() as stack:
        for path in shards:
            shard = stack.enter_context(_open_shard(path))
            for name in shard.keys():
                header = shard.get_slice(name)
                found[name] = tuple(header.get_shape())
                if header.get_dtype() not in FLOAT_TYPES:
                    quantized.append(f"{name} ({header.get_dtype()})")
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(shape)} instead of {list(expected[name])}"
            for name, shape in found.items()
            if name in expected and shape != expected[name]
        ],
        "quantized": quantized,
    }
    if not any(problems.values()):
        return
    lines = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
    where = str(shards[0]) if len(shards) == 1 else f"{shards[0].parent} ({len(shards)} shards)"
    raise ModelError(
        f"{where} does not fit its config.json as {spec.class_name}:\n"
        + "\n".join(f"  - {line}" for line in lines)
        + f"\n{_remedy(expected, found, quantized)}"
    )


def _remedy(expected: Mapping[str, Any], found: Mapping[str, Any], quantized: Sequence[str]) -> str:
    for name, description in OTHER_LAYOUTS:
        if name in found and name not in expected:
            return f"The file holds {description}; change model.family or model.path"
    if quantized:
        return "Quantized checkpoints cannot be trained; take the bf16, fp16 or fp32 weights"
    return "Weights and config.json are from different models, or incomplete: download the folder again"


def _some(names: Sequence[str]) -> str:
    more = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def _assert_real(denoiser: nn.Module) -> None:
    """No tensor may be left on meta. Networks keep no buffers outside the state dict: tables are
    made at first use."""
    tensors = [*denoiser.named_parameters(), *denoiser.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta]
    assert not left, f"still on meta: {_some(left)}"
