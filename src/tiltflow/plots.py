"""Figures of a report, as PNG bytes; matplotlib is an optional extra."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"pretrained": "#8a94a6", "tuned": "#1f6feb", "baseline": "#e0882a"}
NAMES = {"pretrained": "before (pre-trained)", "tuned": "after (tuned)", "baseline": "baseline"}
"""What the models are called in figures."""


def available() -> bool:
    """Whether matplotlib is installed; without it a report has tables only."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def figure(width: float, height: float) -> Figure:
    """An empty figure that touches no global state of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(fig)
    return fig


def png(fig: Figure) -> bytes:
    """A figure as PNG."""
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=150, metadata={"Software": None})
    return out.getvalue()


def style(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """The look of all axes, with a title and labels."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b8c0cc")
    axes.tick_params(colors="#4a5568", labelsize=8)
    axes.set_title(title, loc="left", fontsize=10, color="#1a202c", fontweight="bold")
    axes.set_xlabel(x, fontsize=8.5, color="#4a5568")
    axes.set_ylabel(y, fontsize=8.5, color="#4a5568")


def reward_figure(rewards: Mapping[str, Tensor], level: float) -> Figure:
    """Histograms with the tail means marked, and the lower tails as quantile curves."""
    fig = figure(9.4, 3.3)
    left, right = fig.subplots(1, 2, width_ratios=[1.25, 1])
    histogram(left, rewards, level)
    for name, values in rewards.items():
        ordered = values.double().sort().values
        share = (torch.arange(len(ordered)) + 0.5) / len(ordered)
        shown = share <= 0.5
        right.plot(
            100 * share[shown], ordered[shown], color=COLOURS[name], label=NAMES[name], lw=1.8
        )
    right.axvspan(100 / len(ordered), 100 * level, color="#1f6feb", alpha=0.06, lw=0)
    right.set_xscale("log")
    right.set_xticks(ticks := [0.1, 1, 10, 50], [f"{t:g} %" for t in ticks])
    style(right, "The lower tail", "share of samples that are worse (log scale)", "reward")
    return fig


def histogram(axes: Axes, rewards: Mapping[str, Tensor], level: float) -> None:
    """Overlaid histograms; a triangle marks each worst-tail mean, a line its threshold."""
    every = torch.cat([v.double() for v in rewards.values()])
    low, high = (float(torch.quantile(every[:1_000_000], q)) for q in (0.0005, 0.9995))
    edges = torch.linspace(low, high if high > low else low + 1, 61).tolist()
    for name, values in rewards.items():
        v = values.double().clamp(low, high).tolist()
        axes.hist(v, edges, density=True, color=COLOURS[name], alpha=0.22)
        axes.hist(v, edges, density=True, color=COLOURS[name], histtype="step", lw=1.4,
                  label=NAMES[name])  # fmt: skip
    title = "Rewards"
    counts = torch.histogram(every.clamp(low, high), bins=60).hist
    if float(counts.max()) > 30 * float(counts[counts > 0].median()):
        axes.set_yscale("log")  # a needle of good samples would hide the tail
        title = "Rewards (counts on a log scale)"
    for i, (name, values) in enumerate(rewards.items()):
        threshold = float(torch.quantile(values.double(), level))
        tail = float(values.double()[values.double() <= threshold].mean())
        axes.axvline(threshold, color=COLOURS[name], lw=0.9, ls=":")
        axes.plot([tail], [-0.02 - 0.03 * i], marker="^", ms=7, color=COLOURS[name],
                  transform=axes.get_xaxis_transform(), clip_on=False, zorder=5)  # fmt: skip
    axes.legend(fontsize=8, frameon=False)
    style(axes, title, f"reward (▲ mean of the worst {level:.0%}, dotted: its threshold)", "")
    axes.set_yticks([], minor=True)
    axes.set_yticks([])


def pictures(points: Tensor, shape: tuple[int, int], columns: int) -> Tensor:
    """Grey images (N, h*w) in [-1, 1] tiled row by row into one array, white gaps between."""
    h, w = shape
    tiles = points.reshape(len(points), h, w).float().clamp(-1, 1)
    rows = math.ceil(len(tiles) / columns)
    sheet = torch.full((rows * (h + 1) - 1, columns * (w + 1) - 1), -1.25)
    for i, tile in enumerate(tiles):
        r, c = divmod(i, columns)
        sheet[r * (h + 1) : r * (h + 1) + h, c * (w + 1) : c * (w + 1) + w] = tile
    return sheet


def show_pictures(
    axes: Axes, points: Tensor, shape: tuple[int, int], columns: int, title: str
) -> None:
    """A sheet of pictures, ink on paper."""
    sheet = pictures(points, shape, columns)
    axes.imshow(sheet.numpy(), cmap="Greys", vmin=-1.25, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, loc="left", fontsize=9.5, color="#1a202c")


def worst_figure(
    samples: Mapping[str, tuple[Tensor, Tensor]], level: float, picture: tuple[int, int] | None
) -> Figure:
    """The worst samples of each model: pictures, a scatter (2-D) or a histogram (1-D).

    Args:
        samples: by model, points (N, *event) and rewards (N,).
        level: share of the samples that counts as the worst.
        picture: height and width, for pictures.
    """
    if picture is not None:
        return _worst_pictures(samples, level, picture)
    first = next(iter(samples.values()))[0]
    if first.flatten(1).shape[1] == 1:
        return _states_1d(samples, level)
    return _states_2d(samples, level)


def _worst_pictures(
    samples: Mapping[str, tuple[Tensor, Tensor]], level: float, picture: tuple[int, int]
) -> Figure:
    columns, rows = 20, 3
    fig = figure(9.4, 1.72 * len(samples))
    for axes, (name, (points, rewards)) in zip(_column(fig, len(samples)), samples.items(),
                                               strict=True):  # fmt: skip
        order = rewards[: len(points)].argsort()
        tail = order[: max(columns * rows, int(level * len(order)))]
        pick = torch.linspace(0, len(tail) - 1, columns * rows).long()
        title = f"{NAMES[name]}: across the worst {level:.0%}, worst first"
        show_pictures(axes, points[tail[pick]], picture, columns, title)
    return fig


def pairs_figure(
    samples: Mapping[str, tuple[Tensor, Tensor]], level: float, picture: tuple[int, int]
) -> Figure:
    """The worst pre-trained samples, and what the other models make of the same noise."""
    points, rewards = samples["pretrained"]
    tail = rewards[: len(points)].argsort()[: max(40, int(level * len(points)))]
    pick = tail[torch.linspace(0, len(tail) - 1, 40).long()]
    fig = figure(9.4, 1.25 * len(samples))
    for axes, (name, (own, own_rewards)) in zip(_column(fig, len(samples)), samples.items(),
                                                strict=True):  # fmt: skip
        mean = float(own_rewards[pick].double().mean())
        show_pictures(axes, own[pick], picture, 20, f"{NAMES[name]}, mean reward {mean:.3f}")
    return fig


def _column(fig: Figure, count: int) -> Sequence[Axes]:
    axes: Any = fig.subplots(count, 1, squeeze=False)
    return [row[0] for row in axes]


def _states_1d(samples: Mapping[str, tuple[Tensor, Tensor]], level: float) -> Figure:
    axes = (fig := figure(9.4, 2.8)).subplots(1, 1)
    every = torch.cat([points.flatten() for points, _ in samples.values()]).double()
    edges = torch.linspace(float(every.min()), float(every.max()), 81).tolist()
    for name, (points, rewards) in samples.items():
        worst = rewards[: len(points)] <= torch.quantile(rewards.double(), level)
        axes.hist(points.flatten().tolist(), edges, color=COLOURS[name], histtype="step", lw=1.5,
                  label=NAMES[name])  # fmt: skip
        axes.hist(points.flatten()[worst].tolist(), edges, color=COLOURS[name], alpha=0.35)
    axes.legend(fontsize=8, frameon=False)
    style(axes, f"Samples (filled: the worst {level:.0%})", "x", "count")
    return fig


def _states_2d(samples: Mapping[str, tuple[Tensor, Tensor]], level: float) -> Figure:
    fig = figure(3.15 * len(samples), 3.3)
    row: Any = fig.subplots(1, len(samples), squeeze=False, sharex=True, sharey=True)
    for axes, (name, (points, rewards)) in zip(row[0], samples.items(), strict=True):
        xy, r = points.flatten(1)[:3000], rewards[:3000]
        worst = r <= torch.quantile(rewards.double(), level)
        axes.scatter(xy[:, 0], xy[:, 1], s=3, color=COLOURS[name], alpha=0.35, lw=0)
        axes.scatter(xy[worst, 0], xy[worst, 1], s=4, color="#c53030", alpha=0.7, lw=0)
        more = "" if xy.shape[1] == 2 else " (first two coordinates)"
        style(axes, NAMES[name] + more)
        axes.set_aspect("equal")
    fig.supxlabel(f"red: the worst {level:.0%}", fontsize=8.5, color="#4a5568")
    return fig


def shares_figure(shares: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Share of each class, one bar per model, with error bars of one standard error."""
    fig = figure(9.4, 2.6)
    axes = fig.subplots(1, 1)
    names = list(next(iter(shares.values())))
    width = 0.8 / len(shares)
    for i, (model, each) in enumerate(shares.items()):
        x = [k - 0.4 + width * (i + 0.5) for k in range(len(names))]
        heights = [100 * each[n]["value"] for n in names]
        errors = [100 * each[n]["standard_error"] for n in names]
        axes.bar(x, heights, width * 0.92, yerr=errors, color=COLOURS[model], label=NAMES[model],
                 error_kw={"lw": 0.8, "ecolor": "#4a5568"})  # fmt: skip
    before = next(iter(shares.values()))
    for k, n in enumerate(names):
        half = 50 * before[n]["value"]
        axes.plot([k - 0.42, k + 0.42], [half, half], color="#c53030", lw=1, ls="--",
                  label="half of before" if k == 0 else None)  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.legend(fontsize=8, frameon=False, ncols=4)
    style(axes, "Share of each class", "class", "per cent of samples")
    return fig


CURVES = ("loss", "path_kl", "terminal", "gap", "gradient_norm")
"""Statistics of updates that get a curve, where a solver reports them."""


def training_figure(updates: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Curves of the training statistics, one panel each, the solves side by side in colours."""
    keys = [k for k in CURVES if any(u["stats"].get(k) is not None for u in updates)][:4]
    if not keys:
        return None
    solves: dict[str, list[Mapping[str, Any]]] = {}
    for update in updates:
        solves.setdefault(str(update["at"]), []).append(update)
    fig = figure(9.4, 2.5)
    row: Any = fig.subplots(1, len(keys), squeeze=False)
    for axes, key in zip(row[0], keys, strict=True):
        for i, (at, lines) in enumerate(solves.items()):
            shown = [u for u in lines if u["stats"].get(key) is not None]
            shade = 0.35 + 0.65 * (i + 1) / len(solves)
            colour = COLOURS["baseline"] if "baseline" in at else COLOURS["tuned"]
            axes.plot([u["update"] for u in shown], [u["stats"][key] for u in shown],
                      color=colour, alpha=shade, lw=1.2)  # fmt: skip
        values = [u["stats"][key] for u in updates if u["stats"].get(key) is not None]
        if min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
        style(axes, key.replace("_", " "), "update")
    return fig


def iterations_figure(iterations: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Objective with error bars, and how stationary it is, per outer iteration."""
    known = [i for i in iterations if (i.get("objective") or {}).get("value") is not None]
    if len(known) < 2:
        return None
    fig = figure(9.4, 2.4)
    left, right = fig.subplots(1, 2)
    x = range(1, len(known) + 1)
    left.errorbar(x, [i["objective"]["value"] for i in known],
                  [i["objective"]["standard_error"] or 0 for i in known],
                  color=COLOURS["tuned"], marker="o", ms=4, lw=1.4, capsize=2)  # fmt: skip
    style(left, "Objective after each iteration", "iteration")
    gaps = [i["stationarity"] for i in known]
    gaps = [math.nan if g is None else g for g in gaps]
    right.plot(x, gaps, color=COLOURS["tuned"], marker="o", ms=4, lw=1.4)
    right.set_ylim(bottom=0)
    style(right, "Distance from stationarity (0: optimal)", "iteration")
    for axes in (left, right):
        axes.set_xticks(list(x))
    return fig


def readme_figure(
    samples: Mapping[str, tuple[Tensor, Tensor]], level: float, picture: tuple[int, int] | None
) -> Figure:
    """Worst samples before and after beside the histogram: the picture of a README."""
    shown = {k: v for k, v in samples.items() if k in ("pretrained", "tuned")}
    rewards = {name: r for name, (_, r) in shown.items()}
    if picture is None:
        return reward_figure(rewards, level)
    fig = figure(10.5, 3.3)
    halves: Any = fig.subfigures(1, 2, width_ratios=[1.35, 1])
    left, right = halves
    for axes, (name, (points, own)) in zip(left.subplots(2, 1), shown.items(), strict=True):
        tail = own[: len(points)].argsort()[: max(72, int(level * len(points)))]
        pick = tail[torch.linspace(0, len(tail) - 1, 72).long()]
        title = f"{NAMES[name]}: samples from the worst {level:.0%}"
        show_pictures(axes, points[pick], picture, 18, title)
    histogram(right.subplots(1, 1), rewards, level)
    return fig
