"""Train and measure the shipped digit models: ``python -m tiltflow.adapters.train_digits``.

Deterministic on one machine with one thread; about four minutes on one core. Needs the extra
``train`` (scikit-learn, which brings the data).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, final

import torch
from torch import nn

from tiltflow.adapters.checkpoint import save_tensors, write_atomic
from tiltflow.adapters.digits import CLASSES, EVENT, DigitClassifier, DigitNet
from tiltflow.adapters.digits_data import ClassifierLoss, Split, load_data, no_digits
from tiltflow.context import Context, Step
from tiltflow.density import Bank
from tiltflow.flow import FlowModel, freeze
from tiltflow.kernel import Heun
from tiltflow.matching import fit_flow
from tiltflow.metrics import left_cvar, reward, shares
from tiltflow.sample import Sampler
from tiltflow.schedule import Linear
from tiltflow.seed import Seed
from tiltflow.space import Euclidean
from tiltflow.training import Training, optimise
from tiltflow.types import Estimate

_Net = TypeVar("_Net", bound=nn.Module)
Say: TypeAlias = Callable[[str], None]


@final
@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the shipped files contain."""

    seed: int = 0
    flow_updates: int = 5000
    classifier_updates: int = 2000
    samples: int = 10_000


FLOW = {"width": 160, "depth": 3, "frequencies": 16}
CLASSIFIER = {"members": 3, "channels": [8, 16]}
JUDGE = {"members": 3, "channels": []}


def train_flow(data: Split, recipe: Recipe, say: Say) -> tuple[FlowModel, dict[str, Any]]:
    """The pre-trained model: conditional flow matching on the training digits."""
    settings = Training(num_updates=recipe.flow_updates, learning_rate=2e-3, warmup=200, ema=0.999)
    seed = Seed(recipe.seed).child("flow")
    net = _initialised(lambda: DigitNet(**FLOW), seed)
    model = FlowModel(net, Linear(), Euclidean(EVENT), predicts="velocity")
    stats = fit_flow(model, Bank.equal(data[0]), settings, Context(seed, on_step=_every(say)))
    return freeze(model), {"learning_rate": settings.learning_rate, "ema": settings.ema, **stats}


def train_classifier(
    architecture: dict[str, Any], name: str, data: Split, recipe: Recipe, say: Say
) -> DigitClassifier:
    """The classifier of the reward, or the judge: see ``ClassifierLoss``."""
    settings = Training(num_updates=recipe.classifier_updates, learning_rate=3e-3, ema=0.995)
    seed = Seed(recipe.seed).child(name)
    net = _initialised(lambda: DigitClassifier(**architecture), seed)
    loss = ClassifierLoss(net, data, seed)
    optimise(net, loss, settings, Context(seed, on_step=_every(say)))
    return net.requires_grad_(False).eval()


def measure_classifier(net: DigitClassifier, held_out: Split) -> dict[str, float]:
    """Accuracy and readability of held-out digits, of images that are no digits, and of noise."""
    x, y = held_out
    generator = Seed(0).child("measure").generator()
    logs = torch.log_softmax(net(x), 1)
    blots = torch.log_softmax(net(no_digits(x, generator)), 1)
    noise = torch.log_softmax(net(torch.randn(len(x), *EVENT, generator=generator)), 1)
    return {
        "held_out_digits": len(x),
        "accuracy": float((logs.argmax(1) == y).double().mean()),
        "readability_of_digits": float(logs.amax(1).mean()),
        "readability_of_no_digits": float(blots.amax(1).mean()),
        "readability_of_noise": float(noise.amax(1).mean()),
    }


def measure_flow(
    model: FlowModel, sampler: Sampler, nets: tuple[DigitClassifier, DigitClassifier], count: int
) -> dict[str, Any]:
    """Readability of samples, its worst tenth, class shares, and what the judge says."""
    x = sampler.sample(model, count, seed=Seed(0).child("measure"))
    logs, judged = (torch.log_softmax(net(x), 1) for net in nets)
    r, classes = logs.max(1)
    return {
        "samples": count,
        "confidence": _plain(Estimate.of(r.exp())),
        "readability": {k: _plain(v) for k, v in reward(r).items()},
        "worst_tenth": _plain(left_cvar(r, 0.1)),
        "worst_tenth_by_judge": _plain(left_cvar(judged.amax(1), 0.1)),
        "judge_agrees": _plain(Estimate.of((judged.argmax(1) == classes).double())),
        "shares": {k: round(v.value, 4) for k, v in shares(classes, CLASSES).items()},
    }


def _plain(estimate: Estimate) -> dict[str, float]:
    error = float(f"{estimate.standard_error:.2g}")
    return {"value": float(f"{estimate.value:.4g}"), "standard_error": error}


def memorised(model: FlowModel, data: Split, held_out: Split) -> dict[str, float]:
    """Median distance to the nearest training digit: of samples, and of held-out digits."""
    x = Sampler().sample(model, 1000, seed=Seed(0).child("nearest"))
    return {
        "samples": float(torch.cdist(x, data[0]).amin(1).median()),
        "held_out_digits": float(torch.cdist(held_out[0], data[0]).amin(1).median()),
    }


def _initialised(build: Callable[[], _Net], seed: Seed) -> _Net:
    """A network whose initial weights come from an address; the global generator is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed.child("weights").number)
        return build()


def _every(say: Say, period: int = 1000) -> Callable[[Step], None]:
    def on_step(step: Step) -> None:
        if step.update % period == 0:
            say(f"{step.address[0]}: update {step.update} of {step.total}, "
                f"loss {step.stats['loss']:.4f}")  # fmt: skip

    return on_step


def _save(out: Path, name: str, net: nn.Module, architecture: dict[str, Any]) -> dict[str, Any]:
    """Write the weights; returns what the card says about the file."""
    path = out / f"digits_{name}.safetensors"
    save_tensors(path, net.state_dict(), {"model": f"digits_{name}"})
    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "architecture": architecture,
        "parameters": sum(p.numel() for p in net.parameters()),
    }


@torch.no_grad()
def _quality(
    model: FlowModel, nets: tuple[DigitClassifier, DigitClassifier], data: Split, held_out: Split,
    count: int,
) -> dict[str, Any]:  # fmt: skip
    return {
        "euler_maruyama_40": measure_flow(model, Sampler(), nets, count),
        "heun_40": measure_flow(model, Sampler(kernel=Heun()), nets, count),
        "distance_to_nearest_training_digit": memorised(model, data, held_out),
    }


def train(out: Path, recipe: Recipe, say: Say) -> dict[str, Any]:
    """Train the three networks, write them and their card to ``out``; returns the card."""
    data, held_out = load_data()
    classifier = train_classifier(CLASSIFIER, "classifier", data, recipe, say)
    judge = train_classifier(JUDGE, "judge", data, recipe, say)
    model, training = train_flow(data, recipe, say)
    card = {
        "command": "python -m tiltflow.adapters.train_digits --out src/tiltflow/data",
        "recipe": asdict(recipe),
        "data": {
            "name": "Optical Recognition of Handwritten Digits (UCI), as in scikit-learn",
            "licence": "CC BY 4.0",
            "training_digits": len(data[0]),
            "held_out_digits": len(held_out[0]),
        },
        "flow": _save(out, "flow", model.net, FLOW) | {"training": training}
        | {"quality": _quality(model, (classifier, judge), data, held_out, recipe.samples)},
        "classifier": _save(out, "classifier", classifier, CLASSIFIER)
        | {"quality": measure_classifier(classifier, held_out)},
        "judge": _save(out, "judge", judge, JUDGE)
        | {"quality": measure_classifier(judge, held_out)},
    }  # fmt: skip
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    write_atomic(out / "digits.json", text.encode())
    return card


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tiltflow.adapters.train_digits")
    parser.add_argument("--out", type=Path, required=True, help="directory of the files")
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    arguments = vars(parser.parse_args())
    out, start = arguments.pop("out"), time.process_time()
    torch.set_num_threads(1)

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    card = train(out, Recipe(**arguments), say)
    say(json.dumps({k: card[k]["quality"] for k in ("classifier", "judge", "flow")}, indent=2,
                   ensure_ascii=False))  # fmt: skip
    say(f"Wrote {out} in {time.process_time() - start:.0f} CPU-seconds.")


if __name__ == "__main__":
    main()
