"""What docs/molecules-experiments.md says between its tables."""

HEAD = """
# Experiments on molecules

A published equivariant diffusion model of QM9 ([EDM](adapters.md), 746,892 parameters, trained by
somebody else) and small conformer flows that this repository trains, steered with the methods of
the three papers. One command each; this page is written by `python experiments/molecules.py NAME`.
Results are kept under `runs/molecules`, so that a killed command goes on.

What is told of molecules is told together, because any one of these numbers is easily raised
alone: shares of stable atoms and molecules by EDM's rule; *valid*, RDKit sanitises it; *valid and
connected*, and it is one piece; distinct SMILES among the valid (which falls with their number);
Vendi, the effective number of different ones by Morgan fingerprints (which grows with it); and the
path KL to the pre-trained model in nats per molecule, zero for the model itself. One seed: ±
standard errors over molecules; several: over seeds.
"""

PRETRAINED = """
The model as it is, by its own sampler: 201 ancestral steps, numbers of atoms by the law of its
training. Fewer steps cost little stability and some validity; training happens with fewer.
"""

ENERGY = """
Reward: minus the GFN2-xTB formation energy per atom (energy less that of the free atoms, without
relaxation) of molecules of 12 atoms, in its spread under the model (of quartiles: one wreck would
set a standard deviation). The last 12 % of the steps are tuned, through learned guidance along the
forces at the predicted molecule. Expected reward against the best fifth (right CVaR at 0.8) by
mirror descent (FDC) in two steps at weight 0.1 of the KL, in one step, which is the price of one
training, and by one training at the best threshold of a bank (TFFT). That threshold is the one of
the optimum over *all* laws, which moves most of the mass to the most stable molecules of the bank:
at weight 0.1 it lies beyond nearly all samples, where `tail_aware` refuses, and the last steps
could not reach it anyway. So TFFT is given the smallest weight that the bank supports, and moves
little. Where only a part of the path is tuned, the current quantile is the better threshold. A
tail's path KL is another than that of expected reward at the same weight: it is compared with
expected reward *at its path KL*, interpolated between weights. Energies in kcal/mol per atom,
higher is more stable; every seed has its own trainings and its own noise, shared by its methods,
so that differences are less uncertain than the rows.
"""

PUBLISHED = """
Published, of FlowMol on QM9, rewards in Hartree per molecule (minus GFN1-xTB total energies with
several numbers of atoms, tail: the best 0.2 %), not comparable in numbers with the above:

| | paper: mean | tail | independent re-run: mean | tail | valid |
|---|---|---|---|---|---|
| pre-trained | 15.4 | 24.2 | 28.6 | 38.7 | 96.4 % |
| expected reward (AM) | 29.1 | 39.7 | 28.4 | 38.1 | 96.4 % |
| FDC | 27.5 | 41.8 | 28.6 | 38.4 | 95.1 % |
| TFFT | | | 28.9 | 39.2 | 94.2 % |

Paper: FDC, arXiv 2511.22640; its pre-trained row is impossible for correctly labelled QM9, whose
mean is 28.6. In the re-run, one run each, neither AM nor FDC beat the pre-trained tail. Total
energies grow with the number of atoms; per atom, at one size, they do not.
"""

VALIDITY = """
Reward: `ValidityGap`, which is zero exactly for molecules that RDKit finds valid and in one piece,
and otherwise says how far bonds have to be stretched, and pieces brought together, for that.
Numbers of atoms by the law of the training. Whether a sample is valid is decided in the last steps
by hundredths of an Angstrom, so that only the last fifth of the steps is tuned, through learned
guidance along the gradient of the same reward with a longer reach, at the predicted molecule: a
gain that depends on time and reward, 1,500 numbers. Expected reward, and for reliability the left
CVaR of the worse half (tail-aware, one training), with a rate a tenth as large: at the same rate
its path KL was larger. Uniqueness and Vendi say that this is no collapse; stable atoms, that bonds
were not merely stretched. How far a training goes depends on its seed as much as on its rate,
because adjoints through this model are heavy-tailed: compare rows by their path KLs, seed by seed
below.
"""

DIVERSITY = """
More different formulas: KL-regularised mirror descent on the log of the Vendi score of the numbers
of carbon, nitrogen and oxygen atoms (`KernelDiversity`, a Gaussian kernel of one atom), in
molecules of 18 atoms. What an atom is, is decided late: the predicted formula says little of that
of the sample before t = 0.8. So the last half of the steps is tuned, through learned guidance in
the span of the gradients of the three counts (`LearnedGuidance` with features), which serves the
different first variation of every step of the descent.
"""

MERGING = """
Molecules of 12 atoms. The *copy* is the model tuned by expected reward for the energy above; the
*twin* the same network after 21 epochs, far worse. An intersection (1 - w) model & w copy is the
geometric mean of their laws, and so the model tilted with w times what the copy was tilted with:
its mean energy should be about (1 - w) times that of the model plus w times that of the copy, an
intermediate energy that is chosen by w. By particles of both models (`FeynmanKac`, whose rows of
0.001 and 0.999 are the parts on the same noise; they are drawn again by their weights, so that
molecules repeat), by averaged velocities, and as one model: a control problem that starts from the
average, whose guidance learns what averaging misses, here next to nothing. Of one seed a mean is
uncertain by the ± of its row, less where rows share their noise. The union of model and twin makes
molecules of both, half of each: stable atoms are the mean of theirs. By `Superposition` of both
models, which is exact, and as one network that a few hundred samples of both were distilled into:
it meets the share of stable atoms, but fewer molecules are valid than of the mixture, because so
few samples cost a network of this size some of what it knew. Path KLs of the twin mean only that
the last, nearly noiseless steps of two networks differ.
"""
