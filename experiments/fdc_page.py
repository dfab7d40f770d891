"""docs/fdc.md and its pictures, from the results of ``fdc.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fdc_texts as texts
import torch
from fdc_others import ALPHAS, ETAS, METRICS, UPDATES
from fdc_runs import NOVELTY, RISK, Tails
from toys import Record, Store, of_seeds, summary, table, weight_of

from tiltflow import plots
from tiltflow.potential import Potential

Stores = Mapping[str, Store]

PUBLISHED = {
    "risk": {
        "pretrained": "256.8 ± 8.2", "mean": "225.3 ± 78.9", "steps 1": "221.1 ± 73.2",
        "steps 2": "90.0 ± 0.05",
    },
    "novelty": {
        "pretrained": "59.6 ± 7.5", "mean": "56.7 ± 2.7", "steps 1": "55.0 ± 0.04",
        "steps 2": "452 ± 250",
    },
}  # fmt: skip
"""Tail means of arXiv 2511.22640, appendix: mean ± standard deviation of five seeds."""


LAST = {
    "risk": "steps/0", "novelty": "steps/0", "wasserstein": "planned/b/0", "exploration": "1/0",
    "ablation": "1000/10/0",
}  # fmt: skip
"""The result without which a section is not written yet."""


def write(stores: Stores, home: Path) -> None:
    """The page, with a section for every experiment of which one seed is done."""
    sections = {
        "risk": lambda: _tail_section("risk", RISK, stores["risk"], home),
        "novelty": lambda: _tail_section("novelty", NOVELTY, stores["novelty"], home),
        "wasserstein": lambda: _transport_section(stores["wasserstein"], home),
        "exploration": lambda: _exploration_section(stores["exploration"], home),
        "ablation": lambda: _ablation_section(stores["ablation"], stores["risk"], home),
    }
    (home / "images").mkdir(parents=True, exist_ok=True)
    lines = [*texts.HEAD.strip().splitlines(), ""]
    for name, make in sections.items():
        if LAST[name] in stores[name].known:
            lines += [*make(), *_cost(name, stores[name])]
    text = "\n".join(lines).rstrip() + "\n"
    (home / "fdc.md").write_text(text, encoding="utf-8")


def _cost(name: str, store: Store) -> list[str]:
    minutes = store.seconds() / 60
    seeds = len(of_seeds(store, LAST[name].rpartition("/")[0]))
    return [
        f"`python experiments/fdc.py {name}`: {minutes:.0f} CPU-minutes so far; all methods have "
        f"{seeds} of 5 seeds.", "",
    ]  # fmt: skip


# --- risk and novelty ----------------------------------------------------------------------------


def _tail_section(name: str, toy: Tails, store: Store, home: Path) -> list[str]:
    exact = store.known["exact"]["result"]
    sign = -1.0 if toy.side == "below" else 1.0
    run = toy.plan(0)
    weight, best = weight_of(run), sign * exact["optimum"]["tail"]
    names = {
        "pretrained": "pre-trained", "mean": f"mean, weight {weight:g}",
        "mean_strong": f"mean, weight {toy.strong:g}",
        "mean_matched": "mean, KL of the optimum",
    }  # fmt: skip
    rows = [
        [label, *_tail_row(of_seeds(store, key), sign), f"{sign * exact[key]['tail']:.1f}"]
        for key, label in names.items()
    ]
    steps = [_padded(each, len(exact["steps"])) for each in of_seeds(store, "steps")]
    for k, law in enumerate(exact["steps"]):
        cells = _tail_row([each[k] for each in steps], sign)
        rows.append([f"FDC in steps, k = {k + 1}", *cells, f"{sign * law['tail']:.1f}"])
    rows.append(
        ["**FDC planned**", *_tail_row(of_seeds(store, "planned"), sign), f"**{best:.1f}**"]
    )
    keys = ["pretrained", "mean", "", "", *(f"steps {k + 1}" for k in range(len(exact["steps"])))]
    for row, key in zip(rows, [*keys, ""], strict=True):
        row.append(PUBLISHED[name].get(key, ""))
    head = ["", "tail mean", "mean", "left / right", "exact tail mean", "published"]
    figure = _tail_figure(toy, store, sign)
    (home / "images" / f"fdc_{name}.png").write_bytes(figure)
    title = {"risk": "Risk-averse: the worst 1 % of a cost", "novelty": "Novelty: the best 1 %"}
    return [
        f"## {title[name]}", "",
        *texts.TAILS[name].strip().splitlines(), "",
        *table(head, rows),
        *_verdicts(store, sign, best, weight, exact), "",
        f"![{title[name]}](images/fdc_{name}.png)", "",
    ]  # fmt: skip


def _padded(records: Sequence[Record], count: int) -> list[Record]:
    """Steps that ended early, because nothing felt the tail any more or a training diverged,
    stay where they are."""
    return [*records, *([records[-1]] * (count - len(records)))]


def _tail_row(records: Sequence[Record], sign: float) -> list[str]:
    if not records:
        return ["", "", ""]
    tail = summary([sign * r["tail"] for r in records])
    mean = summary([sign * r["mean"] for r in records]).split(" (")[0]
    left, right = (sum(r[k] for r in records) / len(records) for k in ("left", "right"))
    return [tail, mean, f"{left:.2f} / {right:.2f}"]


def _verdicts(store: Store, sign: float, best: float, weight: float, exact: Record) -> list[str]:
    """How many seeds come within 5 % of the optimum's tail mean, counted."""
    gain = abs(best - sign * exact["pretrained"]["tail"])
    rows = {"planned": of_seeds(store, "planned")}
    rows["in steps (last)"] = [each[-1] for each in of_seeds(store, "steps")]
    lines = []
    for name, records in rows.items():
        tails = [sign * r["tail"] for r in records]
        if not tails:
            continue
        near = sum(abs(t - best) <= 0.05 * abs(best) for t in tails)
        far = max(abs(t - best) for t in tails)
        lines.append(
            f"- FDC {name}: {near} of {len(tails)} seeds within 5 % of the exact optimum's tail "
            f"mean ({best:.1f}); the worst is {100 * far / abs(best):.1f} % of that value, or "
            f"{100 * far / gain:.1f} % of the possible gain, away. Seeds: "
            + ", ".join(f"{t:.1f}" for t in tails) + "."
        )  # fmt: skip
    kls = [r["path_kl"] for r in rows["planned"]]
    worths = [r["tail"] - weight * r["path_kl"] for r in rows["planned"]]
    lines.append(
        f"- Path KL from the start: planned {summary(kls, 3)}; the KL of the optimum is "
        f"{exact['optimum']['kl']:.3f}. Objective (reward's tail mean - {weight:g} KL): "
        f"{summary(worths)}; the optimum has {exact['objective']:.1f}."
    )
    return lines


def _tail_figure(toy: Tails, store: Store, sign: float) -> bytes:
    """The field with samples, before, for the mean and for the tail."""
    reward = toy.plan(0).reward
    x1, x2 = torch.linspace(-4, 4.5, 220), torch.linspace(-3.5, 3.5, 180)
    chosen = {"pre-trained": "pretrained", "mean": "mean_strong", "FDC planned": "planned"}
    fig = plots.figure(9.4, 2.9)
    for axes, (title, key) in zip(fig.subplots(1, 3), chosen.items(), strict=True):
        _field(axes, reward, sign, x1, x2)
        points = torch.tensor(store.known[f"{key}/0"]["result"]["points"]).numpy()
        axes.plot(points[:, 0], points[:, 1], ".", ms=2, color="#1f6feb", alpha=0.7)
        axes.set_title(title, loc="left", fontsize=9.5)
    return plots.png(fig)


def _field(axes: Any, reward: Potential, sign: float, x1: torch.Tensor, x2: torch.Tensor) -> None:
    nodes = torch.cartesian_prod(x1, x2).double()
    values = sign * reward.value(nodes).reshape(len(x1), len(x2)).T
    axes.pcolormesh(
        x1.numpy(), x2.numpy(), values.numpy(), cmap="Greys", shading="auto", rasterized=True
    )
    axes.set_xlim(float(x1[0]), float(x1[-1]))
    axes.set_ylim(float(x2[0]), float(x2[-1]))
    axes.tick_params(labelsize=7)


# --- the others ----------------------------------------------------------------------------------


def _transport_section(store: Store, home: Path) -> list[str]:
    rows = []
    names: dict[str, tuple[str, str]] = {
        "pre-trained": ("floor", ""), "mean": ("mean", "exact/mean"),
        **{f"FDC, d_{m.upper()}": (f"planned/{m}", f"exact/{m}") for m in METRICS},
    }  # fmt: skip
    for name, (key, grid) in names.items():
        records = of_seeds(store, key)
        cells = [
            summary([r[k] for r in records], 2) for k in ("mean", "right", "up", "w1_a", "w1_b")
        ]
        rows.append([name, *(cell.split(" (")[0] for cell in cells)])
        if grid:
            law = store.known[grid]["result"]
            rows.append(
                [
                    f"{name}, exact",
                    *(f"{law[k]:.2f}" for k in ("mean", "right", "up", "w1_a", "w1_b")),
                ]
            )
    head = ["", "E r", "shift right", "shift up", "W1 in d_A", "W1 in d_B"]
    fig = plots.figure(4.2, 3.6)
    axes = fig.subplots()
    for name, key in [
        ("pre-trained", "floor"),
        ("mean", "mean"),
        ("d_A", "planned/a"),
        ("d_B", "planned/b"),
    ]:
        points = torch.tensor(store.known[f"{key}/0"]["result"]["points"]).numpy()
        axes.plot(points[:, 0], points[:, 1], ".", ms=2.5, label=name, alpha=0.6)
    axes.legend(fontsize=7, frameon=False)
    (home / "images" / "fdc_wasserstein.png").write_bytes(plots.png(fig))
    return [
        "## Reward and transport: two ground metrics", "",
        *texts.TRANSPORT.strip().splitlines(), "",
        *table(head, rows), "![Samples under both metrics](images/fdc_wasserstein.png)", "",
    ]  # fmt: skip


def _exploration_section(store: Store, home: Path) -> list[str]:
    exact = store.known["exact"]["result"]
    start = summary([r["entropy"] for r in of_seeds(store, "pretrained")], 3).split(" (")[0]
    rows = [["pre-trained", "1", start, f"{exact['pretrained']:.3f}", "", ""]]
    fig = plots.figure(4.6, 3.2)
    axes = fig.subplots()
    for alpha in ALPHAS:
        law, runs = exact[f"{alpha:g}"], of_seeds(store, f"{alpha:g}")
        last = summary([r[-1]["entropy"] for r in runs], 3).split(" (")[0]
        rows.append([
            f"{alpha:g}", f"{law['exponents'][-1]:.3f}", last, f"{law['entropy'][-1]:.3f}",
            f"{law['limit']:.3f}", f"{law['kl'][-1]:.3f}",
        ])  # fmt: skip
        steps = range(len(law["entropy"]) + 1)
        (line,) = axes.plot(
            steps, [exact["pretrained"], *law["entropy"]], lw=1.2, label=f"alpha = {alpha:g}"
        )
        for run in runs:
            axes.plot(steps[1:], [r["entropy"] for r in run], "o", ms=2.5, color=line.get_color())
    axes.set_xlabel("step (lines: exact, dots: trained)", fontsize=8)
    axes.set_ylabel("entropy, nats", fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    (home / "images" / "fdc_exploration.png").write_bytes(plots.png(fig))
    worst = max(exact[f"{alpha:g}"]["deviation"] for alpha in ALPHAS)
    head = ["alpha", "exponent e_5", "entropy", "exact entropy", "limit of e_k", "exact KL"]
    return [
        "## Conservative exploration: H - alpha KL", "", *texts.EXPLORE.strip().splitlines(), "",
        *table(head, rows),
        f"The grid solver's steps are these powers to {worst:.0e} (total variation).",
        "", "![Entropy step by step](images/fdc_exploration.png)", "",
    ]  # fmt: skip


def _ablation_section(store: Store, risk: Store, home: Path) -> list[str]:
    rows, ended = [], 0
    fig = plots.figure(4.8, 3.2)
    axes = fig.subplots()
    for updates in UPDATES:
        for eta in ETAS:
            runs = of_seeds(store, f"{updates}/{eta:g}")
            if not runs:
                continue
            count = len(store.known[f"exact/{eta:g}"]["result"])
            ended += sum(len(run) < count for run in runs)
            tails = [[-r["tail"] for r in _padded(run, count)] for run in runs]
            per_k = [summary(list(column), 0) for column in zip(*tails, strict=True)]
            rows.append([f"N = {updates}, η = {eta:g}", *per_k, f"{runs[0][-1]['x1']:.1f}"])
            middle = [sorted(c)[len(c) // 2] for c in zip(*tails, strict=True)]
            label = f"N = {updates}, η = {eta:g}"
            axes.plot(range(1, len(middle) + 1), middle, "o-", ms=3, lw=1, label=label)
    for eta in ETAS:
        law = store.known[f"exact/{eta:g}"]["result"]
        rows.append(
            [f"exact, η = {eta:g}", *(f"{-p['tail']:.0f}" for p in law), f"{law[-1]['x1']:.1f}"]
        )
        axes.plot(range(1, len(law) + 1), [-p["tail"] for p in law], "k--", lw=0.8)
    axes.set_xlabel("outer steps K (dashed: exact)", fontsize=8)
    axes.set_ylabel("cost of the worst 1 %, median", fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    (home / "images" / "fdc_ablation.png").write_bytes(plots.png(fig))
    count = len(rows[-1]) - 2
    head = ["", *(f"K = {k + 1}" for k in range(count)), "mean of x1 at the end, seed 0"]
    return [
        "## Ablation: outer steps K, updates N per step, η = 1 / rate", "",
        *texts.ABLATION.strip().splitlines(), "", *table(head, rows),
        f"{ended} runs ended early, where a training diverged or no sample felt the tail; their "
        "last model counts for the rest.", "",
        "![Tail mean by outer steps](images/fdc_ablation.png)", "",
    ]  # fmt: skip
