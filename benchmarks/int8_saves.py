"""What int8 saves do to the gradients, and to a training run. Run by hand:

    python -m benchmarks.int8_saves [--part gradients losses losses_bf16] [--steps 200] [--keep FOLDER]

**gradients**: real blocks at real width on few tokens, rank 16 adapters on every linear layer, random
numbers. SQNR in dB of every gradient, 20 log10(|g| / |g' - g|), of the same step with

  added_db      tensors in int8 against the same tensors saved as they are: what int8 adds
  compute_db    saved tensors in bf16 against the step in float32: what bf16 costs without int8
  total_db      both against float32

and of these the worst gradient, the median, and that of the block's input. "even" inputs and weights are
normal; "outliers" have what is known of trained transformers: a few channels of the stream 60 times the
others, tokens 20 times, heads whose gains differ by 20 times, neurons of the MLP 10 times. The models'
own weights have neither exactly. Rounded are all kept tensors; all but attention's outputs, which are made
again from rounded queries, keys and values; and, in bf16, each alone.

**losses**: the quickstart's model, images and settings at batch 4, with its LoRA and as a full fine-tuning
(the LoRA adapts convolutions too, and blocks with adapted convolutions have no fused form: of the
ResNet blocks it says nothing). The same seed with saved tensors and with int8, and another seed to see
what a difference means. On the CPU the quickstart computes, and saves, in float32.

**losses_bf16**: the same with precision.compute = "bf16", where int8 stands against bf16 saves, and a run
in float32 for what bf16 costs. At 48 px for the time: without AVX-512, a bf16 product of PyTorch's took 40
times as long as one in float32, a convolution 9 times.
"""

import argparse
import hashlib
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, ROOT, Row, machine, machine_name, table, write_rows
from fasttune.adapters.lora import apply_lora
from fasttune.config import Config
from fasttune.config_file import load_config
from fasttune.memory.activations import Choice, Policy
from fasttune.models.flux import DoubleBlock, SingleBlock
from fasttune.models.formulas import FORMULAS
from fasttune.models.fused import fuse
from fasttune.models.layers import Block
from fasttune.models.rope import rope_table
from fasttune.models.unet import ResnetBlock, TransformerBlock
from fasttune.models.unet_config import read_unet_config

RANK = 16
TEXT = 64
GRID = 16, 16
PARTS = ("gradients", "losses", "losses_bf16")
LOGGED = 10
"""Steps between compared losses, which are those of single steps."""
BF16_RESOLUTION = 48

Gradients = dict[str, Tensor]


# --- Gradients


@dataclass(frozen=True, slots=True)
class Case:
    """A block and its inputs, by name; those whose name begins with "x" have a gradient."""

    name: str
    block: Block
    inputs: Mapping[str, Tensor | None]


def cases(uneven: bool) -> Iterator[Case]:
    tokens = GRID[0] * GRID[1]
    width, heads = 3072, 24
    cos, sin = rope_table(*GRID, TEXT, axes=(16, 56, 56), device=torch.device("cpu"))
    tables: dict[str, Tensor | None] = {"cos": cos, "sin": sin, "mask": None}
    vector = torch.randn(1, width)
    stream = _stream(TEXT + tokens, width, uneven)
    yield Case(
        "flux single",
        _block(SingleBlock(width, heads), heads, uneven),
        {"x": stream, "vector": vector, **tables},
    )
    parts = {"x": stream[:, TEXT:], "x_text": stream[:, :TEXT]}
    double = _block(DoubleBlock(width, heads), heads, uneven)
    yield Case("flux double", double, {**parts, "vector": vector, **tables})
    for width, heads in ((640, 10), (1280, 20)):
        yield Case(
            f"sdxl transformer {width}",
            _block(TransformerBlock(width, 2048, heads), heads, uneven),
            {"x": _stream(2 * tokens, width, uneven), "text": torch.randn(1, 77, 2048)},
        )
    features = _stream(32 * 32, 640, uneven).transpose(1, 2).unflatten(2, (32, 32))
    resnet = ResnetBlock(640, 640, 1280, read_unet_config({}))
    inputs = {"x": features.clone(memory_format=torch.channels_last)}
    yield Case(
        "sdxl resnet 640", _block(resnet, 1, uneven), {**inputs, "emb": torch.randn(1, 1280)}
    )


def _stream(tokens: int, width: int, uneven: bool) -> Tensor:
    """(1, tokens, width)."""
    x = torch.randn(1, tokens, width)
    if uneven:
        x *= torch.randn(width).exp()
        x[..., torch.randperm(width)[:3]] *= 60
        x[:, torch.randperm(tokens)[:2]] *= 20
    return x


def _block(block: Block, heads: int, uneven: bool) -> Block:
    """With random weights and, but for ResNet blocks, adapters that are not at their start."""
    root = nn.ModuleDict({"block": block})
    for name, p in root.named_parameters():
        if p.ndim == 1:
            p.data = torch.randn_like(p) * 0.1 + ("norm" in name and name.endswith("weight"))
        else:
            p.data = torch.randn_like(p) * p[0].numel() ** -0.5
        if uneven and p.ndim == 2:
            rows = p.data
            if any(part in name for part in (".to_q", ".to_k", ".to_v", "add_")):
                # 20 times between the ends of 24; what no norm follows would be out of bounds
                free = isinstance(block, TransformerBlock) and ".to_v" not in name
                gains = ((0.2 if free else 0.75) * torch.randn(heads)).exp()
                rows.view(heads, -1, rows.shape[1]).mul_(gains[:, None, None])
            elif "proj_mlp" in name or "net.0" in name:
                rows[torch.randperm(len(rows))[: len(rows) // 500]] *= 10
    if isinstance(block, ResnetBlock):
        return block.train()
    apply_lora(root, targets=["*"], rank=RANK, alpha=RANK)
    for name, p in root.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.02)
    return block.train()


def gradients(case: Case, dtype: torch.dtype, policy: Policy) -> Gradients:
    """Of the inputs "x..." and of what trains, in float32. Weights and inputs are rounded to bf16 first,
    so that the two compute dtypes start from the same."""
    block = case.block.to(torch.bfloat16).to(dtype)
    for name, p in block.named_parameters():
        if name.endswith(("lora_A", "lora_B")):
            p.data = p.data.float()
    fuse(block, FORMULAS, policy=policy)
    given = [
        x if x is None or name in ("cos", "sin") else x.bfloat16().to(dtype).detach()
        for name, x in case.inputs.items()
    ]
    named = dict(zip(case.inputs, given, strict=True))
    leaves = {
        name: x.requires_grad_() for name, x in named.items() if name[0] == "x" and x is not None
    }
    outputs = block(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    ends = [torch.randn(x.shape, generator=generator).bfloat16().to(dtype) for x in outputs]
    torch.autograd.backward(outputs, ends)
    found = {f"d{name}": x.grad.float() for name, x in leaves.items() if x.grad is not None}
    for name, p in block.named_parameters():
        if p.grad is not None:
            found[name] = p.grad.float()
        p.grad = None
    return found


def sqnr(reference: Tensor, found: Tensor) -> float:
    """dB; 200 where they are equal."""
    error = float((found.double() - reference.double()).norm())
    size = float(reference.double().norm())
    return round(20 * math.log10(size / error), 1) if error else 200.0


def gradient_rows(only: str = "") -> Iterator[Row]:
    for uneven in (False, True):
        torch.manual_seed(0)
        for case in cases(uneven):
            if only in case.name:
                yield from _rows_of(case, "outliers" if uneven else "even")


def _rows_of(case: Case, numbers: str) -> Iterator[Row]:
    saved = {d: gradients(case, d, Policy()) for d in (torch.float32, torch.bfloat16)}
    truth = saved[torch.float32]
    names = sorted(FORMULAS[type(case.block)].kept)
    together = {"all": Policy("int8")}
    if "attention" in names:
        others: dict[str, Choice] = {name: "recompute" for name in names if "attention" in name}
        together["all, attention recomputed"] = Policy("int8", others)
    alone = {name: Policy(choices={name: "int8"}) for name in names if len(names) > 1}
    for dtype, reference in saved.items():
        policies = together if dtype == torch.float32 else together | alone
        for tensors, policy in policies.items():
            found = gradients(case, dtype, policy)
            added = {name: sqnr(g, found[name]) for name, g in reference.items()}
            row: Row = {
                "measurement": "int8 saves, gradients",
                "case": f"{case.name}, {numbers}, {str(dtype).removeprefix('torch.')}, {tensors}",
                **_summary("added", added),
            }
            if dtype == torch.bfloat16:
                row |= _summary("compute", {n: sqnr(g, reference[n]) for n, g in truth.items()})
                row |= _summary("total", {n: sqnr(g, found[n]) for n, g in truth.items()})
            yield {**row, "gradients_db": added}


def _summary(kind: str, values: Mapping[str, float]) -> Row:
    worst = min(values, key=lambda name: values[name])
    return {
        f"{kind}_worst_db": values[worst],
        f"{kind}_worst": worst,
        f"{kind}_median_db": round(statistics.median(values.values()), 1),
        f"{kind}_dx_db": values["dx"],
    }


# --- Losses


def loss_rows(steps: int, *, bf16: bool, kept: Path | None) -> Iterator[Row]:
    config = _short(load_config(ROOT / "configs" / "quickstart.toml"), steps)
    if bf16:
        config = replace(
            config,
            precision=replace(config.precision, compute="bf16"),
            data=tuple(replace(source, resolution=BF16_RESOLUTION) for source in config.data),
        )
    full = replace(
        config,
        adapter=replace(config.adapter, type="none"),
        optimizer=replace(config.optimizer, lr=2e-4),
        export=replace(config.export, formats=("diffusers",)),
    )
    for name, base in {"lora": config, "full": full}.items():
        runs = {
            "save": base,
            "int8": replace(base, memory=replace(base.memory, activations="int8")),
            "other_seed": replace(base, run=replace(base.run, seed=base.run.seed + 1)),
        }
        if bf16:
            runs["fp32"] = replace(base, precision=replace(base.precision, compute="fp32"))
        curves = {run: curve(changed, kept) for run, changed in runs.items()}
        saved = curves["save"]
        row: Row = {
            "measurement": "int8 saves, losses",
            "case": f"quickstart {name}" + (f", bf16, {BF16_RESOLUTION} px" if bf16 else ""),
            "steps": steps,
        }
        for run in list(curves)[1:]:
            row |= _difference(run, saved, curves[run])
        row |= {f"held_out_{run}": found.held_out for run, found in curves.items()}
        row |= {"every": LOGGED}
        yield row | {f"losses_{run}": found.losses for run, found in curves.items()}


@dataclass(frozen=True, slots=True)
class Curve:
    """The loss of every `LOGGED`th step, and the held-out loss at the end."""

    losses: list[float]
    held_out: float


def curve(config: Config, kept: Path | None) -> Curve:
    """A run of its own, whose folder is removed. `kept` has those made before, by their config."""
    from fasttune.train import train

    text = json.dumps(asdict(config), sort_keys=True, default=str)
    path = kept and kept / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    if path is not None and path.exists():
        return Curve(**json.loads(path.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory(prefix="fasttune-int8-") as folder:
        run = replace(config.run, output_dir=folder)
        if train(replace(config, run=run)) != 0:
            raise RuntimeError("the run was stopped")
        text = (Path(folder) / config.run.name / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    found = Curve([round(line["loss"], 6) for line in lines if "loss" in line], held_out[-1])
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(found)), encoding="utf-8")
    return found


def _short(config: Config, steps: int) -> Config:
    return replace(
        config,
        run=replace(config.run, device="cpu"),
        train=replace(config.train, steps=steps, batch_size=4),
        validation=replace(config.validation, every=steps, prompts=()),
        checkpoint=replace(config.checkpoint, every=0),
        logging=replace(config.logging, every=LOGGED),
    )


def _difference(name: str, reference: Curve, found: Curve) -> Row:
    """Root mean square and mean over the curve, relative to the reference's mean."""
    pairs = zip(reference.losses, found.losses, strict=True)
    off = [b - a for a, b in pairs]
    mean = statistics.fmean(reference.losses)
    return {
        f"{name}_rms_share": round(math.sqrt(statistics.fmean(x * x for x in off)) / mean, 6),
        f"{name}_mean_share": round(statistics.fmean(off) / mean, 6),
    }


# --- The command


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8_saves")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--only", default="", help="of the gradients: blocks whose name has this")
    parser.add_argument("--steps", type=int, default=200, help="of the losses")
    parser.add_argument("--keep", type=Path, help="where finished runs are, and are not made again")
    parser.add_argument("--out", type=Path, help="default results/<machine>.jsonl")
    args = parser.parse_args()
    facts = machine()
    rows: list[Row] = []
    if "gradients" in args.part:
        rows += gradient_rows(args.only)
    if "losses" in args.part:
        rows += loss_rows(args.steps, bf16=False, kept=args.keep)
    if "losses_bf16" in args.part:
        rows += loss_rows(args.steps, bf16=True, kept=args.keep)
    rows = [{**row, **facts} for row in rows]
    write_rows(args.out or RESULTS / f"{machine_name(facts)}.jsonl", rows)
    print(summary(rows))


def summary(rows: list[Row]) -> str:
    """The numbers of each row but its lists."""
    lines = [["case", "what"]]
    for row in rows:
        shown = [f"{k} {v}" for k, v in row.items() if k.endswith(("_db", "_worst", "_share"))]
        lines.append([row["case"], ", ".join(x for x in shown if "{" not in x)])
    return table(lines)


if __name__ == "__main__":
    main()
