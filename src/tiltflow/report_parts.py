"""Parts of a report that every kind of run has: verdicts, findings, cost, how to do it again."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from tiltflow.html_page import number, section, table


def verdicts(data: Mapping[str, Any]) -> list[str]:
    """Chips for a report's head: expectations and warnings."""
    chips = []
    found = data["expectations"]
    if found:
        met = sum(v["met"] for v in found)
        kind = "good" if met == len(found) else "bad"
        chips.append(f'<span class="chip {kind}">{met} of {len(found)} expectations met</span>')
    warnings = sum(f["level"] == "warning" for f in data["findings"])
    kind, told = ("bad", f"{warnings} warning(s)") if warnings else ("good", "no warnings")
    chips.append(f'<span class="chip {kind}">{told}</span>')
    return chips


def findings(data: Mapping[str, Any]) -> str:
    """What to know before believing a result."""
    boxes = [
        f'<div class="box {f["level"]}"><b>{html.escape(f["title"])}.</b> '
        f"{html.escape(f['text'])}</div>"
        for f in data["findings"]
    ]
    return section("What to know before believing it", *boxes) if boxes else ""


def cost(data: Mapping[str, Any]) -> str:
    """Evaluations and seconds by stage."""
    stages: list[tuple[str, Mapping[str, float]]] = list(data["cost"].items())
    total = {k: sum(each[k] for _, each in stages) for k in stages[0][1]} if stages else {}
    rows = [
        (kind, [html.escape(name), f"{each['evaluations']:,.0f}", f"{each['cpu_seconds']:.1f}",
                f"{each['wall_seconds']:.1f}"])
        for kind, name, each in (*(("", n, e) for n, e in stages), ("key", "total", total))
        if each
    ]  # fmt: skip
    header = ["", "network evaluations", "CPU seconds", "wall seconds"]
    note = "Evaluations of pre-trained networks and their copies, one per state, forward only."
    return section("Cost", table(header, rows, note))


def expectations(data: Mapping[str, Any]) -> str:
    """Numbers that the run file expects, and what was measured."""
    if not data["expectations"]:
        return ""
    rows = [
        ("", [f"<code>{html.escape(v['metric'])}</code>", f"{v['value']:.4g} ± {v['within']:.2g}",
              number(v["measured"]),
              f'<span class="chip {"good" if v["met"] else "bad"}">'
              f"{'met' if v['met'] else 'missed'}</span>", html.escape(v["from"])])
        for v in data["expectations"]
    ]  # fmt: skip
    header = ["metric", "expected", "measured", "verdict", "from"]
    return section("Expectations", table(header, rows))


def appendix(data: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """The configuration and the machine."""
    facts = [
        ("", [html.escape(str(k)), html.escape(str(v))])
        for k, v in environment.items() if v is not None
    ]  # fmt: skip
    return section(
        "How to do it again",
        "<p>The complete configuration; saved as a file, <code>tiltflow run FILE.toml</code> "
        "repeats this run, to the same bits on the same kind of machine.</p>",
        f"<pre>{html.escape(data['config'])}</pre>",
        f"<details><summary>Environment</summary>{table(['', ''], facts)}</details>",
    )
