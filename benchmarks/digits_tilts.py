"""What any solver can reach on the digits: exact tilts of 20,000 samples, and a picture.

Run: ``python benchmarks/digits_tilts.py [--picture docs/images/digits_pretrained.png]``. Prints
the table of docs/digits.md: E[r] against CVaR at equal KL.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tiltflow.adapters.digits import CLASSES, SIDE, load_digits_flow
from tiltflow.metrics import left_cvar
from tiltflow.rewards import Readability
from tiltflow.sample import Sampler
from tiltflow.seed import Seed

LEVEL = 0.1


def bisect(f: Callable[[float], bool], low: float, high: float) -> float:
    """The point where f turns from true to false."""
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) else (low, middle)
    return low


def mean_tilt(r: Tensor, weight: float) -> Tensor:
    """The optimum of E[r] - weight KL: p ~ exp(r / weight), (N,)."""
    return torch.softmax(r / weight, 0)


def tail_tilt(r: Tensor, weight: float) -> Tensor:
    """The optimum of LeftCVaR - weight KL: exp(-(y - r)_+ / (level weight)), P(r < y) = level."""

    def tilt(y: float) -> Tensor:
        return torch.softmax(-(y - r).clamp(min=0) / (LEVEL * weight), 0)

    return tilt(
        bisect(lambda y: float(tilt(y)[r < y].sum()) < LEVEL, float(r.min()), float(r.max()))
    )


def kl(p: Tensor) -> float:
    """KL of weights (N,) against equal weights."""
    return float((p * (p * len(p)).clamp(min=1e-300).log()).sum())


def tail_mean(r: Tensor, p: Tensor) -> float:
    """Mean of the worst tenth under weights p."""
    order = r.argsort()
    mass = p[order].cumsum(0).clamp(max=LEVEL)
    return float((mass.diff(prepend=mass.new_zeros(1)) * r[order]).sum() / LEVEL)


def at_kl(
    tilt: Callable[[Tensor, float], Tensor], r: Tensor, target: float
) -> tuple[Tensor, float]:
    """The tilt whose KL is ``target``, and its weight."""
    log_weight = bisect(lambda w: kl(tilt(r, math.exp(w))) > target, -7.0, 7.0)
    return tilt(r, math.exp(log_weight)), math.exp(log_weight)


def table(x: Tensor) -> None:
    """Print the table."""
    for temperature in (1.0, 2.0, 3.0):
        reward = Readability(temperature=temperature)
        r, classes = reward.value(x).double(), reward.class_of(x)
        base, start, median = torch.bincount(classes), left_cvar(r, LEVEL).value, float(r.median())
        print(f"temperature {temperature:g}: worst tenth {start:.3f}, median {median:.3f}")
        for target in (0.05, 0.1, 0.2, 0.3, 0.5):
            for name, tilt in (("E[r]", mean_tilt), ("CVaR", tail_tilt)):
                p, weight = at_kl(tilt, r, target)
                tail = tail_mean(r, p)
                share = torch.zeros(CLASSES, dtype=p.dtype).index_add_(0, classes, p)
                print(
                    f"  KL {target:.2f} {name} weight {weight:6.3f}: "
                    f"mean {float((p * r).sum()):.3f}, worst tenth {tail:.3f}, "
                    f"gained {(tail - start) / (median - start):.2f}, "
                    f"least share {float((share * len(p) / base).min()):.2f}"
                )


def picture(x: Tensor, path: Path) -> None:
    """Two rows from the worst tenth, one of any samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    reward, x = Readability(), x[:1000]
    r, classes = reward.value(x), reward.class_of(x)
    worst = r.argsort()[: len(x) // 10]
    shown = torch.cat([worst[torch.linspace(0, len(worst) - 1, 32).long()], torch.arange(16)])
    figure, axes = plt.subplots(3, 16, figsize=(9.6, 2.5))
    for axis, i in zip(axes.flat, shown.tolist(), strict=True):
        axis.imshow(x[i].reshape(SIDE, SIDE), cmap="gray_r", vmin=-1, vmax=1)
        axis.set_title(f"{int(classes[i])}  {float(r[i]):.2f}", fontsize=7, pad=2)
        axis.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x = Sampler().sample(load_digits_flow(), 20_000, seed=Seed(100))
    table(x)
    if arguments.picture:
        picture(x, arguments.picture)


if __name__ == "__main__":
    main()
