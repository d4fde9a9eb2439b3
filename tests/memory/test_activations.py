"""What a policy keeps, rounds and moves."""

import pytest
import torch
from torch import Tensor

from fasttune.memory.activations import GROUP, Kept, Policy, moved, pack, policy_of

NAMED = frozenset({"qkv", "mlp"})


def rounded(x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What is kept of x, and what comes back."""
    kept = pack({"mlp": x}, NAMED, Policy("int8"))
    return kept, Kept(kept, x.dtype)["mlp"]


def test_a_table_has_a_default() -> None:
    assert policy_of("int8")["mlp"] == "int8"
    assert policy_of({"mlp": "int8"})["qkv"] == "save"
    policy = policy_of({"default": "recompute", "mlp": "offload"})
    assert policy["qkv"] == "recompute" and policy["mlp"] == "offload"


def test_parts_go_by_their_name_and_statistics_stay() -> None:
    tensors = {name: torch.randn(1, 2, GROUP) for name in ("qkv", "qkv/text", "mlp", "mean")}
    kept = pack(tensors, NAMED, Policy("recompute", {"qkv": "int8"}))
    assert list(kept) == ["qkv.scales", "qkv.codes", "qkv/text.scales", "qkv/text.codes", "mean"]
    found = Kept(kept, torch.float32)
    assert "qkv" in found and "qkv/text" in found and "mlp" not in found
    with pytest.raises(KeyError):
        found["mlp"]
    kept = pack(tensors, NAMED, Policy("recompute", {"qkv": "offload"}))
    assert moved(kept, NAMED, Policy("save", {"qkv": "offload"})) == {"qkv", "qkv/text"}
    assert moved(kept, NAMED, Policy("save")) == frozenset()
    # "mean" has no name in the policy, whatever its default
    assert moved(kept, NAMED, Policy("offload")) == {"qkv", "qkv/text"}
    # of what would be rounded and moved, codes and scales both go
    assert moved(["mlp.codes", "mlp.scales"], NAMED, Policy("offload")) == {
        "mlp.codes",
        "mlp.scales",
    }


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 5, 3 * GROUP), GROUP),
        ((2, 5, 2, GROUP // 2), GROUP),  # attention: (B, N, heads, width), two heads share a scale
        ((2, 5, 320), 64),
        ((2, 5, 96), 96),
        ((2, 3, 4, 7), 28),
        ((1, 0, GROUP), GROUP),
        ((1, 3, 0), 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_share_a_scale(shape: tuple[int, ...], size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    kept, found = rounded(x)
    assert found.shape == x.shape and found.dtype == dtype
    assert kept["mlp.codes"].shape == x.shape and kept["mlp.codes"].dtype == torch.int8
    if x.numel():
        assert kept["mlp.scales"].numel() == x.numel() // size
        groups = x.reshape(-1, size).double()
        # half a code, and a rounding to the dtype
        bound = groups.abs().amax(1, keepdim=True) * (0.5 / 127 + torch.finfo(dtype).eps)
        assert ((found.reshape(-1, size).double() - groups).abs() <= bound).all()


def test_a_large_head_costs_the_others_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 24 * GROUP)
    large = x.clone()
    large[..., :GROUP] *= 1000
    assert rounded(large)[1][..., GROUP:].equal(rounded(x)[1][..., GROUP:])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels", [64, 2 * GROUP, 24])
def test_feature_maps_keep_their_memory_format(batch: int, channels: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, channels, 6, 5).contiguous(memory_format=torch.channels_last)
    kept, found = rounded(x)
    assert found.stride() == x.stride() == kept["mlp.codes"].stride()
    assert float((found - x).norm()) < 0.01 * float(x.norm())
    plain, found = rounded(x.contiguous())
    assert found.stride() == x.contiguous().stride()
    if channels >= 64:  # a pixel's channels share scales, not a channel's pixels
        size = min(channels, GROUP)
        assert kept["mlp.scales"].shape == (batch, 30 * channels // size)
    assert plain["mlp.scales"].shape == (batch, channels)


def test_rounding_makes_no_copies() -> None:
    """The groups of what blocks keep are views."""
    from fasttune.memory.activations import _groups

    for x in (
        torch.empty(1, 4, 3 * GROUP),
        torch.empty(2, 4, 3, GROUP),
        torch.empty(2, 320, 6, 5).contiguous(memory_format=torch.channels_last),
    ):
        assert _groups(x).data_ptr() == x.data_ptr()
