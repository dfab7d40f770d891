"""Plain words about a merge: do the parts meet, is anything lost, is it the optimum?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from tiltflow.algorithms.lowerings.control import APART
from tiltflow.diagnosis import LARGE_KL, Finding

FAR = 0.1
"""Total variation to the closed form that is worth a warning."""
UNCOVERED = 0.5
"""Nats by which a union may miss a part beyond what its weight costs."""
ERRORS = 3.0
"""Standard errors from which on a difference is more than chance."""


def findings(report: Mapping[str, Any]) -> list[Finding]:
    """All findings about the gates of ``report.json``, warnings first."""
    found = [f for gate in report["gates"] for f in _of_gate(gate, report)]
    return sorted(found, key=lambda f: f.level != "warning")


def _of_gate(gate: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[Finding]:
    yield from _unsolved(gate)
    yield from _apart(gate)
    yield from _unlikely(gate)
    yield from _uncovered(gate)
    yield from _shares(gate, report)
    yield from _far(gate)


def _unsolved(gate: Mapping[str, Any]) -> Iterator[Finding]:
    for number, result in enumerate(gate["solves"]):
        if result in ("STARVED", "DEGENERATE"):
            yield Finding(
                "warning", f"The solver gave up on {gate['text']}",
                f"Control problem {number + 1} of {len(gate['solves'])} ended as {result}.",
            )  # fmt: skip


def _apart(gate: Mapping[str, Any]) -> Iterator[Finding]:
    apart = gate["stats"].get("apart")
    if apart is not None and apart > APART:
        yield Finding(
            "warning", f"The parts of {gate['text']} hardly meet",
            f"They overlap by exp(-{apart:.1f}), where -log of the overlap is in nats and "
            f"{APART:g} is much: their intersection is hardly likely under any of them, and its "
            "samples may be of neither. A union or an interpolation may be what is meant.",
        )  # fmt: skip


def _unlikely(gate: Mapping[str, Any]) -> Iterator[Finding]:
    """An intersection should be likely under all of its parts, a contrast under the first."""
    likely = {"Intersection": gate["parts"], "Contrast": gate["parts"][:1]}
    for part in likely.get(gate["gate"], []):
        kl = part["kl_to"]["value"]
        if kl is not None and kl > LARGE_KL:
            yield Finding(
                "warning", f"{gate['text']} is far from {part['name']}",
                f"KL to it is {kl:.3g} nats; above {LARGE_KL:g}, fewer than one of "
                f"{math.exp(LARGE_KL):.0f} of its samples look like one of the merged model.",
            )  # fmt: skip


def _uncovered(gate: Mapping[str, Any]) -> Iterator[Finding]:
    """p >= w_i p_i, so that KL(p_i || p) of a union is at most log 1/w_i."""
    if gate["gate"] != "Union" or gate["guided"]:
        return
    for part in gate["parts"]:
        kl, most = part["kl_from"], -math.log(part["share"])
        if kl["value"] is None:
            continue
        if kl["value"] > most + UNCOVERED + ERRORS * (kl["standard_error"] or 0):
            yield Finding(
                "warning", f"{gate['text']} does not cover {part['name']}",
                f"KL({part['name']} || union) is {kl['value']:.3g} nats, but a mixture in which "
                f"it has the share {part['share']:.3g} is at most {most:.3g} away. Train longer, "
                "or with a larger bank.",
            )  # fmt: skip


def _shares(gate: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[Finding]:
    """Shares of classes of a union are the mean shares of its parts."""
    shares = report["shares"]
    if gate["gate"] != "Union" or gate["guided"] or not shares:
        return
    off = []
    for label, own in shares[gate["text"]].items():
        parts = [(p["share"], shares[p["name"]][label]) for p in gate["parts"]]
        mixed = sum(w * s["value"] for w, s in parts)
        errors = [w * s["standard_error"] for w, s in parts]
        error = math.hypot(own["standard_error"], *errors)
        if abs(own["value"] - mixed) > ERRORS * max(error, 1e-12):
            off.append(f"{label}: {own['value']:.1%} instead of {mixed:.1%} ± {error:.1%}")
    if off:
        yield Finding(
            "note", f"Class shares of {gate['text']} are not those of the mixture",
            f"{'; '.join(off)}. Train longer, or with a larger bank; parts that are gates are "
            "compared as they were made.",
        )  # fmt: skip


def _far(gate: Mapping[str, Any]) -> Iterator[Finding]:
    distance = gate["total_variation"]
    if distance is not None and distance["value"] > FAR:
        yield Finding(
            "warning", f"{gate['text']} is not its closed form",
            f"Total variation {distance['value']:.2g} between the merged model's density and the "
            f"exact optimum of the gate over exact parts; above {FAR:g} they differ visibly. "
            "Train longer, with more steps, or by another lowering; errors of gates below count "
            "here too.",
        )  # fmt: skip
