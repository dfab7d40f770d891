"""The union of two published image models for ``rfm.py``: digits or clothes, in one network.

    python experiments/rfm_images.py [--full] [--device cuda]

runs it alone. The models (MNIST and Fashion-MNIST, 28x28) are not in the repository: put them
into ``shared/models`` beside it, or name their folder by TILTFLOW_MODELS; MNIST's test set is
looked for in ``data`` beside that folder. Samples and networks are kept beside the results, so
that a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rfm_images_judges import in_batches, numbers, real_digits
from rfm_images_lab import (
    BALANCED,
    CLASSIFIER,
    CPU,
    DATA,
    FULL,
    PARTS,
    PREFERRED,
    QUICK,
    Lab,
)
from rfm_images_page import COLUMNS, TITLES, draw, section
from rfm_images_taught import taught
from torch import Tensor
from toys import MODELS, ROOT, Record, Store

from tiltflow.adapters.checkpoint import load_tensors
from tiltflow.adapters.ddpm_images import pixels_of_centred
from tiltflow.algorithms import Merging, merge
from tiltflow.context import Context
from tiltflow.density import Bank
from tiltflow.flow import FlowModel, freeze
from tiltflow.matching import MatchingLoss, fit_flow
from tiltflow.operators import Gate, circuit, guided_union, union_weights
from tiltflow.potential import BlackBox, Potential
from tiltflow.rewards import MnistDigit
from tiltflow.seed import Seed
from tiltflow.training import Training
from tiltflow.types import Cond, Estimate

GATES = {
    "balanced": BALANCED,
    "taught": BALANCED,
    "unbalanced": "0.75*mnist | 0.25*fashion",
    "guided": f"({BALANCED})[preferred]",
}
"""The circuits that are trained; A = 1 in all of them."""


@dataclass(frozen=True)
class Drawn:
    """The sampler of merges that share one bank: the first of the samples there are of a part."""

    banks: Mapping[int, Tensor]

    def sample(
        self, model: FlowModel, count: int, *, seed: Seed, cond: Cond | None = None
    ) -> Tensor:
        """(count, 1, 28, 28)."""
        return self.banks[id(model.net)][:count]


class Measured(Lab):
    """What is measured, each entry of the results a method."""

    def banks(self) -> Record:
        """What the samples of both parts cost."""
        milliseconds = [self.cost(f"bank-{name}") for name in self.bank]
        return {
            "count": self.setting.bank,
            "seconds": self.setting.bank * sum(milliseconds) / 1000,
        }

    def parts(self) -> Record:
        """The parts themselves, in equal numbers, and how often the discriminator is right."""
        seen, each = 2 * self.setting.bank // 3, self.setting.fresh // 2
        right = [
            (self.judges.fashion(self.bank[name][seen:]) >= 0.5) == (name == "fashion")
            for name in PARTS
        ]
        record = self.judges.measured(torch.cat([x[:each] for x in self.bank.values()]))
        record["right"] = [numbers(Estimate.of(r.double())) for r in right]
        record["milliseconds"] = self.cost("bank-mnist")
        losses = [self.losses(self.parents[name]) for name in PARTS]
        record["losses"] = [losses[0][0], losses[1][1]]
        real = real_digits(DATA, 5000, 5000)
        record["real"] = self.judges.of_pixels(real)
        return record

    def superposition(self) -> Record:
        """Both models at each step; its posterior is a second opinion on the discriminator."""
        x, posterior = self.superposed["x"], self.superposed["posterior"]
        record = self.judges.measured(x)
        says = self.judges.fashion(x) >= 0.5
        record["agrees"] = numbers(Estimate.of((says == (posterior[:, 1] > 0.5)).double()))
        record["certainty"] = float(posterior.max(1).values.mean())
        record["milliseconds"] = self.cost("superposition")
        del record["to_digits"], record["to_fashion"]  # they are what the others are compared with
        return record

    def trained(self, name: str) -> Record:
        """One network for a gate, by flow matching on the bank: that of equal shares starts from
        the digits' network, the others from it."""
        stats: dict[str, float] = {}

        def make() -> Mapping[str, Tensor]:
            ways = {"taught": self._taught, self.whole: self._merge}
            model, known = ways.get(name, self._fit)(name)
            stats.update(known)
            return dict(model.net.state_dict())

        state = self.kept(f"model-{name}", make)
        return {"stats": stats, "tensors": len(state)}

    def _merge(self, name: str) -> tuple[FlowModel, Mapping[str, float]]:
        settings = Merging(
            sampler=Drawn({id(m.net): self.bank[part] for part, m in self.parents.items()}),  # type: ignore[arg-type]
            training=self.training(self.setting.updates),
            bank_size=_bank_size(_gate(name), self.setting.bank),
            batch_size=self.setting.batch,
        )
        context = Context(self.seed.child("merge", name))
        merged = merge(_gate(name), self.parents, context=context, settings=settings)
        (lowered,) = merged.gates.values()
        return merged.model, lowered.stats

    def _taught(self, name: str) -> tuple[FlowModel, Mapping[str, float]]:
        teachers, training = list(self.parents.values()), self.training(self.setting.taught)
        context = Context(self.seed.child("merge", name))
        model = taught(
            teachers[0], teachers, list(self.bank.values()), _gate(name).shares, training,
            context, self.setting.batch,
        )  # fmt: skip
        return model, {"updates": float(training.num_updates)}

    def _fit(self, name: str) -> tuple[FlowModel, Mapping[str, float]]:
        """The regression of ``_merge`` without the calibration that ends it, which serves another
        sampler and costs as much as the training."""
        gate = _gate(name)
        total = _bank_size(gate, self.setting.bank)
        first = round(total * gate.shares[0])
        x = torch.cat([self.bank["mnist"][:first], self.bank["fashion"][: total - first]])
        bank = Bank.equal(x)
        if gate.reward is not None:
            bank = guided_union(bank, gate.reward, gate.total)
        model = self.parents["mnist"].clone() if name == "balanced" else self.network("balanced")
        context = Context(self.seed.child("merge", name))
        updates = self.setting.updates if name == "balanced" else self.setting.again
        stats = fit_flow(
            model, bank, self.training(updates), context, batch_size=self.setting.batch
        )
        return freeze(model), stats

    def training(self, updates: int) -> Training:
        """Of every network."""
        return Training(
            num_updates=updates, learning_rate=self.setting.rate, warmup=20,
            ema=0.999 if updates > 5000 else 0.99,
        )  # fmt: skip

    def network(self, name: str) -> FlowModel:
        """A trained union, to sample or to train on."""
        model = self.parents["mnist"].clone()
        model.net.load_state_dict(self.kept(f"model-{name}", dict))
        return freeze(model)

    def losses(self, model: FlowModel) -> list[float]:
        """Mean squared error of the predicted noise on digits and clothes of ``Superposition``."""
        halves = self.judges.halves(self.superposed["x"])
        return [
            MatchingLoss(model, Bank.equal(x), Context(self.seed), self.setting.batch).measure()
            for x in halves
        ]

    @property
    def whole(self) -> str:
        """The gate that goes through ``merge``; none in a smoke run."""
        return "" if self.setting.name == "quick" else "balanced"

    def merged(self, name: str) -> Record:
        """Samples of a trained union, judged."""
        model = self.network(name)
        x = self.drawn(f"fresh-{name}", model, self.setting.fresh)
        record = self.judges.measured(x)
        record["losses"] = self.losses(model)
        record["milliseconds"] = self.cost(f"fresh-{name}")
        record["reward"] = numbers(Estimate.of(preferred().value(x)))
        return record

    def promised(self) -> Record:
        """The guided union on the bank: E f before, and after with weights A / (nu - f)."""
        count = self.setting.bank
        x, part = torch.cat(list(self.bank.values())), torch.arange(2 * count) >= count
        f = preferred().value(x).double()
        equal = torch.full_like(f, 1 / len(f))
        w = equal * union_weights(f, equal, 1.0)
        here = (self.judges.logs(x).argmax(1) == PREFERRED) & ~part
        return {
            "before": numbers(Estimate.of(f)),
            "reward": numbers(Estimate.of(f, w)),
            "effective": float(1 / w.square().sum()),
            "share": numbers(Estimate.of(here.double(), w)),
            "fashion": numbers(Estimate.of(part.double(), w)),
        }


@functools.cache
def preferred() -> Potential:
    """The classifier's probability of the preferred digit, in [0, 1]."""
    log = MnistDigit(CLASSIFIER, PREFERRED)
    return BlackBox(lambda x: in_batches(lambda part: log.value(part).exp(), x.cpu()).to(x))


def _gate(name: str) -> Gate:
    gate = circuit(GATES[name], PARTS, {"preferred": preferred()})
    assert isinstance(gate, Gate)
    return gate


def _bank_size(gate: Gate, available: int) -> int:
    """As many samples as the part of the largest share has."""
    return int(available / max(gate.shares))


def run(
    store: Store, seeds: Sequence[int], quick: bool, full: bool = False, device: str = "cpu"
) -> None:
    """All unions of the first seed: one costs a quarter of an hour on a processor core."""
    if not MODELS.is_dir():
        print(f"images: no models in {MODELS}, see rfm_images.py; nothing is run.")
        return
    setting = QUICK if quick else FULL if full else CPU
    for seed in seeds if full else list(seeds)[:1]:
        lab = Measured(store, seed, setting, device)
        store.get(lab.key("setting"), functools.partial(dataclasses.asdict, setting))
        store.get(lab.key("bank"), lab.banks)
        store.get(lab.key("superposition"), lab.superposition)
        store.get(lab.key("parts"), lab.parts)
        store.get(lab.key("promised"), lab.promised)
        for name in GATES:
            store.get(lab.key(f"train-{name}"), functools.partial(lab.trained, name))
            store.get(lab.key(name), functools.partial(lab.merged, name))


def pictures(store: Store, home: Path) -> None:
    """Some samples of each method, if they are still beside the results."""
    for setting in (FULL, CPU, QUICK):
        folder = store.path.parent / "images" / setting.name / "0"
        if (folder / "fresh-guided.safetensors").exists():
            draw(_sheets(folder), home / "images" / "rfm_images.png")
            return


def _sheets(folder: Path) -> dict[str, Tensor]:
    """Pixels by method: the first samples, none left out."""

    def first(name: str, count: int = 2 * COLUMNS) -> Tensor:
        return load_tensors(folder / f"{name}.safetensors")["x"][:count]

    shown = {TITLES["parts"]: torch.cat([first(f"bank-{name}", COLUMNS) for name in PARTS])}
    shown[TITLES["superposition"].replace("`", "")] = first("superposition")
    shown |= {TITLES[name]: first(f"fresh-{name}") for name in GATES}
    return {title: pixels_of_centred(x) for title, x in shown.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="the setting for a GPU")
    parser.add_argument("--quick", action="store_true", help="a smoke run: meaningless numbers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = ROOT / "runs" / ("rfm-quick" if given.quick else "rfm")
    store = Store(out / "images.json")
    run(store, range(given.seeds), given.quick, given.full, given.device)
    pictures(store, out / "docs" if given.quick else ROOT / "docs")
    print(section(store))


__all__ = ["main", "pictures", "run", "section"]

if __name__ == "__main__":
    main()
