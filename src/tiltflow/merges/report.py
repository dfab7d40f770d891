"""One self-contained HTML file about a merge, for a reader who was not there."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tiltflow import plots
from tiltflow.adapters.checkpoint import load_tensors
from tiltflow.gallery import cards, grid, legend, metrics_table
from tiltflow.html_page import MISSING, image, number, page, plain, section, table
from tiltflow.merges.drawing import circuit_svg
from tiltflow.merges.plots import classes_figure, colours, samples_figure
from tiltflow.molecules import Molecules
from tiltflow.report_molecules import read_all
from tiltflow.report_parts import appendix, cost, expectations, findings, verdicts
from tiltflow.rundir import RunDirectory

Report = Mapping[str, Any]

FEW = 6
"""Molecules that are shown of each model and gate."""

DEFINITIONS = {
    "Intersection": "what all parts find likely: ∝ ∏ p<sub>i</sub><sup>w<sub>i</sub></sup>",
    "Union": "what any part makes: the mixture Σ w<sub>i</sub> p<sub>i</sub>",
    "Interpolation": "between the parts: their Wasserstein barycentre",
    "Contrast": "what the first part makes and the second does not",
}
"""By gate, its optimum without a reward."""


def merge_page(
    directory: RunDirectory,
    data: Report,
    records: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
) -> str:
    """The HTML text."""
    molecules = read_all(directory, data, data["files"])
    shown = _molecules(data, molecules) if molecules else _samples(directory, data)
    parts = [
        _head(data), findings(data), _circuit(data), *(_gate(gate) for gate in data["gates"]),
        shown, _classes(data), _models(data), _training(data, records),
        cost(data), expectations(data), appendix(data, environment),
    ]  # fmt: skip
    return page(str(data["name"]), parts)


def merge_picture(directory: RunDirectory, data: Report) -> bytes:
    """Samples of the models and the gates, as PNG."""
    samples = _read_samples(directory, data)
    return plots.png(samples_figure(samples, _colours(data), _picture(data)))


def _read_samples(directory: RunDirectory, data: Report) -> dict[str, Tensor]:
    return {
        name: load_tensors(directory.samples / f"{file}.safetensors")["points"]
        for name, file in data["files"].items()
    }


def _colours(data: Report) -> dict[str, str]:
    return colours(data["models"], [gate["text"] for gate in data["gates"]])


def _picture(data: Report) -> tuple[int, int] | None:
    return tuple(data["picture"]) if data["picture"] else None


def _head(data: Report) -> str:
    many, gates, root = len(data["models"]), len(data["gates"]), data["gates"][-1]
    chips = [*verdicts(data), f'<span class="chip">{gates} gate{"s" if gates > 1 else ""}</span>']
    distance = root["total_variation"]
    told = ""
    if distance is not None:
        told = (
            f" The total variation between its density and the exact optimum is "
            f"<b>{plain(distance)}</b>: of so much mass the two differ."
        )
    lead = (
        f"{many} pre-trained generative models were merged into one flow model: "
        f"<b><code>{html.escape(data['circuit'])}</code></b>.{told}"
    )
    explain = (
        "±&nbsp;is one standard error. <i>KL to a part</i>, KL(p‖p<sub>i</sub>): how unlikely "
        "samples of the merged model are under the part; an intersection keeps it small for all. "
        "<i>KL from a part</i>, KL(p<sub>i</sub>‖p): how much of the part the merged model "
        "misses; a union keeps it under log 1/w<sub>i</sub>. In nats, by the paths of the "
        "sampler: upper bounds where models are not exact."
    )
    return (
        f"<h1>{html.escape(str(data['name']))}</h1><div>{''.join(chips)}</div>"
        f'<p class="lead">{lead}</p><p class="soft">{explain}</p>'
    )


def _circuit(data: Report) -> str:
    lowerings = {gate["text"]: gate["lowering"] for gate in data["gates"]}
    start = data["start"]
    note = "of the first model that a gate is over" if start is None else f"of {start}"
    return section(
        "The circuit", circuit_svg(data["tree"], lowerings, data["drawn"]),
        f'<p class="soft">The result is on top. Numbers at the lines are shares; below a gate\'s '
        f"name is how it was made. Trainings start from the weights {html.escape(note)}.</p>"
        f"<details><summary>As text</summary><pre>{html.escape(data['drawn'])}</pre></details>",
    )  # fmt: skip


def _gate(gate: Mapping[str, Any]) -> str:
    rows = [
        ("", [html.escape(part["name"]), f"{part['weight']:.4g}", f"{part['share']:.3g}",
              number(part["kl_to"]), number(part["kl_from"])])
        for part in gate["parts"]
    ]  # fmt: skip
    chosen = "as the run file says" if gate["chosen"] else "chosen automatically"
    reward = ""
    if gate["guided"]:
        name = html.escape(gate["reward_name"] or "reward")
        reward = f", with the reward {name} = {html.escape(gate['reward_text'])}"
    told = (
        f"<p>{gate['gate']}, {DEFINITIONS.get(gate['gate'], '')}{reward}. Made by "
        f"<code>{html.escape(gate['lowering'])}</code>, {chosen}.</p>"
    )
    parts = table(
        ["part", "weight", "share", "KL to it, nats", "KL from it, nats"], rows,
        _solved(gate),
    )  # fmt: skip
    facts = table(["", ""], [("", row) for row in _facts(gate)])
    return section(f"<code>{html.escape(gate['text'])}</code>", told, parts, facts)


def _solved(gate: Mapping[str, Any]) -> str:
    ends = list(dict.fromkeys(gate["solves"]))
    if not ends:
        return "By regression on merged samples; there was no control problem."
    count = len(gate["solves"])
    return f"{count} control problem{'s' if count > 1 else ''}: {', '.join(ends)}."


def _facts(gate: Mapping[str, Any]) -> list[list[str]]:
    rows = [["objective that the gate maximises", number(gate["objective"])]]
    if gate["own_reward"] is not None:
        rows.append(["mean of its reward", number(gate["own_reward"])])
    if gate["total_variation"] is not None:
        label = "total variation to the exact optimum (of the flow's ODE, on a grid)"
        rows.append([label, number(gate["total_variation"])])
    else:
        why = f"not compared with a closed form: {gate['no_closed_form']}"
        rows.append([html.escape(why), MISSING])
    names = {"apart": "-log of the overlap of the parts, nats",
             "path_kl": "path-KL from the average of the parts, nats"}  # fmt: skip
    for key, value in gate["stats"].items():
        shown = MISSING if value is None else f"{value:.4g}"
        rows.append([names.get(key, html.escape(key.replace("_", " "))), shown])
    return rows


def _samples(directory: RunDirectory, data: Report) -> str:
    if not plots.available():
        return section(
            "Figures", "<p>matplotlib is not installed, so that this report has tables only. "
            "<code>pip install 'tiltflow[plots]'</code> and <code>tiltflow report DIR</code> add "
            "the figures.</p>",
        )  # fmt: skip
    fig = samples_figure(_read_samples(directory, data), _colours(data), _picture(data))
    return section("Samples of the models and the gates",
                   image(plots.png(fig), "Samples of each model and gate"))  # fmt: skip


def _molecules(data: Report, every: Mapping[str, Molecules]) -> str:
    """Metrics of the molecules of all models and gates together, and the first of each."""
    told = metrics_table(data["numbers"], {name: name for name in every}, None)
    first = "".join(
        f"<h3>{html.escape(name)}</h3>{grid(cards(each.chosen(range(min(FEW, len(each))))))}"
        for name, each in every.items()
    )
    return section("Molecules", told, legend(), first)


def _classes(data: Report) -> str:
    shares = data["shares"]
    if not shares:
        return ""
    shown = {name: each for name, each in shares.items()
             if name in data["models"] or name == data["root"]}  # fmt: skip
    rows = [
        ("", [html.escape(label), *(f"{100 * each[label]['value']:.1f} %"
                                    for each in shares.values())])
        for label in data["classes"]
    ]  # fmt: skip
    note = "As the first model with classes sees them, or the one that evaluate.classes names."
    figures = ""
    if plots.available():
        figures = image(plots.png(classes_figure(shown, _colours(data))), "Share of each class")
    header = ["class", *(html.escape(name) for name in shares)]
    return section("Classes of the parts and the result", figures, table(header, rows, note))


def _models(data: Report) -> str:
    """What is measured of every model and gate alike."""
    numbers = data["numbers"]
    every = {key: None for each in numbers.values() for key in each}
    shown = [
        key for key in every
        if key == "reward" or key.partition(".")[0] in ("mean", "variance", *data["judges"])
    ]  # fmt: skip
    if not shown:
        return ""
    label = {"reward": f"reward {data['reward']}"}
    rows = [
        ("key" if name == data["root"] else "",
         [html.escape(name), *(number(each.get(key)) for key in shown)])
        for name, each in numbers.items()
    ]  # fmt: skip
    header = ["", *(html.escape(label.get(key, key.replace(".", " "))) for key in shown)]
    return section("Every model", table(header, rows))


def _training(data: Report, records: Sequence[Mapping[str, Any]]) -> str:
    if not plots.available():
        return ""
    parts = []
    for number_, gate in enumerate(data["gates"]):
        updates = [r for r in records if r["kind"] == "update"
                   and str(r["at"]).split("/")[:2] == ["gate", str(number_)]]  # fmt: skip
        fig = plots.training_figure(updates)
        if fig is not None:
            parts.append(f"<p><code>{html.escape(gate['text'])}</code></p>")
            parts.append(image(plots.png(fig), f"Training curves of {gate['text']}"))
    return section("Training", *parts) if parts else ""
