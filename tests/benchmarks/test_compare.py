"""Two result files: what is joined, what the verdicts are worth on data of known truth, and messages."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.compare import APART, ResultsError, measured, read_rows
from benchmarks.ratios import Ratio, ratio_of
from benchmarks.verdicts import (
    Better,
    Change,
    Limit,
    LimitError,
    Outcome,
    direction,
    limit_for,
    markdown,
    parse_limits,
)
from fasttune.cli import main

ROOT = Path(__file__).parents[2]


def change(low: float, high: float, limit: float | None = 0.03, **facts: Any) -> Change:
    values = {"measurement": "m", "case": "", "metric": "step_ms", "base": 1.0, "head": 1.0}
    ratio = Ratio((low + high) / 2, low, high)
    return Change(**{**values, "ratio": ratio, "better": Better.LOWER, "limit": limit, **facts})


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps({"measurement": "steps", **row}) + "\n" for row in rows))
    return path


def compare(tmp_path: Path, base: list[dict], head: list[dict], fail: str = "") -> int:
    files = [write(tmp_path / f"{n}.jsonl", *rows) for n, rows in (("b", base), ("h", head))]
    return main(["bench", "compare", *map(str, files), "--fail", fail])


# What the rule says of an interval.


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (1.00, 1.00, Outcome.EQUAL),
        (0.99, 1.01, Outcome.NOISE),
        (0.97, 0.99, Outcome.BETTER),
        (1.005, 1.02, Outcome.WORSE),  # real, but 3 % is excluded
        (1.02, 1.035, Outcome.FAILS),
        (0.995, 1.031, Outcome.INCONCLUSIVE),
        (1.002, 1.06, Outcome.INCONCLUSIVE),  # too wide to tell 3 % from nothing
        (1.05, 1.15, Outcome.FAILS),  # wide, and clear all the same
        (0.90, 0.95, Outcome.BETTER),
        (0.80, 1.10, Outcome.INCONCLUSIVE),
    ],
)
def test_the_rule(low: float, high: float, outcome: Outcome) -> None:
    assert change(low, high).outcome is outcome
    mirrored = Ratio(2 - (low + high) / 2, 2 - high, 2 - low)
    higher = change(low, high, better=Better.HIGHER, ratio=mirrored, metric="images_per_s")
    assert higher.outcome is outcome


@pytest.mark.parametrize(
    ("ratio", "outcome"), [(1.0024, Outcome.WORSE), (1.0026, Outcome.FAILS), (0.9, Outcome.BETTER)]
)
def test_exact_numbers_fail_beyond_the_limit(ratio: float, outcome: Outcome) -> None:
    assert change(ratio, ratio, limit=0.0025, metric="peak_gib").outcome is outcome


@pytest.mark.parametrize(
    ("low", "high", "settled"),
    [
        (0.995, 1.014, True),  # narrow: +- 0.95 %
        (0.99, 1.02, False),
        (1.01, 1.06, False),
        (1.031, 1.2, True),  # past the limit, however far
        (0.7, 0.96, True),  # better, however much
        (0.7, 0.98, False),
    ],
)
def test_more_rounds_are_of_no_use(low: float, high: float, settled: bool) -> None:
    assert change(low, high).is_settled is settled
    assert change(low, high, limit=None).is_settled


def test_without_a_limit_nothing_fails() -> None:
    outcomes = [change(*bounds, limit=None).outcome for bounds in ((2, 2), (1.5, 3), (0.5, 3))]
    assert outcomes == [Outcome.WORSE, Outcome.WORSE, Outcome.NOISE]


def error_rates(
    true: float, noise: float, rounds: int, *, paired: bool, seeds: int = 200
) -> dict[Outcome, float]:
    """Verdicts under a limit of 3 % on samples with a true ratio and log-normal noise; paired ones
    share a drift of 5 % as well."""
    counts = dict.fromkeys(Outcome, 0)
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        drift = rng.lognormal(0, 0.05, rounds) if paired else 1.0
        base = 40 * drift * rng.lognormal(0, noise, rounds)
        head = 40 * true * drift * rng.lognormal(0, noise, rounds)
        ratio = ratio_of(head, base, paired=paired)
        counts[change(1, 1, ratio=ratio).outcome] += 1
    return {outcome: count / seeds for outcome, count in counts.items()}


@pytest.mark.parametrize("paired", [True, False])
def test_a_real_three_percent_fails_and_noise_does_not(paired: bool) -> None:
    # 0.8 % from process to process, 12 rounds: what `ab` finds on processor time.
    assert error_rates(1.03, 0.008, 12, paired=paired)[Outcome.FAILS] > 0.95
    assert error_rates(1.05, 0.008, 12, paired=paired)[Outcome.FAILS] == 1
    same = error_rates(1.0, 0.008, 12, paired=paired)
    assert same[Outcome.FAILS] == 0
    assert same[Outcome.INCONCLUSIVE] < 0.01


@pytest.mark.parametrize(("noise", "rounds"), [(0.02, 12), (0.05, 12), (0.01, 3)])
def test_noise_of_any_size_fails_nothing(noise: float, rounds: int) -> None:
    rates = error_rates(1.0, noise, rounds, paired=True)
    assert rates[Outcome.FAILS] < 0.01
    assert rates[Outcome.INCONCLUSIVE] > 0.05  # and is not passed off as a result


# Names, limits and their messages.


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("step_ms", Better.LOWER),
        ("wall_s", Better.LOWER),
        ("median_us", Better.LOWER),
        ("peak_gib", Better.LOWER),
        ("spill_bytes", Better.LOWER),
        ("saved_u", Better.LOWER),
        ("launches", Better.LOWER),
        ("gemm_launches", Better.LOWER),
        ("graph_breaks", Better.LOWER),
        ("images_per_s", Better.HIGHER),
        ("gb_per_s", Better.HIGHER),
        ("mfu", Better.HIGHER),
        ("fraction_of_copy", Better.HIGHER),
        ("steps", None),
        ("checksum", None),
        ("clock_mhz", None),
    ],
)
def test_a_name_tells_the_direction(metric: str, better: Better | None) -> None:
    assert direction(metric) is better


def test_limits_are_read_in_order() -> None:
    limits = parse_limits("step_ms:3%, *_ms:10%,peak_gib:0.25%")
    assert limits == (Limit("step_ms", 0.03), Limit("*_ms", 0.1), Limit("peak_gib", 0.0025))
    found = [limit_for(m, limits) for m in ("step_ms", "first_ms", "peak_gib", "wall_s")]
    assert found == [0.03, 0.1, 0.0025, None]
    assert parse_limits("") == ()


@pytest.mark.parametrize("text", ["step_ms", "step_ms:3", "step_ms:-3%", ":3%", "a_ms:3%,", "a:b%"])
def test_a_limit_that_cannot_be_read(text: str) -> None:
    with pytest.raises(LimitError, match=r'is not a limit.*"step_ms:3%,peak_gib:0.25%"'):
        parse_limits(text)


def test_a_limit_that_could_never_fail_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"step_ms": 5.0, "steps": 7}]
    assert compare(tmp_path, rows, rows, "stepms:3%") == 2
    assert "limit stepms:3%: both sides have no such metric; there are: step_ms" in error(capsys)
    assert compare(tmp_path, rows, rows, "steps:3%") == 2
    assert "steps has no unit that tells which way is better" in error(capsys)


def error(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and "Traceback" not in said.err
    return said.err


# Files.


def test_files_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good.jsonl", {"step_ms": 1.0})
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"measurement": "a"}\n{"measu')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "samples.jsonl").write_text('{"measurement": "a", "samples": {"step_ms": [NaN]}}\n')
    for name, message in (
        ("absent.jsonl", "absent.jsonl cannot be read: No such file"),
        ("empty.jsonl", "has no rows"),
        ("broken.jsonl", "broken.jsonl:2 is not JSON"),
        ("list.jsonl", "list.jsonl:1 is not a row"),
        ("binary.jsonl", "it is not text"),
        ("samples.jsonl", 'samples.jsonl:1: "samples" must be'),
    ):
        assert main(["bench", "compare", str(good), str(tmp_path / name)]) == 2
        assert message in error(capsys)
    other = write(tmp_path / "other.jsonl", {"measurement": "loading", "step_ms": 1.0})
    assert main(["bench", "compare", str(good), str(other)]) == 2
    assert "no measurement in common" in error(capsys)


def test_the_table_and_what_is_said_below(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = np.random.default_rng(0).normal(50, 0.3, (2, 20))
    base = {"case": "a|b", "samples": {"step_ms": samples[0].tolist()}, "peak_gib": 8.0, "steps": 9}
    head = {"case": "a|b", "samples": {"step_ms": (1.05 * samples[1]).tolist()}, "peak_gib": 8.0}
    assert (
        compare(
            tmp_path,
            [base | {"gpu": "X", "quick": False}, {"case": "old", "step_ms": 1.0}],
            [head | {"gpu": "Y", "quick": False, "steps": 8}, {"measurement": "new", "step_ms": 1}],
            "step_ms:3%,peak_gib:0.25%",
        )
        == 1
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| measurement | case | metric | base | head | head / base | 95 % |")
    cells = {line.split(" | ")[2]: line.strip("| ").split(" | ") for line in lines[2:4]}
    assert cells["step_ms"][:2] == ["steps", "a\\|b"]
    assert 1.045 < float(cells["step_ms"][5]) < 1.055
    assert cells["step_ms"][-1] == "**FAILS** (limit 3 %)"
    assert cells["peak_gib"][3:] == ["8", "8", "1.0000", "exact", "equal"]
    assert lines[4:] == [
        "",
        "Base and head differ in gpu: X / Y.",
        "",
        "Not judged, as their names tell no direction: steps a|b: steps 9 -> 8.",
        "",
        "Only in base: steps old.",
        "",
        "Only in head: new.",
        "",
        APART,
    ]


def times(ms: float, metric: str = "step_ms") -> dict[str, Any]:
    """A row of twelve samples that differ by 1 %."""
    return {"samples": {metric: [ms * (1 + i / 1000) for i in range(12)]}}


def test_no_limit_no_failure(tmp_path: Path) -> None:
    assert compare(tmp_path, [times(1.0)], [times(9.0)]) == 0
    assert compare(tmp_path, [times(1.0)], [times(9.0)], "step_ms:3%") == 1


@pytest.mark.parametrize(
    ("metric", "base", "head"),
    [
        ("step_ms", 1.0, 9.0),
        ("wall_s", 10.0, 10.4),
        ("images_per_s", 2.0, 1.0),
        ("mfu", 0.5, 0.4),
        ("update_ms", 0.0, 0.3),
    ],
)
def test_a_clock_s_number_alone_decides_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str, base: float, head: float
) -> None:
    for fail in (f"{metric}:3%", ""):
        assert compare(tmp_path, [{metric: base}], [{metric: head}], fail) == 0
        assert capsys.readouterr().out.splitlines()[2].endswith("| inconclusive: more rounds |")
    many = {"samples": {metric: [base or 0.1] * 9}}  # of one side alone
    assert compare(tmp_path, [many], [{metric: head}], f"{metric}:3%") == 0
    assert compare(tmp_path, [{metric: head}], [{metric: head}], f"{metric}:3%") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("| equal |")


@pytest.mark.parametrize("metric", ["peak_gib", "spill_bytes", "launches", "recompiles", "tflop"])
def test_sizes_and_counts_need_no_samples(tmp_path: Path, metric: str) -> None:
    assert compare(tmp_path, [{f"a_{metric}": 10}], [{f"a_{metric}": 11}], f"a_{metric}:3%") == 1


def test_what_fails_without_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"fits": True, "loss_curve": "agrees", "step_ms": 10.0, "peak_gib": 22.0}
    oom = {"fits": False, "peak_gib": 20.5}
    assert compare(tmp_path, [good], [good], "step_ms:3%") == 0
    assert compare(tmp_path, [good], [oom], "step_ms:3%,peak_gib:0.25%") == 1
    said = capsys.readouterr().out
    assert "**FAILS** steps: fits is false, and was not." in said
    assert "**FAILS** steps: step_ms is gone, and has a limit." in said
    assert compare(tmp_path, [good], [oom]) == 1  # no limit is needed to see that it broke
    assert compare(tmp_path, [good], [good | {"loss_curve": "differs"}]) == 1
    assert (
        compare(tmp_path, [{"passed": True, "saved_u": 1}], [{"passed": False, "saved_u": 1}]) == 1
    )
    assert compare(tmp_path, [oom], [good], "peak_gib:10%") == 0  # it fits now


def test_a_rate_beside_its_time_is_not_judged_without_its_spread(tmp_path: Path) -> None:
    noisy = np.random.default_rng(1).normal(50, 5, (2, 6))
    base = {"samples": {"step_ms": noisy[0].tolist()}, "images_per_s": 20.0}
    head = {"samples": {"step_ms": noisy[1].tolist()}, "images_per_s": 15.0}
    assert compare(tmp_path, [base], [head], "step_ms:3%") == 0
    assert compare(tmp_path, [base | {"images_per_s": 20.0}], [head], "step_ms:3%,*_gib:1%") == 2
    alone = {"samples": {"step_ms": [5.0]}}
    assert compare(tmp_path, [alone], [{"samples": {"step_ms": [5.3]}}], "step_ms:3%") == 0


def test_main_metrics_of_kernels_and_of_cpu_rows_have_a_direction(tmp_path: Path) -> None:
    assert compare(tmp_path, [times(100.0, "us")], [times(200.0, "us")], "us:3%") == 1
    cpu = {"ratio": 0.8, "ours_ms": 8.0, "theirs_ms": 10.0}
    slower = cpu | times(1.2, "ratio")
    assert compare(tmp_path, [cpu | times(0.8, "ratio")], [slower], "ratio:5%") == 1
    slower_contender = cpu | {"theirs_ms": 20.0}
    assert compare(tmp_path, [cpu], [slower_contender], "*_ms:3%") == 0


def test_samples_of_changed_files_are_not_pooled(tmp_path: Path) -> None:
    def row(ms: float, time: str, changed: int) -> dict[str, Any]:
        near = [ms * (1 + i / 1000) for i in range(12)]
        facts = {"commit": "a", "changed_files": changed, "time": time}
        return {"samples": {"step_ms": near}, **facts}

    base = [row(10, "1", 0)]
    assert compare(tmp_path, base, [row(10, "1", 1), row(20, "2", 1)], "step_ms:3%") == 1
    assert compare(tmp_path, base, [row(20, "1", 1), row(10, "2", 1)], "step_ms:3%") == 0


def test_quick_rows_do_not_meet_full_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, quick = times(10.0), times(1.0) | {"quick": True}
    assert compare(tmp_path, [full], [quick], "") == 2
    assert compare(tmp_path, [full, quick], [quick | times(2.0)], "step_ms:3%") == 1
    assert "| steps | quick | step_ms |" in capsys.readouterr().out


def test_counts_may_be_zero(tmp_path: Path) -> None:
    zero, two = [{"recompiles": 0}], [{"recompiles": 2, "samples": {"recompiles": [2, 2]}}]
    assert compare(tmp_path, zero, zero, "recompiles:0%") == 0
    assert compare(tmp_path, zero, two, "recompiles:0%") == 1
    assert compare(tmp_path, two, zero, "recompiles:0%") == 0


def test_the_last_commit_counts_and_its_samples_are_pooled() -> None:
    def row(commit: str, time: str, *samples: float) -> dict[str, Any]:
        return {
            "measurement": "m",
            "commit": commit,
            "changed_files": 0,
            "time": time,
            "samples": {"step_ms": samples},
            "peak_gib": samples[0],
        }

    rows = [
        row("old", "2026-01-01", 9.0),
        row("new", "2026-01-02", 1.0, 2.0),
        row("new", "2026-01-03", 6.0),
    ]
    found = measured(rows)["m", ""]
    assert found.samples == {"step_ms": [1.0, 2.0, 6.0]}
    assert found.values == {"step_ms": 2.0, "peak_gib": 6.0}


def test_rows_without_case_and_samples_compare(capsys: pytest.CaptureFixture[str]) -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))[0]
    assert main(["bench", "compare", str(results), str(results), "--fail", "*_ms:0%,*_gib:0%"]) == 0
    table = capsys.readouterr().out
    assert "| load 5 GB: fasttune |  | peak_anon_gib |" in table
    assert "FAILS" not in table


def test_markdown_has_one_line_for_each_change() -> None:
    changes = [change(1.02, 1.04), change(0.99, 1.01, metric="first_ms", head=123456.0)]
    lines = markdown(changes).splitlines()
    assert len(lines) == 4 and {line.count("|") for line in lines} == {9}
    assert "| 123,456 |" in lines[3] and "no difference seen" in lines[3]


def test_read_rows_raises_what_the_command_line_prints(tmp_path: Path) -> None:
    with pytest.raises(ResultsError):
        read_rows(tmp_path / "none.jsonl")
