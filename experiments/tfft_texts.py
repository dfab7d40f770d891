"""What docs/tfft.md says between its tables; numbers are put in by ``tfft_tables.py``."""

HEAD = """
# The experiments of Tail-aware Flow Fine-Tuning

Experiments on [tail-aware fine-tuning](tail-aware.md) (arXiv 2602.16796), one command each. The
paper's own settings and tables were not available; these are ours. Wherever the pre-trained law is
known, the problem is also solved exactly on a grid.

This page is written by `python experiments/tfft.py NAME`. Results are kept under `runs/tfft` by
method and seed, so that a killed command goes on. Numbers: mean ± standard error over seeds; with
one seed, ± is the error of the measurement, without the spread between trainings. G is the tail
mean less weight times KL, in units of the reward; gap is (G* - G) / (G* - G before). "Five
Gaussians" is the fitted network of [the benchmarks](benchmarks/utilities.md), with r = 0.618 x +
y, of standard deviation 1.5. Unless said otherwise G, tail mean and KL are of 5000 samples of the
tuned model's ODE, with log-densities by `Likelihood`; evaluations are points times forward passes
of networks.
"""

COST = """
Five Gaussians, `AdjointMatching` with its defaults (4000 updates). All evaluations of
`tail_aware` (a bank of 10,000 samples, roll-outs, updates, statistics of the tuned model) over
those of one fine-tuning for the mean reward by the same solver, seed by seed. *Active*: part of
the pre-trained samples beyond the threshold, which alone have a gradient. Where they are few, the
solver simulates more roll-outs than it keeps (`oversample`); that is what the right tails cost.
CPU-seconds are process time on a busy machine.
"""

DENSITIES = """
One `tail_aware` with the default `AdjointMatching` (4000 updates), but 80 time steps: a hinge is
steep, and 40, as elsewhere on this page, smear it out. On the line the pre-trained model is the
exact flow of N(0, 1) or of three Gaussians (at -2, 0.5 and 2.5, masses 0.35, 0.4 and 0.25), with r
= x; "the plane" is the network of the five Gaussians. *Gap of the bank* and *TV of the bank* are
what the law that was asked for loses, the exact tilt at the threshold that 10,000 samples gave;
the rest is the training and its sampling. Tail masses are of 50 000 fresh samples of each sampler,
beyond the threshold that was found; TV is the total variation between the density of the tuned
model's ODE and the optimum.
"""

FRONTIER = """
Five Gaussians, left tail at level 0.1 and right tail at 0.9. All methods make 2000 updates of the
default `AdjointMatching`. *FDC, K* is `mirror_descent` in its anchored form, whose K trainings
share the updates, with the constant rate after whose exact steps on the grid least is missing
(*exact steps*: what is missing then; rates up to 1 / weight; the best is not known in practice).
What steps miss beyond that is their training's: each has a K-th of the updates, and the hinge at
the current quantile is felt by few samples. Roll-outs are simulated for those, and every step has
banks of its own, so that equal updates are not equal evaluations. *Mean reward* is tuned
with the same weight; it is judged here by an objective that it does not have, so look at its place
below the curve in the picture too. Lines are the exact optima for all weights.
"""

STARVATION = """
N(0, 1), r = x, right tail at level 0.9, weight 1: the optimum is 4.7 nats away, more than half of
the 9.2 that 10,000 samples can tell. 1000 updates in each training, six trainings at most.
`anyway=True` trains for the threshold of the bank, such as it is. With `max_rounds=6` milder
problems come first, `ease` says which: a larger weight, a wider tail (the default), or a rounded
hinge. `AdjointMatching` where no solver is named. P(r > y*) is beyond the exact threshold. At the
optimum a tenth of the samples is at 10, apart from the rest at 0: right thresholds are not
enough, the training has to put the right mass on each side.
"""

DIGITS = """
The shipped [digit flow](digits.md) with a learned guidance, solver settings of
[`digits_reliability.toml`](../experiments/digits_reliability.toml) (no path values, learning rate
3e-3; `WeightedMatching` likewise, on two banks), 400 updates for each method in all. Rewards at
temperature 2, where means and tails differ.

*Left tail of readability*: level 0.1, weight one standard deviation of the reward. *Right tail of
the rarest class*: log-probability of the class that the flow draws least, level 0.9, weight half a
standard deviation. The mean reward is trained up to three times, until its path KL is within 7 %
of that of the tail's model; its evaluations count all of them. *Judge*: the same reward by a
classifier that no training sees. *Least share ratio*: the smallest share of a class over its
pre-trained share. Path KL is that of the training sampler, an upper bound of the KL. A guidance
learns one gain for a direction, so that the path KL of a tuned model may be far from the KL that
was asked for. FDC in steps begins with the hinge at the quantile of the pre-trained model, which
a tenth of the roll-outs feel, more than the hinge at the optimal threshold of a right tail.
"""

SOLVERS = """
Five Gaussians; `tail_aware` with either solver's defaults but for the number of updates, hence
with the same threshold for the same seed. On the digits, the left tail of readability of the
section above with its settings.
"""
