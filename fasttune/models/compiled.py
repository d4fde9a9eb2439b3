"""Compiled blocks: one graph for each kind of block, direction and token count.

torch keeps graphs by code object, tries their guards one after the other, and past a limit of eight runs
eagerly without a word; the limit is a setting of the thread, and backwards run in a thread of their
own. So every graph gets a code object of its own here, under a key that says all it depends on
(`fused.Kind`): no graph is ever compiled a second time, no limit is near, and one key more after warm-up is
a bucket more.
"""

import hashlib
import logging
import time
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

import fasttune_kernels
from fasttune.errors import HardwareError
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
        self.seconds = 0.0
        """That first calls took: tracing, compiling or finding it in the cache, and one run."""
        self.num_cached = 0
        """How many of the graphs torch had in its cache, from an earlier run."""
        self.given_up: str | None = None
        """Why "auto" went back to eager mode, if it did."""

    def __call__(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The compiled function. It compiles when it is first called. HardwareError with the compiler's
        reason if that fails; in mode "auto" the reason is logged once, and this function and all later
        ones run as they are."""
        if self.given_up is not None:
            return function
        compiled = torch.compile(
            _own_code(function, name), backend=self.backend, fullgraph=True, dynamic=False
        )
        chosen: list[Callable[..., Any]] = []

        def call(*tensors: Any) -> Any:
            if chosen:
                return chosen[0](*tensors)
            if self.given_up is not None:  # since this was made
                chosen.append(function)
                return function(*tensors)
            try:
                found = self._first_call(compiled, name, tensors)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler can raise on a user's machine
                if self.mode != "auto":
                    raise HardwareError(
                        f'train.compile = "blocks": {name} does not compile here ({_reason(error)}). '
                        'Take "auto", which then runs blocks eagerly, or "off"'
                    ) from error
                self._give_up(error, name)
                chosen.append(function)
                return function(*tensors)
            chosen.append(compiled)
            return found

        return call

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            "graphs": len(self.graphs),
            "seconds": self.seconds,
            "from_cache": self.num_cached,
            "given_up": self.given_up,
        }

    def __str__(self) -> str:
        """12 graphs in 41.3 s, 12 of them from the cache"""
        if self.given_up is not None and not self.graphs:
            return "blocks run eagerly, as one did not compile"
        text = f"{len(self.graphs)} graphs in {self.seconds:.1f} s"
        text += f", {self.num_cached} of them from the cache" if self.num_cached else ""
        return text + ("; further ones run eagerly" if self.given_up is not None else "")

    def _first_call(self, compiled: Callable[..., Any], name: str, tensors: tuple[Any, ...]) -> Any:
        begin, hits, made = time.perf_counter(), _cache_hits(), _graphs_made()
        # In the thread that compiles, which for a backward on a GPU is autograd's.
        with torch.compiler.config.patch(cache_key_tag=_cache_tag()):  # type: ignore[attr-defined]
            found = compiled(*tensors)
        if _graphs_made() == made:
            raise RuntimeError("torch.compile made no graph; is TORCHDYNAMO_DISABLE set?")
        seconds = time.perf_counter() - begin
        log.info("compiled %s in %.1f s", name, seconds)
        self.graphs.append(name)
        self.seconds += seconds
        self.num_cached += _cache_hits() > hits
        return found

    def _give_up(self, error: Exception, name: str) -> None:
        self.given_up = _reason(error)
        log.warning(
            'compile = "auto": %s does not compile here, blocks run eagerly (%s). '
            'compile = "off" says so without trying, "blocks" stops with the error',
            name,
            self.given_up,
        )


def _cache_hits() -> int:
    """Graphs that Inductor has found in its cache so far."""
    from torch._dynamo.utils import counters  # a second's import, for those who compile

    hits: int = counters["inductor"]["fxgraph_cache_hit"]
    return hits


def _graphs_made() -> int:
    """Graphs that dynamo has traced so far."""
    from torch._dynamo.utils import counters

    made: int = counters["stats"]["unique_graphs"]
    return made


@cache
def _cache_tag() -> str:
    """Sets the cached graphs of one state of our operations apart from another's: torch's key has their
    names, and not the shapes and strides that they return."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(fasttune_kernels.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return f"{torch.compiler.config.cache_key_tag} fasttune {digest.hexdigest()}".strip()


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
