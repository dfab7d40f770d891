"""What docs/rfm.md says between its tables; numbers are put in by the experiments."""

HEAD = """
# The experiments of Reward-Guided Flow Merging

Experiments on [merging](merging.md) (arXiv 2602.08012), one command each. The paper's own settings
and tables were not available; these are ours.

This page is written by `python experiments/rfm.py NAME`. Results are kept under `runs/rfm` by
method and seed, so that a killed command goes on. Numbers: mean ± standard error over seeds. TV is
total variation. CPU-minutes are without the training of the given models.
"""

PANELS = """
Four densities in the plane, drawn as contours in the picture: two arcs a and b that cross, an
affine image c of a, and three blobs d. The pre-trained models are velocity networks of three
layers of 128, fitted to 100,000 exact samples of each for 20,000 updates. They are given, and so
the same for all seeds. `merge` makes one network of the same shape, which starts from a's; every
regression in it has a bank of 20,000 samples and 2000 updates, every control problem 1000 updates
(the defaults are 8000 and 4000), densities of parts have 30 steps, transport with a reward has two
rounds. `one_shot` is refitted afterwards, by default.

*Direct*: the same network from a random start, fitted with the very settings of `merge`'s own
regressions to a bank of 20,000 exact samples of the optimum; it never sees the given models.
*Again*: likewise, but from a's network, where the merged ones start, so that only the banks
differ; this is the harder comparison, because the given models are themselves not exact. The
requirement is a mean TV of at most 1.5 times that of *direct*.

TV is between the density of a model's ODE (`Likelihood`, on 91 x 91 nodes) and the optimum. Energy
distances are of 2000 ODE samples to 4000 exact ones, unbiased: zero on average where the laws are
equal, and of either sign. Samples of the SDE (20,000, 40 steps) are counted in squares of
side 0.3; the second table says what such counting shows where nothing is wrong. It also has the
exact gate, on the grid, of the densities of the given models: what is lost before `merge` begins.

Optima on the grid are `gate.exact`, gate by gate. Barycentres in the plane are known in closed
form because c is the law of S x + m under a, with S diagonal and positive: the optimal map from a
is x -> S x + m, and the barycentre is a's image under the averaged map. With the reward
f = -sum_d h_d (z_d - c_d)^2 / 2 each point y of it moves to argmax f(z) - A |z - y|^2, which is
affine again; see `rfm_plane.moved` for why this is the optimum.
"""

TOY = """
Two trained networks (three layers of 64, 5000 updates), each of a density with two equal modes;
their union has four, a quarter each. *Merged* is one network of the same size, distilled by
`merge`. `Superposition` moves every sample with both networks at each step, by the posterior of
which one it belongs to; `mean=True` with the averaged velocity, as SuperDiff does. All sample by
40 steps of the SDE, 20,000 samples, which are counted by the nearest mode. Modes were made with
standard deviation 0.4. Evaluations are of networks, for one sample; those of the training of the
merged model are made once.
"""

GAUSSIANS = """
Exact models with a small correction network to train (float32); 1000 updates of a control problem,
the defaults otherwise. 20,000 samples, by the SDE (Euler) and the ODE (Heun) in 200 steps, and by
the training's SDE in 40. At t = 0.995 the exact law is noised likewise. `averaging` is the average
of velocities, which trains nothing and is not the geometric mean.
"""
