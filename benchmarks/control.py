"""Does it matter which branches are dropped, or only how many? The paper's control at AIG's own rates, block by block.

    python -m benchmarks.control --data DIR           # DIR holds train/ and test/
    python -m benchmarks.control --data DIR --list    # the commands

The small protocol of `benchmarks.reproduction` with stochastic depth, as there, but each block drops its branch as
often as the gate of that block did in the AIG run of the same seed: 1 - its rate in gate mode `sample` after the last
epoch, from results/runs/small-aig-t0.7-sSEED/test.json. (There every block drops 0.3, and AIG dropped 0.25 on average.)
To be compared with that AIG's errors in modes `sample` and `expected`: five seeds, Welch's t. This file is the
protocol: it is committed before its first training.
"""

from __future__ import annotations

from collections.abc import Sequence

from aig.checkpoint import TEST
from aig.console import run_command
from aig.runs import read_json
from benchmarks import reproduction
from benchmarks.reproduction import SEEDS, SMALL
from benchmarks.runner import ROOT, RUNS, follow, make_parser


def flags(seed: int) -> str:
    """Those of the training that drops as the AIG run of this seed does."""
    rates = read_json(ROOT / "results" / RUNS / f"small-aig-t0.7-s{seed}" / TEST)["sample"]["gates"]
    dropped = ",".join(f"{1 - rate:.4f}" for rate in rates)
    return f"{SMALL} --target 1 --stochastic-depth {dropped} --seed {seed}"


def main(argv: Sequence[str] | None = None) -> None:
    trainings = [(f"small-matched-depth-s{seed}", flags(seed)) for seed in SEEDS]
    args = make_parser(__doc__.split("\n")[0]).parse_args(argv)
    follow([trainings], reproduction.tests, args)


if __name__ == "__main__":
    run_command(main, "control")
