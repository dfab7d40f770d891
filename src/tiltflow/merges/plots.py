"""Figures of a merge: samples of the models and the gates, and masses of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiltflow.plots import figure, show_pictures, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT = "#1f6feb"
GATE = "#1a6b3c"
PARTS = ("#8a94a6", "#e0882a", "#8250df", "#2a9d8f", "#c2410c", "#b83280")
"""Colours of the models, in turn."""

POINTS, PICTURES, ROW = 3000, 30, 4
"""Points of a scatter, pictures of a model, scatters in a row, at most."""


def colours(models: Sequence[str], gates: Sequence[str]) -> dict[str, str]:
    """A colour for each model and gate; the last gate is the result."""
    out = {name: PARTS[i % len(PARTS)] for i, name in enumerate(models)}
    return out | dict.fromkeys(gates, GATE) | {gates[-1]: RESULT}


def samples_figure(
    samples: Mapping[str, Tensor], colour: Mapping[str, str], picture: tuple[int, int] | None
) -> Figure:
    """Samples of each model and gate: pictures, histograms (1-D) or scatters."""
    if picture is not None:
        return _pictures(samples, picture)
    if next(iter(samples.values())).flatten(1).shape[1] == 1:
        return _histograms(samples, colour)
    return _scatters(samples, colour)


def _pictures(samples: Mapping[str, Tensor], picture: tuple[int, int]) -> Figure:
    columns = PICTURES // 2
    fig = figure(9.4, 1.5 * len(samples))
    grid: Any = fig.subplots(len(samples), 1, squeeze=False)
    for (axes,), (name, points) in zip(grid, samples.items(), strict=True):
        show_pictures(axes, points[:PICTURES], picture, columns, name)
    return fig


def _histograms(samples: Mapping[str, Tensor], colour: Mapping[str, str]) -> Figure:
    axes = (fig := figure(9.4, 3.0)).subplots(1, 1)
    low, high = _limits([points.flatten()[:, None] for points in samples.values()])
    edges = torch.linspace(float(low), float(high), 81).tolist()
    last = list(samples)[-1]
    for name, points in samples.items():
        values = points.flatten().tolist()
        if name == last:
            axes.hist(values, edges, density=True, color=colour[name], alpha=0.25)
        axes.hist(values, edges, density=True, color=colour[name], histtype="step", lw=1.6,
                  label=name)  # fmt: skip
    axes.legend(fontsize=8, frameon=False)
    style(axes, "Samples (filled: the result)", "x", "density")
    return fig


def _scatters(samples: Mapping[str, Tensor], colour: Mapping[str, str]) -> Figure:
    columns = min(ROW, len(samples))
    rows = math.ceil(len(samples) / columns)
    fig = figure(9.4, 0.4 + 9.4 / columns * rows)
    flat = {name: points.flatten(1)[:POINTS, :2] for name, points in samples.items()}
    low, high = _limits(list(flat.values()))
    grid: Any = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    every = [axes for row in grid for axes in row]
    for axes in every[len(samples) :]:
        axes.set_axis_off()
    for axes, (name, xy) in zip(every, flat.items(), strict=False):
        axes.scatter(xy[:, 0], xy[:, 1], s=3, color=colour[name], alpha=0.35, lw=0)
        style(axes, name if len(name) < 30 else name[:28] + "…")
        axes.set(xlim=(float(low[0]), float(high[0])), ylim=(float(low[1]), float(high[1])))
        axes.set_aspect("equal")
    return fig


def _limits(points: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Where nearly all points of all models are."""
    every = torch.cat([p[:POINTS] for p in points]).double()
    low, high = torch.quantile(every, 0.001, dim=0), torch.quantile(every, 0.999, dim=0)
    margin = 0.08 * (high - low).clamp(min=1e-6)
    return low - margin, high + margin


def classes_figure(
    shares: Mapping[str, Mapping[str, Mapping[str, float]]], colour: Mapping[str, str]
) -> Figure:
    """Share of each class, one bar per model, with error bars of one standard error."""
    axes = (fig := figure(9.4, 3.1)).subplots(1, 1)
    labels = list(next(iter(shares.values())))
    width = 0.84 / len(shares)
    for i, (name, each) in enumerate(shares.items()):
        x = [k - 0.42 + width * (i + 0.5) for k in range(len(labels))]
        heights = [100 * each[label]["value"] for label in labels]
        errors = [100 * each[label]["standard_error"] for label in labels]
        axes.bar(x, heights, width * 0.92, yerr=errors, color=colour[name], label=name,
                 error_kw={"lw": 0.8, "ecolor": "#4a5568"})  # fmt: skip
    axes.set_xticks(range(len(labels)), labels)
    style(axes, x="class", y="per cent of samples")
    axes.legend(fontsize=8, frameon=False, ncols=6, loc="lower left", bbox_to_anchor=(0, 1))
    return fig
