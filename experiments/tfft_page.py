"""docs/tfft.md and its pictures, from the results of ``tfft.py``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tfft_more_tables as more
import tfft_tables as tables
import tfft_texts as texts
import torch
from tfft_plane import STEPS, WEIGHTS
from tfft_toys import CASES
from toys import Record, Store, of_seeds

from tiltflow import plots

Stores = Mapping[str, Store]

COLOURS = {"tail": "#1f6feb", "mean": "#e0882a", **dict(zip(
    (f"steps-{k}" for k in STEPS), ("#c4d7c4", "#92ba92", "#5a9a5a", "#1f6b1f"), strict=True
))}  # fmt: skip


def write(stores: Stores, home: Path) -> None:
    """The page, with a section for every experiment that has begun."""
    sections: Mapping[str, tuple[str, Callable[[Store, Path], list[str]]]] = {
        "cost": ("right-0.9", _cost),
        "densities": (CASES[-1].name, _densities),
        "frontier": (f"steps-{STEPS[1]}/right/{WEIGHTS['right'][0]:g}", _frontier),
        "starvation": ("rounds", _starvation),
        "digits": ("steps/readable", _digits),
        "solvers": (more.FIRST_SOLVED, _solvers),
    }
    (home / "images").mkdir(parents=True, exist_ok=True)
    lines = [*texts.HEAD.strip().splitlines(), ""]
    for name, (first, make) in sections.items():
        if of_seeds(stores[name], first):
            lines += [*make(stores[name], home), *_spent(name, stores[name])]
    text = "\n".join(lines).rstrip() + "\n"
    (home / "tfft.md").write_text(text, encoding="utf-8")


def _spent(name: str, store: Store) -> list[str]:
    heads = {key.rpartition("/")[0] for key in store.known if key.rpartition("/")[2].isdigit()}
    trained = [head for head in heads if head.split("/")[0] not in ("exact", "rate")]
    if name == "densities":  # results of cases that have been replaced may still be there
        trained = [case.name for case in CASES]
    seeds = min(len(of_seeds(store, head)) for head in trained)
    return [
        f"`python experiments/tfft.py {name}`: {store.seconds() / 60:.0f} CPU-minutes so far; "
        f"every row has at least {seeds} {'seed' if seeds == 1 else 'seeds'}.", "",
    ]  # fmt: skip


def _section(title: str, text: str, *parts: Sequence[str]) -> list[str]:
    lines = [f"## {title}", "", *text.strip().splitlines(), ""]
    for part in parts:
        lines += part
    return lines


def _cost(store: Store, home: Path) -> list[str]:
    return _section("Cost against the mean reward", texts.COST, tables.cost(store))


def _starvation(store: Store, home: Path) -> list[str]:
    return _section(
        "Starvation: a weight that the bank does not support", texts.STARVATION,
        more.starvation(store),
    )  # fmt: skip


def _digits(store: Store, home: Path) -> list[str]:
    return _section("Digits", texts.DIGITS, more.digits(store))


def _solvers(store: Store, home: Path) -> list[str]:
    return _section("Adjoint Matching or Weighted Matching", texts.SOLVERS, more.solvers(store))


# --- with pictures -------------------------------------------------------------------------------


def _densities(store: Store, home: Path) -> list[str]:
    fig = plots.figure(12.0, 4.8)
    for axes, case in zip(fig.subplots(2, 4).T.flat, CASES, strict=True):
        laws = store.known[f"exact/{case.name}"]["result"]["laws"]
        edges = torch.tensor(laws["edges"])
        middle, width = 0.5 * (edges[1:] + edges[:-1]), float(edges[1] - edges[0])
        tuned = of_seeds(store, case.name)[0]["bins_ode"]
        axes.bar(
            middle.tolist(), [p / width for p in tuned], width, color=COLOURS["tail"], alpha=0.45
        )
        for name, colour in (("before", "#8a94a6"), ("optimum", "#1a202c")):
            axes.plot(middle.tolist(), [p / width for p in laws[name]], color=colour, lw=1.1)
        axes.set_title(case.title, loc="left", fontsize=8.5)
        axes.tick_params(labelsize=7)
    (home / "images" / "tfft_densities.png").write_bytes(plots.png(fig))
    picture = [
        "![Densities of the reward: before, at the optimum, tuned](images/tfft_densities.png)",
        "", "*Density of the reward: grey before, black at the exact optimum, blue the tuned "
        "model's ODE (seed 0).*", "",
    ]  # fmt: skip
    return _section("Densities against the exact law", texts.DENSITIES,
                    tables.densities(store), picture)  # fmt: skip


def _frontier(store: Store, home: Path) -> list[str]:
    fig = plots.figure(9.4, 3.8)
    for axes, side in zip(fig.subplots(1, 2), WEIGHTS, strict=True):
        _frontier_axes(axes, store, side)
    (home / "images" / "tfft_frontier.png").write_bytes(plots.png(fig))
    picture = ["![Tail mean against KL](images/tfft_frontier.png)", ""]
    return _section("Frontier: tail mean against KL at equal updates", texts.FRONTIER,
                    tables.frontier(store), picture)  # fmt: skip


def _frontier_axes(axes: Any, store: Store, side: str) -> None:
    curves = store.known[f"curve/{side}"]["result"]
    reach = 1.3 * max(
        statistics.fmean(r["kl"] for r in records)
        for _, _, records in tables.frontier_points(store, side)
    )
    for name, label in (("tail", "exact: tail"), ("mean", "exact: mean")):
        inside = [(kl, tail) for kl, tail, _ in curves[name] if kl < reach]
        axes.plot(*zip(*inside, strict=True), color=COLOURS[name], lw=1, label=label)
    labelled = set[str]()
    for method, _, records in tables.frontier_points(store, side):
        new = method not in labelled
        labelled.add(method)
        axes.errorbar(
            _mean(records, "kl"), _mean(records, "tail"), xerr=tables.error(records, "kl"),
            yerr=tables.error(records, "tail"), fmt="o", ms=3.5, lw=0.8, color=COLOURS[method],
            label=tables.METHODS[method] if new else None,
        )  # fmt: skip
    axes.set_title(f"{side} tail", loc="left", fontsize=9.5)
    axes.set_xlabel("KL, nats", fontsize=8)
    axes.set_ylabel("tail mean", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6.5, frameon=False)


def _mean(records: Sequence[Record], key: str) -> float:
    return statistics.fmean(r[key] for r in records)
