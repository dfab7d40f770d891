"""Seven panels in the plane of ``rfm.py``: merged networks against exact optima."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import rfm_texts as texts
import torch
from rfm_plane import (
    FRESH,
    HALF_WIDTH,
    LAWS,
    NODES,
    PANELS,
    PRETRAINING,
    Panel,
    binned_distance,
    fitted,
    law_of,
    law_on_grid,
    measured,
    merging,
    network,
    on_grid,
    picture,
    shortened,
    trained,
)
from tfft_tables import said
from toys import Record, Store, of_seeds, table

from tiltflow import plots
from tiltflow.algorithms import merge
from tiltflow.context import Context
from tiltflow.density import Quadrature
from tiltflow.flow import FlowModel
from tiltflow.operators import Gate, Intersection
from tiltflow.seed import Seed

FACTOR = 1.5
"""A merged model may be so many times as far from the optimum as one trained on its samples."""

COMPARED = ("one_shot", "weighted")
"""Lowerings of intersections."""

BASELINES = {"direct": "exact samples, a new network", "again": "exact samples, a's network"}

Models = Mapping[str, FlowModel]


def lowerings_of(panel: Panel) -> tuple[str, ...]:
    """The lowerings to compare; one where there is no intersection."""
    nodes = [node for node in panel.circuit.walk() if isinstance(node, Gate)]
    return COMPARED if any(isinstance(node, Intersection) for node in nodes) else ("default",)


def run(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """All panels, seed by seed."""
    home = store.path.parent / "pretrained"
    training = shortened(PRETRAINING, quick)
    models = {
        name: fitted(name, law, network(k, quick), home, training)
        for k, (name, law) in enumerate(LAWS.items())
    }
    store.get("pretrained", lambda: before(models, quick))
    for panel in PANELS:
        store.get(f"exact/{panel.name}", lambda p=panel: exact(p))
    for methods in (("direct", "again", "default", "weighted"), ("one_shot",)):
        for seed in seeds:
            for panel in PANELS:
                for method in set(methods) & {*lowerings_of(panel), *BASELINES}:
                    store.get(
                        f"{method}/{panel.name}/{seed}",
                        lambda p=panel, m=method, s=seed: one(p, m, models, s, quick),
                    )


def one(panel: Panel, method: str, models: Models, seed: int, quick: bool) -> Record:
    """One training, and how far it is from the optimum."""
    stats = dict[str, Any]()
    if method in BASELINES:
        again = method == "again"
        start = models[panel.circuit.names[0]] if again else network(1000 + seed, quick)
        model = trained(panel, start, seed, quick)
    else:
        merged = merge(
            panel.circuit, models, context=Context(Seed(seed)), settings=merging(quick),
            lowerings={} if method == "default" else {Intersection: method},
        )  # fmt: skip
        model, stats = merged.model, {str(k): dict(v.stats) for k, v in merged.gates.items()}
    found = measured(panel, model, quick) | {"stats": stats}
    if seed > 0:
        del found["picture"]
    return found


def before(models: Models, quick: bool) -> Record:
    """How far the given models are from what they were trained on, and what their gates would be
    if nothing else were lost."""
    laws, found = dict[str, Quadrature](), Record()
    for name, model in models.items():
        laws[name], _ = law_of(model, quick)
        found[name] = laws[name].total_variation(law_on_grid(name, NODES))
    for panel in PANELS:
        if panel.known is None:
            p = on_grid(panel.circuit, laws)
            found[f"gate/{panel.name}"] = p.total_variation(panel.exact())
    return found


def exact(panel: Panel) -> Record:
    """The optimum, what the parts are from it, and the least distance that bins can show."""
    p = panel.exact()
    floor = binned_distance(panel, panel.sample(FRESH, Seed(37)))
    parts = {n: law_on_grid(n, NODES).total_variation(p) for n in panel.circuit.names}
    return {"picture": picture(p), "parts": parts, "floor": floor}


# --- the section ---------------------------------------------------------------------------------


def section(store: Store) -> str:
    """Tables, whether the requirement is met, and where errors come from."""
    if not of_seeds(store, f"direct/{PANELS[0].name}"):
        return ""
    head = ["panel", "model", "TV", *(f"times {each}" for each in BASELINES), "by seed",
            "energy distance, 1e-3", "TV of SDE samples in bins", "seeds"]  # fmt: skip
    lines = ["## Seven panels in the plane", "", *texts.PANELS.strip().splitlines(), ""]
    lines += ["![Exact, merged and directly trained densities](images/rfm_panels.png)", ""]
    lines += table(head, [row for panel in PANELS for row in rows(store, panel)])
    lines += [verdict(store), "", *limits(store), ""]
    return "\n".join(lines)


def ratios(store: Store, panel: Panel, method: str, base: str = "direct") -> list[float]:
    """TV over that of a baseline, seed by seed."""
    pairs = zip(
        of_seeds(store, f"{method}/{panel.name}"), of_seeds(store, f"{base}/{panel.name}"),
        strict=False,
    )  # fmt: skip
    return [run["tv"] / other["tv"] for run, other in pairs]


def factor(store: Store, panel: Panel, method: str, base: str = "direct") -> float | None:
    """Mean TV over the mean TV of a baseline; nothing where one of them is missing."""
    runs = [of_seeds(store, f"{name}/{panel.name}") for name in (method, base)]
    if not all(runs):
        return None
    merged, direct = (statistics.fmean(run["tv"] for run in each) for each in runs)
    return merged / direct


def rows(store: Store, panel: Panel) -> Iterator[list[str]]:
    """One row for each kind of model."""
    for method in (*lowerings_of(panel), *BASELINES):
        runs = of_seeds(store, f"{method}/{panel.name}")
        if not runs:
            continue
        times = [factor(store, panel, method, base) for base in BASELINES]
        each = " ".join(f"{ratio:.2f}" for ratio in ratios(store, panel, method))
        yield [
            panel.title, title(method), said(runs, "tv", 4),
            *("" if each is None else f"{each:.2f}" for each in times), each,
            said(runs, "energy", 2, 1e3), said(runs, "tv_sde", 3), str(len(runs)),
        ]  # fmt: skip


def limits(store: Store) -> list[str]:
    """What the given models and the measures allow."""
    lost: Record = store.known["pretrained"]["result"]
    lines = list[list[str]]()
    for panel in PANELS:
        known = store.known[f"exact/{panel.name}"]["result"]
        nearest = min(known["parts"], key=lambda n: known["parts"][n])
        gate = lost.get(f"gate/{panel.name}")
        lines.append([
            panel.title, f"{nearest}: {known['parts'][nearest]:.4f}",
            "" if gate is None else f"{gate:.4f}", f"{known['floor']:.3f}",
        ])  # fmt: skip
    head = ["panel", "TV of the nearest part", "TV of the exact gate of the given models",
            "exact samples in bins"]  # fmt: skip
    own = ", ".join(f"{name} {lost[name]:.4f}" for name in LAWS)
    said_of = f"TV of the given models to what they were trained on: {own}."
    return [*table(head, lines), said_of]


def title(method: str) -> str:
    """What a row is called."""
    if method in BASELINES:
        return f"{method}: {BASELINES[method]}"
    return "merged" if method == "default" else f"merged, `{method}`"


def verdict(store: Store) -> str:
    """Which panels are within the factor of each baseline, by each lowering."""
    lines = list[str]()
    for base, meaning in BASELINES.items():
        met, missed = list[str](), list[str]()
        for panel in PANELS:
            for method in lowerings_of(panel):
                ratio = factor(store, panel, method, base)
                if ratio is not None:
                    by = "" if method == "default" else f" (`{method}`)"
                    text = f"{panel.title}{by} {ratio:.2f}"
                    (met if ratio <= FACTOR else missed).append(text)
        lines.append(
            f"- Mean TV at most {FACTOR:g} times that of *{base}* ({meaning}): "
            f"{', '.join(met) or 'none'}."
            + (f" Missed by: {', '.join(missed)}." if missed else " None misses it.")
        )
    return "\n".join(lines)


# --- the picture ---------------------------------------------------------------------------------


def pictures(store: Store, home: Path) -> None:
    """Exact densities with their parts as contours, merged ones, and directly trained ones."""
    fig = plots.figure(11.2, 3.9)
    for column, panel in zip(fig.subplots(3, len(PANELS)).T, PANELS, strict=True):
        shown = [store.known.get(f"exact/{panel.name}", {}).get("result")]
        runs = (of_seeds(store, f"{m}/{panel.name}") for m in (lowerings_of(panel)[-1], "direct"))
        shown += [each[0] if each else None for each in runs]
        for axes, found, label in zip(column, shown, ("exact", "merged", "direct"), strict=True):
            _show(axes, panel, found, label)
        _contours(column[0], panel)
    (home / "images" / "rfm_panels.png").write_bytes(plots.png(fig))


def _show(axes: Any, panel: Panel, found: Record | None, label: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#d5dae2")
    axes.set_xlim(-HALF_WIDTH, HALF_WIDTH)
    axes.set_ylim(-2.8, 2.4)
    axes.set_aspect("equal")
    axes.set_title(panel.title if label == "exact" else label, loc="left", fontsize=7.5)
    if found is None:
        return
    peak = float(panel.exact().table.exp().max())
    density = torch.tensor(found["picture"]).T.numpy()
    box = (-HALF_WIDTH, HALF_WIDTH, -HALF_WIDTH, HALF_WIDTH)
    axes.imshow(density, origin="lower", extent=box, cmap="Blues", vmin=0, vmax=peak,
                interpolation="bilinear")  # fmt: skip
    axes.set_ylim(-2.8, 2.4)
    if "tv" in found:
        axes.text(-4.2, -2.5, f"TV {found['tv']:.3f}", fontsize=7, color="#4a5568")


def _contours(axes: Any, panel: Panel) -> None:
    colours = ("#e0882a", "#5a9a5a", "#b04a7a", "#7a5ab0")
    for name, colour in zip(panel.circuit.names, colours, strict=False):
        p = law_on_grid(name, NODES)
        density, (x, y) = p.table.exp().T.numpy(), (axis.numpy() for axis in p.axes)
        axes.contour(x, y, density, levels=[0.25 * float(density.max())],
                     colors=[colour], linewidths=0.8)  # fmt: skip
