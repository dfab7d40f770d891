"""The five experiments in the plane of Flow Density Control, each with one command.

    python experiments/fdc.py NAME [--seeds 5] [--quick]

with NAME one of risk, novelty, wasserstein, exploration, ablation; or page.

Every experiment reads its run file here (fdc_*.toml), solves its problem exactly on a grid, trains
all methods for all seeds, and writes docs/fdc.md anew from all results there are. Results are kept
in runs/fdc/*.json, seed by seed and method by method: a killed command goes on where it was, and
``page`` only writes.
"""

from __future__ import annotations

import sys

import fdc_others
import fdc_page
import fdc_runs
from commands import Commands

RUNS = {
    "risk": fdc_runs.RISK.run,
    "novelty": fdc_runs.NOVELTY.run,
    "wasserstein": fdc_others.wasserstein,
    "exploration": fdc_others.exploration,
    "ablation": fdc_others.ablation,
}
NAMES = tuple(RUNS)

main = Commands("fdc", __doc__.split("\n")[0], RUNS, fdc_page.write, seeds=5)

if __name__ == "__main__":
    main(sys.argv[1:])
