"""The one optimiser loop of the library, over any loss and any backend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, final

import torch
from torch import Tensor, nn

from tiltflow.context import Context, Snapshot, Step
from tiltflow.errors import CheckpointError, ConfigError, NonFiniteError


@final
@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of the optimiser loop (Adam).

    Args:
        num_updates: number of optimiser updates; an upper bound where a loss can say it converged.
        learning_rate: peak learning rate.
        decay: ``"cosine"`` to zero over the run, or ``"constant"``.
        warmup: updates of linear warm-up.
        betas, epsilon, weight_decay: Adam's.
        clip_norm: bound of the gradient norm (Adjoint Matching, G.2: 1).
        ema: decay of the exponential average of the weights that is returned; 0 switches it off.
            It warms up as (1 + u) / (10 + u).
        accumulate: micro-batches per update.
    """

    num_updates: int = 1000
    learning_rate: float = 1e-3
    decay: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema: float = 0.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        checks = {
            "num_updates": self.num_updates >= 0,
            "learning_rate": self.learning_rate > 0,
            "decay": self.decay in ("cosine", "constant"),
            "warmup": self.warmup >= 0,
            "betas": len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "clip_norm": self.clip_norm > 0,
            "ema": 0 <= self.ema < 1,
            "accumulate": self.accumulate >= 1,
        }
        for name, fine in checks.items():
            if not fine:
                raise ConfigError(f"Training: {name}={getattr(self, name)!r} is out of range.")

    def rate(self, update: int) -> float:
        """Learning rate of an update."""
        warm = min(1.0, (update + 1) / self.warmup) if self.warmup else 1.0
        if self.decay == "constant":
            return self.learning_rate * warm
        return (
            self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * update / self.num_updates))
        )


class Loss(Protocol):
    """What is minimised. Data are drawn from addressed seeds, so that only the number counts."""

    def __call__(self, update: int, part: int) -> tuple[Tensor, Mapping[str, float]]:
        """Loss and statistics of micro-batch ``part`` of an update."""
        ...

    def between_rounds(self, update: int) -> bool:
        """Whether ``state`` before this update is complete, i.e. a snapshot can be taken."""
        ...

    def converged(self, update: int) -> bool:
        """Whether training can stop before this update."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """Tensors that cannot be drawn again, e.g. a replay buffer."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of ``state``."""
        ...


@final
class _Trainer:
    """Optimiser, average and their state."""

    def __init__(self, module: nn.Module, settings: Training) -> None:
        self.settings, self.module = settings, module
        self.names = [n for n, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError(
                f"{type(module).__name__} has no trainable parameters. Give the model a "
                "Correction, e.g. model.with_delta(Correction(MLP(event, zero_init=True)))."
            )
        self.optimiser = torch.optim.Adam(
            self.parameters, lr=settings.learning_rate, betas=settings.betas,
            eps=settings.epsilon, weight_decay=settings.weight_decay,
            fused=all(p.is_floating_point() for p in self.parameters),
        )  # fmt: skip
        self.average = [p.detach().clone() for p in self.parameters] if settings.ema else []

    def update(self, number: int, context: Context) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.rate(number)
        if context.backend.num_processes > 1:
            for p in self.parameters:
                if p.grad is not None:
                    p.grad = context.backend.reduce(p.grad, reduction="mean")
        norm = float(context.backend.clip_grad_norm_(self.parameters, self.settings.clip_norm))
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.average:
            keep = min(self.settings.ema, (1 + number) / (10 + number))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - keep)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for i, name in enumerate(self.names):
            out[f"parameter/{name}"] = self.parameters[i].detach()
            if self.average:
                out[f"average/{name}"] = self.average[i]
            for key, entry in self.optimiser.state.get(self.parameters[i], {}).items():
                out[f"optimiser/{key}/{name}"] = torch.as_tensor(entry)
        return {key: tensor.detach().clone().contiguous() for key, tensor in out.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        try:
            for i, name in enumerate(self.names):
                p = self.parameters[i]
                p.copy_(tensors[f"parameter/{name}"])
                if self.average:
                    self.average[i].copy_(tensors[f"average/{name}"])
                state = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    entry = tensors.get(f"optimiser/{key}/{name}")
                    if entry is not None:
                        state[key] = entry.clone() if key == "step" else entry.clone().to(p)
                if state:
                    self.optimiser.state[p] = state
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"The snapshot does not fit the module being trained ({error}); it belongs to "
                "another model. Start again in a new directory."
            ) from None

    @torch.no_grad()
    def finish(self) -> None:
        for p, average in zip(self.parameters, self.average, strict=bool(self.average)):
            p.copy_(average)


def optimise(module: nn.Module, loss: Loss, settings: Training, context: Context) -> int:
    """Minimise ``loss`` over the trainable parameters of ``module``, in place.

    Returns:
        the number of updates made. The module ends with its averaged weights (``ema``).

    Raises:
        NonFiniteError: if the loss or its gradient is not finite; nothing is repaired silently.
        CheckpointError: if ``context.resume`` belongs to another module.
    """
    trainer, first = _Trainer(module, settings), 0
    snapshot = context.snapshot_here()
    if snapshot is not None:
        trainer.load(snapshot.tensors)
        loss.load({k[5:]: v for k, v in snapshot.tensors.items() if k.startswith("loss/")})
        first = snapshot.update
    address = context.seed.path

    def freeze_frame(update: int) -> Snapshot:
        kept = {f"loss/{k}": v.detach().clone() for k, v in loss.state().items()}
        return Snapshot(address, update, trainer.tensors() | kept)

    done = first
    for update in range(first, settings.num_updates):
        if loss.converged(update):
            break
        stats: dict[str, float] = {}
        for part in range(settings.accumulate):
            value, stats_of_part = loss(update, part)
            stats = {**stats, **stats_of_part}
            stats["loss"] = stats.get("loss", 0.0) + float(value.detach()) / settings.accumulate
            if not math.isfinite(stats["loss"]):
                raise NonFiniteError(
                    "/".join(address) or "training", update, "the loss",
                    "Lower the learning rate or the rate (a smaller tilt); the last snapshot "
                    "is intact.",
                )  # fmt: skip
            context.backend.backward(value / settings.accumulate)
        norm = trainer.update(update, context)
        if not math.isfinite(norm):
            raise NonFiniteError(
                "/".join(address) or "training", update, "the gradient of the loss"
            )
        done = update + 1
        can_freeze = loss.between_rounds(done)
        frame = (lambda u=done: freeze_frame(u)) if can_freeze else None
        context.on_step(
            Step(address, done, settings.num_updates, {**stats, "gradient_norm": norm}, frame)
        )
    trainer.finish()
    return done
