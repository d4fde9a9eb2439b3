"""Compiled blocks: one graph for each kind of block, direction and token count.

torch keeps graphs by code object, tries their guards one after the other, and past a limit of eight runs
eagerly without a word; the limit is a setting of the thread, and backwards run in a thread of their
own. So every graph gets a code object of its own here, under a key that says all it depends on
(`fused.Kind`): no graph is ever compiled a second time, no limit is near, and one key more after warm-up is
a bucket more.
"""

import logging
import types
from collections.abc import Callable
from typing import Any, Literal

import torch

from fasttune_kernels.jit import HAS_TRITON

Backend = str | Callable[..., Any]
Mode = Literal["auto", "blocks"]

log = logging.getLogger(__name__)


class Compiler:
    """Compiles functions of tensors, each for the one set of shapes that it is called with."""

    def __init__(self, *, mode: Mode = "blocks", backend: Backend = "inductor") -> None:
        self.mode, self.backend = mode, backend
        self.graphs: list[str] = []
        """Names of what was compiled, in order."""
        self.given_up: str | None = None
        """Why "auto" went back to eager mode, if it did."""

    def __call__(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The compiled function. It compiles when it is first called, and raises what that raises; in
        mode "auto" the reason is logged once, and this function and all later ones run as they are."""
        if self.given_up is not None:
            return function
        compiled = torch.compile(
            _own_code(function, name), backend=self.backend, fullgraph=True, dynamic=False
        )
        if self.mode == "auto":
            return self._first_call(function, compiled, name)
        self.graphs.append(name)
        return compiled

    def _first_call(
        self, function: Callable[..., Any], compiled: Callable[..., Any], name: str
    ) -> Callable[..., Any]:
        chosen: list[Callable[..., Any]] = []

        def call(*tensors: Any) -> Any:
            if not chosen:
                chosen.append(function if self.given_up is not None else compiled)
                if chosen[0] is compiled:
                    try:
                        found = compiled(*tensors)
                    except torch.OutOfMemoryError:
                        raise
                    except Exception as error:  # whatever a compiler can raise on a user's machine
                        self.given_up = _reason(error)
                        log.warning(
                            'compile = "auto": %s does not compile here, blocks run eagerly (%s). '
                            'compile = "off" says so without trying, "blocks" stops with the error',
                            name,
                            self.given_up,
                        )
                        chosen[0] = function
                    else:
                        self.graphs.append(name)
                        return found
            return chosen[0](*tensors)

        return call


def compiler_for(compile: str, device_type: str) -> tuple[Compiler | None, str]:
    """The compiler that the config's "auto", "off" or "blocks" means on this kind of device, and a
    sentence that says so."""
    if compile == "off":
        return None, 'blocks run eagerly (train.compile = "off")'
    if compile == "blocks":
        return Compiler(mode="blocks"), 'blocks are compiled (train.compile = "blocks")'
    if device_type != "cuda":
        return None, f'blocks run eagerly on {device_type} (train.compile = "auto")'
    if not HAS_TRITON:
        return None, 'blocks run eagerly: triton is not installed (train.compile = "auto")'
    return Compiler(mode="auto"), 'blocks are compiled when first run (train.compile = "auto")'


def _reason(error: Exception) -> str:
    """The first line that says something, of what the compiler wrapped if it did."""
    inner = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[0]}" if lines else type(inner).__name__


def _own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same function, with a code object of its own."""
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(
        function.__code__.replace(co_name=name),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
