"""Building blocks of an HTML page without network access: sections, tables, embedded images."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
:root { --ink:#1a202c; --soft:#4a5568; --line:#e2e8f0; --blue:#1f6feb; }
* { box-sizing: border-box }
body { margin:0; color:var(--ink); background:#f7f8fa; line-height:1.55;
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif }
main { max-width:980px; margin:0 auto; padding:2.5rem 1.25rem 4rem }
h1 { font-size:1.9rem; margin:0 0 .2rem; letter-spacing:-.015em }
h2 { font-size:1.2rem; margin:0 0 .7rem; letter-spacing:-.01em }
p { margin:.4rem 0 .8rem; max-width:72ch } .lead { font-size:1.08rem }
.soft, small, caption { color:var(--soft) } caption { text-align:left; font-size:.88rem;
  caption-side:bottom; padding-top:.5rem }
section { background:#fff; border:1px solid var(--line); border-radius:10px;
  padding:1.3rem 1.5rem 1.1rem; margin:1.1rem 0 }
.wide { overflow-x:auto } table { border-collapse:collapse; width:100%; font-size:.93rem }
th { text-align:left; font-weight:600; color:var(--soft); font-size:.85rem }
th, td { padding:.42rem .7rem .42rem 0; border-bottom:1px solid var(--line); vertical-align:top }
td.n, th.n { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap }
tr.key td { font-weight:600; background:#f2f7ff }
td small { white-space:nowrap }
img { max-width:100%; height:auto; display:block; margin:.3rem 0 }
.chip { display:inline-block; border-radius:99px; padding:.1rem .7rem; font-size:.83rem;
  margin:.15rem .35rem .15rem 0; border:1px solid var(--line); background:#fff }
.good { color:#1a6b3c; background:#eaf7ef; border-color:#bfe5cd }
.bad { color:#9b2c2c; background:#fdf0ef; border-color:#f3c9c5 }
.box { border-left:4px solid #cbd5e0; padding:.5rem .9rem; margin:.6rem 0; background:#f7f8fa;
  border-radius:0 6px 6px 0 } .box.warning { border-color:#dd6b20; background:#fff6ec }
pre { background:#f4f6f9; border-radius:8px; padding:.9rem 1rem; overflow-x:auto; font-size:.8rem;
  line-height:1.45 } code { font-size:.92em }
details summary { cursor:pointer; font-weight:600 }
.cards { display:grid; gap:.7rem; margin:.5rem 0 1rem;
  grid-template-columns:repeat(auto-fill,minmax(286px,1fr)) }
.molecule { border:1px solid var(--line); border-radius:8px; padding:.35rem .5rem .3rem; margin:0 }
.molecule svg { width:49%; height:auto; vertical-align:middle }
.molecule.poor { background:#fffafa; border-color:#f3c9c5 }
.molecule figcaption { font-size:.84rem; color:var(--soft); line-height:1.35 }
.molecule figcaption b { color:var(--ink) }
td .molecule { min-width:250px; white-space:normal; text-align:left }
@media print { section { break-inside:avoid } body { background:#fff } }
"""

MISSING = "\u2013"
"""Stands where there is no number."""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page; empty parts are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)} · tiltflow</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(p for p in parts if p)}</main></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A card with a heading."""
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def image(png: bytes, alternative: str) -> str:
    """An embedded picture."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{data}">'


def number(estimate: Mapping[str, Any] | None, digits: int = 4) -> str:
    """``1.234 ± 0.005``; rounded where the standard error says that digits are noise."""
    if estimate is None or estimate["value"] is None:
        return MISSING
    value, error = float(estimate["value"]), float(estimate["standard_error"] or 0.0)
    if error <= 0:
        return f"{value:.{digits}g}"
    decimals = min(6, max(0, 1 - int(f"{error:e}".split("e")[1])))
    return f"{value:.{decimals}f} <small>± {error:.{decimals}f}</small>"


def interval(ends: Sequence[float]) -> str:
    """``-1.83 to -1.74``, with as many digits as its length deserves."""
    low, high = ends
    if not high > low:
        return f"{low:.4g}"
    decimals = min(6, max(0, 1 - int(f"{high - low:e}".split("e")[1])))
    return f"{low:.{decimals}f} to {high:.{decimals}f}"


def plain(estimate: Mapping[str, Any]) -> str:
    """``number`` without mark-up."""
    return number(estimate).replace("<small>", "").replace("</small>", "")


def table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], note: str = "") -> str:
    """Rows of (class, cells); the first column is text, the others are numbers."""
    head = "".join(f'<th class="{"n" if i else ""}">{cell}</th>' for i, cell in enumerate(header))
    body = "".join(
        f'<tr class="{kind}">'
        + "".join(f'<td class="{"n" if i else ""}">{c}</td>' for i, c in enumerate(cells))
        + "</tr>"
        for kind, cells in rows
    )
    caption = f"<caption>{note}</caption>" if note else ""
    return (
        f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
