"""report.html: parsed, searched for the run's numbers, and made from folders with parts missing."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttune.charts import Line, format_number, histogram, line_chart, nice_axis, share_bar, thin
from fasttune.errors import StorageError
from fasttune.report import render_report, write_report
from fasttune.report_files import MAX_GRID_SIDE, MAX_GRIDS

VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta"}
EVIL = "<script>alert('x')</script>\" onload=\"alert(1)"


class Page(HTMLParser):
    """The elements of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def labels(self) -> list[str]:
        return [attrs["aria-label"] or "" for _, attrs in self.tags if "aria-label" in attrs]

    @property
    def content(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


def write_run(run_dir: Path) -> Path:
    """A finished run of 100 steps, validated at 0, 50 and 100."""
    (run_dir / "samples").mkdir(parents=True)
    (run_dir / "weights").mkdir()
    records: list[dict[str, object]] = []
    for step in range(0, 101, 10):
        if step:
            records.append(
                {
                    "step": step,
                    "loss": 0.5 - step / 1000,
                    "loss_smoothed": 0.6 - step / 500,
                    "lr": 1e-4 * (1 - step / 200),
                    "grad_norm": 1.25,
                    "step_ms": 380.0 + step / 10,
                    "images_per_s": 10.4,
                    "peak_gib": 11.37,
                    "data_wait_share": 0.034,
                    "epoch": step / 16,
                    "elapsed_s": float(step),
                }
            )
        if step % 50 == 0:
            records.append(
                {
                    "step": step,
                    "held_out_loss": 0.25 - step / 1000,
                    "held_out_per_timestep": [0.1, 0.4 - step / 500],
                    "held_out_timesteps": [750.0, 250.0],
                }
            )
            records.append({"step": step, "samples": f"samples/step-{step:06d}.png"})
            pixels = np.full((8, 16, 3), step, dtype=np.uint8)
            Image.fromarray(pixels).save(run_dir / "samples" / f"step-{step:06d}.png")
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run_dir / "config.toml").write_text(
        f"[run]\nname = '''{EVIL}'''\n\n[model]\nfamily = \"sdxl\"\npath = \"models/{{x}} & <y>\"\n"
        '[adapter]\ntype = "lora"\nrank = 16  # <i>inner</i>\n'
        f"[train]\nsteps = 100\nbatch_size = 4\n[validation]\nprompts = ['''{EVIL}''', \"a dog\"]\n"
    )
    (run_dir / "summary.json").write_text(
        json.dumps(
            {
                "steps": 100,
                "total_steps": 100,
                "images_seen": 400,
                "step_ms": 384.2,
                "step_ms_p10": 377.0,
                "step_ms_p90": 393.0,
                "images_per_s": 10.41,
                "peak_gib": 11.37,
                "peak_gib_by_phase": {"training": 11.37, "validation": 9.25},
                "data_wait_share": 0.034,
                "elapsed_s": 125.0,
                "placement": "CPU, fp32",
                "torch": "2.13",
                "seconds": {"training": 75.0, "preparation": 25.0, "other": 0.0},
                "first_step_s": 95.0,
                "compiled": {"graphs": 12, "seconds": 41.3, "from_cache": 5, "given_up": None},
            }
        )
    )
    (run_dir / "bad_files.json").write_text(
        json.dumps(
            {
                "bad_files": [{"path": f"photos/{EVIL}.jpg", "reason": "truncated after 12 bytes"}],
                "warnings": [{"path": "photos/lost.txt", "reason": "no image of this name"}],
            }
        )
    )
    (run_dir / "run.log").write_text("".join(f"line {i} {EVIL}\n" for i in range(200)))
    (run_dir / "weights" / "dog.safetensors").write_bytes(b"\0" * 3 * 2**19)
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def test_the_page_holds_the_numbers_of_the_run(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    for text in (
        "finished",
        "400 images, 6.25 epochs",
        "from 0.580, −31.0%",  # smoothed loss, 0.58 to 0.40
        "from 0.250, −40.0%",  # held-out loss, 0.25 to 0.15
        "384 ms",
        "80% within 377 to 393 ms",
        "10.4 images/s",
        "11.4 GiB",
        "3.4%",
        "2m05s",
        "1m35s 12 graphs compiled in 41s, 5 cached",
        "LoRA of rank 16",
        "preparation: 25s 25%",
        "training: 1m15s 75%",
        "9.25 GiB",
        "1.50 MiB",
        "weights/dog.safetensors",
        "Files not used",
        "truncated after 12 bytes",
        "Warnings about files",
        "no image of this name",
        "CPU, fp32 · torch 2.13",
        "line 199",
        "line 140",
    ):
        assert text in page.content, text
    assert "line 139" not in page.content
    labels = "\n".join(page.labels())
    for text in (
        "Loss, smoothed: 0.5800 at step 10, 0.4000 at step 100",
        "Held-out loss, held-out loss: 0.2500 at step 0, 0.1500 at step 100",
        "noise level 250, held-out loss: 0.4000 at step 0, 0.2000 at step 100",
        "Learning rate, lr: 9.5e-5 at step 10, 5e-5 at step 100",
        "Gradient norm, gradient norm: 1.250",
        "Step times: 10 logging windows from 381.0 to 390.0 ms, median 385.5 ms",
        "Peak memory, peak memory: 11.37 GiB",
    ):
        assert text in labels, text
    # Least noise first.
    assert labels.index("noise level 250") < labels.index("noise level 750")


def test_the_charts_carry_every_point(run_dir: Path) -> None:
    page = Page(render_report(run_dir))
    data = [json.loads(a["data-chart"] or "") for a in page.all("div") if "data-chart" in a]
    (loss,) = [d for d in data if d and d["lines"][0]["name"] == "of a step"]
    expected = [[step, pytest.approx(0.5 - step / 1000)] for step in range(10, 101, 10)]
    assert loss["lines"][0]["points"] == expected


def test_nothing_is_fetched_and_nothing_is_injected(run_dir: Path) -> None:
    text = render_report(run_dir)
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    for _, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on"), (name, value)
            if name in ("src", "href"):
                assert (value or "").startswith("data:image/")
    (policy,) = [
        m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in (policy or "")
    # One script, ours; the name, prompt, path and log line that hold one are plain text.
    assert len(page.all("script")) == 1
    assert page.content.count(EVIL) >= 4
    assert "<i>inner</i>" in page.content and "models/{x} & <y>" in page.content


def test_grids_are_embedded_newest_first_with_descriptions(run_dir: Path) -> None:
    images = Page(render_report(run_dir)).all("img")
    values = []
    for image in images:
        kind, _, content = (image["src"] or "").partition(";base64,")
        assert kind == "data:image/png"
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            values.append(picture.getpixel((0, 0))[0])  # type: ignore[index]
        assert "a dog" in (image["alt"] or "")
    assert values == [100, 50, 0]
    assert "step 100" in (images[0]["alt"] or "")


def test_large_grids_are_scaled_and_many_are_thinned(tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    samples.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (300, 2400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(samples / "step-000000.png")
    for step in range(1, 61):
        Image.new("RGB", (4, 4)).save(samples / f"step-{step:06d}.png")
    page = Page(render_report(tmp_path))
    images = page.all("img")
    assert len(images) == MAX_GRIDS and f"{MAX_GRIDS} of 61 grids" in page.content
    assert "step 60" in (images[0]["alt"] or "") and "step 0" in (images[-1]["alt"] or "")
    kind, _, content = (images[-1]["src"] or "").partition(";base64,")
    assert kind == "data:image/jpeg"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert picture.size == (MAX_GRID_SIDE, 200)


def test_an_empty_folder_has_a_report(tmp_path: Path) -> None:
    page = Page(render_report(tmp_path))
    assert "no step made" in page.content
    assert not page.all("svg") and not page.all("img")


@pytest.mark.parametrize(
    "missing",
    ["metrics.jsonl", "config.toml", "summary.json", "bad_files.json", "run.log", "samples"],
)
def test_a_missing_part_is_left_out(run_dir: Path, missing: str) -> None:
    path = run_dir / missing
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    else:
        path.unlink()
    Page(render_report(run_dir))


@pytest.mark.parametrize("damaged", ["config.toml", "summary.json", "bad_files.json"])
def test_a_damaged_part_is_left_out(run_dir: Path, damaged: str) -> None:
    path = run_dir / damaged
    path.write_bytes(path.read_bytes()[:5] + b"\xff")
    Page(render_report(run_dir))


def test_an_unreadable_grid_is_named(run_dir: Path) -> None:
    path = run_dir / "samples" / "step-000050.png"
    path.write_bytes(path.read_bytes()[:40])
    page = Page(render_report(run_dir))
    assert len(page.all("img")) == 2
    assert "Could not be read: step-000050.png" in page.content


def test_an_interrupted_run_with_a_single_line_has_a_report(tmp_path: Path) -> None:
    line = {"step": 10, "loss": 0.5, "loss_smoothed": 0.5, "step_ms": None, "lr": 1e-4}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 20, "lo')
    (tmp_path / "config.toml").write_text("[train]\nsteps = 1000\nbatch_size = 2\n")
    page = Page(render_report(tmp_path))
    assert "stopped at step 10 of 1,000" in page.content and "20 images" in page.content
    assert "Loss: 0.5000 at step 10." in page.labels()


def test_a_run_whose_losses_were_not_finite_has_a_report(run_dir: Path) -> None:
    records = [
        {"step": 10, "loss": 0.5, "loss_smoothed": 0.5, "grad_norm": None},
        {"step": 20, "loss": None, "loss_smoothed": 0.5, "grad_norm": None},
        {"step": 20, "held_out_loss": None, "held_out_per_timestep": [None, 0.2]},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text = render_report(run_dir)
    Page(text)
    assert not re.search(r"\b(nan|inf|None)\b", text)


def test_a_report_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"report\.html"):
        write_report(tmp_path / "missing")


# Charts


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.127, 0.169, [0.12, 0.13, 0.14, 0.15, 0.16, 0.17]),
        (0.0, 1e-4, [0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4]),
        (-3.0, 7.0, [-4, -2, 0, 2, 4, 6, 8]),
    ],
)
def test_ticks_are_round_and_enclose_the_range(low: float, high: float, ticks: list[float]) -> None:
    axis = nice_axis(low, high)
    assert axis.ticks == pytest.approx(ticks)
    assert axis.low == pytest.approx(ticks[0]) and axis.high == pytest.approx(ticks[-1])


def test_a_constant_has_an_axis() -> None:
    for value in (0.0, 5.0, -1e-8):
        axis = nice_axis(value, value)
        assert 0 < axis.share(value) < 1 and len(axis.ticks) >= 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234567, "1,234,567"), (12.345, "12.3"), (0.01234, "0.0123"), (1.2e-5, "1.2e-5")],
)
def test_numbers(value: float, text: str) -> None:
    assert format_number(value) == text


def test_points_lie_where_the_axes_say() -> None:
    points = [(0.0, 0.0), (50.0, 0.5), (100.0, 1.0)]
    chart = line_chart("Line", [Line(name="line", points=points)])
    assert chart is not None
    (path,) = [a["d"] for a in Page(chart).all("path") if a["class"] == "line main"]
    assert path == "M0.0 400.0L500.0 200.0L1000.0 0.0"


def test_thinning_keeps_the_ends_and_the_extremes() -> None:
    points = [(float(x), math.sin(x / 1000)) for x in range(20_000)]
    points[7777] = (7777.0, 9.0)
    thinned = thin(points, 500)
    assert 250 <= len(thinned) <= 502
    assert thinned[0] == points[0] and thinned[-1] == points[-1]
    assert (7777.0, 9.0) in thinned and thinned == sorted(thinned)


def test_one_slow_value_does_not_squeeze_the_histogram() -> None:
    values = [100 + index / 10 for index in range(99)] + [5000.0]
    chart = histogram("Times", values, unit="ms", counted="steps")
    assert chart is not None
    page = Page(chart)
    assert len(page.all("rect")) >= 10
    assert "the last bar includes" in page.content and "5,000 ms" in page.content


def test_charts_without_data_are_none() -> None:
    assert line_chart("Nothing", [Line(name="nothing", points=[])]) is None
    assert histogram("Few", [1.0], unit="ms", counted="steps") is None
    assert share_bar([("nothing", 0.0, "0s")]) is None
