"""Log-densities, ratios and critics on laws whose answers are known: bias, spread, cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from common import Page, Settings, spread
from torch import Tensor

from tiltflow.analytic import GaussianMixture, gaussian, ring
from tiltflow.density import Bank, Density, Empirical, FlowDensity, Reweighted
from tiltflow.divergences import KL
from tiltflow.kernel import EulerMaruyama
from tiltflow.potential import Differentiable
from tiltflow.ratio import (
    ExactRatio,
    Likelihood,
    LogisticRatio,
    PathRatio,
    RatioEstimator,
    WassersteinCritic,
    path_log_density,
)
from tiltflow.sample import Sampler, calibrated
from tiltflow.seed import Seed
from tiltflow.training import Training


@dataclass(frozen=True)
class Pair:
    """Two laws with known densities: p, and the prior q."""

    name: str
    p: GaussianMixture
    q: GaussianMixture

    def exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log p/q and its gradient."""
        x = x.double()
        return self.p.log.value(x) - self.q.log.value(x), self.p.log.grad(x) - self.q.log.grad(x)


TEN = [0.8 + 0.05 * i for i in range(10)]
PAIRS = (
    Pair("Gaussians, 2-D", gaussian([0.8, -0.5], [0.8, 1.1]), gaussian([0.0, 0.0])),
    Pair("Gaussians, 10-D", gaussian([0.3] * 10, TEN), gaussian([0.0] * 10)),
    Pair("ring tilted by x1, ring", ring().tilted([1.0, 0.0])[0], ring()),
)


def cell(error: Tensor) -> str:
    """Mean and standard deviation of errors, in nats."""
    return f"{float(error.mean()):+.4f} ({float(error.std()):.4f})"


# ------------------------------------------------------------------------------- log-densities


def densities(page: Page, settings: Settings) -> None:
    """log p of exact flow models, by their ODE and along paths."""
    count = 500 if settings.quick else 4000
    rows = []
    for steps in (10, 20, 40, 100):
        rows.append(_ode(f"`Likelihood`, {steps} steps", count, num_steps=steps))
    for probes in (1, 8):
        name = f"`Likelihood`, 40 steps, Hutchinson, {probes} probe{'s' * (probes > 1)}"
        rows.append(_ode(name, count, num_steps=40, trace="hutchinson", probes=probes))
    for steps in (40, 100, 250):
        rows.append(_along(f"`path_log_density`, {steps} steps", count, steps, calibrate=True))
    for steps in (40, 250):
        name = f"the same on `EulerMaruyama`, {steps} steps"
        rows.append(_along(name, count, steps, calibrate=False))
    page.text(
        "## Log-densities of a flow model",
        "Exact flow models of p (`GaussianMixture.flow()`). Mean error of log p in nats (standard "
        f"deviation over {count} samples), and seconds for 1000 samples, summed over the three "
        "laws. `Likelihood` is judged at exact samples; `path_log_density` at its own, where the "
        "mean error is the excess over E log p, never negative but for noise.",
    )
    page.table(["method", *(pair.name for pair in PAIRS), "seconds"], rows)
    page.text(
        "`Likelihood` errs by the square of the step, `path_log_density` on a calibrated kernel "
        "by the step: its samples must be drawn by a kernel whose variances are those of the "
        "reverse, calibrated at the same number of steps. On the uniform grid of Euler-Maruyama "
        "the first and last steps have up to twice that variance, whatever the step: 0.41 nats "
        "per dimension stay for ever. Hutchinson's errors are independent between samples, so "
        "that means over a bank forgive them; single values do not. (On the Gaussians, whose "
        "axes are those of the signs, it has none.)"
    )


def _ode(name: str, count: int, **arguments: object) -> list[str]:
    cells, seconds = [], 0.0
    for pair in PAIRS:
        x = pair.p.sample(count, Seed(1)).float()
        start = time.process_time()
        log = Likelihood(pair.p.flow(hidden=()), **arguments)  # type: ignore[arg-type]
        error = log.value(x).double() - pair.p.log.value(x.double())
        seconds += (time.process_time() - start) * 1000 / count
        cells.append(cell(error))
    return [name, *cells, f"{seconds:.2f}"]


def _along(name: str, count: int, steps: int, *, calibrate: bool) -> list[str]:
    cells, seconds = [], 0.0
    for pair in PAIRS:
        model, sampler = pair.p.flow(hidden=()), Sampler(EulerMaruyama(), steps)
        if calibrate:
            model = calibrated(model, seed=Seed(0), num_steps=steps, count=4096)
            sampler = Sampler(num_steps=steps)
        start = time.process_time()
        points, logs = path_log_density(model, sampler, count, Seed(1))
        seconds += (time.process_time() - start) * 1000 / count
        cells.append(cell(logs - pair.p.log.value(points.double())))
    return [name, *cells, f"{seconds:.2f}"]


# --------------------------------------------------------------------------------------- ratios

Known = Callable[[Pair, int], tuple[Density, Density]]


def _analytic(pair: Pair, seed: int) -> tuple[Density, Density]:
    return pair.p, pair.q


def _tracked(pair: Pair, seed: int) -> tuple[Density, Density]:
    """log p = log q + psi with psi = log p/q + 3, on 10 000 samples of q."""
    q = Reweighted(Bank.equal(pair.q.sample(10_000, Seed(seed))), pair.q.log)
    psi = Differentiable(lambda x: pair.p.log._value(x, None) - pair.q.log._value(x, None) + 3)
    return Reweighted(Bank.equal(pair.p.sample(100, Seed(seed))), q.log + psi), q


def _flows(pair: Pair, seed: int) -> tuple[Density, Density]:
    return FlowDensity(pair.p.flow(hidden=())), FlowDensity(pair.q.flow(hidden=()))


def _samples(count: int) -> Known:
    def of(pair: Pair, seed: int) -> tuple[Density, Density]:
        p, q = (
            Empirical(law.sample(count, Seed(seed).child(i)))
            for i, law in enumerate((pair.p, pair.q))
        )
        return p, q

    return of


def ratios(page: Page, settings: Settings) -> None:
    """T = log p/q and its gradient, at fresh samples of p."""
    methods: dict[str, tuple[RatioEstimator, Known]] = {
        "`ExactRatio`, analytic logs": (ExactRatio(), _analytic),
        "`ExactRatio`, tracked up to a constant": (ExactRatio(), _tracked),
        "`PathRatio`, 40 steps": (PathRatio(), _flows),
        "`LogisticRatio`, 1000 + 1000 samples": (LogisticRatio(), _samples(1000)),
        "`LogisticRatio`, 10 000 + 10 000 samples": (LogisticRatio(), _samples(10_000)),
    }
    page.text(
        "## Ratios",
        "T = log p/q at fresh samples of p: bias of the mean of T, which is KL(p ‖ q), per seed; "
        "root mean square error of T; relative error of its gradient, E|g - grad T|^2 / E|grad "
        "T|^2 under the root. Means over seeds but for the bias.",
    )
    for pair in PAIRS:
        rows = [
            _ratio_row(name, estimator, known, pair, settings)
            for name, (estimator, known) in methods.items()
        ]
        rows.append(_path_kl_row(pair, settings))
        exact = float(pair.exact(pair.p.sample(200_000, Seed(3)))[0].mean())
        page.text(f"### {pair.name}: KL = {exact:.3f}")
        page.table(["method", "bias of KL", "error of T", "error of gradient", "seconds"], rows)
    page.text(
        "The bias of the tracked ratio is the sampling error of its normaliser, one number that "
        "the standard errors of the divergences contain. Gradients of `PathRatio` are scores at t "
        "= 0.99. The learned ratio is usable for values from ten thousand samples on; its "
        "gradient is the weaker part, and in ten dimensions good to a fifth."
    )


def _ratio_row(
    name: str, estimator: RatioEstimator, known: Known, pair: Pair, settings: Settings
) -> list[str]:
    x = pair.p.sample(500 if settings.quick else 4000, Seed(77))
    exact, slopes = pair.exact(x)
    bias, rms, grad, seconds = [], [], [], []
    for seed in settings.seeds:
        start = time.process_time()
        used = estimator
        if isinstance(used, LogisticRatio):
            used = replace(used, seed=Seed(seed))
            if settings.quick:
                used = replace(used, training=Training(num_updates=50))
        t = used.log_ratio(*known(pair, seed))
        values, gradients = t.value_and_grad(x)
        seconds.append(time.process_time() - start)
        bias.append(float((values - exact).mean()))
        rms.append(float((values - exact).square().mean().sqrt()))
        error = (gradients - slopes).square().sum() / slopes.square().sum()
        grad.append(float(error.sqrt()))
    n = len(settings.seeds)
    return [
        name, spread(bias), f"{sum(rms) / n:.3f}", f"{sum(grad) / n:.3f}",
        f"{sum(seconds) / n:.1f}",
    ]  # fmt: skip


def _path_kl_row(pair: Pair, settings: Settings) -> list[str]:
    """The path KL of two flows: no ratio, but a value of KL without one."""
    count = 500 if settings.quick else 4000
    exact = float(pair.exact(pair.p.sample(200_000, Seed(3)))[0].mean())
    q, bias, start = FlowDensity(pair.q.flow(hidden=())), [], time.process_time()
    for seed in settings.seeds:
        p = FlowDensity(
            pair.p.flow(hidden=()), num_samples=count, seed=Seed(seed),
            sampler=Sampler(EulerMaruyama(), 100),
        )  # fmt: skip
        bias.append(KL(q).value(p).value - exact)
    seconds = (time.process_time() - start) / len(settings.seeds)
    return ["path KL of the flows, 100 steps", spread(bias), "", "", f"{seconds:.1f}"]


# -------------------------------------------------------------------------------------- critics


def critics(page: Page, settings: Settings) -> None:
    """W_1 of a translation is its length, and the potential's gradient its direction."""
    shift = torch.tensor([1.5, 0.5], dtype=torch.float64)
    cases: list[tuple[str, GaussianMixture, Tensor, tuple[float, ...] | None]] = [
        ("ring by (1.5, 0.5)", ring(), shift, None),
        ("the same, metric diag(1, 7)", ring(), shift, (1.0, 7.0)),
        ("ring by (0.3, 0.1)", ring(), 0.2 * shift, None),
        ("N(0, I) in 10-D by 0.3 in each", gaussian([0.0] * 10), torch.full((10,), 0.3).double(),
         None),
    ]  # fmt: skip
    rows = [_critic_row(*case, settings) for case in cases]
    page.text(
        "## `WassersteinCritic`",
        "Trained once on 5000 samples of each side, 500 updates. W_1 from fresh samples, per "
        "seed; root mean square slope under the metric (1 is right); error of the gradient under "
        "the metric, whose right length is 1.",
    )
    page.table(["translation", "exact W_1", "W_1", "slope", "error of gradient", "seconds"], rows)
    page.text(
        "Good to a few per cent where discrete transport, which is exact, cannot be afforded; "
        "see [transport](transport.md)."
    )


def _critic_row(
    name: str, q: GaussianMixture, shift: Tensor, metric: tuple[float, ...] | None,
    settings: Settings,
) -> list[str]:  # fmt: skip
    scale = torch.ones_like(shift) if metric is None else shift.new_tensor(metric)
    exact = float((scale * shift).norm())
    p = GaussianMixture(q.means + shift, q.stds)
    values, slopes, errors, start = [], [], [], time.process_time()
    for seed in settings.seeds:
        critic = WassersteinCritic(metric=metric, seed=Seed(seed))
        if settings.quick:
            critic = replace(critic, training=Training(num_updates=50))
        phi = critic.fit(*_samples(5000)(Pair("", p, q), seed))
        x, y = p.sample(20_000, Seed(3)), q.sample(20_000, Seed(4))
        # The same noise on both sides: fresh means without their own error.
        y = torch.cat([y, x - shift])
        x = torch.cat([x, y[: len(x)] + shift])
        values.append(float(phi.value(x).mean() - phi.value(y).mean()))
        slope = phi.grad(x) / scale
        slopes.append(float(slope.square().sum(1).mean().sqrt()))
        offset = slope - scale * shift / exact
        errors.append(float(offset.square().sum(1).mean().sqrt()))
    n = len(settings.seeds)
    seconds = (time.process_time() - start) / n
    return [
        name, f"{exact:.3f}", spread(values, 3), f"{sum(slopes) / n:.3f}",
        f"{sum(errors) / n:.3f}", f"{seconds:.1f}",
    ]  # fmt: skip


def main(settings: Settings) -> None:
    """Write docs/benchmarks/ratios.md."""
    page = Page("ratios", "Density ratios, likelihoods and critics")
    page.text(
        "Which one when. **`ExactRatio`, the default, wherever both logs are known or their "
        "difference is tracked**: it has no error, or that of one normaliser. **`PathRatio` "
        "(`Likelihood`) for flow models that were not tracked**, in dimensions whose trace can be "
        "afforded; with Hutchinson's trace for means over banks in many dimensions. "
        "**`LogisticRatio` only where a law is known by samples alone.** `path_log_density` gives "
        "an entropy bound for the price of sampling. The divergences themselves: "
        "[divergences](../divergences.md)."
    )
    densities(page, settings)
    ratios(page, settings)
    critics(page, settings)
    page.finish(settings)
