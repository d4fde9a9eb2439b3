"""The copy of a network's adapters: the values of its parameters, at each forward anew."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttune.adapters.lora import apply_lora
from fasttune.models.adapter_copy import ALIGNMENT
from fasttune.models.formulas import FORMULAS
from fasttune.models.fused import FusedBlock, adapter_copy, fuse, unfuse
from fasttune.models.layers import run_block, set_recompute
from fasttune.models.unet import TransformerBlock

WIDTH, TEXT_WIDTH, RANK = 32, 24, 3


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TransformerBlock(WIDTH, TEXT_WIDTH, 2) for _ in range(2)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = run_block(block, x, text)
        return x


def adapted(targets: str = "*") -> Network:
    torch.manual_seed(0)
    network = Network().to(torch.bfloat16)
    apply_lora(network, targets=[targets], rank=RANK, alpha=2.0)
    for p in network.parameters():
        if p.requires_grad:
            assert p.dtype == torch.float32
            nn.init.normal_(p, std=0.2)
    return network.train()


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, 6, WIDTH).bfloat16().requires_grad_()
    return x, torch.randn(2, 5, TEXT_WIDTH).bfloat16()


def found(network: Network) -> dict[str, Any]:
    given = inputs()
    y = network(*given)
    (y.float() ** 2).mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    network.zero_grad()
    return {"output": y.detach(), "input": given[0].grad, **gradients}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("targets", ["*", "*attn1.to_[qk]"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_copy_computes_what_casts_compute(targets: str, recompute: bool) -> None:
    casts, copies = adapted(targets), adapted(targets)
    fuse(casts, FORMULAS)
    fuse(copies, FORMULAS, dtype=torch.bfloat16)
    for network in (casts, copies):
        set_recompute(network, recompute)
    assert adapter_copy(casts) is None and adapter_copy(copies) is not None
    assert same(found(casts), found(copies))


def test_changed_parameters_are_seen_by_the_next_forward() -> None:
    network, twin = adapted(), adapted()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    fuse(network, FORMULAS, dtype=torch.bfloat16)
    after = dict(network.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    first = found(network)
    for trained in (network, twin):
        for p in trained.parameters():
            if p.requires_grad:
                p.data.mul_(1.5)  # as loading does: past the counters of autograd
    second = found(network)
    fuse(twin, FORMULAS)
    assert same(second, found(twin)) and not torch.equal(first["output"], second["output"])


def test_adapters_lie_side_by_side_and_joined() -> None:
    network = adapted()
    fuse(network, FORMULAS, dtype=torch.bfloat16)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert len({p.untyped_storage().data_ptr() for p in parameters.values()}) == 1
    block = network.blocks[1]
    assert isinstance(block.forward, FusedBlock)
    joint = block.forward._tensors["attn1.to_q+attn1.to_k+attn1.to_v.joint_lora_A"]
    assert joint.shape == (3 * RANK, WIDTH) and joint.dtype == torch.bfloat16
    assert joint.storage_offset() % ALIGNMENT == 0
    found(network)
    expected = [parameters[f"blocks.1.attn1.to_{x}.lora_A"] for x in "qkv"]
    assert torch.equal(joint, torch.cat(expected).bfloat16())


def test_fusing_again_and_not_at_all() -> None:
    network = adapted()
    for _ in range(2):
        fuse(network, FORMULAS, dtype=torch.bfloat16)
        assert len(network._forward_pre_hooks) == 1
    unfuse(network)
    assert len(network._forward_pre_hooks) == 0 and adapter_copy(network) is None
    found(network)


def test_no_copy_in_the_parameters_own_dtype() -> None:
    network = adapted().float()
    fuse(network, FORMULAS, dtype=torch.float32)
    assert adapter_copy(network) is None


def test_adapters_of_two_dtypes_are_refused() -> None:
    network = adapted()
    p = network.get_parameter("blocks.0.attn1.to_q.lora_A")
    p.data = p.data.double()
    with pytest.raises(ValueError, match="give all one dtype and device"):
        fuse(network, FORMULAS, dtype=torch.bfloat16)
