"""What the cards of gpus.toml can do at most, and how long given ops take at that rate.

An op takes as long as its arithmetic at the card's dense rate or its memory traffic at the card's
bandwidth, whichever is longer; a step takes the sum over its ops. That bounds a step from below only
for the traffic that it really has: of the ops of eager PyTorch it is the eager step if nothing stayed
in a cache and every op ran at full rate. Fused kernels and caches can beat that; launches, gaps and
inefficiency make it slower. fp32 is the rate without TF32, in which cuDNN runs fp32 convolutions by
default. [Williams, Waterman, Patterson, "Roofline", 2009]
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fasttune.errors import FasttuneError, HardwareError

TABLE = Path(__file__).with_name("gpus.toml")

DTYPES = ("bf16", "fp16", "fp16_acc16", "fp8", "fp8_acc16", "int8", "fp32")
"""What rates are given for. acc16: products accumulate in fp16 instead of fp32."""
SIXTEEN_BIT = ("bf16", "fp16", "fp16_acc16")

PCIE_GT_PER_S = {3: 8, 4: 16, 5: 32}
"""Transfers a second and lane; 128 of 130 bits are data. [PCI Express Base Specification]"""

_TARGET_NUMBERS = (
    "shared_per_block",
    "shared_per_unit",
    "registers_per_unit",
    "registers_per_thread",
)
_CARD_NUMBERS = ("num_units", "boost_mhz", "memory_gb", "memory_mib", "bandwidth_gb_per_s")
_OPTIONAL = ("tensor_boost_mhz", "l2_mib", "last_level_mib", "pcie_generation", "pcie_lanes")
_NEEDED_BY_TARGETS = ("shared_per_block",)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a number is from."""

    title: str
    checked: bool
    """The number was read there, or where the document is quoted."""
    url: str | None = None
    """None for arithmetic on other numbers of the table."""


@dataclass(frozen=True, slots=True)
class Target:
    """What the code for one architecture has to do with. Sizes in bytes; registers of 32 bits."""

    name: str
    """As compilers know it: sm_89, gfx1100."""
    shared_per_block: int
    """Shared memory (LDS, threadgroup memory) one block may have, with the opt-in of CUDA."""
    shared_per_unit: int | None
    """Shared memory of a multiprocessor (SM, CU, core)."""
    registers_per_unit: int | None
    registers_per_thread: int | None
    per_clock: Mapping[str, int]
    """dtype -> operations a clock and multiprocessor; 2 a multiply-add."""
    sources: Mapping[str, Source]


@dataclass(frozen=True, slots=True)
class Card:
    """A card's ceilings. None where there is no such thing or nobody says."""

    name: str
    target: Target
    device_names: tuple[str, ...]
    """As torch names the device, without the vendor in front."""
    num_units: int
    """Multiprocessors."""
    boost_mhz: int
    tensor_boost_mhz: int
    """The clock of the tensor rates; `boost_mhz` but on few cards."""
    memory_gb: int
    """As sold."""
    memory_mib: int
    """As the driver lists it."""
    bandwidth_gb_per_s: float
    """Of the card's memory: 10^9 bytes."""
    l2_mib: int | None
    last_level_mib: int | None
    """A cache behind L2 (AMD's Infinity Cache)."""
    pcie_generation: int | None
    pcie_lanes: int | None
    rates: Mapping[str, float]
    """dtype -> dense TFLOP/s, TOP/s for int8."""
    note: str
    sources: Mapping[str, Source]
    """Of each number, by its key: "memory_gb", "rates.bf16"."""

    @property
    def memory_gib(self) -> float:
        """As the driver lists it; what a program can allocate is a little less."""
        return self.memory_mib / 1024

    @property
    def pcie_gb_per_s(self) -> float | None:
        """To or from the host, each direction; before the overhead of packets."""
        if self.pcie_generation is None or self.pcie_lanes is None:
            return None
        return PCIE_GT_PER_S[self.pcie_generation] * self.pcie_lanes * 128 / 130 / 8

    def rate(self, dtype: str) -> float:
        """Dense TFLOP/s. HardwareError if the card does not compute in this dtype."""
        if dtype not in self.rates:
            raise HardwareError(
                f"{self.name} has no rate for {dtype}; it has {', '.join(self.rates)}"
            )
        return self.rates[dtype]


@dataclass(frozen=True, slots=True)
class OpCost:
    """What one op, or several as one kernel, takes from the card."""

    kind: str
    """For sums by kind; the roofline does not read it."""
    flops: int
    bytes: int
    """Read from and written to the card's memory."""
    dtype: str
    """What it computes in: one of DTYPES."""


def op_ms(op: OpCost, card: Card, dtype: str | None = None) -> float:
    """An op's time at full rate; `dtype` as in `step_ms`."""
    computed_in = dtype if dtype is not None and op.dtype in SIXTEEN_BIT else op.dtype
    memory_ms = op.bytes / card.bandwidth_gb_per_s * 1e-6
    return max(op.flops / card.rate(computed_in) * 1e-9, memory_ms) if op.flops else memory_ms


def step_ms(ops: Iterable[OpCost], card: Card, dtype: str | None = None) -> float:
    """Time of ops that run one after another, each at full rate and with all its bytes from memory.

    With `dtype`, ops of 16 bits compute at its rate instead, on the same bytes: "fp16" for a card without
    bf16, "int8" or "fp8" for quantized products. HardwareError if the card lacks a dtype."""
    return sum(op_ms(op, card, dtype) for op in ops)


def attainable(card: Card, dtype: str, intensity: float) -> float:
    """The roofline: TFLOP/s at most at `intensity` FLOPs a byte of memory traffic."""
    return min(card.rate(dtype), intensity * card.bandwidth_gb_per_s * 1e-3)


def mfu(flops: float, seconds: float, card: Card, dtype: str) -> float:
    """Model FLOPs utilization: the share of the dense rate that `flops` in `seconds` make.
    [Chowdhery et al., "PaLM", appendix B]"""
    return flops / seconds / (card.rate(dtype) * 1e12)


def card_named(device_name: str, memory_gib: float | None = None) -> Card | None:
    """The card that torch calls `device_name`, or None if it is not in the table.

    `torch.cuda.get_device_name()`, or on Apple f"Apple M3 Max ({cores}-core GPU)". Names have to agree
    as a whole, for an RTX 4090 D, a laptop's RTX 4090 and an H100 PCIe are other cards. With `memory_gib`,
    the memory has to agree within a tenth as well: some names stand for two sizes."""
    wanted = _without_vendor(device_name)
    for card in load_cards().values():
        if wanted in map(str.casefold, card.device_names):
            same = memory_gib is None or abs(memory_gib / card.memory_gib - 1) < 0.1
            return card if same else None
    return None


def _without_vendor(name: str) -> str:
    folded = " ".join(name.casefold().split())
    return folded.removeprefix("nvidia ").removeprefix("amd ")


def load_cards(path: Path = TABLE) -> dict[str, Card]:
    """All cards by name. FasttuneError if the table is not as it has to be."""
    table, sources = _read(path)
    targets = {name: _target(name, t, sources) for name, t in table["targets"].items()}
    return {name: _card(name, t, targets, sources) for name, t in table["cards"].items()}


def load_targets(path: Path = TABLE) -> dict[str, Target]:
    """All targets by name, those of no card in the table included. FasttuneError as `load_cards`."""
    table, sources = _read(path)
    return {name: _target(name, t, sources) for name, t in table["targets"].items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    _only("the table", table, needed={"sources", "targets", "cards"})
    for key, source in table["sources"].items():
        _only(f"sources.{key}", source, needed={"title"}, allowed={"url"})
        if not str(source.get("url", "https://")).startswith("https://"):
            raise FasttuneError(f"sources.{key}.url = {source['url']!r}: expected https://")
    return table, table["sources"]


def _target(name: str, table: dict[str, Any], sources: dict[str, Any]) -> Target:
    where = f"targets.{name}"
    _only(
        where,
        table,
        needed={*_NEEDED_BY_TARGETS},
        allowed={*_TARGET_NUMBERS, "per_clock"},
    )
    numbers, origins = _numbers(where, table, _TARGET_NUMBERS, sources)
    per_clock, more = _by_dtype(where, "per_clock", table, sources)
    return Target(
        name=name,
        per_clock=MappingProxyType({dtype: int(value) for dtype, value in per_clock.items()}),
        sources=MappingProxyType(origins | more),
        **{key: numbers.get(key) for key in _TARGET_NUMBERS},  # type: ignore[arg-type]
    )


def _card(
    name: str, table: dict[str, Any], targets: dict[str, Target], sources: dict[str, Any]
) -> Card:
    where = f"cards.{name}"
    _only(
        where,
        table,
        needed={*_CARD_NUMBERS, "target", "device_names", "rates"},
        allowed={*_OPTIONAL, "note"},
    )
    if table["target"] not in targets:
        raise FasttuneError(
            f"{where}.target = {table['target']!r}: no such target; there are {', '.join(targets)}"
        )
    target = targets[table["target"]]
    numbers, origins = _numbers(where, table, (*_CARD_NUMBERS, *_OPTIONAL), sources)
    rates, more = _by_dtype(where, "rates", table, sources)
    unknown = sorted(rates.keys() ^ target.per_clock.keys())
    if unknown:
        raise FasttuneError(
            f"{where}.rates: {', '.join(unknown)} is either not in it or not in the per_clock of "
            f"{target.name}; both have the dtypes that the card computes in"
        )
    generation = numbers.get("pcie_generation")
    if generation is not None and generation not in PCIE_GT_PER_S:
        raise FasttuneError(
            f"{where}.pcie_generation = {generation}: expected one of "
            f"{', '.join(map(str, PCIE_GT_PER_S))}"
        )
    numbers.setdefault("tensor_boost_mhz", numbers["boost_mhz"])
    return Card(
        name=name,
        target=target,
        device_names=tuple(table["device_names"]),
        rates=MappingProxyType(rates),
        note=table.get("note", ""),
        sources=MappingProxyType(origins | more),
        **{key: numbers.get(key) for key in (*_CARD_NUMBERS, *_OPTIONAL)},  # type: ignore[arg-type]
    )


def _by_dtype(
    where: str, key: str, table: dict[str, Any], sources: dict[str, Any]
) -> tuple[dict[str, float], dict[str, Source]]:
    by_dtype = table.get(key, {})
    _only(f"{where}.{key}", by_dtype, allowed=set(DTYPES))
    values, origins = _numbers(f"{where}.{key}", by_dtype, DTYPES, sources)
    return values, {f"{key}.{dtype}": origin for dtype, origin in origins.items()}


def _numbers(
    where: str, table: dict[str, Any], keys: Iterable[str], sources: dict[str, Any]
) -> tuple[dict[str, float], dict[str, Source]]:
    """The values and their sources of those keys that are there."""
    values, origins = {}, {}
    for key in keys:
        if key not in table:
            continue
        entry = table[key]
        if not isinstance(entry, dict):
            raise FasttuneError(f"{where}.{key} = {entry!r}: expected {{ value = , source = }}")
        _only(f"{where}.{key}", entry, needed={"value", "source"}, allowed={"checked"})
        value, source = entry["value"], entry["source"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise FasttuneError(f"{where}.{key} = {value!r}: expected a number above 0")
        if source not in sources:
            raise FasttuneError(f"{where}.{key}: no source {source!r} in [sources]")
        values[key] = value
        origins[key] = Source(**sources[source], checked=entry.get("checked", True))
    return values, origins


def _only(
    where: str,
    table: Mapping[str, Any],
    *,
    needed: set[str] | None = None,
    allowed: set[str] | None = None,
) -> None:
    """FasttuneError if keys are missing, or there are others."""
    needed, allowed = needed or set(), allowed or set()
    missing = sorted(needed - table.keys())
    if missing:
        raise FasttuneError(f"{where}: {', '.join(missing)} missing")
    unknown = sorted(table.keys() - needed - allowed)
    if unknown:
        raise FasttuneError(
            f"{where}: unknown {', '.join(unknown)}; expected {', '.join(sorted(needed | allowed))}"
        )
