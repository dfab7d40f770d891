"""Several processes without accelerate."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Gloo:
    """The smallest distributed backend: what ``accelerate.Accelerator`` does, by hand."""

    process_index: int
    num_processes: int = 2
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        loss.backward(**kwargs)  # type: ignore[no-untyped-call]

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: int = 2) -> Any:
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        out = tensor.clone()
        torch.distributed.all_reduce(out)
        return out / self.num_processes if reduction == "mean" else out
