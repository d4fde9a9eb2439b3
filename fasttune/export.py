"""Trained weights for use elsewhere, from a checkpoint of a run.

    LoRA            <name>.safetensors (PEFT), <name>-kohya.safetensors, <name>-comfyui.safetensors
    whole network   <name>/ (diffusers folder, all components), <name>.safetensors (single file)

`main` is the composition root; the functions below it take what they need. Averaged weights (EMA)
are exported where the checkpoint has them. Everything is written beside and renamed, tensor by
tensor.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasttune.adapters.formats import Layout, lora_tensors
from fasttune.adapters.lora import LoraPair, lora_from_parameters, module_shapes
from fasttune.build import scheduler_config
from fasttune.checkpoint import damage, list_checkpoints
from fasttune.config import Config
from fasttune.errors import CheckpointError, ConfigError, StorageError
from fasttune.models import MODELS
from fasttune.models.spec import ModelSpec
from fasttune.models.weights import (
    INDEX,
    WEIGHTS,
    build_on_meta,
    component_patterns,
    read_config,
    resolve_model,
)
from fasttune.modelspec import file_metadata
from fasttune.single_file import single_file_tensors
from fasttune.tensor_files import (
    HASH_KEY,
    VARIANT,
    LazyTensor,
    lazy,
    open_tensors,
    stored,
    write_tensors,
)

log = logging.getLogger(__name__)

SHARD_BYTES = 5_000_000_000
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LORA_FILES: dict[Layout, str] = {
    "peft": "{}.safetensors",
    "kohya": "{}-kohya.safetensors",
    "comfyui": "{}-comfyui.safetensors",
}
_NETWORK_FORMATS = ("diffusers", "single_file")
_COMPONENTS = (
    "scheduler",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "unet",
    "transformer",
    "vae",
    "feature_extractor",
)
_OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data", ".xml")


def main(
    config: Config,
    *,
    checkpoint: Path | None = None,
    formats: Sequence[str] = (),
    dtype: str | None = None,
    out: Path | None = None,
) -> list[Path]:
    """Exports a checkpoint of the run of `config`, its newest one by default, and returns what was
    written: files, and a folder for "diffusers".

    formats, dtype: as in `config.export`, the default; out: folder, by default weights/ of the run.
    Raises CheckpointError, ConfigError (a format that does not fit), ModelError or StorageError.
    """
    if checkpoint is None:
        root = Path(config.run.output_dir).expanduser() / config.run.name / "checkpoints"
        found = list_checkpoints(root)
        if not found:
            raise CheckpointError(
                f"{root}: no checkpoint to export; train first, or give its folder"
            )
        checkpoint = found[-1]
    problem = damage(checkpoint)
    if problem is not None:
        raise CheckpointError(f"{checkpoint}: {problem}; export the checkpoint before it")
    is_lora = config.adapter.type == "lora"
    formats = tuple(formats) or config.export.formats or ("peft" if is_lora else "diffusers",)
    fitting: tuple[str, ...] = tuple(_LORA_FILES) if is_lora else _NETWORK_FORMATS
    if config.model.family == "autoencoder":
        fitting = fitting[:1]  # the other formats hold whole models, or are none that tools read
    unfit = [f for f in formats if f not in fitting]
    if unfit:
        raise ConfigError(
            [
                f'export.formats: "{f}" does not go with adapter.type = "{config.adapter.type}" and '
                f"family {config.model.family}; allowed are {', '.join(fitting)}"
                for f in unfit
            ]
        )

    spec = MODELS[config.model.family]
    needed = (
        component_patterns(*_COMPONENTS) if not is_lora else (f"{spec.denoiser_folder}/*.json",)
    )
    folder = resolve_model(config.model.path, config.model.revision, (*needed, "scheduler/*.json"))
    ema = checkpoint / "ema.safetensors"
    trained = open_tensors([ema if ema.is_file() else checkpoint / "trainable.safetensors"])
    network = build_on_meta(spec, folder)
    out = checkpoint.parent.parent / "weights" if out is None else out
    storage = DTYPES[dtype or config.export.dtype]
    written = []
    for name in formats:
        metadata = _metadata(config, spec, folder, checkpoint, layout=name)
        if is_lora:
            layout: Layout = name  # type: ignore[assignment]  # one of `fitting`
            parameters = {key: tensor.load() for key, tensor in trained.items()}
            path = export_lora(
                lora_from_parameters(parameters, alpha=config.adapter.alpha),
                out / _LORA_FILES[layout].format(config.run.name),
                shapes=module_shapes(network),
                layout=layout,
                dtype=storage,
                metadata=metadata,
            )
        else:
            _check_complete(network, trained, checkpoint)
            if name == "diffusers":
                path = export_folder(
                    stored(trained, storage),
                    out / config.run.name,
                    source=folder,
                    component=spec.denoiser_folder,
                    metadata=metadata,
                    scheduler=_scheduler_changes(config, spec, folder),
                )
            else:
                path = out / f"{config.run.name}.safetensors"
                whole = single_file_tensors(spec.family, trained, folder)
                whole |= _markers(config, spec, folder)
                write_tensors(path, stored(whole, storage), metadata)
        log.debug("wrote %s (%s, %s)", path, name, dtype or config.export.dtype)
        written.append(path)
    return written


def export_lora(
    lora: Mapping[str, LoraPair],
    path: Path,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    layout: Layout,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> Path:
    """Writes a LoRA file. `shapes`: weight shapes of the network (`module_shapes`, on meta)."""
    tensors = lora_tensors(lora, shapes, layout=layout, dtype=torch.float32)
    alphas = {name: lazy(t) for name, t in tensors.items() if name.endswith(".alpha")}
    pairs = {name: lazy(t) for name, t in tensors.items() if name not in alphas}
    write_tensors(path, stored(pairs, dtype) | alphas, metadata)
    return path


def export_folder(
    network: Mapping[str, LazyTensor],
    out: Path,
    *,
    source: Path,
    component: str,
    metadata: Mapping[str, str],
    scheduler: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """A model folder in diffusers layout: `network` in the sub-folder `component`, in shards of at
    most `shard_bytes`, and everything else copied from the folder `source`. `scheduler` has the
    keys of scheduler_config.json that training changed. A folder already at `out` is replaced when
    the new one is complete."""
    beside = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        _copy_components(source, beside, component)
        if scheduler:
            path = beside / "scheduler" / "scheduler_config.json"
            path.parent.mkdir(exist_ok=True)
            text = json.dumps(scheduler_config(source) | dict(scheduler), indent=2)
            path.write_text(text + "\n", encoding="utf-8")
        (beside / component).mkdir()
        shutil.copyfile(source / component / "config.json", beside / component / "config.json")
        _write_shards(beside / component, network, metadata, shard_bytes)
        if out.exists():
            out.rename(old)
        beside.rename(out)
    except OSError as error:
        raise StorageError(
            f"{out} cannot be written ({error}); free some space or choose another folder. Earlier "
            "files are intact"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return out


def _write_shards(
    folder: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], shard_bytes: int
) -> None:
    shards: list[dict[str, LazyTensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.num_bytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.num_bytes
    if len(shards) == 1:
        write_tensors(folder / WEIGHTS, shards[0], metadata)
        return
    stem, count = WEIGHTS.removesuffix(".safetensors"), len(shards)
    weight_map: dict[str, str] = {}
    metadata = {key: value for key, value in metadata.items() if key != HASH_KEY}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{count:05d}.safetensors"
        write_tensors(folder / file, shard, metadata)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_components(source: Path, out: Path, component: str) -> None:
    """model_index.json and every component but one; weights in other formats than safetensors, or
    half-precision variants beside plain ones, are left out.

    Copied, not linked: the source is often the hub's cache, which an edit of the export must not
    change."""
    folders = [path for path in source.iterdir() if path.is_dir() and path.name != component]
    if (source / "model_index.json").is_file():
        shutil.copyfile(source / "model_index.json", out / "model_index.json")
        listed = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
        folders = [path for path in folders if path.name in listed]
    for folder in folders:
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        weights = [path for path in files if path.suffix == ".safetensors"]
        has_plain = any(VARIANT.search(path.name) is None for path in weights)
        (out / folder.name).mkdir()
        for path in files:
            is_variant = VARIANT.search(path.name) is not None
            if (weights and path.suffix in _OTHER_WEIGHTS) or (has_plain and is_variant):
                continue
            shutil.copyfile(path, out / folder.name / path.name)


def _check_complete(
    network: nn.Module, trained: Mapping[str, LazyTensor], checkpoint: Path
) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    wrong = [name for name, shape in expected.items() if name not in trained]
    wrong += [name for name in trained if trained[name].shape != expected.get(name)]
    if wrong:
        raise CheckpointError(
            f"{checkpoint} does not hold the network of model.path: {len(wrong)} tensors differ, such "
            f"as {wrong[0]}; export with the config.toml of its run folder"
        )


def _prediction(config: Config, spec: ModelSpec, folder: Path) -> str:
    """What the trained network predicts: the config's word, the folder's, the family's."""
    if config.objective.prediction != "auto":
        return config.objective.prediction
    if spec.objective != "ddpm":
        return spec.prediction
    prediction: str = scheduler_config(folder).get("prediction_type", "epsilon")
    return prediction


def _scheduler_changes(config: Config, spec: ModelSpec, folder: Path) -> dict[str, Any]:
    """Keys of scheduler_config.json that samplers need after training with another objective."""
    if spec.objective != "ddpm":
        return {}
    before = scheduler_config(folder)
    changes: dict[str, Any] = {}
    if _prediction(config, spec, folder) != before.get("prediction_type", "epsilon"):
        changes["prediction_type"] = _prediction(config, spec, folder)
    if config.objective.zero_terminal_snr and not before.get("rescale_betas_zero_snr"):
        # the last step must be sampled, too (arXiv 2305.08891, section 3.3)
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return changes


def _markers(config: Config, spec: ModelSpec, folder: Path) -> dict[str, LazyTensor]:
    """Empty tensors by which ComfyUI and others tell SDXL checkpoints of v-prediction, and of zero
    terminal SNR, from the usual ones: a single file has no scheduler config."""
    if spec.family != "sdxl" or _prediction(config, spec, folder) != "v_prediction":
        return {}
    zero_snr = config.objective.zero_terminal_snr or scheduler_config(folder).get(
        "rescale_betas_zero_snr"
    )
    names = ("v_pred", "ztsnr") if zero_snr else ("v_pred",)
    return {name: lazy(torch.empty(0)) for name in names}


def _metadata(
    config: Config, spec: ModelSpec, folder: Path, checkpoint: Path, *, layout: str
) -> dict[str, str]:
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    is_lora = config.adapter.type == "lora"
    return file_metadata(
        family=spec.family,
        layout=layout,
        title=config.run.name,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        resolution=config.data[0].resolution,
        prediction=_prediction(config, spec, folder),
        model_config=read_config(folder, spec.denoiser_folder),
        base_model=config.model.path,
        base_precision=state.get("base_dtype", config.precision.base),
        step=state["step"],
        lora={"rank": config.adapter.rank, "alpha": config.adapter.alpha} if is_lora else None,
    )
