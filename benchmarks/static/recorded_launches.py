"""What training steps of shipped configs launch, as `Launch`es for the codegen gate.

A table of launches has what its author thought of. A step has more: a pointer that is absent, the number of
slices that a card's processors make, the dtype of a gradient. So a step of each config runs on tensors without
memory and says what operations are called with; the bodies of these run once more for each card, with its
answers and with kernels replaced by a note (own_launches.py); and what a kernel gets goes through triton's own
specialisation. That takes seconds, and no GPU.

Not seen: buckets other than the largest, whose numbers of tokens may be divisible by 16 where its are not;
what a card has that is not in `CARDS`; and strides that Inductor gives to what it hands to operations, where
they are not those of eager mode.
"""

import hashlib
import importlib.util
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from benchmarks.static import own_launches, targets, triton_offline
from benchmarks.static.gpu_operations import as_on_gpu
from benchmarks.static.models import config_named, model_folder
from benchmarks.static.own_launches import Card, launching_on
from fasttune.config import Config
from fasttune.memory.activations import Choice, policy_of
from fasttune.models.formulas import FORMULAS
from fasttune.models.fused import fuse
from fasttune.rehearsal import gpu_placement, rehearse
from fasttune_kernels.launch import AMD, Launch

CONFIGS: dict[str, tuple[Choice, ...]] = {
    "flux-lora-32gb": ("recompute", "save"),
    "sdxl-lora-12gb": ("recompute",),
    "sdxl-full-24gb": ("recompute",),
}
"""By what becomes of activations. Of SDXL with "save" everything is launched that is with "recompute", and
no more; the whole network is the case whose weights have gradients."""
CARDS = (
    Card(
        arch=own_launches.ARCH,
        processors=own_launches.PROCESSORS,
        backends=own_launches.BACKENDS,
    ),
    Card(arch="gfx1100", processors=48, backends=frozenset({"short", "own_flash"})),
)
"""An RTX 4090, and an RX 7900 XTX: HIP counts its 96 compute units in pairs, and PyTorch's attention is plain
math there. Two cards of consumers, as each takes about 130 compilations."""

_NEAR = (1 << 31) - 1
"""Bytes of the largest storage that AMD's kernels address with 32 bits."""


@dataclass(frozen=True, slots=True)
class Given:
    """A tensor that an operation is called with: all that a launch depends on."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    start: int
    """Bytes after a multiple of 16, which storages begin at."""
    is_near: bool
    """Whether its storage has at most 2 GiB."""

    @classmethod
    def of(cls, x: Tensor) -> "Given":
        start = x.storage_offset() * x.element_size() % 16
        is_near = x.untyped_storage().nbytes() <= _NEAR
        return cls(tuple(x.shape), x.stride(), x.dtype, int(start), is_near)

    def made(self) -> Tensor:
        """One like it without memory."""
        size, offset = self.dtype.itemsize, self.start // self.dtype.itemsize
        reach = sum((n - 1) * stride for n, stride in zip(self.shape, self.stride, strict=True))
        length = max(offset + reach + 1, 0 if self.is_near else _NEAR // size + 1)
        storage = torch.empty(length, dtype=self.dtype, device="meta")
        return storage.as_strided(self.shape, self.stride, offset)


Call = tuple[str, tuple[Any, ...], Any]
"""One of our operations by name, its arguments with tensors as Given, and their structure."""


def launches_in_steps(listed: Iterable[Any] = ()) -> list[Launch]:
    """Those that are not `listed`: each specialisation once, for the targets of the cards that it was
    found on. None without triton, which the gate says."""
    if importlib.util.find_spec("triton") is None:
        return []
    return launches_of_calls(calls_of_steps(), listed)


# --- What operations are called with


def calls_of_steps() -> list[Call]:
    """All different ones of the steps of CONFIGS, in their order."""
    found: dict[Call, None] = {}
    for name, choices in CONFIGS.items():
        config = config_named(name)
        found |= dict.fromkeys(calls_of_step(config, model_folder(name, config), choices))
    return list(found)


def calls_of_step(config: Config, folder: Path, choices: Sequence[Choice]) -> list[Call]:
    """Of a micro-batch at the largest bucket and an update, for each of what becomes of activations."""
    placement = replace(gpu_placement(config), device=torch.device("meta"))
    short = replace(config, train=replace(config.train, gradient_accumulation=1))
    rehearsal = rehearse(short, folder, placement=placement, device_type="cuda")
    with as_on_gpu(rehearsal.denoiser), _Calls() as found:
        for choice in choices:
            fuse(
                rehearsal.denoiser,
                FORMULAS,
                policy=policy_of(choice),
                dtype=placement.compute_dtype,
            )
            # There is no generator of tensors without memory, and nothing is drawn.
            loss = rehearsal.forward.loss(rehearsal.batch, torch.Generator())
            rehearsal.trained.backward(loss)
            rehearsal.update()
    return list(found.calls)


class _Calls(TorchDispatchMode):
    """Within, `calls` gets every operation of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Call, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("fasttune::") and func.name() in OPDEFS:
            leaves, structure = tree_flatten((args, kwargs or {}))
            given = tuple(Given.of(x) if isinstance(x, Tensor) else x for x in leaves)
            self.calls[func.name(), given, structure] = None
        return func(*args, **(kwargs or {}))


# --- What their bodies launch


@dataclass(slots=True)
class _Known:
    """What is known of the listed launches for one target."""

    identities: set[str] = field(default_factory=set)
    matrix: dict[Any, bool] = field(default_factory=dict)
    """Kernel -> whether all of them have the matrix instruction."""


def launches_of_calls(calls: Sequence[Call], listed: Iterable[Any] = ()) -> list[Launch]:
    """See `launches_in_steps`."""
    listed = [launch for launch in listed if isinstance(launch, Launch)]
    found: dict[tuple[str, bool], Launch] = {}
    for card in CARDS:
        known, target = _known(listed, card.arch), targets.target_of(card.arch)
        for launch in launches_on(card, calls):
            if triton_offline.identity(launch, target) in known.identities:
                continue
            matrix = known.matrix.get(launch.kernel(), False)
            before = found.get((launch.name, matrix))
            archs = before.targets if before else ()
            found[launch.name, matrix] = replace(launch, targets=(*archs, card.arch), matrix=matrix)
    return sorted(found.values(), key=lambda launch: launch.name)


def _known(listed: Sequence[Launch], arch: str) -> _Known:
    known = _Known()
    for launch in listed:
        if arch in launch.targets:
            with suppress(TypeError, ValueError):  # of its own row
                kernel = triton_offline.kernel_of(launch)
                known.matrix[kernel] = launch.matrix and known.matrix.get(kernel, True)
                known.identities.add(triton_offline.identity(launch, targets.target_of(arch)))
    return known


def launches_on(card: Card, calls: Sequence[Call]) -> list[Launch]:
    """What the calls launch on a card, each specialisation once."""
    found: dict[str, Launch] = {}
    specialise = _Specialise(card.arch)

    def launched(kernel: Any, args: Any, kwargs: Any) -> None:
        launch = specialise(kernel, args, kwargs)
        found.setdefault(launch.name, launch)

    waiting, seen = list(calls), set(calls)
    with launching_on(card, launched):
        while waiting:
            name, leaves, structure = waiting.pop()
            made = [x.made() if isinstance(x, Given) else x for x in leaves]
            args, kwargs = tree_unflatten(made, structure)
            with _Calls() as inside:  # operations that call others
                OPDEFS[name]._init_fn(*args, **kwargs)
            waiting += [call for call in inside.calls if call not in seen]
            seen |= set(inside.calls)
    return list(found.values())


class _Specialise:
    """What a kernel is launched with -> the Launch, by what triton would do on that target."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend

        target = targets.target_of(arch)
        self.arch = arch
        self.backend = make_backend(GPUTarget(target.backend, target.arch, target.warp_size))
        self.binders: dict[Any, Any] = {}

    def __call__(self, kernel: Any, args: Any, kwargs: Any) -> Launch:
        """ValueError for a kernel that is interpreted."""
        from triton.runtime.jit import JITFunction, create_function_from_signature

        if not isinstance(kernel, JITFunction):
            raise ValueError(f"{kernel} is interpreted: TRITON_INTERPRET is set")
        if kernel not in self.binders:
            self.binders[kernel] = create_function_from_signature(
                kernel.signature, kernel.params, self.backend
            )
        bound, specialised, options = self.binders[kernel](*args, **kwargs)
        said = dict(zip(kernel.arg_names, specialised, strict=True))
        variable = {
            name: (type_, how) for name, (type_, how) in said.items() if type_ != "constexpr"
        }
        parsed = vars(self.backend.parse_options(dict(options)))
        told = {name: options.get(name, parsed[name]) for name in _TOLD}
        return named(
            Launch(
                name=f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}",
                kernel=lambda: kernel,
                signature={name: type_ for name, (type_, _) in variable.items()},
                constants={name: bound[name] for name in said if name not in variable},
                aligned=tuple(name for name, (_, how) in variable.items() if "D" in (how or "")),
                over_2_gib=tuple(
                    name
                    for name, (type_, how) in variable.items()
                    if self.arch in AMD and type_.startswith("*") and "S" not in (how or "")
                ),
                options={name: value for name, value in options.items() if name not in told},
                targets=(self.arch,),
                **told,
            )
        )


_TOLD = ("num_warps", "num_stages", "enable_fp_fusion")


def named(launch: Launch) -> Launch:
    """The same with a name of kernel and specialisation: "geglu._forward_kernel in steps 1f0c9a2b"."""
    digest = hashlib.sha256(described(launch).encode()).hexdigest()[:8]
    return replace(launch, name=f"{launch.name} in steps {digest}")


def described(launch: Launch) -> str:
    """All that it is specialised on: "x_ptr *bf16 % 16, tokens i32, add_ptr None, BLOCK 512, num_warps 4"."""
    parts = [
        f"{name} {type_}{' % 16' * (name in launch.aligned)}"
        f"{' over 2 GiB' * (name in launch.over_2_gib)}"
        for name, type_ in launch.signature.items()
    ]
    rest = {**launch.constants, **launch.keywords()}
    return ", ".join([*parts, *(f"{name} {value!r}" for name, value in rest.items())])
