"""The end of a run: losses beside those of other runs and cases, and targets."""

import argparse
from pathlib import Path

from benchmarks.gpu import loss_curves
from benchmarks.gpu.chosen_items import own_kernels
from benchmarks.gpu.run import Run


def curves_file(args: argparse.Namespace) -> Path:
    return args.out / loss_curves.FILE.name if args.out else loss_curves.FILE


def judge_curves(suite: Run) -> None:
    """Says which losses are not as they should be, and records new ones if this run can be trusted."""
    failed = suite.said.failed
    for row in suite.rows:
        if row.get("loss_curve") == "differs":
            failed.append((row["case"], "the losses differ from the recorded curve"))
    for case, other in loss_curves.differing(suite.rows):
        failed.append(
            (
                case,
                f"losses are more than {loss_curves.TOLERANCE:.0%} from those of {other}, which has "
                "the same weights and noise",
            )
        )
    if suite.args.smoke or not any(loss_curves.is_new(row) for row in suite.rows):
        return
    file = curves_file(suite.args)
    if suite.facts.get("changed_files") != 0:
        untold = "the checkout is changed, or no checkout at all"
    elif failed or not own_kernels() <= suite.right():
        untold = "not all of this run is right"
    else:
        added = loss_curves.record(suite.rows, file)
        suite.said.notes.append(f"{len(added)} loss curves are new and recorded in {file}")
        return
    suite.said.notes.append(f"new loss curves are not recorded: {untold}")


def judge_targets(suite: Run) -> None:
    """Adds a row for each target that this run can tell of, and names the others."""
    from benchmarks.gpu import targets

    judged = targets.rows_of(suite.rows)
    for row in judged:
        suite.add(row)
    unjudged = targets.unjudged(suite.rows, judged)
    suite.said.notes += [f"target not judged, something is not measured: {n}" for n in unjudged]
