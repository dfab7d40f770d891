"""What a terminal shows: progress with the time left, and the result as a small table."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from tiltflow.recorder import Progress


def summary_text(report: dict[str, Any]) -> str:
    """The result as a small table for a terminal."""
    if "circuit" in report:
        return _merge_text(report)
    numbers = report["numbers"]
    level = report["levels"][0]
    rows = [
        ("mean reward", "reward.mean"), (f"worst {level:.0%} mean", "tails.left_cvar"),
        ("median reward", "reward.median"), ("path-KL (nats)", "path_kl"),
        ("gain of worst / way to median", "gain.tail_to_median"),
        *((f"{judge} mean", f"{judge}.mean") for judge in report["judges"]),
        ("beyond the threshold", "tail_aware.tail_mass"),
        ("stable atoms", "molecules.atom_stability"),
        ("stable molecules", "molecules.molecule_stability"),
        ("valid, in one piece", "molecules.valid_connected"),
        ("unique of the valid", "molecules.unique"), ("Vendi score", "molecules.vendi"),
        ("achieved tilt, slope", "tilt.slope"), ("achieved tilt, R²", "tilt.r2"),
    ]  # fmt: skip
    lines = ["".join([f"{'':30}", *(f"{name:>22}" for name in numbers)])]
    for label, key in rows:
        cells = [_cell(each.get(key)) for each in numbers.values()]
        if any(cells):
            lines.append("".join([f"{label:30}", *(f"{cell:>22}" for cell in cells)]))
    return "\n".join([*lines, *_findings(report)])


def _findings(report: dict[str, Any]) -> list[str]:
    return [f"\n{f['level'].upper()}: {f['title']}. {f['text']}" for f in report["findings"]]


def _merge_text(report: dict[str, Any]) -> str:
    """The circuit, and what became of every gate."""
    lines = [report["drawn"], "", f"{'':44}{'KL to it':>20}{'KL from it':>20}"]
    for gate in report["gates"]:
        facts = [("objective", gate["objective"]), ("reward", gate["own_reward"]),
                 ("total variation", gate["total_variation"])]  # fmt: skip
        told = ", ".join(f"{name} {_cell(value)}" for name, value in facts if value is not None)
        lines.append(f"{gate['text']}: {gate['lowering']}, {told}")
        for part in gate["parts"]:
            name = f"  {part['share']:.3g} {part['name']}"
            lines.append(f"{name:44}{_cell(part['kl_to']):>20}{_cell(part['kl_from']):>20}")
    return "\n".join([*lines, *_findings(report)])


def _cell(estimate: dict[str, Any] | None) -> str:
    if estimate is None or estimate["value"] is None:
        return ""
    error = estimate["standard_error"]
    return f"{estimate['value']:.4f}" + (f" ± {error:.4f}" if error else "")


def say(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr)


@final
class Bar:
    """Progress on stderr: a bar on a terminal, else a line every ten seconds."""

    EVERY = 10.0

    def __init__(self) -> None:
        self._stage, self._told = "", time.monotonic()
        self._bar: Any = None
        self._started = self._told
        self._first = 0
        self._terminal = sys.stderr.isatty()

    def __call__(self, progress: Progress) -> None:
        if progress.stage != self._stage:
            self._begin(progress)
        if self._bar is not None:
            self._bar.n = progress.done
            self._bar.set_postfix_str(_short(progress.stats), refresh=False)
            self._bar.update(0)
        elif time.monotonic() - self._told >= self.EVERY:
            self._told = time.monotonic()
            say(f"{progress.stage}: {progress.done}/{progress.total}{self._left(progress)} "
                 f"{_short(progress.stats)}".rstrip())  # fmt: skip

    def close(self) -> None:
        """End the current bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _begin(self, progress: Progress) -> None:
        self.close()
        self._stage, self._started = progress.stage, time.monotonic()
        self._first = progress.done
        if self._terminal:
            from tqdm import tqdm

            self._bar = tqdm(total=progress.total, initial=progress.done, desc=progress.stage,
                             file=sys.stderr, leave=False, dynamic_ncols=True)  # fmt: skip

    def _left(self, progress: Progress) -> str:
        done = progress.done - self._first
        if done < 1:
            return ""
        seconds = (time.monotonic() - self._started) / done * (progress.total - progress.done)
        return f", {seconds:.0f} s left"


def _short(stats: Mapping[str, float]) -> str:
    shown = [k for k in ("loss", "path_kl", "terminal") if k in stats]
    return " ".join(f"{k}={stats[k]:.4g}" for k in shown)
