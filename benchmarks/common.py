"""What the benchmarks share: timing, tables, and measures of a tuned model."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from tiltflow.context import Context
from tiltflow.flow import FlowModel
from tiltflow.kernel import EulerMaruyama
from tiltflow.potential import Potential
from tiltflow.problem import ControlProblem, Solution
from tiltflow.sample import Sampler, step_kl
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching

ROOT = Path(__file__).parent
DOCS = ROOT.parent / "docs" / "benchmarks"


@dataclass(frozen=True)
class Settings:
    """How much to do.

    Args:
        seeds: one training each.
        samples: fresh paths or samples behind every measured number.
        quick: a smoke run: short trainings, meaningless numbers, nothing written.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    samples: int = 20_000
    quick: bool = False

    def shortened(self, solver: AdjointMatching) -> AdjointMatching:
        """The solver, or a hundred updates of it."""
        if not self.quick:
            return solver
        return replace(solver, training=replace(solver.training, num_updates=100))


@dataclass
class Page:
    """A Markdown page that is written and printed at the end."""

    name: str
    title: str
    lines: list[str] = field(default_factory=list)

    def text(self, *paragraphs: str) -> None:
        """Paragraphs."""
        for paragraph in paragraphs:
            self.lines += [paragraph, ""]

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is text, the others are numbers."""
        self.lines.append("| " + " | ".join(head) + " |")
        self.lines.append("|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|")
        self.lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]

    def finish(self, settings: Settings, path: Path | None = None) -> None:
        """Print the page; write it, unless this was a smoke run."""
        command = f"python benchmarks/run.py --only {self.name}"
        seeds = ", ".join(map(str, settings.seeds))
        head = [
            f"# {self.title}", "",
            f"Made by `{command}` on {cpu()}, one thread, torch {torch.__version__},",
            f"seeds {seeds}. CPU-seconds are process time; on a busy machine they grow.", "",
        ]  # fmt: skip
        page = "\n".join(head + self.lines).rstrip() + "\n"
        print(page, flush=True)
        if not settings.quick:
            path = path or DOCS / f"{self.name}.md"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(page, encoding="utf-8")


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def timed(work: Callable[[], Solution[FlowModel]]) -> tuple[Solution[FlowModel], float]:
    """A solution and the CPU-seconds that it cost."""
    start = time.process_time()
    return work(), time.process_time() - start


def train(
    model: FlowModel, reward: Potential, solver: AdjointMatching, seed: int
) -> tuple[Solution[FlowModel], float]:
    """One training, with its CPU-seconds (calibration and final statistics included)."""
    problem = ControlProblem(model, reward)
    return timed(lambda: solver.solve(problem, Context(Seed(seed))))


@dataclass(frozen=True)
class Paths:
    """What fresh paths tell about a tuned model.

    Attributes:
        reward: mean reward.
        path_kl: KL of the path laws, tuned from pre-trained.
        gap: log-mean-exp minus mean of reward - log dP/dP_ref: KL(P || P*) of the path laws.
    """

    reward: float
    path_kl: float
    gap: float

    @property
    def objective(self) -> float:
        """Mean reward - path KL."""
        return self.reward - self.path_kl


@torch.no_grad()
def walk(
    tuned: FlowModel,
    reference: FlowModel,
    reward: Potential,
    *,
    num_steps: int,
    count: int,
    sampler: Sampler | None = None,
) -> Paths:
    """Measures of a tuned model on fresh paths of ``EulerMaruyama`` (or of a sampler)."""
    sampler = sampler or Sampler(EulerMaruyama(), num_steps)
    kls, weights, values = [], [], []
    for batch in range(math.ceil(count / 5000)):
        size = min(5000, count - batch * 5000)
        path = sampler.simulate(tuned, size, seed=Seed(77).child(batch))
        kl, ratio = step_kl(tuned, reference, sampler.kernel, path)
        values.append(reward.value(path.end))
        kls.append(kl)
        weights.append(values[-1] - ratio)
    w = torch.cat(weights).double()
    gap = float(w.logsumexp(0) - math.log(len(w)) - w.mean())
    return Paths(float(torch.cat(values).mean()), float(torch.cat(kls).mean()), gap)


def spread(values: Sequence[float], digits: int = 4) -> str:
    """The numbers of all seeds."""
    return " / ".join("" if math.isnan(v) else f"{v:.{digits}f}" for v in values).strip(" /")


def log_normaliser(values: Tensor) -> float:
    """log mean exp of rewards (N,)."""
    return float(values.double().logsumexp(0) - math.log(len(values)))
