"""FLUX.1's blocks over fused operations; flux.py has the same as plain modules.

B batch, L image tokens, T text tokens, N all tokens of a block, D model width, H heads, E head width.
1 u is the bytes of an activation (N, D). Kept, beside inputs and outputs: "qkv" 3 u, "attention" 1 u,
"mlp" 4 u, and in double blocks "residual" 1 u, the stream between attention and MLP. Made again in the
backward: normed and modulated inputs, rotated queries and keys, GELU's output, and the output of a gated
projection where the gate's gradient is wanted.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttune.memory.activations import Kept
from fasttune.models.fused import Context, Formula, Tensors
from fasttune_kernels.attention import attention_backward, attention_forward
from fasttune_kernels.gated_residual import (
    gated_residual_backward,
    gated_residual_forward,
    gated_residual_norm_forward,
)
from fasttune_kernels.gelu_tanh import gelu_tanh_backward, gelu_tanh_forward
from fasttune_kernels.norm_modulate import norm_modulate_backward, norm_modulate_forward
from fasttune_kernels.qk_norm_rope import qk_norm_rope_backward, qk_norm_rope_forward

EPS = 1e-6


def _modulated(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return norm_modulate_forward(x, scale, shift, None, None, EPS, False)


LARGEST = 65504.0
"""Of float16, whose range the residual stream of the released weights leaves."""


def _clip_fp16(x: Tensor, kept: dict[str, Tensor]) -> Tensor:
    """The stream in float16's range, and for the backward where it was clipped: the output itself, which
    is the next block's input and kept anyway."""
    if x.dtype != torch.float16:
        return x
    kept["clipped"] = x.clamp(-LARGEST, LARGEST)
    return kept["clipped"]


def _clip_backward(dy: Tensor, kept: Kept) -> Tensor:
    """No gradient where the stream was clipped."""
    return dy * (kept["clipped"].abs() < LARGEST) if "clipped" in kept else dy


def _shape_alone(x: Tensor, width: int) -> Tensor:
    """(B, N, width) for an operation that does not read the values."""
    return x.new_empty(1).expand(*x.shape[:-1], width)


# --- Single block: text and image tokens in one sequence, attention and MLP side by side


def single_inputs(
    block: Any, x: Tensor, vector: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None
) -> dict[str, Tensor | None]:
    """x (B, N, D), modulation (B, 3 D): shift, scale, gate."""
    return {
        "x": x,
        "modulation": block.norm.linear(vector),
        "cos": cos[:, 0],
        "sin": sin[:, 0],
        "mask": mask,
    }


def _single_qk(c: Context, t: Tensors, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = qkv.unflatten(-1, (3, c.numbers["num_heads"], -1))  # (B, N, 3, H, E)
    weights = t["attn.norm_q.weight"], t["attn.norm_k.weight"]
    q, k, _ = qk_norm_rope_forward(heads, *weights, None, None, None, t["cos"], t["sin"], EPS)
    return q, k, heads[:, :, 2]


def single_forward(c: Context, t: Tensors) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    x = t["x"]
    shift, scale, gate = t["modulation"].chunk(3, dim=-1)
    y, mean, rstd = _modulated(x, scale, shift)
    qkv, low_qkv = c.project("qkv", t, y)
    mlp, low_mlp = c.project("mlp", t, y)
    out, lse = attention_forward(*_single_qk(c, t, qkv), t.get("mask"))
    z, low_out = c.project("out", t, out.flatten(2), gelu_tanh_forward(mlp))
    kept = {"qkv": qkv, "mlp": mlp, "attention": out, "lse": lse, "mean": mean, "rstd": rstd}
    kept |= {"low_qkv": low_qkv, "low_mlp": low_mlp, "low_out": low_out}
    return (_clip_fp16(gated_residual_forward(x, z, gate), kept),), kept


def single_backward(
    c: Context, t: Tensors, kept: Kept, gradients: Sequence[Tensor]
) -> dict[str, Tensor]:
    dstream = _clip_backward(gradients[0], kept)
    x, mask = t["x"], t.get("mask")
    shift, scale, gate = t["modulation"].chunk(3, dim=-1)
    wants_gate = "modulation" in c.wanted
    found: dict[str, Tensor] = {}

    def normed() -> Tensor:
        return _modulated(x, scale, shift)[0]

    def joint() -> Tensor:
        return kept["qkv"] if "qkv" in kept else c.project("qkv", t, normed())[0]

    # Each tensor is fetched when it is needed, which for int8 is when its bf16 form is made.
    qkv = None
    if "attention" in kept:
        out, lse = kept["attention"], kept["lse"]
    else:
        qkv = joint()
        out, lse = attention_forward(*_single_qk(c, t, qkv), mask)
    made = None if "mlp" in kept else c.project("mlp", t, normed())[0]

    projection = c.projections["out"]
    if wants_gate or projection.keeps_input(c.wanted):
        hidden = gelu_tanh_forward(kept["mlp"] if made is None else made)
    else:
        hidden = _shape_alone(x, len(t[f"{c.projections['mlp'].joint}.weight"]))
    z = c.project("out", t, out.flatten(2), hidden)[0] if wants_gate else None
    dz, dgate = gated_residual_backward(dstream, z, gate, wants_gate)
    del z
    g = projection.backward(
        t, c.wanted, dz, out.flatten(2), kept["low_out"], hidden, training=c.training
    )
    del dz, hidden
    found |= g.parameters
    dout, dhidden = g.x, g.x2
    assert dout is not None and dhidden is not None
    # Fetched anew: in int8, its bf16 form would have waited through the projection's backward.
    dmlp = gelu_tanh_backward(dhidden, kept["mlp"] if made is None else made)
    del g, dhidden, made

    qkv = joint() if qkv is None else qkv
    q, k, v = _single_qk(c, t, qkv)
    dq, dk, dv = attention_backward(dout.view_as(out), q, k, v, out, lse, mask)
    del dout, out, q, k, v
    heads = qkv.unflatten(-1, (3, c.numbers["num_heads"], -1))
    weights = t["attn.norm_q.weight"], t["attn.norm_k.weight"]
    dqkv, _, dq_weight, dk_weight, _, _ = qk_norm_rope_backward(
        dq, dk, dv, heads, *weights, None, None, None, t["cos"], t["sin"], EPS,
        c.wants("attn.norm_q.weight", "attn.norm_k.weight"),
    )  # fmt: skip
    del dq, dk, dv, heads, qkv
    found |= {"attn.norm_q.weight": dq_weight, "attn.norm_k.weight": dk_weight}

    y = normed() if any(c.projections[n].keeps_input(c.wanted) for n in ("qkv", "mlp")) else x
    g = c.projections["qkv"].backward(
        t, c.wanted, dqkv.flatten(2), y, kept["low_qkv"], training=c.training
    )
    del dqkv
    found |= g.parameters
    g = c.projections["mlp"].backward(
        t, c.wanted, dmlp, y, kept["low_mlp"], residual=g.x, training=c.training
    )
    del dmlp, y
    found |= g.parameters
    dy = g.x
    assert dy is not None
    dx, dscale, dshift, _, _ = norm_modulate_backward(
        dy, x, kept["mean"], kept["rstd"], scale, None, None, dstream, False, wants_gate, False
    )
    found["x"] = dx
    if wants_gate:
        found["modulation"] = torch.cat([dshift, dscale, dgate], dim=-1).to(x.dtype)
    return found


SINGLE = Formula(
    projections={
        "qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "mlp": ("proj_mlp",),
        "out": ("proj_out",),
    },
    inputs=single_inputs,
    stream=frozenset({"x"}),
    numbers=lambda block: {"num_heads": block.attn.num_heads},
    forward=single_forward,
    backward=single_backward,
    kept=frozenset({"qkv", "attention", "mlp"}),
)


# --- Double block: text and image tokens with weights of their own, joined in attention

IMAGE, TEXT = "", "/text"
"""Suffixes of what a stream keeps."""


def double_inputs(
    block: Any,
    x: Tensor,
    text: Tensor,
    vector: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
) -> dict[str, Tensor | None]:
    """x (B, L, D), text (B, T, D), modulations (B, 6 D): shift, scale and gate of attention, of MLP."""
    return {
        "x": x,
        "x/text": text,
        "modulation": block.norm1.linear(vector),
        "modulation/text": block.norm1_context.linear(vector),
        "cos": cos[:, 0],
        "sin": sin[:, 0],
        "mask": mask,
    }


def _double_qkv(c: Context, t: Tensors, qkv: Tensor, text_qkv: Tensor) -> tuple[Any, ...]:
    """What `qk_norm_rope` takes, from the joint projections (B, L, 3 D) and (B, T, 3 D)."""
    split = (3, c.numbers["num_heads"], -1)
    return (
        qkv.unflatten(-1, split), t["attn.norm_q.weight"], t["attn.norm_k.weight"],
        text_qkv.unflatten(-1, split), t["attn.norm_added_q.weight"], t["attn.norm_added_k.weight"],
        t["cos"], t["sin"], EPS,
    )  # fmt: skip


def double_forward(c: Context, t: Tensors) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    kept: dict[str, Tensor] = {}
    for s in (IMAGE, TEXT):
        shift, scale = t[f"modulation{s}"].chunk(6, dim=-1)[:2]
        y, kept[f"mean1{s}"], kept[f"rstd1{s}"] = _modulated(t[f"x{s}"], scale, shift)
        kept[f"qkv{s}"], kept[f"low_qkv{s}"] = c.project(f"qkv{s}", t, y)
    q, k, v = qk_norm_rope_forward(*_double_qkv(c, t, kept["qkv"], kept["qkv/text"]))
    out, kept["lse"] = attention_forward(q, k, v, t.get("mask"))
    kept["attention"] = out
    num_text_tokens = t["x/text"].shape[1]
    # Of one sample these are views; of several, products copy what they read of them.
    parts = {IMAGE: out[:, num_text_tokens:], TEXT: out[:, :num_text_tokens]}
    streams: dict[str, Tensor] = {}
    for s in (IMAGE, TEXT):
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = t[f"modulation{s}"].chunk(6, dim=-1)
        z, kept[f"low_out{s}"] = c.project(f"out{s}", t, parts[s].flatten(2))
        stream, y, kept[f"mean2{s}"], kept[f"rstd2{s}"] = gated_residual_norm_forward(
            t[f"x{s}"], z, gate, mlp_scale, mlp_shift, None, None, EPS, False
        )
        mlp, kept[f"low_mlp{s}"] = c.project(f"mlp{s}", t, y)
        z, kept[f"low_down{s}"] = c.project(f"down{s}", t, gelu_tanh_forward(mlp))
        streams[s] = gated_residual_forward(stream, z, mlp_gate)
        kept[f"residual{s}"], kept[f"mlp{s}"] = stream, mlp
    return (streams[IMAGE], _clip_fp16(streams[TEXT], kept)), kept


def double_backward(
    c: Context, t: Tensors, kept: Kept, gradients: Sequence[Tensor]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    num_text_tokens = t["x/text"].shape[1]
    mask = t.get("mask")

    def normed(s: str) -> Tensor:
        shift, scale = t[f"modulation{s}"].chunk(6, dim=-1)[:2]
        return _modulated(t[f"x{s}"], scale, shift)[0]

    def joint() -> tuple[Any, ...]:
        qkvs = [
            kept[key] if (key := f"qkv{s}") in kept else c.project(key, t, normed(s))[0]
            for s in (IMAGE, TEXT)
        ]
        return _double_qkv(c, t, *qkvs)

    packed = None
    if "attention" in kept:
        out, lse = kept["attention"], kept["lse"]
    else:
        packed = joint()
        out, lse = attention_forward(*qk_norm_rope_forward(*packed), mask)
    parts = {IMAGE: out[:, num_text_tokens:], TEXT: out[:, :num_text_tokens]}

    dstreams: dict[str, Tensor] = {}
    dmodulations: dict[str, list[Tensor]] = {}
    leaving: dict[str, Tensor] = {}
    ends = gradients[0], _clip_backward(gradients[1], kept)
    for s, dstream in zip((IMAGE, TEXT), ends, strict=True):
        dstreams[s], leaving[s], dmodulations[s] = _leave_backward(
            c, t, kept, s, parts[s].flatten(2), dstream, found
        )

    # Only now is there room for it: both MLPs are behind. Each stream writes its part.
    dout = out.new_empty(out.flatten(2).shape)
    for s, part in ((IMAGE, dout[:, num_text_tokens:]), (TEXT, dout[:, :num_text_tokens])):
        g = c.projections[f"out{s}"].backward(
            t, c.wanted, leaving.pop(s), parts[s].flatten(2), kept[f"low_out{s}"],
            into=part, training=c.training,
        )  # fmt: skip
        found |= g.parameters
    packed = joint() if packed is None else packed
    q, k, v = qk_norm_rope_forward(*packed)
    dq, dk, dv = attention_backward(dout.view_as(out), q, k, v, out, lse, mask)
    del dout, part, out, parts, q, k, v
    kinds = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    names = [f"attn.{kind}.weight" for kind in kinds]
    dqkv, dtext_qkv, *dweights = qk_norm_rope_backward(dq, dk, dv, *packed, c.wants(*names))
    del dq, dk, dv, packed
    found |= zip(names, dweights, strict=True)

    dqkvs = {IMAGE: dqkv, TEXT: dtext_qkv}
    del dqkv, dtext_qkv
    for s in (IMAGE, TEXT):
        x, scale = t[f"x{s}"], t[f"modulation{s}"].chunk(6, dim=-1)[1]
        projection = c.projections[f"qkv{s}"]
        g = projection.backward(
            t, c.wanted, dqkvs.pop(s).flatten(2),
            normed(s) if projection.keeps_input(c.wanted) else x,
            kept[f"low_qkv{s}"], training=c.training,
        )  # fmt: skip
        found |= g.parameters
        assert g.x is not None
        wants_modulation = f"modulation{s}" in c.wanted
        found[f"x{s}"], dscale, dshift, _, _ = norm_modulate_backward(
            g.x, x, kept[f"mean1{s}"], kept[f"rstd1{s}"], scale, None, None, dstreams.pop(s),
            False, wants_modulation, False,
        )  # fmt: skip
        if wants_modulation:
            vectors = [dshift, dscale, *dmodulations[s]]
            found[f"modulation{s}"] = torch.cat(vectors, dim=-1).to(x.dtype)
    return found


def _leave_backward(
    c: Context,
    t: Tensors,
    kept: Kept,
    s: str,
    out: Tensor,  # (B, L or T, D): attention's output of this stream
    dstream: Tensor,
    found: dict[str, Tensor],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """From the block's output back to attention's projection: gradients of the stream before it, of the
    projection's output, and of the modulation from its gate on. Adds those of parameters to `found`."""
    wants = f"modulation{s}" in c.wanted
    _, _, gate, mlp_shift, mlp_scale, mlp_gate = t[f"modulation{s}"].chunk(6, dim=-1)
    up, down = c.projections[f"mlp{s}"], c.projections[f"down{s}"]
    stream = z = None
    if wants or f"residual{s}" not in kept:
        z = c.project(f"out{s}", t, out)[0]
    if f"residual{s}" in kept:
        stream = kept[f"residual{s}"]
    else:
        assert z is not None
        stream = gated_residual_forward(t[f"x{s}"], z, gate)

    made = None
    if f"mlp{s}" not in kept:
        made = c.project(f"mlp{s}", t, _modulated(stream, mlp_scale, mlp_shift)[0])[0]
    if wants or down.keeps_input(c.wanted):
        hidden = gelu_tanh_forward(kept[f"mlp{s}"] if made is None else made)
    else:
        hidden = _shape_alone(stream, len(t[f"{up.joint}.weight"]))
    z2 = c.project(f"down{s}", t, hidden)[0] if wants else None
    dz, dmlp_gate = gated_residual_backward(dstream, z2, mlp_gate, wants)
    del z2
    g = down.backward(t, c.wanted, dz, hidden, kept[f"low_down{s}"], training=c.training)
    del dz, hidden
    found |= g.parameters
    assert g.x is not None
    # Fetched anew: in int8, its bf16 form would have waited through the projection's backward.
    dmlp = gelu_tanh_backward(g.x, kept[f"mlp{s}"] if made is None else made)
    del g, made
    y = stream
    if up.keeps_input(c.wanted):
        y = _modulated(stream, mlp_scale, mlp_shift)[0]
    g = up.backward(t, c.wanted, dmlp, y, kept[f"low_mlp{s}"], training=c.training)
    del dmlp, y
    found |= g.parameters
    assert g.x is not None
    dx, dmlp_scale, dmlp_shift, _, _ = norm_modulate_backward(
        g.x, stream, kept[f"mean2{s}"], kept[f"rstd2{s}"], mlp_scale, None, None, dstream,
        False, wants, False,
    )  # fmt: skip
    del stream, g
    dz, dgate = gated_residual_backward(dx, z if wants else None, gate, wants)
    del z
    return dx, dz, [dgate, dmlp_shift, dmlp_scale, dmlp_gate]


DOUBLE = Formula(
    projections={
        "qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "qkv/text": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "out": ("attn.to_out.0",),
        "out/text": ("attn.to_add_out",),
        "mlp": ("ff.net.0.proj",),
        "mlp/text": ("ff_context.net.0.proj",),
        "down": ("ff.net.2",),
        "down/text": ("ff_context.net.2",),
    },
    inputs=double_inputs,
    stream=frozenset({"x", "x/text"}),
    numbers=lambda block: {"num_heads": block.attn.num_heads},
    forward=double_forward,
    backward=double_backward,
    kept=frozenset({"qkv", "attention", "residual", "mlp"}),
)
