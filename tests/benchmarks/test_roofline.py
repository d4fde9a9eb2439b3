"""The table of cards against arithmetic and known datasheets; the roofline against cases by hand."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks.harness import environment
from benchmarks.roofline import (
    TABLE,
    Card,
    OpCost,
    attainable,
    card_named,
    load_cards,
    load_targets,
    mfu,
    op_ms,
    step_ms,
)
from benchmarks.static.targets import TARGETS
from fasttune.errors import FasttuneError, HardwareError

CARDS = load_cards()
NAMES = ["RTX 3060 12G", "RTX 3090", "RTX 4070", "RTX 4080", "RTX 4090", "RTX 5090", "A100 40G"]
NAMES += ["A100 80G", "H100", "H200", "MI300X", "RX 7900 XTX", "RX 9070 XT", "M3 Max"]


def changed(tmp_path: Path, old: str, new: str) -> Path:
    """A copy of the table with one text in it replaced."""
    text = TABLE.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "gpus.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


def test_every_card_is_there() -> None:
    assert list(CARDS) == NAMES


def test_targets_cover_what_code_is_generated_for() -> None:
    wanted = "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx942 gfx950 gfx1100 gfx1201".split()
    assert set(wanted) <= load_targets().keys()


def test_limits_of_a_block() -> None:
    limits = {name: target.shared_per_block for name, target in load_targets().items()}
    assert limits["sm_80"] == 163 * 1024
    assert limits["sm_86"] == limits["sm_89"] == limits["sm_120"] == 99 * 1024
    assert limits["sm_90"] == limits["sm_100"] == 227 * 1024
    assert limits["gfx942"] == limits["gfx1100"] == limits["gfx1201"] == 64 * 1024
    assert limits["gfx950"] == 160 * 1024


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source(name: str) -> None:
    card = CARDS[name]
    numbers = {"num_units", "boost_mhz", "memory_gb", "memory_mib", "bandwidth_gb_per_s"}
    numbers |= {f"rates.{dtype}" for dtype in card.rates}
    optional = {"l2_mib", "last_level_mib", "pcie_generation", "pcie_lanes"}
    numbers |= {key for key in optional if getattr(card, key) is not None}
    assert numbers <= card.sources.keys()
    for origin in (*card.sources.values(), *card.target.sources.values()):
        assert origin.title
        assert origin.url is None or origin.url.startswith("https://")


def test_every_source_is_used() -> None:
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    used = {origin.title for card in CARDS.values() for origin in card.sources.values()}
    used |= {origin.title for t in load_targets().values() for origin in t.sources.values()}
    assert used == {source["title"] for source in table["sources"].values()}


@pytest.mark.parametrize("name", NAMES)
def test_rates_follow_from_units_and_clocks(name: str) -> None:
    # A rate of sparse matrices would be twice as high, a wrong accumulator's half or twice.
    card = CARDS[name]
    assert card.rates.keys() == card.target.per_clock.keys()
    for dtype, rate in card.rates.items():
        mhz = card.boost_mhz if dtype == "fp32" else card.tensor_boost_mhz
        computed = card.num_units * card.target.per_clock[dtype] * mhz * 1e-6
        assert computed == pytest.approx(rate, rel=0.02), dtype


@pytest.mark.parametrize(
    ("name", "bus_bits", "gbit_per_s"),
    [  # width and data rate of the memory, an independent way to the bandwidth
        ("RTX 3060 12G", 192, 15.0),
        ("RTX 3090", 384, 19.5),
        ("RTX 4070", 192, 21.0),
        ("RTX 4080", 256, 22.4),
        ("RTX 4090", 384, 21.0),
        ("RTX 5090", 512, 28.0),
        ("A100 40G", 5120, 2.43),
        ("A100 80G", 5120, 3.186),
        ("MI300X", 8192, 5.2),
        ("RX 7900 XTX", 384, 20.0),
        ("RX 9070 XT", 256, 20.0),
    ],
)
def test_bandwidth_follows_from_the_memory_bus(name: str, bus_bits: int, gbit_per_s: float) -> None:
    assert CARDS[name].bandwidth_gb_per_s == pytest.approx(bus_bits * gbit_per_s / 8, rel=0.01)


def test_known_values() -> None:
    card = CARDS["RTX 4090"]
    assert card.target.name == "sm_89"
    assert (card.rate("bf16"), card.rate("fp16_acc16"), card.rate("fp8")) == (165.2, 330.3, 330.3)
    assert (card.rate("int8"), card.rate("fp8_acc16")) == (660.6, 660.6)
    assert CARDS["RTX 5090"].rate("bf16") == 209.5
    assert CARDS["A100 80G"].rate("bf16") == 312
    assert CARDS["MI300X"].rate("bf16") == 1307.4
    assert CARDS["RTX 4090"].pcie_gb_per_s == pytest.approx(31.5, abs=0.1)
    assert CARDS["H100"].pcie_gb_per_s == pytest.approx(63.0, abs=0.1)
    assert CARDS["M3 Max"].pcie_gb_per_s is None


def test_an_h200_is_an_h100_with_other_memory() -> None:
    h100, h200 = CARDS["H100"], CARDS["H200"]
    assert h100.rates == h200.rates
    assert h100.target == h200.target
    assert h200.bandwidth_gb_per_s == 4800
    assert h200.memory_gb == 141
    assert h100.bandwidth_gb_per_s == 3350


@pytest.mark.parametrize("name", NAMES)
def test_sanity(name: str) -> None:
    card = CARDS[name]
    rates = card.rates
    assert rates["bf16"] == rates["fp16"] >= rates["fp32"]
    if "int8" in rates:
        assert rates["int8"] >= rates["bf16"]
    if "fp8" in rates:
        assert rates["fp8"] == pytest.approx(2 * rates["bf16"], rel=0.01)
    if "fp16_acc16" in rates:
        assert rates["fp16_acc16"] >= rates["fp16"]
    assert card.memory_gib == pytest.approx(card.memory_gb, rel=0.01)
    unit = card.target.shared_per_unit
    assert unit is None or unit >= card.target.shared_per_block


def test_dtypes_a_card_lacks() -> None:
    with pytest.raises(HardwareError, match="RTX 3090 has no rate for fp8; it has bf16, fp16"):
        CARDS["RTX 3090"].rate("fp8")
    with pytest.raises(HardwareError, match="int4"):
        CARDS["RTX 4090"].rate("int4")


def test_step_time() -> None:
    card = CARDS["H100"]
    product = OpCost("gemm", flops=989_400_000_000, bytes=1, dtype="bf16")
    copy = OpCost("copy", flops=0, bytes=3_350_000_000, dtype="fp32")
    assert op_ms(product, card) == pytest.approx(1.0)
    assert op_ms(copy, card) == pytest.approx(1.0)
    assert step_ms([product, copy, copy], card) == pytest.approx(3.0)
    assert step_ms([], card) == 0
    # The longer of the two counts, not their sum.
    both = OpCost("gemm", flops=989_400_000_000, bytes=2 * 3_350_000_000, dtype="bf16")
    assert op_ms(both, card) == pytest.approx(2.0)


def test_step_time_in_another_dtype() -> None:
    card = CARDS["H100"]
    product = OpCost("gemm", flops=989_400_000_000, bytes=1, dtype="bf16")
    single = OpCost("gemm", flops=66_900_000_000, bytes=1, dtype="fp32")
    assert step_ms([product], card, "fp8") == pytest.approx(0.5, rel=1e-3)
    assert step_ms([single], card, "fp8") == pytest.approx(1.0)
    with pytest.raises(HardwareError):
        step_ms([product], CARDS["RTX 3090"], "fp8")


def test_an_op_without_flops_needs_no_rate() -> None:
    # Such as the update of 8-bit optimizer states.
    assert op_ms(OpCost("copy", flops=0, bytes=936_000_000, dtype="int4"), CARDS["RTX 3090"]) == 1


def test_attainable_and_mfu() -> None:
    card = CARDS["RTX 4090"]
    ridge = 165.2e12 / 1008e9
    assert attainable(card, "bf16", ridge / 2) == pytest.approx(165.2 / 2)
    assert attainable(card, "bf16", ridge) == pytest.approx(165.2)
    assert attainable(card, "bf16", 1e6) == 165.2
    assert mfu(165.2e12, 2.0, card, "bf16") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4080", "RTX 4080"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060 12G"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100 80G"),
        ("A100-SXM4-40GB", "A100 40G"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Radeon RX 7900 XTX", "RX 7900 XTX"),
        ("Radeon RX 7900 XTX", "RX 7900 XTX"),
        ("AMD Radeon RX 9070 XT", "RX 9070 XT"),
        ("Apple M3 Max (40-core GPU)", "M3 Max"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA GeForce RTX 4070 Ti", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("AMD Radeon RX 7900 XT", None),
        ("Apple M3 Max", None),
        ("", None),
    ],
)
def test_card_named(device: str, name: str | None) -> None:
    card = card_named(device)
    assert (card.name if card else None) == name


def test_names_that_stand_for_two_sizes() -> None:
    found = card_named("NVIDIA GeForce RTX 3060", memory_gib=11.76)
    assert isinstance(found, Card)
    assert card_named("NVIDIA GeForce RTX 3060", memory_gib=7.8) is None


def test_device_names_are_of_one_card_each() -> None:
    names = [name for card in CARDS.values() for name in card.device_names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_units = { value = 28,", "num_units = { value = -1,", "num_units = -1: expected a number"),
        ("boost_mhz = { value = 1777,", "boost_mhz = { value = true,", "boost_mhz = True"),
        ('source = "pcpartdb-3060"', 'source = "hearsay"', "no source 'hearsay'"),
        ("memory_gb = { value = 12,", "memory_tb = { value = 12,", "memory_gb missing"),
        ("bandwidth_gb_per_s = { value = 360,", "bandwidth_gb_per_s = { is = 360,", "value missing"),
        ('target = "sm_86"', 'target = "sm_87"', "target = 'sm_87': no such target; there are sm_80"),
        ("pcie_generation = { value = 4,", "pcie_generation = { value = 9,", "expected one of 3, 4"),
        ("rates.bf16 = { value = 25.5,", "rates.bf15 = { value = 25.5,", "unknown bf15"),
        ("rates.fp32 = { value = 12.7,", "rates.fp8 = { value = 12.7,", "fp32, fp8 is either not"),
        ('l2_mib = { value = 3, source = "gpumap" }', "l2_mib = 3", "l2_mib = 3: expected {"),
        ('url = "https://docs.nvidia.com/cuda/', 'url = "docs.nvidia.com/cuda/', "expected https"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(FasttuneError) as caught:
        load_cards(changed(tmp_path, old, new))
    assert message in str(caught.value)


def test_needs_no_torch() -> None:
    code = "import sys, benchmarks.roofline; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_limits_agree_with_those_that_generated_code_is_held_to() -> None:
    targets = load_targets()
    for name, limits in TARGETS.items():
        target = targets[name]
        assert target.shared_per_block == limits.shared_bytes, name
        partitions = 2 if name.startswith("gfx1") else 4  # a CU is half of a workgroup processor
        assert target.registers_per_unit == limits.registers * limits.warp_size * partitions, name
