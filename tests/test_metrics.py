"""Step times, metrics.jsonl, the progress line and the trackers."""

import contextlib
import json
import logging
import math
import os
import re
import statistics
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttune.errors import ConfigError, StorageError
from fasttune.metrics import LOSS_DECAY, Metrics, MetricsFile, open_trackers, read_metrics
from fasttune.models.compiled import Compiler
from fasttune.progress import Progress, format_duration, format_values, setup_run_log
from fasttune.rates import Rates, StepTimer, peak_memory_gib


class FakeClock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def metrics_for(run_dir: Path, clock: FakeClock, **kwargs: object) -> Metrics:
    defaults = {"total_steps": 100, "batch_images": 4, "show_progress": False, "clock": clock}
    return Metrics(run_dir, **{**defaults, **kwargs})  # type: ignore[arg-type]


def run_steps(metrics: Metrics, clock: FakeClock, steps: range, seconds: float = 0.5) -> None:
    for step in steps:
        clock.now += seconds
        metrics.step(step, torch.tensor(1.0 / step), 1e-4, torch.tensor(2.0), 0.1)


# Rates


def test_first_steps_and_steps_after_pauses_do_not_count() -> None:
    rates = Rates(batch_images=8)
    assert rates.median_s() is None and rates.eta_s(10) is None
    for seconds in (60.0, 5.0, 5.0):
        assert not rates.add(seconds)
    assert rates.median_s() is None
    for seconds in (0.2, 0.4, 0.3):
        assert rates.add(seconds)
    assert not rates.add(9.0, after_pause=True)
    assert rates.median_s() == 0.3
    assert rates.eta_s(100) == pytest.approx(30.0)
    assert rates.eta_s(100, pause_s_per_step=0.1) == pytest.approx(40.0)
    assert rates.images_per_s(rates.median_s()) == pytest.approx(8 / 0.3)


def test_steps_after_pauses_count_if_there_are_no_others() -> None:
    rates = Rates(batch_images=1, warmup_steps=0)
    rates.add(2.0, after_pause=True)
    assert rates.median_s() == 2.0


def test_step_timer_leaves_pauses_out() -> None:
    clock = FakeClock()
    timer = StepTimer(torch.device("cpu"), clock)
    timer.step_done()
    clock.now += 1.0
    timer.step_done()
    clock.now += 500.0
    timer.restart()
    clock.now += 2.0
    timer.step_done()
    assert timer.collect() == [(None, False), (1.0, False), (2.0, True)]
    assert timer.collect() == []


def test_peak_memory_of_the_process_is_that_of_the_kernel() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    reported = peak_memory_gib(torch.device("cpu"))
    line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
    assert reported == pytest.approx(int(line.split()[1]) / 2**20, rel=0.02)


# Metrics


def test_a_line_holds_the_window_since_the_last_one(tmp_path: Path) -> None:
    clock = FakeClock()
    metrics = metrics_for(tmp_path, clock, images_per_epoch=20)
    run_steps(metrics, clock, range(1, 4), seconds=30.0)
    assert metrics.log_now(3)["step_ms"] is None  # warm-up
    run_steps(metrics, clock, range(4, 8), seconds=0.5)
    run_steps(metrics, clock, range(8, 11), seconds=0.25)
    line = metrics.log_now(10)
    metrics.close()

    assert line == read_metrics(tmp_path / "metrics.jsonl")[-1]
    mean_s = (4 * 0.5 + 3 * 0.25) / 7
    assert line["step_ms"] == pytest.approx(mean_s * 1000)
    assert line["images_per_s"] == pytest.approx(4 / mean_s)
    assert line["data_wait_share"] == pytest.approx(7 * 0.1 / (7 * mean_s))
    assert line["loss"] == pytest.approx(0.1)
    assert line["lr"] == 1e-4 and line["grad_norm"] == 2.0
    assert line["epoch"] == 2.0
    assert line["elapsed_s"] == pytest.approx(90 + 2 + 0.75)
    assert line["peak_gib"] > 0


def test_the_smoothed_loss_takes_every_step(tmp_path: Path) -> None:
    clock = FakeClock()
    metrics = metrics_for(tmp_path, clock)
    run_steps(metrics, clock, range(1, 31))
    line = metrics.log_now(30)
    metrics.close()
    weights = [LOSS_DECAY ** (30 - step) for step in range(1, 31)]
    expected = sum(w / step for w, step in zip(weights, range(1, 31), strict=True)) / sum(weights)
    assert line["loss_smoothed"] == pytest.approx(expected)


def test_the_losses_may_be_overwritten_after_the_call(tmp_path: Path) -> None:
    clock = FakeClock()
    metrics = metrics_for(tmp_path, clock)
    buffer = torch.zeros(())
    for step, loss in ((1, 3.0), (2, 5.0)):
        buffer.fill_(loss)
        metrics.step(step, buffer, 1e-4, torch.tensor(loss / 10), 0.0)
    buffer.fill_(-1.0)
    line = metrics.log_now(2)
    metrics.close()
    assert line["loss"] == 5.0 and line["grad_norm"] == pytest.approx(0.5)
    assert line["loss_smoothed"] == pytest.approx((3 * LOSS_DECAY + 5) / (LOSS_DECAY + 1))


def test_pauses_count_neither_as_step_time_nor_as_training(tmp_path: Path) -> None:
    clock = FakeClock()
    metrics = metrics_for(tmp_path, clock)
    with metrics.paused():
        clock.now += 50.0
    run_steps(metrics, clock, range(1, 11), seconds=1.0)
    with metrics.paused():
        clock.now += 10.0
    with metrics.paused("checkpoint"):
        clock.now += 5.0
    run_steps(metrics, clock, range(11, 12), seconds=4.0)
    run_steps(metrics, clock, range(12, 21), seconds=1.0)
    line = metrics.log_now(20)
    summary = metrics.summary()
    metrics.close()
    assert line["step_ms"] == pytest.approx(1000.0)
    assert summary["step_ms"] == summary["step_ms_p10"] == summary["step_ms_p90"] == 1000.0
    assert summary["seconds"] == {
        "training": pytest.approx(23.0),
        "validation": 60.0,
        "checkpoint": 5.0,
    }
    assert summary["elapsed_s"] == pytest.approx(88.0)
    assert summary["images_seen"] == 80 and summary["images_per_s"] == pytest.approx(4.0)
    assert set(summary["peak_gib_by_phase"]) == {"training", "validation", "checkpoint"}


def test_summary_quantiles_are_those_of_all_fair_steps(tmp_path: Path) -> None:
    clock = FakeClock()
    metrics = metrics_for(tmp_path, clock)
    times = [0.1 * step for step in range(1, 31)]
    for step, seconds in enumerate(times, start=1):
        run_steps(metrics, clock, range(step, step + 1), seconds)
    metrics.log_now(30)
    summary = metrics.summary()
    metrics.close()
    fair_ms = [1000 * seconds for seconds in times[3:]]
    assert summary["step_ms"] == pytest.approx(statistics.median(fair_ms))
    assert summary["step_ms_p10"] == pytest.approx(np.quantile(fair_ms, 0.1, method="weibull"))
    assert summary["step_ms_p90"] == pytest.approx(np.quantile(fair_ms, 0.9, method="weibull"))


def test_a_run_without_steps_has_a_summary(tmp_path: Path) -> None:
    metrics = metrics_for(tmp_path, FakeClock())
    assert metrics.log_now(0) == {}
    summary = metrics.summary()
    metrics.close()
    assert summary["step_ms"] is None and summary["steps"] == 0
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_the_first_step_is_timed_from_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, compiler = FakeClock(), Compiler()
    metrics = metrics_for(tmp_path, clock, begin=70.0, compiler=compiler)
    assert metrics.summary()["first_step_s"] is None
    compiler.graphs, compiler.seconds, compiler.num_cached = ["a", "b"], 4.25, 1
    with caplog.at_level("INFO", logger="fasttune"):
        run_steps(metrics, clock, range(1, 4), seconds=5.0)
    summary = metrics.summary()
    metrics.close()
    assert caplog.messages == [
        "first step done after 35.0 s; 2 graphs in 4.2 s, 1 of them from the cache"
    ]
    assert summary["first_step_s"] == 35.0
    compiled = {"graphs": 2, "seconds": 4.25, "from_cache": 1, "given_up": None}
    assert summary["compiled"] == compiled


@pytest.mark.parametrize(("may_overflow", "first"), [(False, 2), (True, None)])
def test_a_non_finite_gradient_is_named_unless_a_loss_scale_skips_it(
    tmp_path: Path, may_overflow: bool, first: int | None
) -> None:
    metrics = metrics_for(tmp_path, FakeClock(), norms_may_overflow=may_overflow)
    for step, norm in ((1, 1.0), (2, math.inf), (3, 1.0)):
        metrics.step(step, torch.tensor(2.0), 1e-4, torch.tensor(norm), 0.0)
    metrics.log_now(3)
    metrics.close()
    assert metrics.first_nonfinite_step == first


def test_a_non_finite_loss_is_null_and_named(tmp_path: Path) -> None:
    metrics = metrics_for(tmp_path, FakeClock())
    for step, loss in ((1, 2.0), (2, math.nan), (3, math.inf)):
        metrics.step(step, torch.tensor(loss), 1e-4, torch.tensor(1.0), 0.0)
    line = metrics.log_now(3)
    metrics.close()
    assert metrics.first_nonfinite_step == 2
    assert line["loss_smoothed"] == pytest.approx(2.0)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["loss"] is None


def test_held_out_and_samples_have_lines_of_their_own(tmp_path: Path) -> None:
    metrics = metrics_for(tmp_path, FakeClock())
    metrics.held_out(0, 0.5, [0.25, 0.75], timesteps=[0.2, 0.8])
    metrics.held_out(5, 0.4, [0.2, math.nan])
    metrics.samples(5, tmp_path / "samples" / "step-000005.png")
    summary = metrics.summary()
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {
            "step": 0,
            "held_out_loss": 0.5,
            "held_out_per_timestep": [0.25, 0.75],
            "held_out_timesteps": [0.2, 0.8],
        },
        {"step": 5, "held_out_loss": 0.4, "held_out_per_timestep": [0.2, None]},
        {"step": 5, "samples": "samples/step-000005.png"},
    ]
    assert (summary["held_out_first"], summary["held_out_last"]) == (0.5, 0.4)


def test_a_resumed_run_has_the_lines_of_one_that_never_stopped(tmp_path: Path) -> None:
    def lines(folder: Path) -> list[dict[str, object]]:
        records = read_metrics(folder / "metrics.jsonl")
        timed = ("step_ms", "images_per_s", "data_wait_share", "peak_gib", "elapsed_s")
        return [{k: v for k, v in record.items() if k not in timed} for record in records]

    def drive(metrics: Metrics, clock: FakeClock, first: int, last: int) -> None:
        for step in range(first, last + 1):
            run_steps(metrics, clock, range(step, step + 1))
            if step % 5 == 0:
                metrics.log_now(step)
            if step % 10 == 0:
                metrics.held_out(step, 1 / step, [1 / step])

    clock = FakeClock()
    straight = metrics_for(tmp_path / "straight", clock, images_per_epoch=10)
    drive(straight, clock, 1, 30)
    straight.close()

    clock = FakeClock()
    first = metrics_for(tmp_path / "resumed", clock, images_per_epoch=10)
    drive(first, clock, 1, 17)  # killed at 17; the checkpoint is that of step 10
    first.close()
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss": 0.0')
    second = metrics_for(tmp_path / "resumed", clock, images_per_epoch=10, start_step=10)
    drive(second, clock, 11, 30)
    summary = second.summary()
    second.close()

    resumed, expected = lines(tmp_path / "resumed"), lines(tmp_path / "straight")
    assert [record["step"] for record in resumed] == [record["step"] for record in expected]
    # Only the sum behind the smoothed loss goes through a division and back.
    for record, wanted in zip(resumed, expected, strict=True):
        assert record.pop("loss_smoothed", 0) == pytest.approx(
            wanted.pop("loss_smoothed", 0), rel=1e-12
        )
        assert record == wanted
    # 10 steps before the kill and 20 after it, of half a second each.
    assert summary["elapsed_s"] == pytest.approx(15.0)
    assert summary["held_out_first"] == 0.1 and summary["start_step"] == 10


# metrics.jsonl


def test_opening_cuts_later_steps_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\nnot json\n[1]\n'
        b'{"step": 3, "loss": 0.2}\n{"step": 2, "los\xff'
    )
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    file = MetricsFile(path, resume_step=2)
    file.write({"step": 3, "loss": 0.25})
    # Flushed line by line: there before the file is closed.
    assert path.read_text().endswith('{"step": 3, "loss": 0.25}\n')
    file.close()
    assert [r["loss"] for r in read_metrics(path)] == [1.0, 0.5, 0.25]
    assert len(path.read_text().splitlines()) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_start_begins_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "held_out_loss": 1.0}\n')
    MetricsFile(path).close()
    assert path.read_text() == ""


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="metrics.jsonl"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.close()
    with Path("/dev/full").open("w") as file._file:
        with pytest.raises(StorageError, match=r"metrics\.jsonl.*No space left"):
            file.write({"step": 1})
        # What could not be written is still in the buffer, and closing would try it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), file._file.fileno())


# Progress


@pytest.fixture
def fasttune_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG, logger="fasttune"):
        yield caplog


def test_without_a_terminal_there_is_a_log_line_a_logging_step(
    tmp_path: Path, fasttune_log: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    metrics = metrics_for(tmp_path, clock, show_progress=True)
    run_steps(metrics, clock, range(1, 11))
    metrics.log_now(10)
    metrics.close()
    (record,) = [r for r in fasttune_log.records if r.levelno == logging.INFO]
    message = record.getMessage()
    assert message.startswith("step 10/100: loss 0.28")
    # 90 steps of half a second are left.
    for part in ("500 ms/step", "ETA 45s", "lr 1.00e-04", "8 images/s", "data wait 20%", "GiB"):
        assert part in message


def test_a_run_whose_stderr_is_a_file_shows_readable_lines(tmp_path: Path) -> None:
    """Metrics as train.py drives it, under the command line's logging."""
    code = """
import sys
from pathlib import Path
import torch
from fasttune.cli import _set_up_logging
from fasttune.metrics import Metrics
from fasttune.progress import setup_run_log
_set_up_logging(verbose=False)
run_dir = Path(sys.argv[1])
setup_run_log(run_dir)
metrics = Metrics(run_dir, total_steps=20, batch_images=2, images_per_epoch=8, show_progress=True)
with metrics.paused("validation"):
    metrics.samples(0, run_dir / "samples" / "step-000000.png")
for step in range(1, 21):
    metrics.step(step, torch.tensor(0.5), 1e-4, torch.tensor(1.0), 0.0)
    if step % 10 == 0:
        metrics.log_now(step)
metrics.log_now(20)
metrics.close()
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    first, *lines = result.stderr.splitlines()
    assert first == f"step 0: samples at {tmp_path / 'samples' / 'step-000000.png'}"
    assert [line.split(":")[0] for line in lines] == ["step 10/20", "step 20/20"]
    for line in lines:
        assert re.search(r": loss 0\.5000, .*/step, ETA \w+, lr 1\.00e-04, .*images/s", line), line
    assert "%|" not in result.stderr  # no bar
    logged = (tmp_path / "run.log").read_text()
    assert all(line in logged for line in lines)


def test_in_a_terminal_there_is_a_bar_and_notes_stand_above_it(tmp_path: Path) -> None:
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    root = logging.getLogger("fasttune")
    level = root.level
    with os.fdopen(follower, "w") as terminal:
        console = logging.StreamHandler(terminal)
        console.setLevel(logging.INFO)
        root.addHandler(console)
        root.setLevel(logging.DEBUG)
        try:
            progress = Progress(total_steps=200, start_step=50, stream=terminal)
            progress.update(60, {"loss_smoothed": 0.125, "step_ms": 250.0, "eta_s": 35.0})
            progress.note("a note")
            logging.getLogger("fasttune.elsewhere").info("another module")
            progress.update(61)
            progress.close()
            progress.close()
        finally:
            root.removeHandler(console)
            root.setLevel(level)
        assert not console.filters
    written = b""
    # A terminal hands over what it holds piece by piece; with its other end closed it ends so.
    with contextlib.suppress(OSError):
        while piece := os.read(leader, 4096):
            written += piece
    os.close(leader)
    shown = written.decode()
    assert "60/200, loss 0.1250, 250 ms/step, ETA 35s" in shown
    # Each message starts on a line that was cleared for it, and is not part of the bar's.
    for message in ("a note", "another module"):
        before, after = shown.split(message)
        assert before.endswith(" \r") and after.startswith("\r\n")


def test_values_that_are_missing_are_left_out() -> None:
    assert format_values({}) == ""
    assert format_values({"loss_smoothed": math.nan, "lr": None, "peak_gib": 1.0}) == "1.00 GiB"
    assert "2.50 s/step" in format_values({"step_ms": 2500.0})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (273_600, "3d04h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_run_log_has_debug_messages_of_every_start(tmp_path: Path) -> None:
    root = logging.getLogger("fasttune")
    level = root.level
    for verbose in (False, True):
        handler = setup_run_log(tmp_path / "run", verbose)
        logging.getLogger("fasttune.data").debug("start %s", verbose)
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    first, second = (tmp_path / "run" / "run.log").read_text().splitlines()
    assert "fasttune.data: start False" in first and "test_metrics.py" not in first
    assert "start True (test_metrics.py:" in second


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_run_log_on_a_full_disk_is_given_up_with_one_warning(
    tmp_path: Path, fasttune_log: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.log").symlink_to("/dev/full")
    root = logging.getLogger("fasttune")
    handler = setup_run_log(tmp_path)
    for number in range(3):
        logging.getLogger("fasttune.data").info("message %d", number)
    root.removeHandler(handler)
    handler.close()  # must not try again what could not be written
    told = [(r.levelname, r.getMessage()) for r in fasttune_log.records]
    assert [text for level, text in told if level == "INFO"] == [
        "message 0",
        "message 1",
        "message 2",
    ]
    (warning,) = [text for level, text in told if level != "INFO"]
    assert "run.log: cannot be written (No space left on device)" in warning
    # Nothing of logging's own "--- Logging error ---", with a traceback for each record.
    assert capsys.readouterr() == ("", "")


def test_a_record_that_cannot_be_formatted_stays_a_bug(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    level = logging.getLogger("fasttune").level
    handler = setup_run_log(tmp_path)
    record = logging.LogRecord("fasttune", logging.INFO, "x.py", 1, "%d", ("text",), None)
    handler.handle(record)
    logging.getLogger("fasttune").removeHandler(handler)
    logging.getLogger("fasttune").setLevel(level)
    handler.close()
    assert "--- Logging error ---" in capsys.readouterr().err


# Trackers


def trackers_for(run_dir: Path, **kwargs: object) -> list:
    defaults = {
        "tensorboard": False,
        "wandb": False,
        "wandb_project": "fasttune-tests",
        "wandb_mode": "offline",
        "run_name": "dog",
        "config": {"train": {"steps": 4}},
    }
    return open_trackers(run_dir, **{**defaults, **kwargs})  # type: ignore[arg-type]


def write_png(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(path)
    return path


def test_tensorboard_on_a_full_disk_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tracker,) = trackers_for(tmp_path, tensorboard=True)
    png = write_png(tmp_path / "samples" / "step-000001.png")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("add_scalar", "add_image", "close"):
        monkeypatch.setattr(tracker._writer, name, full)
    for call in (
        lambda: tracker.log(1, {"train/loss": 0.5}),
        lambda: tracker.image(1, "samples", png),
        tracker.close,
    ):
        with pytest.raises(StorageError, match=r"/tensorboard: .*\(No space left on device\)"):
            call()
    monkeypatch.undo()
    tracker.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/tensorboard: "):
        trackers_for(tmp_path / "file", tensorboard=True)


def test_tensorboard_events_are_those_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    clock = FakeClock()
    metrics = metrics_for(tmp_path, clock, trackers=trackers_for(tmp_path, tensorboard=True))
    run_steps(metrics, clock, range(1, 5))
    metrics.log_now(4)
    run_steps(metrics, clock, range(5, 9))
    line = metrics.log_now(8)
    metrics.held_out(8, 0.25, [0.25])
    metrics.samples(8, write_png(tmp_path / "samples" / "step-000008.png"))
    metrics.close()

    # A run resumed from step 4: its events replace those of step 8.
    clock = FakeClock()
    trackers = trackers_for(tmp_path, tensorboard=True, start_step=4)
    metrics = metrics_for(tmp_path, clock, trackers=trackers, start_step=4)
    run_steps(metrics, clock, range(5, 9))
    again = metrics.log_now(8)
    metrics.held_out(8, 0.25, [0.25])
    metrics.close()

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = events.Scalars("train/loss")
    assert [(event.step, event.value) for event in losses] == [
        (4, pytest.approx(0.25)),
        (8, pytest.approx(0.125)),
    ]
    assert again["loss_smoothed"] == pytest.approx(line["loss_smoothed"], rel=1e-12)
    assert [(e.step, e.value) for e in events.Scalars("held_out/loss")] == [(8, 0.25)]


def test_tensorboard_images_can_be_decoded(tmp_path: Path) -> None:
    import io

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = write_png(tmp_path / "grid.png")
    (tracker,) = trackers_for(tmp_path, tensorboard=True)
    tracker.image(3, "samples", path)
    tracker.close()
    (event,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("samples")
    with Image.open(io.BytesIO(event.encoded_image_string)) as shown, Image.open(path) as source:
        assert event.step == 3 and np.array_equal(np.asarray(shown), np.asarray(source))


def test_a_resumed_run_continues_its_wandb_run(tmp_path: Path) -> None:
    path = write_png(tmp_path / "grid.png")
    for step in (1, 2):
        (tracker,) = trackers_for(tmp_path, wandb=True)
        tracker.log(step, {"train/loss": 0.5})
        tracker.image(step, "samples", path)
        tracker.close()
    run_id = (tmp_path / "wandb-id").read_text().strip()
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 2 and all(file.stat().st_size > 0 for file in files)


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_missing_library_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"logging\.{name} = true .*fasttune\[{name}\]"):
        trackers_for(tmp_path, **{name: True})
