"""What samples are of: the share of each class. Neither direction is better; zero is collapse."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tiltflow.errors import ShapeError
from tiltflow.types import Estimate


def shares(classes: Tensor, num_classes: int) -> Mapping[str, Estimate]:
    """The share of each class among independent samples, with its binomial standard error.

    Args:
        classes: (N,) of integers in [0, num_classes).
        num_classes: how many classes there are; absent ones have share 0.

    Returns:
        ``"0"``, ``"1"``, ...: the share p of the class; its error sqrt(p (1 - p) / N) uses
        Laplace's p = (n + 1) / (N + 2) so that a class never seen has a positive error.
    """
    c = torch.as_tensor(classes).detach().cpu()
    if c.ndim != 1 or c.numel() == 0 or c.is_floating_point():
        raise ShapeError(f"shares: need integers (N,) with N > 0, got {c.dtype} {tuple(c.shape)}.")
    if int(c.min()) < 0 or int(c.max()) >= num_classes:
        raise ShapeError(
            f"shares: classes run from {int(c.min())} to {int(c.max())}, outside "
            f"[0, {num_classes})."
        )
    n = c.numel()
    counts = torch.bincount(c.long(), minlength=num_classes).tolist()
    return {str(k): _share(m, n) for k, m in enumerate(counts)}


def _share(count: int, total: int) -> Estimate:
    p = (count + 1) / (total + 2)
    return Estimate(count / total, math.sqrt(p * (1 - p) / total), total)
