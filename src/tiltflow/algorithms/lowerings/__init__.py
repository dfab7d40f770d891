"""How a gate becomes a model: control problems, or one regression on merged samples."""

from tiltflow.algorithms.lowerings.base import (
    Descent,
    Job,
    Keeper,
    Lowered,
    Lowering,
    Merging,
)
from tiltflow.algorithms.lowerings.control import one_shot, terminal, trajectory, untrained
from tiltflow.algorithms.lowerings.regression import (
    distilled,
    geometric,
    particles,
    thinned,
    transported,
)
from tiltflow.operators import Contrast, Gate, Interpolation, Intersection, Union
from tiltflow.types import Access


def _unconditional(gate: Gate, conditional: bool) -> str:
    return "it does not know conditions" if conditional else ""


def _squares(gate: Gate, conditional: bool) -> str:
    assert isinstance(gate, Interpolation)
    if gate.power != 2 or gate.metric is not None:
        return "barycentres by transport are those of W_2^2 without a metric"
    return _unconditional(gate, conditional)


_TERMINAL = Lowering(terminal, Access.GRAD)
_CRITICS = Lowering(terminal, Access.GRAD, _unconditional)

LOWERINGS: dict[type[Gate], dict[str, Lowering]] = {
    Intersection: {
        "one_shot": Lowering(one_shot, Access.GRAD),
        "weighted": Lowering(geometric, Access.VALUE),
        "particles": Lowering(particles, Access.VALUE, _unconditional),
        "terminal": _TERMINAL,
        "trajectory": Lowering(trajectory, Access.GRAD),
    },
    Union: {"distilled": Lowering(distilled, Access.VALUE), "terminal": _CRITICS},
    Interpolation: {
        "transported": Lowering(transported, Access.BOTH, _squares),
        "terminal": _CRITICS,
    },
    Contrast: {"thinned": Lowering(thinned, Access.VALUE), "terminal": _TERMINAL},
}
"""By gate; the first that can make a gate is the default."""

__all__ = ["LOWERINGS", "Descent", "Job", "Keeper", "Lowered", "Lowering", "Merging", "untrained"]
