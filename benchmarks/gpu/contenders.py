"""The same training steps by other means: diffusers' networks with PEFT's LoRA, eager, compiled and
quantized.

`python -m benchmarks.gpu.contenders --case NAME --contender NAME` measures one in this process. Batch, noise,
objective and loss are those of our own step; network, adapter, clipping and optimizer are theirs, put
together as diffusers' training scripts do. A library that is missing or does not work
is named on a line "absent:", and no row is written.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.gpu import steps
from benchmarks.gpu.step_cases import StepCase, folder_of, parse, side_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_CLASSES = {"flux": "FluxTransformer2DModel", "sdxl": "UNet2DConditionModel"}
_BLOCKS = {
    "flux": ("transformer_blocks.", "single_transformer_blocks."),
    "sdxl": ("down_blocks.", "mid_block.", "up_blocks."),
}
_TARGETS = {
    "flux": r".*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
    "sdxl": r".*\.(to_[qkv]|to_out\.0)",
}
"""The Linear layers that our preset "attention" adapts."""
RANK = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """What is done to diffusers' network. Both take (network, is it a layer of a block, on the CPU)."""

    before: Callable[..., None] | None = None
    """Done before PEFT adds its adapters."""
    after: Callable[..., None] | None = None
    """Done after it."""
    compiled: bool = False


def _nf4(network: "nn.Module", chosen: Callable[[str], bool], smoke: bool) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torch import nn

    for name, layer in list(network.named_modules()):
        if not (type(layer) is nn.Linear and chosen(name)):
            continue
        weight, bias = layer.weight, layer.bias
        with torch.device("meta"):
            narrow = Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=bias is not None,
                compute_dtype=weight.dtype,
                quant_type="nf4",
            )
        narrow.bias = bias
        # quantized by the move to its device, layer by layer: the base never is there twice
        narrow.weight = Params4bit(
            weight.detach(), requires_grad=False, quant_type="nf4", module=narrow
        ).to(weight.device)
        network.set_submodule(name, narrow)
    network.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT asks for it


def _int8(network: "nn.Module", chosen: Callable[[str], bool], smoke: bool) -> None:
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
    from torchao.quantization import quantize_

    config = Int8MixedPrecisionTrainingConfig(output=True, grad_input=True, grad_weight=False)
    quantize_(network, config, filter_fn=partial(_is_base, chosen))


def _fp8(network: "nn.Module", chosen: Callable[[str], bool], smoke: bool) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(
        network,
        module_filter_fn=partial(_is_base, chosen),
        config=Float8LinearConfig(emulate=smoke),  # the CPU has no float8 products
    )


def _is_base(chosen: Callable[[str], bool], module: Any, name: str) -> bool:
    """A frozen layer whose sizes the matrix units take."""
    from torch import nn

    is_layer = isinstance(module, nn.Linear) and "lora_" not in name and chosen(name)
    return is_layer and module.in_features % 16 == 0 and module.out_features % 16 == 0


CONTENDERS: Mapping[str, Contender] = {
    "diffusers peft": Contender(),
    "diffusers peft compile": Contender(compiled=True),
    "bitsandbytes nf4": Contender(before=_nf4),
    "bitsandbytes nf4 compile": Contender(before=_nf4, compiled=True),
    "torchao int8": Contender(after=_int8),
    "torchao int8 compile": Contender(after=_int8, compiled=True),
    "torchao fp8 compile": Contender(after=_fp8, compiled=True),
}


def items() -> list[tuple[str, StepCase]]:
    """(contender, case), most important first."""
    flux, sdxl = StepCase(model="flux"), StepCase(model="sdxl")
    saving = [replace(case, activations="save") for case in (flux, sdxl)]
    unquantized = [name for name, c in CONTENDERS.items() if c.before is None and c.after is None]
    quantized = [name for name in CONTENDERS if name not in unquantized]
    return [
        *((name, case) for case in (*saving, flux, sdxl) for name in unquantized),
        *((name, flux) for name in quantized),
        *((name, replace(flux, size=512)) for name in CONTENDERS),
        *((name, sdxl) for name in quantized),
    ]


def why_not(contender: Contender, device: "torch.device", smoke: bool) -> str | None:
    """Why this one does not work here; None if a small adapted layer has a gradient."""
    import torch
    from torch import nn

    try:
        import diffusers  # noqa: F401
        from peft import LoraConfig, inject_adapter_in_model

        dtype = torch.float32 if smoke else torch.bfloat16
        small: nn.Module = nn.ModuleDict({"to_q": nn.Linear(128, 128, device=device, dtype=dtype)})
        small.requires_grad_(False)
        if contender.before is not None:
            contender.before(small, _any_name, smoke)
        inject_adapter_in_model(LoraConfig(r=8, target_modules=["to_q"]), small)
        if contender.after is not None:
            contender.after(small, _any_name, smoke)
        for name, p in small.named_parameters():
            if "lora_" in name:
                p.data = p.data.to(device, dtype)
        x = torch.randn(32, 128, device=device, dtype=dtype, requires_grad=True)
        small["to_q"](x).square().sum().backward()  # type: ignore[index]
        if x.grad is None or not x.grad.isfinite().all().item():
            return "a small layer has no finite gradient"
    except Exception as error:  # whatever a library raises when its kernels are missing
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    """The type and what it says, in one line that is not too long."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:200]}"


def _any_name(name: str) -> bool:
    return True


def take_step_of(
    contender: Contender, case: StepCase, folder: Path, device: "torch.device", *, smoke: bool
) -> steps.TakeStep:
    """Builds network, adapter, batch and optimizer; a call takes one step."""
    import torch

    from fasttune import rehearsal
    from fasttune.build import objective_for, placement_for, step_for
    from fasttune.models import MODELS
    from fasttune.seeds import derive_seed

    config = case.config(device.type)
    placement = placement_for(config)
    own = MODELS[case.model]
    spec = replace(own, build=partial(_build, case.model), predict=_PREDICT[case.model])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = rehearsal.network_without_weights(spec, folder, placement)
    denoiser.requires_grad_(False)
    _adapt(denoiser, contender, case.model, smoke)
    denoiser.train()
    if case.activations == "recompute":
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    if contender.compiled:
        options = {"backend": "aot_eager"} if smoke else {"fullgraph": True}
        denoiser.compile_repeated_blocks(**options)  # type: ignore[operator]
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.optimizer.lr, weight_decay=0.01)
    side = side_of(case, smoke)
    batch = rehearsal.random_batch(config, spec, folder, placement, (side, side))
    forward = step_for(
        config, spec, denoiser, objective_for(config, spec, folder), placement, folder
    )
    taken = 0

    def take_step() -> "Tensor":
        nonlocal taken
        generator = torch.Generator(device)
        generator.manual_seed(derive_seed(config.run.seed, "micro-batch", taken))
        taken += 1
        loss = forward.loss(batch, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return take_step


def _build(model: str, config: Mapping[str, Any]) -> "nn.Module":
    import diffusers

    network: nn.Module = getattr(diffusers, _CLASSES[model]).from_config(dict(config))
    return network


def _adapt(denoiser: "nn.Module", contender: Contender, model: str, smoke: bool) -> None:
    from peft import LoraConfig

    def in_block(name: str) -> bool:
        return name.startswith(_BLOCKS[model])

    if contender.before is not None:
        contender.before(denoiser, in_block, smoke)
    denoiser.add_adapter(  # type: ignore[operator]
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_TARGETS[model])
    )
    if contender.after is not None:
        contender.after(denoiser, in_block, smoke)
    # In the compute dtype: PEFT casts its input to the adapter's, and would compute in float32.
    dtype = next(p.dtype for p in denoiser.parameters() if p.is_floating_point())
    for p in denoiser.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)


def _predict_flux(
    denoiser: "nn.Module",
    noisy_latents: "Tensor",
    timestep: "Tensor",
    conditions: Mapping[str, "Tensor"],
    sizes: "Tensor",
    guidance: "Tensor",
) -> "Tensor":
    import torch

    from fasttune.models.flux import PACK, pack_latents, unpack_latents

    device = noisy_latents.device
    height, width = noisy_latents.shape[2] // PACK, noisy_latents.shape[3] // PACK
    text = conditions["text_embeddings"]
    rows = torch.arange(height, device=device)[:, None].expand(height, width)
    columns = torch.arange(width, device=device)[None, :].expand(height, width)
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    packed = denoiser(
        hidden_states=pack_latents(noisy_latents),
        encoder_hidden_states=text,
        pooled_projections=conditions["pooled_text_embeddings"],
        timestep=timestep,
        guidance=guidance,
        img_ids=ids.float(),
        txt_ids=torch.zeros(text.shape[1], 3, device=device),
        return_dict=False,
    )[0]
    return unpack_latents(packed, height, width)


def _predict_sdxl(
    denoiser: "nn.Module",
    noisy_latents: "Tensor",
    timestep: "Tensor",
    conditions: Mapping[str, "Tensor"],
    sizes: "Tensor",
    guidance: "Tensor",
) -> "Tensor":
    added = {"text_embeds": conditions["pooled_text_embeddings"], "time_ids": sizes}
    out: Tensor = denoiser(
        noisy_latents,
        timestep,
        conditions["text_embeddings"],
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return out


_PREDICT: Mapping[str, Any] = {"flux": _predict_flux, "sdxl": _predict_sdxl}


def case_name(case: StepCase, contender: str) -> str:
    """Of a row: the step's name, with the contender in the place of eager or compile."""
    head, _, _ = case.name.partition(" eager")
    return f"{head}, {contender}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", help="as of benchmarks.gpu.steps; eager")
    parser.add_argument("--contender", choices=sorted(CONTENDERS))
    parser.add_argument("--list", action="store_true", help="all, in their order")
    parser.add_argument("--steps", type=int, default=steps.STEPS)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--plan", type=Path, help="file of benchmarks.gpu.step_plan")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU")
    args = parser.parse_args()
    if args.list or args.case is None or args.contender is None:
        print("\n".join(json.dumps([name, case.name]) for name, case in items()))
        return
    import torch

    from benchmarks.gpu.card import device_for

    case, device = parse(args.case), device_for(smoke=args.smoke)
    contender = CONTENDERS[args.contender]
    reason = why_not(contender, device, args.smoke)
    row: harness.Row = {"fits": True}
    losses: list[float] = []
    if reason is None:
        try:
            with (
                steps.out_of_memory_is_a_result(row, device),
                folder_of(case, args.smoke) as folder,
            ):
                take_step = take_step_of(contender, case, folder, device, smoke=args.smoke)
                losses = steps.timed_steps(
                    take_step, case.batch_size, device, row, steps=args.steps, seconds=args.seconds
                )
        except Exception as error:  # as above; a library may fail at the real size alone
            reason = _reason(error)
    if reason is not None:
        print(f"absent: {case_name(case, args.contender)}: {reason}", flush=True)
        return
    row |= {
        "host_peak_gib": steps.host_peak_gib(),
        **steps.tf32(case),
        "losses": [round(x, 6) for x in losses],
    }
    if device.type == "cuda":
        row["gpu"] = torch.cuda.get_device_name(device)
    steps.with_plan(row, case, args.plan, smoke=args.smoke)
    row["predicted_peak_gib"] = None  # it is of our network
    harness.emit("contender step", case=case_name(case, args.contender), **row)


if __name__ == "__main__":
    main()
