"""A training step of each shipped config on Apple's GPUs, held to PyTorch's own table of operators.

No Apple machine is needed: the step runs on the CPU, computed as on MPS, with every operator noted that
it calls, those within our own operations included. torchgen says which of them have a kernel for MPS.
Seen in this way is which kernels there are, not what they compute.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

from benchmarks.static.models import CONFIG_FILES, config_named
from fasttune.config import Config
from fasttune.device import Placement
from fasttune.optim.chunks import chunked_as_on
from fasttune.rehearsal import rehearse
from fasttune_kernels.dispatch import computed_as_on

TABLE = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
WITHOUT = (torch.float64, torch.complex128)
FP8 = "float8"


class Noted(TorchDispatchMode):
    """Notes operators, and the dtypes of what goes in and out. Enters the bodies of our operations."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.own: set[str] = set()
        self.dtypes: dict[torch.dtype, str] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fasttune":
            self.own.add(func._opname)
            with self:
                out = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        else:
            name = func._opname if func._overloadname == "default" else str(func)[5:]
            if func.namespace == "aten":
                self.operators.add(name)
            out = func(*args, **kwargs)
        for tensor in tree_leaves([args, kwargs, out]):
            if isinstance(tensor, Tensor):
                self.dtypes.setdefault(tensor.dtype, str(func))
        return out


@cache
def without_kernel() -> Callable[[str], bool]:
    """Whether MPS has nothing to run an operator by."""
    parsed = parse_native_yaml(str(TABLE / "native_functions.yaml"), str(TABLE / "tags.yaml"))
    functions = {str(f.func.name): f for f in parsed.native_functions}
    mps = parsed.backend_indices[DispatchKey.MPS]

    def is_missing(name: str) -> bool:
        f = functions[name]
        structured = f.structured_delegate and functions[str(f.structured_delegate)]
        return not (
            mps.has_kernel(f)
            or (structured and mps.has_kernel(structured))
            or f.has_composite_explicit_autograd_kernel
            or f.has_composite_implicit_autograd_kernel
            or f.has_composite_explicit_autograd_non_functional_kernel
        )

    return is_missing


def tiny(name: str, request: pytest.FixtureRequest) -> tuple[Config, Path]:
    """The shipped config with a tiny model of its family in place of its own."""
    config = config_named(name)
    family = config.model.family
    model = "sdxl" if family == "autoencoder" else family
    train = replace(config.train, batch_size=1, gradient_accumulation=1)
    return replace(config, train=train), request.getfixturevalue(f"tiny_{model}")


def noted_steps(config: Config, folder: Path) -> tuple[Noted, Any]:
    """Two steps as on MPS; what they called, and what was trained."""
    placement = Placement(
        device=torch.device("cpu"),
        base_dtype=torch.float32,  # what "auto" is on MPS
        compute_dtype=torch.float32,
        reason="as on MPS",
    )
    # The kernel of fused attention that trains on MPS is math; only inference has another.
    with computed_as_on("mps"), chunked_as_on("mps"), sdpa_kernel(SDPBackend.MATH):
        run = rehearse(config, folder, placement=placement, device_type="mps", size=(64, 64))
        run.micro_batch()  # DDPM's table is made on the CPU in float64, and moved in float32
        with Noted() as noted:
            for _ in range(2):
                loss = run.take_step()
    assert torch.isfinite(loss)
    return noted, run


CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "as it is": {},
    "int8 kept, average": {"memory": {"activations": "int8"}, "ema": {"enabled": True}},
    "all kept, masked": {"memory": {"activations": "save"}, "objective": {"text_mask": True}},
    "Lion": {"optimizer": {"name": "lion"}},
}
CASES = [(path.stem, "as it is") for path in CONFIG_FILES] + [
    ("flux-lora-32gb", "int8 kept, average"),
    ("flux-lora-32gb", "all kept, masked"),
    ("sdxl-lora-12gb", "int8 kept, average"),
    ("sdxl-full-24gb", "Lion"),
]


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="pyproject.toml: torch 2.13 or newer on macOS"
)
@pytest.mark.parametrize(("name", "change"), CASES)
def test_every_operator_of_a_step_has_a_kernel(
    name: str, change: str, request: pytest.FixtureRequest
) -> None:
    config, folder = tiny(name, request)
    for section, keys in CHANGES[change].items():
        config = replace(config, **{section: replace(getattr(config, section), **keys)})
    noted, run = noted_steps(config, folder)
    assert not sorted(filter(without_kernel(), noted.operators))
    bad = {d: op for d, op in noted.dtypes.items() if d in WITHOUT or FP8 in str(d)}
    assert not bad, "MPS has no such dtype"
    optimizer = run.trained._optimizer
    state = [x for each in optimizer.state.values() for x in each.values() if torch.is_tensor(x)]
    assert state and all(x.is_contiguous() for x in [*state, *run.trained.parameters.values()])
    assert noted.own or config.model.family == "autoencoder"


def test_the_table_tells_what_is_missing() -> None:
    missing = without_kernel()
    assert missing("_scaled_dot_product_flash_attention_for_cpu")
    assert missing("geqrf")
    assert not missing("mm") and not missing("addmm") and not missing("native_layer_norm")
    assert not missing("add.Tensor")  # structured
    assert not missing("linear") and not missing("convolution")


def test_bodies_of_operations_are_noted() -> None:
    import fasttune_kernels

    x = torch.randn(1, 3, 2, 8, requires_grad=True)
    with computed_as_on("mps"), Noted() as noted:
        fasttune_kernels.attention(x, x, x).sum().backward()
    assert noted.own == {"attention_forward", "attention_backward"}
    assert "logsumexp" in noted.operators
    assert "_scaled_dot_product_flash_attention_for_cpu" not in noted.operators
    with Noted() as noted:
        fasttune_kernels.attention(x, x, x)
    assert "_scaled_dot_product_flash_attention_for_cpu" in noted.operators
    assert without_kernel()("_scaled_dot_product_flash_attention_for_cpu")


def test_dtypes_are_noted() -> None:
    with Noted() as noted:
        torch.ones(2).double()
    assert noted.dtypes[torch.float64] == "aten._to_copy.default"
