"""The experiments on molecules, each with one command.

    python experiments/molecules.py NAME [--seeds 1] [--quick]

with NAME one of those in ``MODULES``; or page. All but ``conformers`` and ``priors`` need the
published model that docs/adapters.md describes: put it into ``shared/models`` beside the
repository, or name the folder of models by TILTFLOW_MODELS. Where there is a GPU the full setting
runs, otherwise the small one, about a quarter of an hour for a seed on a quiet core, which says so
on the page. More seeds give errors over trainings.

Results are kept in runs/molecules/*.json, seed by seed and method by method: a killed command goes
on where it was. Every command writes docs/molecules-experiments.md anew from all results there
are, ``page`` only that.
"""

from __future__ import annotations

import sys

import molecules_conformers
import molecules_conformers_priors
import molecules_diversity
import molecules_energy
import molecules_merging
import molecules_pretrained
import molecules_texts as texts
import molecules_validity
from commands import Commands
from pages import Page

MODULES = {
    "pretrained": molecules_pretrained,
    "validity": molecules_validity,
    "energy": molecules_energy,
    "diversity": molecules_diversity,
    "merging": molecules_merging,
    "conformers": molecules_conformers,
    "priors": molecules_conformers_priors,
}
"""Each has ``run(store, seeds, quick)`` and ``section(store)``, a part of the page."""

RUNS = {name: module.run for name, module in MODULES.items()}

PAGE = Page("molecules", "molecules-experiments", texts.HEAD, MODULES)
main = Commands("molecules", __doc__.split("\n")[0], RUNS, PAGE, seeds=1)

if __name__ == "__main__":
    main(sys.argv[1:])
