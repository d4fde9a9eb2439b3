"""The losses of the quickstart config's first steps, kept in a file.

A refactor leaves them bit-identical on one machine; across machines they agree within a tolerance
of rounding. A change that moves them on purpose says so in CHANGELOG.md and writes the file anew:

    python tests/test_golden.py
"""

import sys
from pathlib import Path

import pytest
import torch

from fasttune.config_file import load_config
from fasttune.metrics import read_metrics
from fasttune.train import train

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "quickstart.txt"
STEPS = 12


def first_losses(folder: Path) -> list[float]:
    """Losses of the first steps on one thread, for the same order of additions everywhere."""
    overrides = {
        "run.device": "cpu",
        "run.output_dir": str(folder / "runs"),
        "cache.dir": str(folder / "cache"),
        "train.steps": STEPS,
        "validation.every": 0,
        "checkpoint.every": 0,
        "logging.every": 1,
    }
    config = load_config(
        ROOT / "configs" / "quickstart.toml", [f"{k}={v}" for k, v in overrides.items()]
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train(config) == 0
    finally:
        torch.set_num_threads(threads)
    return [
        line["loss"]
        for line in read_metrics(folder / "runs" / "quickstart" / "metrics.jsonl")
        if "loss" in line
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_losses_of_the_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    golden = [float(line.split()[1]) for line in GOLDEN.read_text().splitlines()[1:]]
    losses = first_losses(tmp_path)
    assert len(golden) == STEPS
    # Matrix products of another CPU or torch add in another order: 1e-6 a step, growing.
    assert losses == pytest.approx(golden, rel=2e-3)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        written = first_losses(Path(folder))
    lines = [f"{step} {loss!r}" for step, loss in enumerate(written, 1)]
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(
        f"step loss, torch {torch.__version__}, {sys.platform}\n" + "\n".join(lines) + "\n"
    )
