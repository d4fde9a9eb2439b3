"""Runs operations up to where Triton would start a kernel, for a GPU that is not there.

`python real_launches.py sm_89 1,2 norm_modulate geglu` takes batches of 1 and of 2 through their launching
code, on CPU tensors, with the backward: Triton specialises on the arguments as it does in use (an integer
that is 1 is a constant, a pointer is a multiple of 16 bytes or is not) and compiles to machine code. It
prints each kernel, and ends with 1 if one does not compile, does not fit the GPU's shared memory, or has
a grid that no GPU takes. Without names, all cases run.

Not in a process that has TRITON_INTERPRET set: its kernels are others.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fasttune_kernels as ours
from fasttune_kernels.dispatch import forced
from fasttune_kernels.flash_attention import flash_attention_backward, flash_attention_forward
from fasttune_kernels.quantize_rows import dequantize_rows, quantize_rows
from fasttune_kernels.short_attention import short_attention_backward, short_attention_forward

TARGETS = {"sm_89": GPUTarget("cuda", 89, 32), "gfx1100": GPUTarget("hip", "gfx1100", 32)}
SHARED_BYTES = {"sm_89": 101376, "gfx1100": 65536}
"""That a block may have."""
GRID = (2**31 - 1, 65535, 65535)
BF16, FP32 = torch.bfloat16, torch.float32


class Driver:
    """What Triton asks before it compiles."""

    def __init__(self, target: str) -> None:
        self._target = TARGETS[target]

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def say(text: str) -> None:
    """At once: what a compiler that aborts was at is the last line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def drawn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])


def norm(batch: int, *, modulated: bool, gated: bool) -> None:
    width = 33
    x, y = drawn(batch, 5, width), drawn(batch, 5, width)
    vectors = [drawn(batch, width) for _ in range(2)] if modulated else [None, None]
    weights = [None, None] if modulated else [drawn(width, dtype=FP32) for _ in range(2)]
    if gated:
        gate = drawn(batch, width) if modulated else None
        backward(*ours.gated_residual_norm_modulate(x, y, gate, *vectors, *weights))
    else:
        backward(ours.norm_modulate(x, *vectors, *weights))


def gated_residual(batch: int) -> None:
    backward(ours.gated_residual(drawn(batch, 5, 33), drawn(batch, 5, 33), drawn(batch, 33)))


def activation(batch: int, *, function: Callable[[Tensor], Tensor]) -> None:
    for tokens in (1, 5):
        backward(function(drawn(batch, tokens, 66)))


def qk_norm_rope(batch: int, *, text: int | None) -> None:
    weights = [drawn(40) for _ in range(4)]
    tables = [torch.randn(5 + (text or 0), 20) for _ in range(2)]
    keywords: dict[str, Any] = {}
    if text is not None:
        keywords = {"text_qkv": drawn(batch, text, 3, 3, 40)}
        keywords |= {"text_q_weight": weights[2], "text_k_weight": weights[3]}
    backward(*ours.qk_norm_rope(drawn(batch, 5, 3, 3, 40), *weights[:2], *tables, **keywords))


def short_attention(batch: int) -> None:
    q, k, v, dout = (torch.randn(batch, n, 3, 40).to(BF16) for n in (70, 7, 7, 70))
    short_attention_backward(dout, q, k, v, *short_attention_forward(q, k, v))


def flash_attention(batch: int) -> None:
    q, k, v, dout = (torch.randn(batch, n, 3, 64).to(BF16) for n in (70, 7, 7, 70))
    for mask in (None, torch.ones(batch, 7, dtype=torch.bool)):
        out, lse = flash_attention_forward(q, k, v, mask)
        flash_attention_backward(dout, q, k, v, out, lse, mask)


def group_norm(batch: int, *, skip: int) -> None:
    def image(channels: int) -> Tensor:
        return drawn(batch, channels, 5, 7).detach().to(memory_format=torch.channels_last)

    x, weight, bias = image(6).requires_grad_(), drawn(6 + skip), drawn(6 + skip)
    keywords: dict[str, Any] = {"skip": image(skip).requires_grad_()} if skip else {}
    if not skip:
        keywords = {"add": drawn(batch, 6)}
    backward(ours.group_norm_silu(x, weight, bias, groups=2, eps=1e-5, silu=True, **keywords))


def lora_linear(batch: int, *, width2: int, slices: list[int]) -> None:
    pairs = list(zip(slices[::2], slices[1::2], strict=True))
    rank, rows = 5, sum(end - begin for begin, end in pairs)
    y = ours.lora_linear(
        drawn(batch, 1 if width2 else 7, 33),
        torch.randn(50, 33 + width2).to(BF16),
        torch.randn(50).to(BF16),
        drawn(rank * len(pairs), 33 + width2),
        drawn(rows, rank),
        slices=slices,
        dropout=0.3,
        seed=torch.tensor([5]),
        x2=drawn(batch, 1, width2) if width2 else None,
    )
    backward(y)


def diffusion_loss(batch: int, *, masked: bool) -> None:
    factors = [torch.randn(batch) for _ in range(3)] if masked else [None, torch.randn(batch), None]
    noise = torch.randn(batch, 4, 3, 5)
    loss = ours.diffusion_loss(
        drawn(batch, 4, 3, 5),
        noise if masked else None,
        noise,
        clean_factor=factors[0],
        noise_factor=factors[1],
        weight=factors[2],
        mask=torch.ones(batch, 1, 1, 1, dtype=torch.bool) if masked else None,
    )
    backward(loss.sum())


def optimizer_step(batch: int, *, state: torch.dtype, rounding: str) -> None:
    """`batch` tensors."""
    weights = [torch.randn(n).to(BF16) for n in (1, 1500)[:batch]]
    arena = ours.Arena.of(weights)
    m, v, ema, rest = (arena.zeros(d, "cpu") for d in (state, state, FP32, BF16))
    absmax = [arena.absmax("cpu") if state == torch.uint8 else None for _ in range(2)]
    ours.optimizer_step_(
        *(weights, [torch.randn_like(w) for w in weights], m, v, *absmax, ema),
        *(rest if rounding == "kahan" else None, [0, 1][:batch], torch.ones(2, 2), torch.ones(6)),
        *(0.9, 0.999, 1e-8, rounding, torch.tensor([3])),
    )
    ours.gradient_norm(weights)
    ours.ema_step_(weights, ema, torch.tensor([1e-4]), torch.tensor([3]))


def rows_in_int8(batch: int) -> None:
    dequantize_rows(*quantize_rows(drawn(batch, 5, 33).detach()), BF16)


CASES: dict[str, Callable[[int], None]] = {
    "norm_modulate": partial(norm, modulated=True, gated=False),
    "norm_modulate weights": partial(norm, modulated=False, gated=False),
    "gated_residual_norm_modulate": partial(norm, modulated=True, gated=True),
    "gated_residual": gated_residual,
    "geglu": partial(activation, function=ours.geglu),
    "gelu_tanh": partial(activation, function=ours.gelu_tanh),
    "qk_norm_rope": partial(qk_norm_rope, text=None),
    "qk_norm_rope text": partial(qk_norm_rope, text=1),
    "short_attention": short_attention,
    "flash_attention": flash_attention,
    "group_norm_silu add": partial(group_norm, skip=0),
    "group_norm_silu skip": partial(group_norm, skip=4),
    "lora_linear": partial(lora_linear, width2=0, slices=[0, 50]),
    "lora_linear two": partial(lora_linear, width2=7, slices=[3, 20, 21, 50]),
    "diffusion_loss": partial(diffusion_loss, masked=False),
    "diffusion_loss masked": partial(diffusion_loss, masked=True),
    "optimizer_step": partial(optimizer_step, state=FP32, rounding="stochastic"),
    "optimizer_step int8": partial(optimizer_step, state=torch.uint8, rounding="nearest"),
    "optimizer_step kahan": partial(optimizer_step, state=BF16, rounding="kahan"),
    "quantize_rows": rows_in_int8,
}
ONLY_ON = {"short_attention": "sm_89", "flash_attention": "gfx1100"}
"""Elsewhere, attention takes other kernels."""


def stand_in(target: str, failures: list[str]) -> None:
    """Makes launches compile for `target` and note what fails, and this package believe that it is
    there."""
    driver.set_active(Driver(target))
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        name = self.fn.__name__
        try:
            made = run(self, *args, grid=grid, warmup=True, **keywords)
            shared = made.metadata.shared
        except Exception as error:  # whatever a compiler raises
            failures.append(f"{name}: {type(error).__name__}: {str(error)[-600:]}")
            return
        say(f"  {name}: {shared} bytes shared")
        if not all(0 < n <= most for n, most in zip(grid, GRID, strict=False)):
            failures.append(f"{name}: grid {grid}")
        if shared > SHARED_BYTES[target]:
            failures.append(f"{name}: {shared} bytes of shared memory")

    JITFunction.run = compile_only
    for name, module in list(sys.modules.items()):
        if name.startswith("fasttune_kernels.") and hasattr(module, "arch"):
            module.arch = lambda device: target  # type: ignore[attr-defined]


def main(target: str, batches: str, *names: str) -> int:
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: nothing would be compiled")
    failures: list[str] = []
    stand_in(target, failures)
    for name in names or CASES:
        if ONLY_ON.get(name, target) != target:
            continue
        for batch in map(int, batches.split(",")):
            say(f"{name}, batch {batch}, {target}")
            known = len(failures)
            with forced("triton"):
                CASES[name](batch)
            failures[known:] = [f"{name}, batch {batch}: {text}" for text in failures[known:]]
    for text in failures:
        say(f"FAILED {text}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
