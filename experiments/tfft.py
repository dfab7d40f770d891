"""The experiments of Tail-aware Flow Fine-Tuning, each with one command.

    python experiments/tfft.py NAME [--seeds 3] [--quick]

with NAME one of cost, densities, frontier, starvation, digits, solvers; or page.

Every experiment has exact optima beside it where there are any (on a grid), trains all methods for
all seeds, and writes docs/tfft.md anew from all results there are. Results are kept in
runs/tfft/*.json, seed by seed and method by method: a killed command goes on where it was, and
``page`` only writes.
"""

from __future__ import annotations

import sys

import tfft_digits
import tfft_hard
import tfft_page
import tfft_plane
import tfft_solvers
from commands import Commands

RUNS = {
    "densities": tfft_plane.densities,
    "frontier": tfft_plane.frontier,
    "cost": tfft_plane.cost,
    "starvation": tfft_hard.starvation,
    "digits": tfft_digits.digits,
    "solvers": tfft_solvers.solvers,
}
NAMES = tuple(RUNS)

main = Commands("tfft", __doc__.split("\n")[0], RUNS, tfft_page.write, seeds=3)

if __name__ == "__main__":
    main(sys.argv[1:])
