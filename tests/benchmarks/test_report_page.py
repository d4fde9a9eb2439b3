"""The results' page: what is drawn agrees with the rows, and no row can break it."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import command, report_gates, report_measured
from benchmarks.report import render
from benchmarks.report_gpu import kernels, steps
from benchmarks.report_plots import Ceiling, Interval, Mark, Part, PlotRow, log_axis, rows_plot
from benchmarks.report_rows import (
    FACTS,
    Result,
    histories,
    metrics,
    newest,
    number,
    point,
    read_expected,
    read_results,
)
from benchmarks.roofline import attainable, load_cards
from fasttune.errors import FasttuneError

# Invented numbers: what a page is drawn from here was measured nowhere.
PEAKS = {
    "flux-lora": {
        "peak_gib": 29.1234,
        "weights_gib": 22.25,
        "adapters_gib": 0.125,
        "gradients_gib": 0.125,
        "optimizer_gib": 0.25,
        "ema_gib": 0.0,
        "saved_gib": 3.5,
        "recomputed_gib": 1.0,
        "transient_gib": 1.8734,
        "module": "transformer_blocks.18.ff",
        "phase": "backward",
    },
    "sdxl-full": {"peak_gib": 20.0, "weights_gib": 5.0, "gradients_gib": 5.0, "optimizer_gib": 8.0},
}
GATES: dict[str, dict[str, dict[str, Any]]] = {
    "memory": PEAKS,
    "flops": {
        "flux-lora": {"tflop": 220.125, "moved_gib": 612.5, "step_ms RTX 4090": 2152.1},
        "sdxl-full": {"tflop": 20.5, "moved_gib": 60.25, "step_ms RTX 4090": 227.5},
    },
    "blocks": {
        "single, lora": {
            "saved_u": 8.0,
            "plain_u": 20.0,
            "min_cut_u": 16.0,
            "tensors": ["1 x (4608, 3072) bf16, 1 u each, mul", "rest 0.01 u"],
        }
    },
    "launches": {
        "flux-lora, eager": {"launches": 900, "gemm": 300, "pointwise": 500, "copy": 100},
    },
    "compiled_launches": {
        "flux-lora, blocks compiled": {"launches": 400, "gemm": 300, "pointwise": 90, "copy": 10},
    },
    "graphs": {"flux, blocks": {"graphs": 7, "graph_breaks": 0}},
}
GPU = "NVIDIA GeForce RTX 4090"
VOID = {"meta", "path", "rect", "br", "link", "input", "i"} - {"i"}


class Page(HTMLParser):
    """Checks that elements close in order; collects text, attributes and ids."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts = 0
        self.titles: list[str] = []
        self.bars: list[dict[str, float]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert not any(name.startswith("on") for name in values)
        if "id" in values:
            self.ids.append(str(values["id"]))
        for name in ("href", "src"):
            if name in values:
                self.links.append(str(values[name]))
        self.scripts += tag == "script"
        if tag == "rect":
            self.bars.append({k: float(str(values[k])) for k in ("x", "width")})
        if tag not in VOID or tag == "rect":
            self.open.append(tag)
        elif tag == "path" and self.get_starttag_text()[-2:] != "/>":  # type: ignore[index]
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            (self.titles if self.open[-1] == "title" else self.text).append(data)


def row(measurement: str = "cpu", **values: Any) -> dict[str, Any]:
    facts = {"time": "2026-01-01T00:00:00+00:00", "commit": "aaaa", "cpu": "CPU", "cores": 2}
    return {"measurement": measurement, **facts, "gpu": None, **values}


def write_rows(path: Path, *rows: Any) -> Path:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def results(*rows: dict[str, Any]) -> list[Result]:
    return [Result(f"rows.jsonl:{i}", r) for i, r in enumerate(rows, start=1)]


def kernel(case: str = "norm 1x8x8 bf16 forward", contender: str = "ours", **values: Any) -> Any:
    usual = {"us": 12.5, "us_p20": 12.0, "us_p80": 13.0, "gb_per_s": 800.0, "tflop_per_s": 0.0}
    usual |= {"fraction_of_ceiling": 0.8, "gpu": GPU, "memory_gib": 23.5}
    return row("kernel", **{"case": f"{case}, {contender}", **usual, **values})


@pytest.fixture
def expected(tmp_path: Path) -> Path:
    path = tmp_path / "static.json"
    path.write_text(json.dumps({"versions": {"torch": "2.13.0"}, "gates": GATES}))
    return path


@pytest.fixture
def page(tmp_path: Path, expected: Path) -> str:
    rows = [
        row(case="ema against torch", ratio=0.5, bounds_95=[0.45, 0.55], rounds=20),
        row(
            case="ema against torch",
            ratio=0.4,
            bounds_95=[0.38, 0.42],
            commit="bbbb",
            time="2026-02-01T00:00:00+00:00",
        ),
        row("ceiling", case="copy", gb_per_s=900.0, gpu=GPU),
        row("ceiling", case="matmul bf16", tflop_per_s=150.0, gpu=GPU),
        kernel(),
        kernel("product 8x8 bf16 forward", "ours", tflop_per_s=100.0, gb_per_s=500.0),
        kernel("product 8x8 bf16 forward", "eager", tflop_per_s=50.0, gb_per_s=250.0, us=25.0),
        row("step", case="sdxl lora", gpu=GPU, step_ms=310.5, peak_gib=8.9, predicted_peak_gib=8.8),
    ]
    return render([write_rows(tmp_path / "rows.jsonl", *rows)], expected)


# The page


def test_the_page_is_whole_and_alone(page: str) -> None:
    parsed = Page(page)
    assert parsed.scripts == 1
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert parsed.links, "links to sections"
    assert all(link[1:] in parsed.ids and link[0] == "#" for link in parsed.links)
    assert not re.search(r"https?://|url\(|@import|<link|<img|<iframe", page)
    assert "default-src 'none'" in page


def test_every_plot_says_in_words_what_it_shows(page: str) -> None:
    labels = re.findall(r'role="img" aria-label="([^"]+)"', page)
    assert len(labels) == page.count('role="img"') > 6
    assert any("flux-lora: 29.12" in label for label in labels)
    assert any("step" not in label and "0.4" in label for label in labels)


def test_tables_have_the_exact_numbers(page: str) -> None:
    cells = Page(page).text
    for number_ in (
        "29.1234",
        "1.8734",
        "220.125",
        "2,152.1",
        "310.5",
        "12.5",
        "0.38, 0.42",
        "900",
        "rest 0.01 u",
    ):
        assert number_ in cells, number_


def test_without_anything_the_page_says_what_to_run(tmp_path: Path) -> None:
    html = render([tmp_path], tmp_path / "absent.json")
    assert "<svg" not in html
    assert html.count('class="empty"') == len(re.findall("<section", html))
    for text in (
        "run benchmarks/gpu/run.sh",
        "fasttune bench static --write",
        "fasttune bench cpu",
    ):
        assert text in html
    Page(html)


def test_the_results_in_the_repository_make_a_page() -> None:
    from benchmarks.harness import RESULTS

    html = render([RESULTS], Path(__file__))  # an expectation that is no JSON
    assert "cannot be read" in html
    Page(html)


def test_the_command_writes_the_page(
    tmp_path: Path, expected: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "page.html"
    rows = write_rows(tmp_path / "rows.jsonl", row(a_ms=1.0))
    options = ["--out", str(out), "--results", str(rows), "--expected", str(expected)]
    assert command.main(["report", *options]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    Page(out.read_text(encoding="utf-8"))


def test_absent_results_are_the_users_mistake(tmp_path: Path, expected: Path) -> None:
    with pytest.raises(FasttuneError, match=r"nowhere\.jsonl: no such file"):
        render([tmp_path / "nowhere.jsonl"], expected)


def test_colours_have_contrast(page: str) -> None:
    """WCAG 2.1: 4.5 for text, 3 for what is drawn, on the card's colour, light and dark."""
    style = page[page.index("<style>") : page.index("</style>")]
    light: dict[str, str] = {}
    dark: dict[str, str] = {}
    for block in re.finditer(
        r"(@media \(prefers-color-scheme: dark\) \{\s*)?:root \{(.*?)\}", style, re.S
    ):
        (dark if block[1] else light).update(re.findall(r"(--\w+): (#[0-9a-f]{3,8})", block[2]))
    assert light.keys() == dark.keys() >= {"--c0", "--c9", "--ink", "--soft"}
    for theme in (light, dark):
        for name, least in {"--ink": 7, "--soft": 4.5, **{f"--c{i}": 3 for i in range(10)}}.items():
            assert contrast(theme[name], theme["--card"]) >= least, (name, theme[name])


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [s / 12.92 if s <= 0.03928 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# Rows that are odd


def test_what_rows_say_is_escaped(tmp_path: Path, expected: Path) -> None:
    bad = """</title><script>alert(1)</script>"'{{ 7*7 }}&amp;"""
    rows = [
        row(bad, case=bad, ratio=0.5, bounds_95=[0.4, 0.6], commit=bad),
        row(bad, case=bad, ratio=0.6, bounds_95=[0.4, 0.7], commit="b", torch=bad),
        kernel(bad, bad, gpu=bad),
        row(bad, case=bad, gpu=bad, step_ms=3.0, peak_gib=1.0),
    ]
    for gate in GATES:
        content = json.loads(expected.read_text())
        content["gates"][gate][bad] = {**next(iter(GATES[gate].values())), bad: bad, "module": bad}
        expected.write_text(json.dumps(content))
    html = render([write_rows(tmp_path / "rows.jsonl", *rows)], expected)
    parsed = Page(html)
    assert parsed.scripts == 1
    assert "alert(1)" in " ".join([*parsed.text, *parsed.titles])
    assert "49" not in "".join(parsed.titles)


def test_odd_rows_are_listed_and_break_nothing(tmp_path: Path, expected: Path) -> None:
    rows = [
        "no json",
        "[1, 2]",
        '{"a_ms": 1}',
        '{"measurement": 5}',
        '{"measurement": "nan", "a_ms": NaN, "samples": {"a_ms": [1, Infinity]}}',
        "[" * 100_000,
        '{"measurement": "fine", "a_ms": 1}',
        "",
        f'{{"measurement": "huge", "a_ms": {10**400}}}',
    ]
    html = render([write_rows(tmp_path / "rows.jsonl", *rows)], expected)
    cells = Page(html).text
    listed = [text for text in cells if re.search(r"rows\.jsonl:\d+$", text)]
    assert [int(text.rsplit(":", 1)[1]) for text in listed] == [1, 2, 3, 4, 5, 6, 9]
    assert "not finite or too large: a_ms, samples" in cells
    reading = read_results([tmp_path / "rows.jsonl"])
    assert [r.measurement for r in reading.results] == ["nan", "fine", "huge"]


@pytest.mark.parametrize("seed", range(12))
def test_values_of_any_kind_break_nothing(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    junk = [None, True, "", "x", -1, 0, 1e-300, 1e300, 10**400, math.nan, math.inf]
    junk += [
        [],
        [1],
        ["a", None],
        {},
        {"us": 3},
        {"a_ms": [1, "b"]},
        -2.5,
        [math.nan],
        1.7e308,
        5e-324,
    ]
    keys = ["case", "time", "commit", "gpu", "cpu", "cores", "samples", "us", "step_ms", "quick"]
    keys += ["ratio", "bounds_95", "gb_per_s", "tflop_per_s", "fraction_of_ceiling"]
    keys += [
        "peak_gib",
        "predicted_peak_gib",
        "a_ms",
        "p20_a_ms",
        "p80_a_ms",
        "memory_gib",
        "torch",
    ]

    def spoilt(values: dict[str, Any], names: list[str]) -> dict[str, Any]:
        return {
            **values,
            **{name: rng.choice(junk) for name in rng.choices(names, k=rng.randint(1, 5))},
        }

    rows = [
        spoilt(kind | {"commit": str(i % 3)}, keys)
        for i in range(12)
        for kind in (
            kernel(tflop_per_s=10.0),
            row("ceiling", case="copy", gb_per_s=9.0, gpu=GPU),
            row("ceiling", case="matmul bf16", tflop_per_s=9.0, gpu=GPU),
            row("step", step_ms=5.0, peak_gib=3.0, gpu=GPU),
            row(ratio=0.5, bounds_95=[0.4, 0.6], a_ms=3.0),
        )
    ]
    gates: dict[str, Any] = {
        gate: {case: spoilt(values, list(values)) for case, values in cases.items()}
        | {"x": rng.choice(junk)}
        for gate, cases in GATES.items()
    }
    gates[rng.choice(list(gates))] = rng.choice(junk)
    expected = tmp_path / "static.json"
    expected.write_text(json.dumps({"versions": rng.choice(junk), "gates": gates}))
    Page(render([write_rows(tmp_path / "rows.jsonl", *rows)], expected))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"gates": 3}', '{"gates": {"memory": [1]}}'])
def test_an_expectation_that_is_none_is_listed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "static.json"
    path.write_text(text)
    odd: list[Any] = []
    assert read_expected(path, odd) == ({}, {})
    assert len(odd) == 1 and "static.json" in odd[0].place


# What is drawn


def test_a_stack_adds_up_to_the_peak(expected: Path) -> None:
    section = report_gates.memory(PEAKS, [])
    bars = Page(str(section.charts[0])).bars
    # both rows start at 0; the scale is that of the 24 GB mark
    mark = re.search(r'left:([\d.]+)%">24 GB', str(section.charts[0]))
    assert mark is not None
    unit = 10 * float(mark[1]) / 24  # drawing units a GiB
    starts = [i for i, bar in enumerate(bars) if bar["x"] == 0]
    first, second = bars[: starts[1]], bars[starts[1] :]
    parts = [value for key, value in PEAKS["flux-lora"].items() if key.endswith("_gib") and value]
    assert [bar["width"] / unit for bar in first] == pytest.approx(parts[1:], abs=0.02)  # type: ignore[arg-type]
    assert first[-1]["x"] + first[-1]["width"] == pytest.approx(29.1234 * unit, abs=0.3)
    # what no part explains is drawn as other
    assert [bar["width"] / unit for bar in second] == pytest.approx([5, 5, 8, 2], abs=0.02)
    assert "other" in str(section.charts[0])


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        ({"weights_gib": 40.0}, "parts do not fit"),
        ({"saved_gib": -1.0}, "parts do not fit"),
        ({"peak_gib": "much"}, "no peak_gib"),
    ],
)
def test_a_peak_that_cannot_be_is_listed(spoilt: dict[str, Any], reason: str) -> None:
    odd: list[Any] = []
    section = report_gates.memory({"x": {**PEAKS["flux-lora"], **spoilt}}, odd)
    assert not section.charts
    assert reason in odd[0].reason


def test_marks_beyond_the_largest_bar_are_left_out() -> None:
    rows = [PlotRow("a", [[Part(0, 0.0, 9.0, "")]])]
    chart = rows_plot("T", rows, unit="GiB", marks=[Mark(8.0, "8 GB"), Mark(32.0, "32 GB")])
    assert chart is not None and "8 GB" in chart and "32 GB" not in chart


def test_what_does_not_fit_into_a_card_is_struck_out() -> None:
    section = report_gates.roofline_times(GATES["flops"], PEAKS, {"RTX 4090": 24.0})
    by_case = {row[0].text: row[1] for row in section.tables[0].rows}
    assert by_case["flux-lora"].is_over and not by_case["sdxl-full"].is_over
    assert by_case["flux-lora"].text == "2,152.1"
    assert section.tables[0].head == ["config", "RTX 4090"]


def test_the_slower_the_more_colour() -> None:
    cases = {"a": {"step_ms X": 1.0, "step_ms Y": 10.0}, "b": {"step_ms X": 100.0}}
    rows = report_gates.roofline_times(cases, {}, {}).tables[0].rows
    assert 0 < rows[0][1].heat < rows[0][2].heat < rows[1][1].heat <= 40
    assert rows[1][2].text == "" and rows[1][2].heat == 0


def test_blocks_and_launches_are_to_scale() -> None:
    bars = Page(str(report_gates.blocks(GATES["blocks"]).charts[0])).bars
    widths = [bar["width"] for bar in bars]
    assert widths[1] / widths[0] == pytest.approx(16 / 8, rel=1e-3)
    assert widths[2] / widths[0] == pytest.approx(20 / 8, rel=1e-3)
    chart = str(report_gates.launches(GATES["launches"]).charts[0])
    widths = [bar["width"] for bar in Page(chart).bars]
    assert np.array(widths) / widths[0] * 300 == pytest.approx([300, 500, 100], abs=1)
    assert ">900<" in chart


def test_operations_and_kernels_have_plots_of_their_own(page: str) -> None:
    chart = str(report_gates.compiled_launches(GATES["compiled_launches"]).charts[0])
    widths = [bar["width"] for bar in Page(chart).bars]
    assert np.array(widths) / widths[0] * 300 == pytest.approx([300, 90, 10], abs=1)
    assert ">400<" in chart and "eager" not in chart
    ids = Page(page).ids
    assert ids.index("launches") < ids.index("compiled-launches")


def test_half_and_double_are_equally_far_from_one() -> None:
    rows = [PlotRow(str(v), [[Interval(0, v, v, v, "")]]) for v in (0.5, 1.0, 2.0)]
    chart = str(rows_plot("T", rows, unit="ratio", ratio=True))
    half, one, double = (float(x) for x in re.findall(r'class="dots line-0" d="M([\d.]+)', chart))
    assert one - half == pytest.approx(double - one, abs=0.2) and one > half


def test_wide_bounds_do_not_squeeze_the_rest() -> None:
    found = results(
        row(case="a", ratio=1.0, bounds_95=[0.01, 900.0], rounds=2),
        row(case="b", ratio=2.0, bounds_95=None, rounds=1),
        row(case="c", ratio=-1.0, bounds_95=[0.5, 1.5]),
        row(case="d", ratio=0.5, bounds_95=[0.4, 0.6], quick=True),
    )
    section = report_measured.ratios(found)
    assert "900" not in section.charts[0]
    # a ratio below 0 is none, and quick rows are no measurements
    cells = [[cell.text for cell in r[:3]] for r in section.tables[0].rows]
    assert cells == [["a", "1", "0.01, 900"], ["b", "2", ""]]


# The roofline


def test_a_ceiling_is_the_roofline_of_its_card() -> None:
    card = load_cards()["RTX 4090"]
    ceiling = Ceiling("x", card.rate("bf16"), card.bandwidth_gb_per_s / 1000)
    for intensity in (0.25, 10.0, 163.0, 164.0, 1000.0):
        assert ceiling.at(intensity) == pytest.approx(attainable(card, "bf16", intensity))


def test_dots_lie_under_the_ceilings_where_their_numbers_say(page: str) -> None:
    chart = str(
        kernels(
            results(
                row("ceiling", case="copy", gb_per_s=500.0, gpu=GPU),
                row("ceiling", case="matmul bf16", tflop_per_s=100.0, gpu=GPU),
                kernel("a", "ours", tflop_per_s=100.0, gb_per_s=1.0),
                kernel("b", "ours", tflop_per_s=5.0, gb_per_s=500.0),
                kernel("c", "ours", tflop_per_s=50.0, gb_per_s=250.0),
                kernel("d", "ours", tflop_per_s=0.0, gb_per_s=250.0),
            ),
            [],
        )[0].charts[0]
    )
    dots = {
        text[0]: (float(x), float(y))
        for x, y, text in re.findall(
            r'd="M([\d.]+) ([\d.]+)h0"><title>\d+\. (\w.*?)</title>', chart
        )
    }
    assert set(dots) == {"a", "b", "c"}  # no products, no place on the roofline
    ceilings = re.findall(r'class="ceiling( measured)?" d="M([-\d. L]+)"', chart)
    corners = [tuple(map(float, p.split())) for p in next(d for m, d in ceilings if m).split("L")]
    # a: on the plateau; b: on the slope at 10 FLOP/byte; c: at the ridge of 200, half as high
    assert dots["a"][1] == pytest.approx(corners[1][1], abs=0.2)
    assert dots["c"][0] == pytest.approx(corners[1][0], abs=0.2)
    (x0, y0), (x1, y1) = corners[:2]
    assert dots["b"][1] == pytest.approx(y0 + (y1 - y0) * (dots["b"][0] - x0) / (x1 - x0), abs=0.5)
    decades = (dots["a"][0] - dots["b"][0]) / math.log10(100_000 / 10)
    assert dots["c"][0] - dots["b"][0] == pytest.approx(decades * math.log10(20), abs=0.5)
    assert len(ceilings) == 2  # the data sheet's as well


def test_the_share_of_the_ceiling_has_every_contender(page: str) -> None:
    titles = Page(page).titles
    for contender in ("ours", "eager"):
        assert any(t.startswith(f"product 8x8 bf16 forward, {contender}: 80.0 %") for t in titles)
    assert any("norm 1x8x8 bf16 forward, ours: 80.0 %" in t for t in titles)


def test_a_failed_check_is_shown_at_once() -> None:
    checks = [
        row("correctness", case="norm 1x7", passed=True, worst_of_allowed=0.4, gpu=GPU),
        row("correctness", case="norm 2x7", passed=False, worst_of_allowed=3.0, gpu=GPU),
    ]
    (table,) = kernels(results(*checks), [])[0].tables
    assert table.is_open and table.title == "Correctness: 2 checks, 1 failed"
    assert [cell.text for cell in table.rows[1][:3]] == ["norm 2x7", "no", "3"]
    (table,) = kernels(results(checks[0]), [])[0].tables
    assert not table.is_open and table.title.endswith("none failed")


def test_what_does_not_fit_is_shown_beside_what_does() -> None:
    usual = {"gpu": GPU, "peak_gib": 8.0}
    found = results(
        row(
            "training step", case="fits", step_ms=30.0, samples={"step_ms": [29.0, 30, 31]}, **usual
        ),
        row("training step", case="too large", fits=False, ended_in="a step", **usual),
    )
    (section,) = steps(found)
    assert "too large: does not fit" in section.charts[0]
    assert "60 % of the steps within 29.4 to 30.6" in section.charts[0]
    assert len(Page(str(section.charts[0])).bars) == 1
    assert [r[0].text for r in section.tables[0].rows] == ["fits", "too large"]
    assert not steps(results(row(step_ms=3.0)))[0].charts  # of no GPU


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (1e-9, 1e12), (3.0, 40.0), (0.5, 0.7)])
def test_logarithmic_axes_hold_what_they_are_for(low: float, high: float) -> None:
    axis, ticks = log_axis(low, high)
    assert axis.low < math.log10(low) <= math.log10(high) < axis.high
    assert len(axis.ticks) == len(ticks) <= 12
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)


# History


def test_a_history_needs_two_commits_of_one_machine() -> None:
    same = results(row(a_ms=1.0), row(a_ms=2.0))
    assert histories(same) == []
    assert histories(results(row(a_ms=1.0), row(a_ms=2.0, commit="b", cpu="other"))) == []
    assert histories(results(row(a_ms=1.0), row(a_ms=2.0, commit="b", quick=True))) == []
    assert histories(results(row(a_ms=1.0), row(b_ms=2.0, commit="b"))) == []
    found = histories(results(row(a_ms=1.0, time="2"), row(a_ms=2.0, commit="b", time="1")))
    assert [p.value for p in found[0].points] == [2.0, 1.0]
    assert (found[0].measurement, found[0].metric) == ("cpu", "a_ms")


def test_the_band_is_from_the_samples() -> None:
    samples = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    found = point(results(row(a_ms=3.5, samples={"a_ms": samples}))[0], "a_ms")
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(samples, (0.2, 0.8))))
    # rows without samples: their own quantiles, or a list of repetitions, or neither
    found = point(results(row(us=3.0, us_p20=2.0, us_p80=4.0, samples=146))[0], "us")
    assert found is not None and (found.low, found.high) == (2.0, 4.0)
    found = point(results(row(a_ms=3.0, p20={"a_ms": 2.0}, p80={"a_ms": 4.0}))[0], "a_ms")
    assert found is not None and (found.low, found.high) == (2.0, 4.0)
    found = point(results(row(load_s=[1.0, 2.0, 6.0]))[0], "load_s")
    assert found is not None and found.value == 2.0 and found.low is not None
    found = point(results(row(a_ms=3.0))[0], "a_ms")
    assert found is not None and found.low is found.high is None


def test_metrics_are_what_has_a_unit() -> None:
    found = metrics(
        row(
            median_ms=1.0,
            p10_ms=1.0,
            mean_ms=1.0,
            ratio=1.0,
            ratio_low=0.5,
            images_per_s=2.0,
            peak_gib=3.0,
            checksum=5.0,
            memory_gib=24,
            steps=9,
            text_ms="3",
            bad_ms=math.nan,
            list_s=[1.0, 2.0],
            ours_p20_ms=3.0,
        )
    )
    assert found == ["median_ms", "ratio", "images_per_s", "peak_gib", "list_s"]
    # a rate follows from the time that was sampled
    assert metrics(row(us=1.0, gb_per_s=3.0, samples={"us": [1.0]})) == ["us"]
    assert "memory_gib" in FACTS


def test_history_is_drawn_in_the_order_of_time(tmp_path: Path) -> None:
    rows = [
        row(a_ms=value, commit=f"c{value:g}", time=f"2026-01-0{day}T00:00:00+00:00")
        for day, value in ((3, 30.0), (1, 10.0), (2, 20.0))
    ]
    html = render([write_rows(tmp_path / "rows.jsonl", *rows)], tmp_path / "none.json")
    titles = [t for t in Page(html).titles if t.startswith("c")]
    assert [t.split(",")[0] for t in titles] == ["c10", "c20", "c30"]
    assert "+200.0%" in html


def test_a_long_history_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_measured, "MAX_HISTORIES", 2)
    rows = [row(case=f"{i}", a_ms=1.0, commit=c) for i in range(3) for c in "ab"]
    (section,) = report_measured.history(histories(results(*rows)))
    assert len(section.charts) == 2 and "The first 2 of 3" in section.lead
    assert len(section.tables[0].rows) == 6


def test_the_newest_row_of_each_machine_counts() -> None:
    rows = results(row(a_ms=1.0, time="2"), row(a_ms=2.0, time="1"), row(a_ms=3.0, cpu="other"))
    assert [r.row["a_ms"] for r in newest(rows)] == [1.0, 3.0]


@pytest.mark.parametrize("value", [None, True, "1", math.nan, math.inf, 10**400, 1e300, [1]])
def test_what_is_no_number_is_none(value: object) -> None:
    assert number(value) is None
