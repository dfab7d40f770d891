"""How a run is driven, as opposed to what it computes: seed, machine, progress, resumption."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from tiltflow.seed import Seed


class Backend(Protocol):
    """Where training happens. ``accelerate.Accelerator`` satisfies it as it is."""

    @property
    def device(self) -> torch.device: ...
    @property
    def num_processes(self) -> int: ...
    @property
    def process_index(self) -> int: ...
    @property
    def is_main_process(self) -> bool: ...
    def backward(self, loss: Tensor, **kwargs: Any) -> None: ...
    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: int = 2) -> Any: ...
    def autocast(self) -> AbstractContextManager[Any]: ...
    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any: ...


@final
@dataclass(frozen=True)
class SingleProcess:
    """The backend of one process on one device.

    Args:
        device: where to train.
        precision: ``"fp32"``, or ``"bf16"`` to run networks (not states, adjoints or losses) in
            bfloat16.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        loss.backward(**kwargs)  # type: ignore[no-untyped-call]

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: int = 2) -> Any:
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        return tensor


@final
@dataclass(frozen=True)
class Snapshot:
    """Everything needed to continue a training: where it was, and its tensors."""

    address: tuple[str, ...]
    update: int
    tensors: Mapping[str, Tensor]


@final
@dataclass(frozen=True)
class Step:
    """A sign of life of a training.

    ``snapshot`` makes a ``Snapshot`` of this moment, or is ``None`` where the state is not
    between two rounds.
    """

    address: tuple[str, ...]
    update: int
    total: int
    stats: Mapping[str, float]
    snapshot: Callable[[], Snapshot] | None = None


def _ignore(step: Step) -> None:
    """Default of ``on_step``."""


@final
@dataclass(frozen=True)
class Context:
    """Seed, backend, progress callback, and the snapshot to resume from.

    A snapshot is used by the training whose address is the snapshot's, and by no other, so that
    the same ``Context`` can be handed down through an outer loop.
    """

    seed: Seed = field(default_factory=lambda: Seed(0))
    backend: Backend = field(default_factory=SingleProcess)
    resume: Snapshot | None = None
    on_step: Callable[[Step], None] = _ignore

    def child(self, *labels: str | int) -> Context:
        """The same context at a deeper address."""
        return replace(self, seed=self.seed.child(*labels))

    def snapshot_here(self) -> Snapshot | None:
        """The snapshot of exactly this address, if there is one."""
        here = self.resume is not None and self.resume.address == self.seed.path
        return self.resume if here else None
