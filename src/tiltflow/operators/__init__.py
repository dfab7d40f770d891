"""Gates over pre-trained models, and circuits of them."""

from tiltflow.operators.circuit import circuit, drawn
from tiltflow.operators.gates import (
    Circuit,
    Contrast,
    Gate,
    Interpolation,
    Intersection,
    Prior,
    Union,
)
from tiltflow.operators.targets import Odds, guided_union, union_weights

__all__ = [
    "Circuit",
    "Contrast",
    "Gate",
    "Interpolation",
    "Intersection",
    "Odds",
    "Prior",
    "Union",
    "circuit",
    "drawn",
    "guided_union",
    "union_weights",
]
