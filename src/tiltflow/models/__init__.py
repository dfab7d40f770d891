"""Pre-trained models that a run file can name.

Each class is a recipe: it is cheap to construct and check, and ``load`` does the work. A
third-party package adds its own by a subclass of ``Model`` and an entry point of group
``tiltflow.models``.
"""

from tiltflow.models.analytic import Gaussian, GaussianMixture, Ring
from tiltflow.models.base import Model as Model
from tiltflow.models.base import Pretrained as Pretrained
from tiltflow.models.trained import EDM, Checkpoint, DenoisingCNN, DenoisingUNet, Digits

__all__ = [
    "EDM",
    "Checkpoint",
    "DenoisingCNN",
    "DenoisingUNet",
    "Digits",
    "Gaussian",
    "GaussianMixture",
    "Ring",
]
