"""The U-Net's transformer and ResNet blocks over fused operations; unet.py has the same as plain modules.

B batch, L image tokens, T text tokens, D width, C channels, H x W a feature map. 1 u is the bytes of an
activation (L, D) or (C, H, W). Kept, beside inputs and outputs: in a transformer block "qkv" 3 u,
"attention" and "cross_attention" 1 u each, "residual" 2 u (the stream after each attention), "query" 1 u
(of the cross-attention) and "mlp" 8 u (both halves of GEGLU's input); in a ResNet block "hidden" 1 u, the
first convolution's output. Made again in the backward: normed inputs, GEGLU's output, SiLU's output.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d

from fasttune.memory.activations import Kept
from fasttune.models.fused import Context, Formula, Tensors
from fasttune_kernels.attention import attention_backward, attention_forward
from fasttune_kernels.gated_residual import gated_residual_forward, gated_residual_norm_forward
from fasttune_kernels.geglu import geglu_backward, geglu_forward
from fasttune_kernels.group_norm_silu import group_norm_silu_backward, group_norm_silu_forward
from fasttune_kernels.norm_modulate import norm_modulate_backward, norm_modulate_forward

Found = dict[str, Tensor]


# --- Transformer block: self-attention, cross-attention to the text, feed-forward


def transformer_inputs(block: Any, x: Tensor, text: Tensor) -> dict[str, Tensor | None]:
    """x (B, L, D), text (B, T, text width)."""
    return {"x": x, "text": text}


def _affine(t: Tensors, norm: str) -> tuple[Tensor, Tensor]:
    return t[f"{norm}.weight"], t[f"{norm}.bias"]


def _normed(c: Context, t: Tensors, norm: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return norm_modulate_forward(x, None, None, *_affine(t, norm), c.numbers["eps"], False)


def _added(c: Context, t: Tensors, norm: str, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """x + z, its norm, and the norm's statistics."""
    return gated_residual_norm_forward(
        x, z, None, None, None, *_affine(t, norm), c.numbers["eps"], False
    )


def _heads(c: Context, x: Tensor, count: int) -> tuple[Tensor, ...]:
    """(B, L, count D) -> count views (B, L, heads, D / heads)."""
    return x.unflatten(-1, (count, c.numbers["num_heads"], -1)).unbind(2)


def transformer_forward(c: Context, t: Tensors) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    x = t["x"]
    kept: dict[str, Tensor] = {}
    y, kept["mean1"], kept["rstd1"] = _normed(c, t, "norm1", x)
    kept["qkv"], kept["low_qkv"] = c.project("qkv", t, y)
    kept["attention"], kept["lse"] = attention_forward(*_heads(c, kept["qkv"], 3), None)
    z, kept["low_out"] = c.project("out", t, kept["attention"].flatten(2))
    x, y, kept["mean2"], kept["rstd2"] = _added(c, t, "norm2", x, z)
    kept["residual"] = x
    kept["query"], kept["low_query"] = c.project("query", t, y)
    kept["context"], kept["low_context"] = c.project("context", t, t["text"])
    kept["cross_attention"], kept["cross_lse"] = attention_forward(
        *_heads(c, kept["query"], 1), *_heads(c, kept["context"], 2), None
    )
    z, kept["low_cross"] = c.project("cross", t, kept["cross_attention"].flatten(2))
    x, y, kept["mean3"], kept["rstd3"] = _added(c, t, "norm3", x, z)
    kept["residual/2"] = x
    kept["mlp"], kept["low_mlp"] = c.project("mlp", t, y)
    z, kept["low_down"] = c.project("down", t, geglu_forward(kept["mlp"]))
    return (gated_residual_forward(x, z, None),), kept


def transformer_backward(
    c: Context, t: Tensors, kept: Kept, gradients: Sequence[Tensor]
) -> dict[str, Tensor]:
    (dx,) = gradients
    found: Found = {}

    # What is not kept is made once and stays until its last use.
    made: dict[str, tuple[Tensor, Tensor]] = {}

    def attended() -> tuple[Tensor, Tensor]:
        if "attention" in kept:
            return kept["attention"], kept["lse"]
        if "attention" not in made:
            made["attention"] = attention_forward(*_heads(c, qkv(), 3), None)
        return made["attention"]

    def qkv() -> Tensor:
        if "qkv" in kept:
            return kept["qkv"]
        return c.project("qkv", t, normed("norm1", t["x"]))[0]

    def crossed(stream: Tensor) -> tuple[Tensor, Tensor]:
        if "cross_attention" in kept:
            return kept["cross_attention"], kept["cross_lse"]
        if "cross_attention" not in made:
            keys = _heads(c, kept["context"], 2)
            made["cross_attention"] = attention_forward(*_heads(c, query(stream), 1), *keys, None)
        return made["cross_attention"]

    def query(stream: Tensor) -> Tensor:
        if "query" in kept:
            return kept["query"]
        return c.project("query", t, normed("norm2", stream))[0]

    def normed(norm: str, x: Tensor) -> Tensor:
        return _normed(c, t, norm, x)[0]

    def before(name: str, norm: str, x: Tensor) -> Tensor:
        """The input of a projection; what has its shape where the values do not matter."""
        return normed(norm, x) if c.projections[name].keeps_input(c.wanted) else x

    def back(name: str, dy: Tensor, x: Tensor, low: str, **options: Any) -> Tensor | None:
        g = c.projections[name].backward(
            t, c.wanted, dy, x, kept[low], training=c.training, **options
        )
        found.update(g.parameters)
        return g.x

    def through_norm(number: int, dy: Tensor | None, x: Tensor, residual: Tensor) -> Tensor:
        assert dy is not None
        norm = f"norm{number}"
        dx, _, _, found[f"{norm}.weight"], found[f"{norm}.bias"] = norm_modulate_backward(
            dy, x, kept[f"mean{number}"], kept[f"rstd{number}"], None, *_affine(t, norm), residual,
            False, False, c.wants(f"{norm}.weight", f"{norm}.bias"),
        )  # fmt: skip
        return dx

    def streams() -> tuple[Tensor, Tensor]:
        """The stream after self-attention and after cross-attention."""
        if "residual" in kept:
            return kept["residual"], kept["residual/2"]
        z = c.project("out", t, attended()[0].flatten(2))[0]
        first = gated_residual_forward(t["x"], z, None)
        z = c.project("cross", t, crossed(first)[0].flatten(2))[0]
        return first, gated_residual_forward(first, z, None)

    first, second = streams()
    mlp = kept["mlp"] if "mlp" in kept else c.project("mlp", t, normed("norm3", second))[0]
    hidden = mlp[..., : mlp.shape[-1] // 2]
    if c.projections["down"].keeps_input(c.wanted):
        hidden = geglu_forward(mlp)
    dhidden = back("down", dx, hidden, "low_down")
    assert dhidden is not None
    del hidden
    dmlp = geglu_backward(dhidden, mlp)
    del dhidden, mlp
    dy = back("mlp", dmlp, before("mlp", "norm3", second), "low_mlp")
    del dmlp
    dx = through_norm(3, dy, second, dx)
    del second, dy

    out, lse = crossed(first)
    dout = back("cross", dx, out.flatten(2), "low_cross")
    assert dout is not None
    keys = _heads(c, kept["context"], 2)
    dq, dk, dv = attention_backward(
        dout.view_as(out), *_heads(c, query(first), 1), *keys, out, lse, None
    )
    dcontext = torch.cat([dk.flatten(2), dv.flatten(2)], dim=-1)  # of the text alone: 77 tokens
    dtext = back("context", dcontext, t["text"], "low_context", wants_x="text" in c.wanted)
    if dtext is not None:
        found["text"] = dtext
    made.pop("cross_attention", None)
    del out, lse, dout, dk, dv, dcontext
    dy = back("query", dq.flatten(2), before("query", "norm2", first), "low_query")
    del dq
    dx = through_norm(2, dy, first, dx)
    del first, dy

    out, lse = attended()
    dout = back("out", dx, out.flatten(2), "low_out")
    assert dout is not None
    dqkv = torch.stack(
        attention_backward(dout.view_as(out), *_heads(c, qkv(), 3), out, lse, None), dim=2
    ).flatten(2)
    made.clear()
    del out, lse, dout
    dy = back("qkv", dqkv, before("qkv", "norm1", t["x"]), "low_qkv")
    del dqkv
    found["x"] = through_norm(1, dy, t["x"], dx)
    return found


TRANSFORMER = Formula(
    projections={
        "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "out": ("attn1.to_out.0",),
        "query": ("attn2.to_q",),
        "context": ("attn2.to_k", "attn2.to_v"),
        "cross": ("attn2.to_out.0",),
        "mlp": ("ff.net.0.proj",),
        "down": ("ff.net.2",),
    },
    inputs=transformer_inputs,
    stream=frozenset({"x"}),
    numbers=lambda block: {"num_heads": block.attn1.num_heads, "eps": block.norm1.eps},
    forward=transformer_forward,
    backward=transformer_backward,
    kept=frozenset({"qkv", "attention", "residual", "query", "cross_attention", "mlp"}),
)


# --- ResNet block: norm, SiLU, convolution, twice, with the time embedding added between


def resnet_inputs(
    block: Any, x: Tensor, emb: Tensor, skip: Tensor | None = None
) -> dict[str, Tensor | None]:
    """x (B, C, H, W), skip (B, C2, H, W) that joins its channels, add (B, C'): the time embedding."""
    return {"x": x, "skip": skip, "add": block.time_emb_proj(emb)}


def _conv(t: Tensors, name: str, x: Tensor) -> Tensor:
    weight, bias = t[f"{name}.weight"].to(x.dtype), t[f"{name}.bias"].to(x.dtype)
    return conv2d(x, weight, bias, padding=(weight.shape[-1] - 1) // 2)


def _conv_backward(
    c: Context, t: Tensors, found: Found, name: str, dy: Tensor, x: Callable[[], Tensor]
) -> Tensor:
    """Gradient of the input of `_conv`; adds those of weight and bias to `found`. The input is made only
    where they are wanted: without, the gradient is the transposed convolution, which asks for no input
    that would say its layout."""
    weight = t[f"{name}.weight"].to(dy.dtype)
    padding = (weight.shape[-1] - 1) // 2
    names = f"{name}.weight", f"{name}.bias"
    wanted = [n in c.wanted for n in names]
    if not any(wanted):
        return conv_transpose2d(dy, weight, padding=padding)
    dx, *gradients = torch.ops.aten.convolution_backward(
        dy, x(), weight, [len(weight)], [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1,
        [True, *wanted],
    )  # fmt: skip
    found.update((n, g) for n, g, want in zip(names, gradients, wanted, strict=True) if want)
    return dx


def _first_norm(c: Context, t: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    return group_norm_silu_forward(
        t["x"],
        t.get("skip"),
        *_affine(t, "norm1"),
        None,
        c.numbers["groups"],
        c.numbers["eps"],
        True,
    )


def _second_norm(c: Context, t: Tensors, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return group_norm_silu_forward(
        hidden, None, *_affine(t, "norm2"), t["add"], c.numbers["groups"], c.numbers["eps"], True
    )


def _joined(t: Tensors) -> Tensor:
    return torch.cat([t["x"], t["skip"]], dim=1) if "skip" in t else t["x"]


def resnet_forward(c: Context, t: Tensors) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    kept: dict[str, Tensor] = {}
    y, kept["mean1"], kept["rstd1"] = _first_norm(c, t)
    kept["hidden"] = _conv(t, "conv1", y)
    y, kept["mean2"], kept["rstd2"] = _second_norm(c, t, kept["hidden"])
    around = _conv(t, "conv_shortcut", _joined(t)) if c.numbers["has_shortcut"] else t["x"]
    return (_conv(t, "conv2", y) + around,), kept


def resnet_backward(
    c: Context, t: Tensors, kept: Kept, gradients: Sequence[Tensor]
) -> dict[str, Tensor]:
    (dy,) = gradients
    found: Found = {}
    groups = c.numbers["groups"]
    x, skip = t["x"], t.get("skip")
    hidden = kept["hidden"] if "hidden" in kept else _conv(t, "conv1", _first_norm(c, t)[0])
    d = _conv_backward(c, t, found, "conv2", dy, lambda: _second_norm(c, t, hidden)[0])
    d, _, dadd, found["norm2.weight"], found["norm2.bias"] = group_norm_silu_backward(
        d, hidden, None, *_affine(t, "norm2"), t["add"], kept["mean2"], kept["rstd2"], None, groups,
        True, c.wants("norm2.weight", "norm2.bias"), "add" in c.wanted,
    )  # fmt: skip
    if "add" in c.wanted:
        found["add"] = dadd.to(x.dtype)
    d = _conv_backward(c, t, found, "conv1", d, lambda: _first_norm(c, t)[0])
    around = dy
    if c.numbers["has_shortcut"]:
        around = _conv_backward(c, t, found, "conv_shortcut", dy, lambda: _joined(t))
    found["x"], dskip, _, found["norm1.weight"], found["norm1.bias"] = group_norm_silu_backward(
        d, x, skip, *_affine(t, "norm1"), None, kept["mean1"], kept["rstd1"], around, groups, True,
        c.wants("norm1.weight", "norm1.bias"), False,
    )  # fmt: skip
    if skip is not None:
        found["skip"] = dskip
    return found


RESNET = Formula(
    projections={},
    inputs=resnet_inputs,
    stream=frozenset({"x", "skip"}),
    numbers=lambda block: {
        "groups": block.norm1.num_groups,
        "eps": block.norm1.eps,
        "has_shortcut": block.conv_shortcut is not None,
    },
    forward=resnet_forward,
    backward=resnet_backward,
    kept=frozenset({"hidden"}),
    # Between norms and convolutions there is one addition, and a graph for each feature map's size:
    # 220 of SDXL's 232 over 11 aspect buckets.
    compiles=False,
    supports=lambda block: (
        not any(hasattr(conv, "lora_A") for conv in (block.conv1, block.conv2, block.conv_shortcut))
    ),
)
