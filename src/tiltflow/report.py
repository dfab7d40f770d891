"""One self-contained HTML file about a run, for a reader who was not there."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tiltflow import plots
from tiltflow.adapters.checkpoint import load_tensors, write_atomic
from tiltflow.diagnosis import EXPLANATIONS
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.html_page import MISSING, image, interval, number, page, plain, section, table
from tiltflow.merges.report import merge_page, merge_picture
from tiltflow.molecules import Molecules
from tiltflow.report_molecules import molecules_sections, read_all
from tiltflow.report_parts import appendix, cost, expectations, findings, verdicts
from tiltflow.report_training import training, two_stages
from tiltflow.rundir import RunDirectory

Samples = Mapping[str, tuple[Tensor, Tensor]]

_TITLES = {"pretrained": "pre-trained", "tuned": "tuned", "baseline": "baseline"}


def write_report(directory: RunDirectory) -> Path:
    """Write ``report.html`` from ``report.json``, the metrics and the samples; computes nothing.

    Raises:
        ConfigError: if the run has not been evaluated yet.
    """
    data = _read(directory)
    records = directory.records(directory.metrics)
    environment = directory.read_json(directory.environment) or {}
    if "circuit" in data:
        text = merge_page(directory, data, records, environment)
    else:
        names = list(data["numbers"])
        samples = read_samples(directory, names)
        molecules = read_all(directory, data, {name: name for name in names})
        text = render(data, samples, records, environment, molecules)
    write_atomic(directory.html, text.encode())
    return directory.html


def write_picture(directory: RunDirectory, path: Path) -> None:
    """Save the worst samples before and after, beside the histogram, as a PNG file; of a merge,
    samples of the models and the gates."""
    if not plots.available():
        raise UnsupportedError("Pictures need matplotlib: pip install 'tiltflow[plots]'.")
    data = _read(directory)
    if "circuit" in data:
        write_atomic(path, merge_picture(directory, data))
        return
    samples = read_samples(directory, ["pretrained", "tuned"])
    picture = tuple(data["picture"]) if data["picture"] else None
    write_atomic(path, plots.png(plots.readme_figure(samples, data["levels"][0], picture)))


def _read(directory: RunDirectory) -> dict[str, Any]:
    data: dict[str, Any] | None = directory.read_json(directory.report)
    if data is None:
        raise ConfigError(f"{directory.path} has no report.json: the run is not finished.")
    return data


def read_samples(directory: RunDirectory, names: Sequence[str]) -> Samples:
    """Points and rewards of each model."""
    out = {}
    for name in names:
        tensors = load_tensors(directory.samples / f"{name}.safetensors")
        out[name] = (tensors["points"], tensors["rewards"])
    return out


def render(
    data: Mapping[str, Any],
    samples: Samples,
    records: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    molecules: Mapping[str, Molecules] | None = None,
) -> str:
    """The HTML text."""
    rewards = {name: each for name, (_, each) in samples.items()}
    shown = (
        molecules_sections(data, molecules, rewards, _TITLES)
        if molecules
        else _samples(data, samples)
    )
    parts = [
        _head(data), findings(data), _result(data), _rewards(data, samples), shown,
        _shares(data), _diagnostics(data), two_stages(data), training(data, records), cost(data),
        expectations(data), appendix(data, environment),
    ]  # fmt: skip
    return page(str(data["name"]), parts)


def _figure(fig: Any, alternative: str) -> str:
    return image(plots.png(fig), alternative)


def _head(data: Mapping[str, Any]) -> str:
    before, after = data["numbers"]["pretrained"], data["numbers"]["tuned"]
    level = data["levels"][0]
    chips = verdicts(data)
    solved = data["solves"]["tuned"]
    chips.append(f'<span class="chip">{html.escape(solved["says"].split(";")[0])}</span>')
    lead = (
        f"A pre-trained generative model was fine-tuned with <b>{html.escape(data['solver'])}</b> "
        f"to raise <b>{html.escape(data['objective'])}</b>. The mean reward of its samples went "
        f"from {plain(before['reward.mean'])} to <b>{plain(after['reward.mean'])}</b>, that of "
        f"the worst {level:.0%} from {plain(before['tails.left_cvar'])} to "
        f"<b>{plain(after['tails.left_cvar'])}</b>. The tuned model is "
        f"<b>{plain(after['path_kl'])} nats</b> (path-KL) away from the pre-trained one."
    )
    explain = (
        "±&nbsp;is one standard error. <i>Path-KL</i> says how far the tuned model moved: at 0 it "
        "is the pre-trained model; at 1, a sample is on average e times more likely under the "
        "tuned model than under the pre-trained one; at 8, one in 3000. A reward without "
        "its distance is not a result: any reward can be had by going far enough."
    )
    return (
        f"<h1>{html.escape(str(data['name']))}</h1><div>{''.join(chips)}</div>"
        f'<p class="lead">{lead}</p><p class="soft">{explain}</p>'
    )


def _result(data: Mapping[str, Any]) -> str:
    numbers, levels = data["numbers"], data["levels"]
    rows = [("mean reward", "reward.mean", "")]
    for level in levels:
        rows.append((f"mean of the worst {level:.0%} (left CVaR)", f"tails.left_cvar_{level:g}",
                     "key" if level == levels[0] else ""))  # fmt: skip
    rows += [
        ("median", "reward.median", ""), ("5 % quantile", "reward.q05", ""),
        ("95 % quantile", "reward.q95", ""), ("standard deviation", "reward.std", ""),
    ]  # fmt: skip
    rows += [
        (f"mean of the best {level:.0%} (right CVaR)", f"tails.right_cvar_{1 - level:g}", "")
        for level in levels
    ]
    for judge in data["judges"]:
        rows.append((f"mean of the {judge} (not trained on)", f"{judge}.mean", ""))
        rows.append((f"worst {levels[0]:.0%} of the {judge}", f"{judge}.left_cvar", ""))
    rows += [
        ("path-KL from pre-trained, nats", "path_kl", "key"),
        ("gain of the mean, sample by sample", "gain.mean", ""),
        (f"gain of the worst {levels[0]:.0%}", "gain.left_cvar", ""),
        ("… as a part of the way to the old median", "gain.tail_to_median", ""),
    ]
    body = [
        (kind, [label, *(number(numbers[m].get(key)) for m in numbers)])
        for label, key, kind in rows
        if any(key in numbers[m] for m in numbers)
    ]
    known = data.get("intervals", {})
    if known:
        ends = [interval(known[m]["tails.left_cvar"]) for m in numbers]
        body.insert(2, ("", ["… its 95 % interval, by the bootstrap", *ends]))
    note = (
        "All models are sampled with the same noise, so that differences are sharper than values."
    )
    if data["baseline_rate"] is not None:
        note += (
            f" The baseline is a single solve at rate {data['baseline_rate']:.4g}, chosen so that "
            "its exact optimum is as far from the pre-trained model as the tuned model is."
        )
    return section("Result", table(["", *(_TITLES[m] for m in numbers)], body, note))


def _rewards(data: Mapping[str, Any], samples: Samples) -> str:
    if not plots.available():
        return section(
            "Figures", "<p>matplotlib is not installed, so that this report has tables only. "
            "<code>pip install 'tiltflow[plots]'</code> and <code>tiltflow report DIR</code> add "
            "the figures.</p>",
        )  # fmt: skip
    rewards = {name: r for name, (_, r) in samples.items()}
    fig = plots.reward_figure(rewards, data["levels"][0])
    return section("Rewards", _figure(fig, "Histograms and lower tails of the rewards"))


def _samples(data: Mapping[str, Any], samples: Samples) -> str:
    if not plots.available():
        return ""
    picture, level = tuple(data["picture"] or ()) or None, data["levels"][0]
    parts = [_figure(plots.worst_figure(samples, level, picture), "Worst samples of each model")]
    if picture is not None:
        parts += [
            "<p>The same noise: the worst samples of the pre-trained model, and below each what "
            "the other models make of the noise that it came from.</p>",
            _figure(plots.pairs_figure(samples, level, picture), "Same noise, other models"),
        ]
    return section("Samples", *parts)


def _shares(data: Mapping[str, Any]) -> str:
    shares = data["shares"]
    if not shares:
        return ""
    rows = [
        ("", [name, *(f"{100 * shares[m][name]['value']:.1f} %" for m in shares),
              _ratio(shares["tuned"][name], shares["pretrained"][name])])
        for name in data["classes"]
    ]  # fmt: skip
    header = ["class", *(_TITLES[m] for m in shares), "tuned / pre-trained"]
    figure = _figure(plots.shares_figure(shares), "Share per class") if plots.available() else ""
    note = "A class under half of its pre-trained share counts as collapsed."
    return section("Diversity: share of each class", figure, table(header, rows, note))


def _ratio(after: Mapping[str, float], before: Mapping[str, float]) -> str:
    return f"{after['value'] / before['value']:.2f}" if before["value"] > 0 else MISSING


def _diagnostics(data: Mapping[str, Any]) -> str:
    models = [m for m in data["numbers"] if m != "pretrained"]
    rows = [
        ("", [f"<b>{label}</b><br><small style='white-space:normal'>{meaning}</small>",
              *(number(data["numbers"][m].get(key)) for m in models)])
        for key, label, meaning in EXPLANATIONS
        if any(key in data["numbers"][m] for m in models)
    ]  # fmt: skip
    note = "The baseline is compared with the optimum of its own objective, not of the main one."
    return section(
        "Diagnostics", table(["", *(_TITLES[m] for m in models)], rows,
                              note if "baseline" in models else ""),
    )  # fmt: skip
