"""What ``rfm_images.py`` works with: settings, models, samples that are kept, judges."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from rfm_images_judges import Judges, discriminator, in_batches, real_digits
from torch import Tensor
from toys import MODELS, Store

from tiltflow.adapters.checkpoint import load_tensors, save_tensors
from tiltflow.adapters.ddpm_images import load_mnist_classifier, load_unet, pixels_of_centred
from tiltflow.algorithms import Superposition
from tiltflow.flow import FlowModel
from tiltflow.kernel import Ancestral
from tiltflow.operators import circuit
from tiltflow.sample import Sampler
from tiltflow.seed import Seed

DATA = MODELS.parent / "data"

CLASSIFIER = MODELS / "mnist_classifier" / "model.safetensors"

PARTS = ("mnist", "fashion")

PREFERRED = 5
"""The digit that the guided union prefers: rare among digits, and clothes are hardly taken for it.
The reward is the classifier's probability of it."""

BALANCED = "0.5*mnist | 0.5*fashion"


@dataclass(frozen=True)
class Setting:
    """What a run costs.

    Args:
        name: begins the keys of its results.
        bank: samples of each part.
        updates: of the union of equal shares, with ``batch`` images each.
        taught: updates of the union of equal shares that its parts teach.
        again: updates of the other unions, which start from that one.
        rate: peak learning rate.
        fresh: samples that each union is measured on.
        steps: of the ancestral sampler.
        judging: updates of the discriminator.
    """

    name: str
    bank: int
    updates: int
    taught: int
    again: int
    fresh: int
    batch: int = 64
    rate: float = 2e-3
    steps: int = 50
    judging: int = 300


QUICK = Setting(
    "quick", bank=24, updates=3, taught=2, again=2, fresh=16, batch=8, steps=3, judging=40
)
CPU = Setting("cpu", bank=1536, updates=1000, taught=500, again=250, fresh=768)
FULL = Setting(
    "full",
    bank=30_000,
    updates=20_000,
    taught=20_000,
    again=4000,
    fresh=5000,
    batch=256,
    steps=100,
)


class Lab:
    """Models, samples and judges of one seed, each made once and kept in files.

    Args:
        store: of the numbers.
        seed: of everything that is drawn.
        setting: what it costs.
        device: of the models.
    """

    def __init__(self, store: Store, seed: int, setting: Setting, device: str = "cpu") -> None:
        self.store, self.setting, self.seed = store, setting, Seed(seed)
        self.folder = store.path.parent / "images" / setting.name / str(seed)
        self.key = lambda name: f"{setting.name}/{name}/{seed}"
        self.parents = {
            name: _moved(load_unet(MODELS / "ddpm_unet_28" / f"model_{name}.safetensors"), device)
            for name in PARTS
        }
        self.sampler = Sampler(Ancestral(), setting.steps, batch_size=128)

    def kept(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Tensors in a file, made if it is missing."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            save_tensors(path, make())
        return load_tensors(path)

    def drawn(self, name: str, model: FlowModel, count: int, seed: Seed | None = None) -> Tensor:
        """Samples of a model, on the CPU."""
        seed = self.seed.child(name) if seed is None else seed

        def make() -> Mapping[str, Tensor]:
            start = time.process_time()
            x = self.sampler.sample(model, count, seed=seed).cpu()
            return {"x": x, "seconds": torch.tensor(time.process_time() - start)}

        return self.kept(name, make)["x"]

    def cost(self, name: str) -> float:
        """Milliseconds per sample that ``drawn`` took, CPU time."""
        known = load_tensors(self.folder / f"{name}.safetensors")
        return 1000 * float(known["seconds"]) / len(known["x"])

    @functools.cached_property
    def bank(self) -> dict[str, Tensor]:
        """Samples of the parts, which all trainings share."""
        return {
            name: self.drawn(f"bank-{name}", model, self.setting.bank, self.seed.child(name))
            for name, model in self.parents.items()
        }

    @functools.cached_property
    def superposed(self) -> Mapping[str, Tensor]:
        """Samples of both models at each step, and the posterior of each model."""

        def make() -> Mapping[str, Tensor]:
            start = time.process_time()
            x, posterior = Superposition().traced(
                circuit(BALANCED), list(self.parents.values()), self.setting.fresh,
                seed=self.seed.child("superposition"), sampler=self.sampler,
            )  # fmt: skip
            seconds = torch.tensor(time.process_time() - start)
            return {"x": x.cpu(), "posterior": posterior.cpu(), "seconds": seconds}

        return self.kept("superposition", make)

    @functools.cached_property
    def judges(self) -> Judges:
        """The discriminator sees the first two thirds of the bank."""
        net, seen = load_mnist_classifier(CLASSIFIER), 2 * self.setting.bank // 3
        part = discriminator(
            *(pixels_of_centred(x[:seen]) for x in self.bank.values()),
            self.seed.child("discriminator"), self.setting.judging,
        )  # fmt: skip
        real = in_batches(net.features, real_digits(DATA, 0, 5000))
        alone = Judges(net, part, real)
        digits, clothes = alone.halves(self.superposed["x"])
        return Judges(net, part, real, (alone.features(digits), alone.features(clothes)))


def _moved(model: FlowModel, device: str) -> FlowModel:
    model.net.to(device)
    return model
