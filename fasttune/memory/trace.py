"""Memory of running code, storage by storage, on real or fake tensors.

`MemoryTrace` sees every operation below autograd and follows the storage of each tensor with a weak
reference: a storage counts from the operation that made it until torch frees it, however many
views it has. So the trace is exact for what goes through the dispatcher, and needs no device: over
a `FakeTensorMode` it gives the memory of a step of any size.

Not counted, because it never is a tensor that an operation returns: workspaces inside a kernel (cuBLAS,
cuDNN, im2col, attention's scratch) that `scratch` does not know; fragmentation, the CUDA context, and host tensors that torch
makes without the dispatcher (the RNG state that `checkpoint` keeps, 5 KiB a block). The caching
allocator may also hand out a block up to 1 MiB larger than asked for instead of splitting it.

Tracing changes one thing: with any dispatch mode on, autograd adds gradients of a tensor with
several users into a new tensor, where it would add in place otherwise. The trace recognises these
additions and does not count the tensor that a run without it would not make.
"""

import sys
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fasttune.memory.tensors import plain_tensors, tensors_in

GIVEN = ("weights", "adapters", "optimizer", "ema", "inputs")
FOUND = ("gradients", "saved", "recomputed", "transient")
CATEGORIES = (*GIVEN, *FOUND)
"""What a storage is. `GIVEN` ones are labelled by the caller, but for inputs: a storage that the
trace first meets as an argument came from outside and is an input unless labelled. `FOUND` ones
are recognised: gradients are in a parameter's `.grad`; saved ones autograd has kept for the backward
(by `checkpoint`: the inputs of its blocks); recomputed ones were made by running a forward again
within the backward; transient is all else."""

ALLOCATION_UNIT = 512
"""Bytes, of CUDA's caching allocator (kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp)."""


def cuda_size(size: int) -> int:
    """Bytes that CUDA's caching allocator gives for `size` bytes."""
    return -(-size // ALLOCATION_UNIT) * ALLOCATION_UNIT


def exact_size(size: int) -> int:
    """The CPU allocator's: what was asked for."""
    return size


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The most that was held at once."""

    bytes: int
    breakdown: dict[str, int]
    """Bytes by category, all `CATEGORIES`; their sum is `bytes`."""
    module: str
    """Dotted name of the innermost module at work; in the backward, of the forward's counterpart.
    Empty outside of all modules."""
    phase: str
    """"forward", "backward", or the name given to `MemoryTrace.phase`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A storage, as the first tensor on it that was seen."""

    category: str
    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    made_by: str
    """The operation, "aten.addmm.default"; empty for what came from outside."""


@dataclass(slots=True)
class _Storage:
    """A storage that lives."""

    reference: weakref.ref[torch.UntypedStorage]
    nbytes: int
    """As the storage says; `size` is that rounded."""
    size: int
    category: str
    born: int
    """Count of operations when it was first seen."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    made_by: Any
    """The operation, None if from outside."""


Scratch = Callable[[Any, tuple[Any, ...], dict[str, Any]], int]
"""(operation, args, kwargs) -> the most bytes that it holds at once beyond its arguments, outputs included:
of an operation with a body in Python, which fake tensors never run. 0 for all others."""


class MemoryTrace(TorchDispatchMode):
    """Follows all storages while it is entered. Enter it inside the `FakeTensorMode`, if any.

    `root` gives modules their names and its parameters' gradients are recognised. `rounding` maps
    the bytes of a storage to those of its allocation. With `device_type`, only tensors of that
    kind of device count. `scratch` knows what an operation holds while it runs.
    """

    def __init__(
        self,
        root: nn.Module | None = None,
        *,
        rounding: Callable[[int], int] = cuda_size,
        device_type: str | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        super().__init__()
        self._root = root
        self._rounding = rounding
        self._device_type = device_type
        self._scratch = scratch
        self._storages: dict[int, _Storage] = {}  # by address: reused only after the callback
        self._held = dict.fromkeys(CATEGORIES, 0)
        self.live = 0
        """Bytes held now."""
        self._peak = self._here()
        self._peak_time = 0
        self._time = 0
        self._phase: str | None = None
        self._modules: list[str] = []
        self._names = {} if root is None else {m: name for name, m in root.named_modules()}
        # Autograd numbers its nodes in order: where each module began and ended tells whose they are.
        self._mark_numbers: list[int] = []
        self._mark_names: list[str] = []
        self._replaceable: set[int] | None = None
        """Storages of which one would have held the last sum of gradients."""
        self._exit = ExitStack()

    @property
    def peak(self) -> Peak:
        """Since the trace began, or since `reset_peak`."""
        self._look()
        return self._peak

    def reset_peak(self) -> None:
        """The peak starts again from what is held now."""
        self._replaceable = None
        self._peak, self._peak_time = self._here(), self._time

    def breakdown(self) -> dict[str, int]:
        """Bytes held now, by category."""
        return dict(self._held)

    def held(self) -> list[Held]:
        """All that is held now, in the order it was first seen."""
        return [
            Held(
                category=storage.category,
                bytes=storage.size,
                shape=tuple(storage.shape),
                dtype=storage.dtype,
                made_by="" if storage.made_by is None else str(storage.made_by),
            )
            for storage in self._storages.values()
        ]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within, the phase is `name` instead of what autograd is doing."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def label(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Says what the storages of `tensors` are, for as long as they live, and in the peak that
        was found already. ValueError for an unknown category."""
        if category not in CATEGORIES:
            raise ValueError(f"category {category!r} is unknown; allowed are {CATEGORIES}")
        for tensor in plain_tensors(tensors):
            known = self._storages.get(tensor.untyped_storage()._cdata)
            if known is not None and known.born <= self._peak_time:
                self._peak.breakdown[known.category] -= known.size
                self._peak.breakdown[category] += known.size
            self._follow(tensor, category)
            self._categorise(tensor, category)
        self._look()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its guard costs as much as the trace, and nothing compiles the trace

    def __enter__(self) -> "MemoryTrace":
        with ExitStack() as stack:
            before = register_module_forward_pre_hook(self._module_begins)
            stack.callback(before.remove)
            after = register_module_forward_hook(self._module_ends, always_call=True)
            stack.callback(after.remove)
            stack.enter_context(saved_tensors_hooks(self._pack, lambda x: x))
            for p in [] if self._root is None else self._root.parameters():
                if p.grad is not None:
                    self.label("gradients", [p.grad])
                if p.requires_grad:
                    hook = p.register_post_accumulate_grad_hook(self._accumulated)
                    stack.callback(hook.remove)
            self._exit = stack.pop_all()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._exit.close()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "prim":  # asks for a device or layout
            return func(*args, **(kwargs or {}))
        for kind in types:
            if kind is not FakeTensor and hasattr(kind, "__tensor_flatten__"):
                return NotImplemented  # its own operations come here next, on the tensors inside
        if self._replaceable is not None:  # nothing took the place of an argument
            self._look()
        kwargs = kwargs or {}
        given = tensors_in([args, kwargs] if kwargs else args)
        if (
            func is not torch.ops.aten.lift_fresh.default
        ):  # whose argument was made unseen, just now
            for tensor in given:
                self._follow(tensor, "inputs")
        if self._scratch is not None and (inside := self._scratch(func, args, kwargs)):
            self._count("transient", inside)
            self._look()
            self._count("transient", -inside)
        out = func(*args, **kwargs)
        self._time += 1
        made = self._category_of_new()
        new = [tensor for tensor in tensors_in([out]) if self._follow(tensor, made, func)]
        if new:
            if func is torch.ops.aten.add.Tensor and self._is_sum_of_gradients():
                self._replaceable = _could_hold(new[0], given) or None
            if self._replaceable is None:
                self._look()
        return out

    def _follow(self, tensor: Tensor, category: str, made_by: Any = None) -> bool:
        """Counts a storage unless it is known already; whether it was new."""
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is None:
            if not self._counts(tensor):
                return False
            reference = weakref.ref(storage, partial(self._died, key))
            size = self._rounding(nbytes)
            self._storages[key] = _Storage(
                reference, nbytes, size, category, self._time, tensor.shape, tensor.dtype, made_by
            )
            self._count(category, size)
            return True
        if known.nbytes != nbytes:  # resized
            size = self._rounding(nbytes)
            self._count(known.category, size - known.size)
            known.nbytes, known.size = nbytes, size
        return False

    def _counts(self, tensor: Tensor) -> bool:
        """Whether the tensor is where memory is followed."""
        if isinstance(tensor, FakeTensor):  # whose `device` is a call through the dispatcher
            return self._device_type in (None, tensor.fake_device.type)
        if self._device_type is None:
            return tensor.device.type != "meta"
        return tensor.device.type == self._device_type

    def _died(self, key: int, reference: object) -> None:
        if self._replaceable is not None and key not in self._replaceable:
            self._look()
        self._replaceable = None
        storage = self._storages.pop(key)
        self._count(storage.category, -storage.size)

    def _count(self, category: str, size: int) -> None:
        self._held[category] += size
        self.live += size

    def _categorise(self, tensor: Tensor, category: str, *, only: tuple[str, ...] = ()) -> None:
        """Changes what a followed storage is, or does so only if it is one of `only`."""
        known = self._storages.get(tensor.untyped_storage()._cdata)
        if known is not None and (not only or known.category in only):
            self._held[known.category] -= known.size
            self._held[category] += known.size
            known.category = category

    def _look(self) -> None:
        """Takes note if this is the peak."""
        self._replaceable = None
        if self.live > self._peak.bytes:
            self._peak, self._peak_time = self._here(), self._time

    def _here(self) -> Peak:
        if self.live == 0:
            return Peak(bytes=0, breakdown=dict(self._held), module="", phase="")
        return Peak(
            bytes=self.live,
            breakdown=dict(self._held),
            module=self._module(),
            phase=self._phase or ("backward" if _in_backward() else "forward"),
        )

    def _category_of_new(self) -> str:
        # The backward computes without gradients; a forward within it is a recomputation.
        return "recomputed" if _in_backward() and torch.is_grad_enabled() else "transient"

    def _is_sum_of_gradients(self) -> bool:
        """Whether autograd's engine itself called this operation."""
        if not _in_backward() or torch.is_grad_enabled():
            return False
        frame = sys._getframe(1).f_back
        while frame is not None and frame.f_code is not _RUN_BACKWARD:
            in_torch = frame.f_code.co_filename.startswith(_TORCH)
            if not in_torch and frame.f_code.co_name != "__torch_dispatch__":  # of another mode
                return False  # a backward written in Python
            frame = frame.f_back
        return True  # a thread of the engine's own has no frame of Python's below the dispatch

    def _accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._categorise(parameter.grad, "gradients", only=FOUND)

    def _pack(self, tensor: Tensor) -> Tensor:
        for plain in plain_tensors([tensor]):
            self._follow(plain, "inputs")
            self._categorise(plain, "saved", only=("transient",))
        return tensor.detach()  # itself would be a reference cycle where it is the node's output

    def _module_begins(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(module)
        if name is not None:
            self._modules.append(name)
            self._mark()

    def _module_ends(self, module: nn.Module, args: Any, out: Any) -> None:
        if module in self._names:
            self._modules.pop()
            self._mark()

    def _mark(self) -> None:
        if not _in_backward():
            self._mark_numbers.append(torch.autograd._get_sequence_nr())
            self._mark_names.append(self._modules[-1] if self._modules else "")

    def _module(self) -> str:
        """Name of the module at work."""
        if self._modules:
            return self._modules[-1]
        node = torch._C._current_autograd_node() if _in_backward() else None
        if node is None:
            return ""
        # A gradient's accumulation has the largest number there is, and no module of its own.
        found = bisect_right(self._mark_numbers, node._sequence_nr()) - 1
        return self._mark_names[found] if found >= 0 else ""


_TORCH = str(Path(torch.__file__).parent)
_RUN_BACKWARD = torch.autograd.graph._engine_run_backward.__code__


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _could_hold(total: Tensor, terms: list[Tensor]) -> set[int]:
    """Storages that autograd could add the terms into: those that a term fills and the sum would
    (can_accumulate_inplace in torch/csrc/autograd/input_buffer.cpp)."""
    size = total.untyped_storage().nbytes()
    found = [t.untyped_storage() for t in terms if t.numel() * t.itemsize == size]
    return {storage._cdata for storage in found if storage.nbytes() == size}
