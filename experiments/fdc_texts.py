"""What docs/fdc.md says between its tables; measured numbers are put in by ``fdc_page.py``."""

HEAD = """
# The experiments in the plane of Flow Density Control

Five experiments of arXiv 2511.22640, one command each. Their fields were published as pictures
only; ours have the described shapes ([formulas](../src/tiltflow/rewards/fields.py)), so that the
published numbers stand beside ours for orientation, not for comparison digit by digit. Every
problem is also solved exactly on a grid.

This page is written by `python experiments/fdc.py NAME`. Results are kept under `runs/fdc` by
method and seed, so that a killed command goes on. Numbers over seeds: mean ± standard error
(median). Published ones: mean ± standard deviation of five seeds. Tail means are of 200 000 fresh
samples of each tuned model.
"""

RISK = """
Run file: [`fdc_risk.toml`](../experiments/fdc_risk.toml). Maximises LeftCVaR(-cost, 0.01) less
25 KL. Samples start on a plateau of high cost; on the left is a moderate cost of 90, on the right
a lower one, cut by narrow stripes of disaster. The table has costs: lower is better.

- *mean*: Adjoint Matching on the mean cost, with the same weight of the KL and with a smaller one.
  It goes to the right, and its network cannot resolve the stripes: cheaper on average, worse in
  the worst 1 %. The exact tilt is not blurred and avoids the stripes too; at the same weight, or
  at the same KL as the optimum, its worst 1 % are bad because the plateau is not left altogether.
- *FDC in steps*: as published: one training per step, each from the last model, gradients only,
  learning rate 2e-2, no KL, 1000 updates; eta = 1. An exact step (the column beside) removes about
  the worst 1 % of the samples, because the hinge is flat for all others, so that two steps cannot
  lead from the plateau to the safe side. See the ablation for how training can jump there. A
  training in which no sample feels the tail ends the steps; later rows then repeat its model.
- *FDC planned*: the run file: the same mirror descent on samples, a hundred steps and more without
  training, then one fine-tuning. The optimum puts a third of the samples between the stripes; the
  network does not find the gaps, and stays on the safe side altogether: the tail is as good, the
  KL larger than it need be.
"""

NOVELTY = """
Run file: [`fdc_novelty.toml`](../experiments/fdc_novelty.toml). Maximises RightCVaR(r, 0.99) less
6000 KL. Samples start where the reward is medium; it is a little higher on the left, low on the
right, with two sparse spikes of 600 there. Higher is better. Our spikes are broader than the
published picture suggests (one pre-trained sample in 300 sees one; the pre-trained tail mean is
higher than the published one): enriching much rarer spikes a hundredfold is noise for a network
of this size, with every solver here.

- *mean*: Adjoint Matching on the mean reward with the same weight of the KL, and with a small one.
  The exact tilt with the same weight stays where it is. With a small weight, or at the KL of the
  optimum, the exact tilt does go to the spikes: on this field nothing but the training keeps the
  mean reward from them. Trained with the small weight it depends on the seed: some see a spike
  early and move there altogether, others go left and lose the tail that they had, as published.
- *FDC in steps*: one training per step, each from the pre-trained model for the sum of all steps,
  rate a quarter of 1 / weight, 1000 updates.
- *FDC planned*: the run file.
"""

TAILS = {"risk": RISK, "novelty": NOVELTY}

TRANSPORT = """
Run files: [`fdc_wasserstein_a.toml`](../experiments/fdc_wasserstein_a.toml) and
[`_b.toml`](../experiments/fdc_wasserstein_b.toml). Reward |x|, less 0.1 W1 in the ground metric
d_A = |diag(1, 7) (x - y)| or d_B = |diag(7, 1) (x - y)|, less 0.7 KL; N((20.9, 20.9), 2.9^2). W1
is exact discrete transport between 2000 fresh samples of each side; the row *pre-trained* is what
two independent samples are apart, the floor of this measure. The exact rows are mirror descent on
a grid of 34 x 34 nodes. *mean* is the reward alone with the published weight 1.538.

Published: E r 29.5 before, 35.08 ± 0.04 for the mean, 35.38 ± 0.04 for FDC in d_A; W1 in d_A 4.68
and 1.92, from a trained critic; shift right over shift up 100 % and 288 ± 15 %. These values of W1
cannot be exact: the published shifts alone cost more in d_A than that.
"""

EXPLORE = """
Run file: [`fdc_exploration.toml`](../experiments/fdc_exploration.toml): two Gaussians, five steps
of rate 0.2 (eta = 5), 400 updates each. Exact mirror descent gives powers of the pre-trained law,
p_k ~ p_pre^e_k with e_{k+1} = (1 - (1 + alpha) / eta) e_k + alpha / eta, whose limit is
alpha / (1 + alpha). For alpha = 0 there is no maximiser on the plane: stopped after five steps.
Entropies in nats, by likelihoods of the flow's ODE on 8192 samples of the stochastic sampler; the
solver sees scores only. In the first step all alphas are the same, because the KL has no slope at
the start.

Published (K = 50, eta = 10, another law, histogram entropy): 6.78 before, 7.00 for alpha = 0.5,
7.14 for alpha = 0; exact steps would have gone to e = 0.334 and 0.005, much further.
"""

ABLATION = """
The risk-averse problem in steps as published (see there), cost of the worst 1 %. The exact rows
are the same steps on the grid.

An exact step gains a few units. Trained steps come near that, or go beyond it by errors of the
training; these add up, because each step starts from the last model and nothing anchors it: the
tail may rise again, as in the published row, or samples may be thrown away altogether. With N =
100 and eta = 1 the training is cut short in its first, large movements; most seeds throw all
samples to the left sooner or later, where the cost is 90 everywhere: that is 90, as published, but
not by solving the step. The last column says where the samples are (mean of x1; -1.4 for the safe
side of the pre-trained law).

Published (1000 samples): N = 1000, eta = 20, K = 0..6: 254, 241, 167, 289, 271, 85, 97; eta = 10,
K = 0..2: 254, 249, 90; N = 100, eta = 10, K = 0..5: 254, 221, 195, 90, 91, 90.
"""
