"""Eight Gaussians on a circle, tilted along x: cost and accuracy of Adjoint Matching."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from common import ROOT, Page, Settings, spread, train, walk

from tiltflow.adapters.checkpoint import load_tensors, save_tensors
from tiltflow.analytic import ring
from tiltflow.context import Context
from tiltflow.delta import MLP
from tiltflow.density import Bank
from tiltflow.errors import CheckpointError
from tiltflow.flow import FlowModel
from tiltflow.kernel import EulerMaruyama
from tiltflow.matching import fit_flow
from tiltflow.rewards.points import Linear as LinearReward
from tiltflow.sample import Sampler, path_kl
from tiltflow.schedule import Linear
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching
from tiltflow.space import Euclidean
from tiltflow.training import Training

REWARD = LinearReward([1.0, 0.0])
DENSITY = ring()
TILTED, LOG_Z = DENSITY.tilted([1.0, 0.0])
FINE = Sampler(EulerMaruyama(), 200)


def pretrained(settings: Settings) -> FlowModel:
    """A velocity network 3-128-128-128-2 fitted to the ring; kept beside this file."""
    torch.manual_seed(0)
    net = MLP((2,), (128, 128, 128))
    model = FlowModel(net, Linear(), Euclidean((2,)), predicts="velocity")
    path = ROOT / ".cache" / "ring_velocity.safetensors"
    try:
        net.load_state_dict(load_tensors(path, net.state_dict()))
        return model
    except CheckpointError:
        pass
    updates = 200 if settings.quick else 8000
    print(f"pre-training the velocity network: {updates} updates ...", flush=True)
    bank = Bank.equal(DENSITY.sample(50_000, Seed(9)).float())
    training = Training(num_updates=updates, learning_rate=2e-3, ema=0.999)
    fit_flow(model, bank, training, Context(Seed(1)), batch_size=1024)
    if not settings.quick:
        save_tensors(path, net.state_dict(), {"made_by": "benchmarks/ring.py"})
    return model


def start(seed: int) -> FlowModel:
    """The exact flow with a fresh correction."""
    torch.manual_seed(seed)
    return DENSITY.flow()


def to_exact(model: FlowModel, settings: Settings) -> float:
    """KL(tuned || exact tilt), by the path identity at 200 steps."""
    exact = TILTED.flow(hidden=())
    return path_kl(model, exact, sampler=FINE, count=settings.samples, seed=Seed(77)).value


def regression(
    model: FlowModel, settings: Settings, seconds: float
) -> tuple[FlowModel, float, float]:
    """Reward-weighted regression: flow matching on reference samples of weight exp(r).

    Returns the model, its CPU-seconds, and the effective fraction of the bank.
    """
    begin = time.process_time()
    points = Sampler().sample(model, 20_000 if not settings.quick else 500, seed=Seed(5))
    bank = Bank(points, torch.softmax(REWARD.value(points).double(), 0))
    updates, tuned = 100, model.clone()
    probe = time.process_time()
    fit_flow(tuned, bank, Training(num_updates=updates, ema=0.99), Context(Seed(2)))
    rate = (time.process_time() - probe) / updates
    if not settings.quick:
        left = seconds - (time.process_time() - begin)
        updates = max(100, int(left / rate))
    tuned = model.clone()
    training = Training(num_updates=updates, learning_rate=2e-3, ema=0.995)
    fit_flow(tuned, bank, training, Context(Seed(3)), batch_size=256)
    return tuned, time.process_time() - begin, bank.effective_size / len(points)


def row(name: str, columns: Mapping[str, list[float]], digits: Mapping[str, int]) -> list[str]:
    """One method, all seeds in each cell."""
    return [name] + [spread(columns[key], digits[key]) for key in columns]


def variants() -> dict[str, AdjointMatching]:
    """The default, and the paper's targets alone."""
    default = AdjointMatching()
    return {
        "default": default,
        "`use_values=False` (the paper's)": replace(default, use_values=False),
    }


def analytic(page: Page, settings: Settings) -> None:
    """The exact flow as the pre-trained model."""
    digits = {"iteration": 3, "seconds": 1, "reward": 3, "kl": 4}
    rows, seconds = [], 0.0
    for name, solver in variants().items():
        columns: dict[str, list[float]] = {key: [] for key in digits}
        for seed in settings.seeds:
            short = settings.shortened(solver)
            out, cost = train(start(seed), REWARD, short, seed)
            rounds = out.stats["num_updates"] / solver.updates_per_rollout
            found = walk(out.model, start(seed), REWARD, num_steps=200, count=settings.samples)
            for key, value in zip(
                digits,
                (cost / rounds, cost, found.reward, to_exact(out.model, settings)),
                strict=True,
            ):
                columns[key].append(value)
            print(name, seed, {k: v[-1] for k, v in columns.items()}, flush=True)
        rows.append(row(name, columns, digits))
        seconds = seconds or sum(columns["seconds"]) / len(settings.seeds)
    columns = {key: [] for key in digits}
    for seed in settings.seeds:
        tuned, cost, _ = regression(start(seed), settings, seconds)
        found = walk(tuned, start(seed), REWARD, num_steps=200, count=settings.samples)
        values = (float("nan"), cost, found.reward, to_exact(tuned, settings))
        for key, value in zip(digits, values, strict=True):
            columns[key].append(value)
    rows.append(row("reward-weighted regression", columns, digits))
    page.text(
        "## The analytic mixture flow as the pre-trained model",
        f"Exact optimum: mean reward {exact_mean():.3f}, KL from the pre-trained "
        f"{exact_mean() - LOG_Z:.3f}. KL(tuned ‖ exact) by the path identity with the exact "
        "tilted mixture's flow, 200 steps of Euler-Maruyama. One number per seed.",
    )
    head = ["method", "CPU-s / iteration", "CPU-s", "mean reward", "KL(tuned ‖ exact)"]
    page.table(head, rows)


def exact_mean() -> float:
    """E r under the exact tilt."""
    return float((TILTED.weights[:, None] * TILTED.means).sum(0)[0])


def trained(page: Page, settings: Settings) -> None:
    """A trained velocity network as the pre-trained model, fine-tuned in full."""
    model = pretrained(settings)
    digits = {"iteration": 3, "seconds": 1, "reward": 3, "kl200": 4, "kl400": 4}
    rows, seconds = [], 0.0

    def measure(tuned: FlowModel) -> tuple[float, float, float]:
        fine, finer = (
            walk(tuned, model, REWARD, num_steps=k, count=settings.samples) for k in (200, 400)
        )
        return fine.reward, fine.gap, finer.gap

    for name, solver in variants().items():
        columns: dict[str, list[float]] = {key: [] for key in digits}
        for seed in settings.seeds:
            out, cost = train(model, REWARD, settings.shortened(solver), seed)
            rounds = out.stats["num_updates"] / solver.updates_per_rollout
            values = (cost / rounds, cost, *measure(out.model))
            for key, value in zip(digits, values, strict=True):
                columns[key].append(value)
            print(name, seed, {k: v[-1] for k, v in columns.items()}, flush=True)
        rows.append(row(name, columns, digits))
        seconds = seconds or sum(columns["seconds"]) / len(settings.seeds)
    columns = {key: [] for key in digits}
    tuned, cost, _ = regression(model, settings, seconds)
    for key, value in zip(digits, (float("nan"), cost, *measure(tuned)), strict=True):
        columns[key].append(value)
    rows.append(row("reward-weighted regression (one seed)", columns, digits))
    floor = [
        walk(TILTED.flow(hidden=()), start(0), REWARD, num_steps=k, count=settings.samples)
        for k in (200, 400)
    ]
    rows.append([
        "exact tilt of the analytic flow (the measure's own floor)", "", "",
        f"{floor[0].reward:.3f}", f"{floor[0].gap:.4f}", f"{floor[1].gap:.4f}",
    ])  # fmt: skip
    ends = FINE.sample(model, settings.samples, seed=Seed(3))
    weights = torch.softmax(REWARD.value(ends).double(), 0)
    best = float((weights * REWARD.value(ends)).sum())
    page.text(
        "## A trained velocity network (3-128-128-128-2) as the pre-trained model",
        f"Its exact optimum, from {settings.samples} weighted samples, has mean reward "
        f"{best:.3f}. KL(P ‖ P*) of the path laws at 200 and 400 steps of Euler-Maruyama: "
        "log-mean-exp minus mean of reward - log dP/dP_pre along fresh paths. It contains the "
        "discretisation of the measuring chain, which the last row shows for an exact solution.",
    )
    head = [
        "method", "CPU-s / iteration", "CPU-s", "mean reward", "KL(P ‖ P*), 200 steps",
        "400 steps",
    ]  # fmt: skip
    page.table(head, rows)


def main(settings: Settings) -> None:
    """Write docs/benchmarks/ring.md."""
    page = Page("ring", "Eight Gaussians on a circle, reward x1")
    page.text(
        "Standard deviation 0.25, radius 2, KL weight 1. `default` is `AdjointMatching()`: "
        "256 trajectories of 40 steps and 20 updates of 256 points per iteration."
    )
    analytic(page, settings)
    trained(page, settings)
    page.finish(settings)
