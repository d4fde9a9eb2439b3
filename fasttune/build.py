"""From the config to the objects of a run. train.py, sample.py and export.py share these, so that
they cannot disagree about what a config means."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasttune import ddpm, flow_matching
from fasttune.adapters.formats import read_lora
from fasttune.adapters.lora import apply_lora, module_shapes
from fasttune.checkpoint import ResumeState, check_same_tensors
from fasttune.config import Config
from fasttune.ddpm import Ddpm
from fasttune.device import Placement, place, short
from fasttune.errors import ConfigError
from fasttune.flow_matching import FlowMatching
from fasttune.memory.activations import Policy, policy_of
from fasttune.memory.offload import Offload
from fasttune.models import MODELS
from fasttune.models.compiled import Compiler, compiler_for
from fasttune.models.formulas import FORMULAS
from fasttune.models.fused import fuse, kept_names
from fasttune.models.layers import Block, set_channels_last, set_recompute
from fasttune.models.spec import ModelSpec
from fasttune.models.weights import (
    build_on_meta,
    check_denoiser,
    component_patterns,
    init_random,
    load_denoiser,
    read_config,
    resolve_model,
)
from fasttune.reconstruction import Reconstruction
from fasttune.seeds import derive_seed
from fasttune.step import Objective, Step
from fasttune_kernels.triton_probe import why_no_triton

log = logging.getLogger(__name__)


def placement_for(config: Config) -> Placement:
    """Device and dtypes of the run; HardwareError if the machine cannot honour them."""
    # The layers of diffusers' autoencoder do not cast, and fp32 is what its training needs.
    fp32 = config.model.family == "autoencoder"
    return place(
        device=config.run.device,
        base="fp32" if fp32 else config.precision.base,
        compute="fp32" if fp32 else config.precision.compute,
        adapter=config.adapter.type != "none",
    )


def scheduler_config(folder: Path) -> dict[str, Any]:
    """scheduler/scheduler_config.json of a model folder: the betas, prediction or shift the model
    was trained with. Raises ModelError where it is missing or damaged."""
    return read_config(folder, "scheduler", "scheduler_config.json")


def resolved(config: Config, placement: Placement, objective: Objective) -> Config:
    """The config with what "auto" has chosen on this machine for this model."""
    dtypes: dict[str, Any] = {
        "base": short(placement.base_dtype),
        "compute": short(placement.compute_dtype),
    }
    chosen: dict[str, Any] = {}
    if isinstance(objective, FlowMatching):
        sampling = objective.timestep_sampling
        chosen = {"prediction": "velocity", "timestep_sampling": sampling}
        if sampling != "explicit":  # explicit noise levels are used as they are
            chosen["shift"] = objective.shift
    elif isinstance(objective, Ddpm):
        chosen = {
            "prediction": objective.prediction,
            "timestep_sampling": objective.timestep_sampling,
        }
    cache = config.cache
    if cache.text_storage == "auto" and placement.compute_dtype != torch.float16:
        cache = replace(cache, text_storage=short(placement.compute_dtype))  # type: ignore[arg-type]
    return replace(
        config,
        run=replace(config.run, device=placement.device.type),  # type: ignore[arg-type]
        precision=replace(config.precision, **dtypes),
        objective=replace(config.objective, **chosen),
        cache=cache,
    )


def check_model(config: Config, resumed: ResumeState | None = None) -> Objective:
    """Everything about the model that can be known from names, shapes and small files, before
    hours of caching: weight files, adapter targets, starting LoRA, resume state, resolutions.
    Returns the objective. Raises what loading would raise."""
    spec = MODELS[config.model.family]
    parts = component_patterns(spec.denoiser_folder, "scheduler", "vae")
    folder = resolve_model(config.model.path, config.model.revision, parts)
    random = config.model.init == "random"
    denoiser = build_on_meta(spec, folder) if random else check_denoiser(spec, folder)
    objective = objective_for(config, spec, folder)
    adapt(config, spec, denoiser)
    policy_for(config, denoiser)
    if config.adapter.init_from is not None and resumed is None:
        read_lora(Path(config.adapter.init_from), module_shapes(denoiser))
    if resumed is not None:
        trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        check_same_tensors(resumed.path, resumed.groups["trainable"], trained)
    return objective


def objective_for(config: Config, spec: ModelSpec, folder: Path) -> Objective:
    """The training objective: the family's and the folder's numbers, then the config's."""
    o = config.objective
    if spec.objective == "reconstruction":
        return Reconstruction(kl_weight=o.kl_weight, loss_name=o.loss, huber_delta=o.huber_delta)
    sampling = spec.timestep_sampling if o.timestep_sampling == "auto" else o.timestep_sampling
    if spec.objective == "flow_matching":
        flow = flow_matching.from_scheduler_config(scheduler_config(folder))
        return FlowMatching(
            timestep_sampling=sampling,
            shift=flow.shift if o.shift == "auto" else o.shift,
            logit_mean=o.logit_mean,
            logit_std=o.logit_std,
            mode_scale=o.mode_scale,
            timesteps=o.timesteps,
            loss_name=o.loss,
            huber_delta=o.huber_delta,
            base_shift=flow.base_shift,
            max_shift=flow.max_shift,
            base_seq_len=flow.base_seq_len,
            max_seq_len=flow.max_seq_len,
        )
    numbers = ddpm.from_scheduler_config(scheduler_config(folder))
    prediction = numbers.prediction if o.prediction == "auto" else o.prediction
    if sampling not in ("uniform", "explicit") or prediction == "velocity":
        raise ConfigError(
            [
                f"objective.prediction = {prediction!r}, objective.timestep_sampling = {sampling!r}: "
                f"family {spec.family} has epsilon or v_prediction, and uniform or explicit"
            ]
        )
    return Ddpm(
        prediction=prediction,
        timestep_sampling=sampling,  # type: ignore[arg-type]  # narrowed above
        timesteps=o.timesteps,
        num_train_timesteps=numbers.num_train_timesteps,
        beta_start=numbers.beta_start,
        beta_end=numbers.beta_end,
        beta_schedule=numbers.beta_schedule,
        zero_terminal_snr=o.zero_terminal_snr or numbers.zero_terminal_snr,
        min_snr_gamma=o.min_snr_gamma,
        loss_name=o.loss,
        huber_delta=o.huber_delta,
    )


def denoiser_for(config: Config, spec: ModelSpec, folder: Path, placement: Placement) -> nn.Module:
    """The network on its device, with an untrained adapter if the config asks for one."""
    dtype, device = placement.base_dtype, placement.device
    if config.model.init == "random":
        seed = derive_seed(config.run.seed, "init")
        denoiser = init_random(spec, folder, dtype=dtype, device=device, seed=seed)
    else:
        denoiser = load_denoiser(spec, folder, dtype=dtype, device=device)
    names = adapt(config, spec, denoiser)
    if names:
        log.info("LoRA rank %d on %d modules", config.adapter.rank, len(names))
    return denoiser


def set_blocks(
    config: Config, denoiser: nn.Module, placement: Placement, *, device_type: str | None = None
) -> Compiler | None:
    """Gives the blocks of a network with its weights and adapter their formulas, with what the config
    says they keep and compile. Returns the compiler, if there is one. `device_type` is what the
    placement's stands for, where it stands for another. Raises what `policy_for` raises."""
    policy = policy_for(config, denoiser)
    compiler, reason = compiler_for(config.train.compile, placement.device.type)
    offload = Offload(stands_for=device_type)
    kinds = fuse(
        denoiser,
        FORMULAS,
        policy=policy,
        compile=compiler,
        offload=offload,
        dtype=placement.compute_dtype,
    )
    if not kinds:  # a network of diffusers
        set_recompute(denoiser, policy.default == "recompute")
        return None
    log.info("%s", reason)
    if problem := why_no_triton(placement.device) if placement.device.type == "cuda" else None:
        log.warning("operations run by PyTorch and take more time and memory: %s", problem)
    _set_plain_blocks(kinds.get("plain", []), policy, compiler)
    if (device_type or placement.device.type) == "cuda":
        # Not on the CPU, whose group norm loses digits there, nor on MPS, whose optimizers want
        # contiguous weights.
        set_channels_last(denoiser)
    return compiler


def policy_for(config: Config, denoiser: nn.Module) -> Policy:
    """What becomes of activations. ConfigError for a table that names what no block of the network
    keeps."""
    policy = policy_of(config.memory.activations)
    names = kept_names(denoiser, FORMULAS)
    unknown = sorted(set(policy.choices) - names)
    if unknown:
        there = ", ".join(sorted(names)) or "nothing"
        raise ConfigError(
            [
                f"memory.activations: {', '.join(unknown)}: no block of family {config.model.family} "
                f"keeps that; there is {there}"
            ]
        )
    return policy


def _set_plain_blocks(blocks: Sequence[Block], policy: Policy, compiler: Compiler | None) -> None:
    """Blocks whose adapters their fused form does not cover save all or recompute as a whole."""
    others = 0
    for block in blocks:
        names = FORMULAS[type(block)].kept
        wanted = {policy[name] for name in names} or {policy.default}
        block.recompute = wanted != {"save"}
        others += wanted not in ({"save"}, {"recompute"})
    if others:
        log.warning(
            "%d blocks have adapters that their fused form does not cover; they recompute, whatever "
            "else memory.activations says of what they keep",
            others,
        )
    if blocks and compiler is not None:
        log.warning("%d blocks with such adapters are not compiled", len(blocks))


def step_for(
    config: Config,
    spec: ModelSpec,
    denoiser: nn.Module,
    objective: Objective,
    placement: Placement,
    folder: Path,
) -> Step:
    """What each micro-batch computes."""
    o, device = config.objective, placement.device
    return Step(
        spec=spec,
        denoiser=denoiser,
        objective=objective,
        compute_dtype=placement.compute_dtype,
        token_side=spec.latent_multiple(read_config(folder, spec.denoiser_folder)),
        offset_noise=o.offset_noise,
        text_mask=o.text_mask,
        guidance=torch.full((config.train.batch_size,), o.guidance, device=device),
    )


def adapt(config: Config, spec: ModelSpec, denoiser: nn.Module) -> list[str]:
    """Freezes the network and adds the untrained adapter, or leaves all of it trainable. Returns
    the names of the adapted modules."""
    denoiser.requires_grad_(config.adapter.type == "none")
    if config.adapter.type == "none":
        return []
    targets = config.adapter.targets
    patterns = (
        spec.adapter_targets.get(targets, (targets,)) if isinstance(targets, str) else targets
    )
    return apply_lora(
        denoiser,
        targets=patterns,
        rank=config.adapter.rank,
        alpha=config.adapter.alpha,
        dropout=config.adapter.dropout,
        seed=derive_seed(config.run.seed, "lora"),
    )
