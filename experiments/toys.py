"""What the experiments in the plane share: exact laws on grids, measures, results on disk."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.analytic import GaussianMixture
from tiltflow.density import Quadrature
from tiltflow.experiment import Plan, load, prepare
from tiltflow.flow import FlowModel
from tiltflow.potential import Hinge, Potential
from tiltflow.sample import Sampler
from tiltflow.seed import Seed

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

MODELS = Path(os.environ.get("TILTFLOW_MODELS", ROOT.parent / "shared" / "models"))
"""One folder per published model: they are too large for the repository."""

Record = dict[str, Any]
"""Measured numbers of one model, as JSON holds them."""


@dataclass
class Store:
    """Results of an experiment by method and seed, in a JSON file: what is there is not redone.

    Args:
        path: the file; delete it to start again.
    """

    path: Path
    known: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.known = json.loads(self.path.read_text(encoding="utf-8"))

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The result under a key, made and saved if it is missing, with its CPU-seconds."""
        if key not in self.known:
            start = time.process_time()
            made = make()
            self.known[key] = {"result": made, "seconds": time.process_time() - start}
            print(f"{key}: {json.dumps(self.known[key])[:300]}", flush=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.known), encoding="utf-8")
            part.replace(self.path)
        return self.known[key]["result"]

    def seconds(self, prefix: str = "") -> float:
        """CPU-seconds of all results whose key starts so."""
        return sum(v["seconds"] for k, v in self.known.items() if k.startswith(prefix))


def planned(name: str, *assignments: str) -> Plan:
    """A run file of this directory with overrides, its models loaded."""
    return prepare(load(HERE / f"{name}.toml", assignments))


def weight_of(plan: Plan, kind: str = "KL") -> float:
    """Weight of the divergence of that kind in a run file's objective."""
    table = plan.resolved["objective"]["divergences"]
    (weight,) = [each["weight"] for each in table if each["kind"] == kind]
    return float(weight)


# --- exact ---------------------------------------------------------------------------------------


def law_on_grid(plan: Plan, axes: Sequence[Tensor]) -> Quadrature:
    """The pre-trained law of a run file (a Gaussian or a mixture) on a grid."""
    given = plan.resolved["models"]["pretrained"]
    means = given["means"] if "means" in given else [given["mean"]]
    stds = torch.as_tensor(given.get("stds", given.get("std", 1.0)), dtype=torch.float64)
    mixture = GaussianMixture(means, stds, given.get("weights"))
    return Quadrature.of(list(axes), mixture.log)


def tail_mean(values: Tensor, mass: float, side: str, weights: Tensor | None = None) -> float:
    """Mean of the lowest (``side = "below"``) or highest ``mass`` of weighted values (N,)."""
    order = values.argsort(descending=side == "above")
    v = values[order].double()
    p = torch.full_like(v, 1 / len(v)) if weights is None else weights[order].double()
    before = p.cumsum(0) - p
    part = torch.minimum(p, (mass - before).clamp(min=0))
    return float((part * v).sum() / part.sum())


@dataclass(frozen=True)
class Exact:
    """A law on a grid with its objective.

    Attributes:
        p: the law.
        objective: tail mean - weight * KL.
        threshold: of the tail, y.
    """

    p: Quadrature
    objective: float
    threshold: float


def kl(p: Quadrature, q: Quadrature) -> float:
    """KL(p || q) of two laws on one grid."""
    return float((p.probabilities * (p.table - q.table).flatten()).sum())


def best_tail(
    q: Quadrature, reward: Potential, mass: float, side: str, weight: float, nodes: int = 400
) -> Exact:
    """The optimum of a CVaR less weight * KL(q), over all laws on the grid.

    At the threshold y the best law is the tilt by its hinge / weight, worth
    y + weight log E_q exp(hinge / weight). LeftCVaR: the best over y, scanned, because it may
    have several local optima. RightCVaR: the least over y (duality; the objective is concave).
    """
    v = reward.value(q.nodes).double()
    log_q = q.probabilities.log()
    sign = 1.0 if side == "above" else -1.0

    def worth(y: float) -> float:
        hinge = sign * (sign * (v - y)).clamp(min=0) / mass
        return y + weight * float((log_q + hinge / weight).logsumexp(0))

    low, high = float(v.min()), float(v.max())
    for _ in range(4):
        ys = torch.linspace(low, high, nodes).tolist()
        worths = torch.tensor([worth(y) for y in ys])
        best = int(worths.argmin() if side == "above" else worths.argmax())
        low, high = ys[max(best - 1, 0)], ys[min(best + 1, nodes - 1)]
        nodes = 20
    y = ys[best]
    hinge = Hinge(reward, y, 1 / mass, "above" if side == "above" else "below")
    return Exact(q.tilted((1 / weight) * hinge), worth(y), y)


# --- measured ------------------------------------------------------------------------------------


def samples(model: FlowModel, count: int, seed: int) -> Tensor:
    """Fresh samples that no training has seen, (count, 2)."""
    return Sampler().sample(model, count, seed=Seed(seed).child("fresh"))


def regions(x: Tensor, weights: Tensor | None = None) -> Record:
    """Probability of the left (x1 < -0.5) and of the right (x1 > 1.4), and the mean of x1."""
    w = torch.full((len(x),), 1 / len(x)).to(x) if weights is None else weights
    left, right = w[x[:, 0] < -0.5].sum(), w[x[:, 0] > 1.4].sum()
    return {"left": float(left), "right": float(right), "x1": float((w * x[:, 0]).sum())}


def measured(x: Tensor, reward: Potential, mass: float, side: str) -> Record:
    """Mean reward and tail mean of samples (N, 2)."""
    v = reward.value(x)
    return {"mean": float(v.mean()), "tail": tail_mean(v, mass, side), **regions(x)}


def on_grid(p: Quadrature, start: Quadrature, reward: Potential, mass: float, side: str) -> Record:
    """The same of a law on a grid, exactly."""
    v, w = reward.value(p.nodes), p.probabilities
    return {
        "mean": float((w * v).sum()), "tail": tail_mean(v, mass, side, w),
        "kl": kl(p, start), **regions(p.nodes, w),
    }  # fmt: skip


# --- pages ---------------------------------------------------------------------------------------


def of_seeds(store: Store, prefix: str) -> list[Any]:
    """Results of a method, seed by seed."""
    found: list[tuple[int, Any]] = []
    for key, entry in store.known.items():
        head, _, seed = key.rpartition("/")
        if head == prefix and seed.isdigit():
            found.append((int(seed), entry["result"]))
    return [record for _, record in sorted(found, key=lambda pair: pair[0])]


def mean_of(values: Sequence[float], digits: int = 1, scale: float = 1.0) -> str:
    """``mean ± standard error`` over seeds; nothing where there is none yet."""
    values = [scale * v for v in values]
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else ""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}"


def summary(values: Sequence[float], digits: int = 1) -> str:
    """``mean_of`` with the median in parentheses."""
    middle = f" ({statistics.median(values):.{digits}f})" if len(values) > 1 else ""
    return mean_of(values, digits) + middle


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|")
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def columns(records: Sequence[Mapping[str, Any]], *keys: str, digits: int = 1) -> Iterator[str]:
    """A summary of each key over the records of all seeds."""
    for key in keys:
        yield summary([float(record[key]) for record in records], digits)
