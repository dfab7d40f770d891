"""Optimal transport between weighted banks: costs, and Kantorovich potentials as ``Potential``.

Three ways, with one result: ``line`` (one dimension, in closed form), ``exact`` (a linear
program) and ``sinkhorn`` (entropic and debiased: smooth).
"""

from tiltflow.transport.exact import exact
from tiltflow.transport.ground import Ground, Power, Transport, thinned
from tiltflow.transport.line import line
from tiltflow.transport.sinkhorn import Entropic, sinkhorn

__all__ = ["Entropic", "Ground", "Power", "Transport", "exact", "line", "sinkhorn", "thinned"]
