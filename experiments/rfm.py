"""The experiments of Reward-Guided Flow Merging, each with one command.

    python experiments/rfm.py NAME [--seeds 3] [--quick]

with NAME one of those in ``MODULES``; or page.

Results are kept in runs/rfm/*.json, seed by seed and method by method: a killed command goes on
where it was. Every command writes docs/rfm.md anew from all results there are, ``page`` only that.
"""

from __future__ import annotations

import sys

import rfm_digits
import rfm_gaussians
import rfm_images
import rfm_lowerings
import rfm_panels
import rfm_texts as texts
import rfm_toy
from commands import Commands
from pages import Page

MODULES = {
    "panels": rfm_panels,
    "toy": rfm_toy,
    "lowerings": rfm_lowerings,
    "gaussians": rfm_gaussians,
    "digits": rfm_digits,
    "images": rfm_images,
}
"""Each has ``run(store, seeds, quick)`` and ``section(store)``, a part of the page."""

RUNS = {name: module.run for name, module in MODULES.items()}
NAMES = tuple(RUNS)

PAGE = Page("rfm", "rfm", texts.HEAD, MODULES)
main = Commands("rfm", __doc__.split("\n")[0], RUNS, PAGE, seeds=3)

if __name__ == "__main__":
    main(sys.argv[1:])
