"""Evaluation numbers against closed forms, findings against made-up facts, and the HTML file."""

from __future__ import annotations

import builtins
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiltflow import plots
from tiltflow.analytic import gaussian
from tiltflow.cli import main
from tiltflow.diagnosis import Facts, diagnose
from tiltflow.evaluation import (
    class_shares,
    compare,
    draw,
    entropy_change,
    matching_rate,
    measure,
    tilt,
    tilt_kl,
)
from tiltflow.flow import FlowModel
from tiltflow.html_page import number
from tiltflow.problem import Result
from tiltflow.report import write_report
from tiltflow.rewards import Linear
from tiltflow.rundir import RunDirectory
from tiltflow.sample import Sampler
from tiltflow.schedule import Linear as LinearSchedule
from tiltflow.seed import Seed
from tiltflow.space import Euclidean
from tiltflow.types import Estimate

TINY = """
name = "tiny <b>report"
[models]
pretrained = {model}
[objective]
utility = {{ kind = "LeftCVaR", level = 0.2, reward = {reward} }}
divergences = [{{ kind = "KL", prior = "pretrained", weight = 2.0 }}]
[algorithm]
num_iterations = 2
rates = [0.5, 0.5]
num_samples = 64
[solver]
kind = "AdjointMatching"
sampler = {{ num_steps = 5 }}
training = {{ num_updates = 4, learning_rate = 1e-4 }}
num_trajectories = 16
updates_per_rollout = 2
num_evaluate = 16
[evaluate]
num_samples = 128
sampler = {{ num_steps = 5 }}
levels = [0.2, 0.1]
[baseline]
utility = {{ kind = "ExpectedReward", reward = {reward} }}
num_samples = 256
[expect]
"path_kl" = {{ value = 0.0, within = 50.0, from = "a test" }}
"""
LINEAR = '{ kind = "Linear", slope = 1.0 }'


class Outline(HTMLParser):
    """Collects what a page refers to, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.headings = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]
        self.headings += tag == "h2"
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def reported(tmp_path: Path, model: str, reward: str = LINEAR) -> tuple[Path, str]:
    file = tmp_path / "tiny.toml"
    file.write_text(TINY.format(model=model, reward=reward))
    assert main(["run", str(file), "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run", (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("model", "reward", "pictures"),
    [
        ('{ kind = "Gaussian", mean = [0.0], hidden = [4] }', LINEAR, 4),
        (
            '{ kind = "Ring", count = 3, hidden = [4] }',
            '{ kind = "Linear", slope = [1.0, 0.0] }',
            5,
        ),
        ('{ kind = "Digits" }', '{ kind = "Readability" }', 6),
    ],
    ids=["1d", "2d", "digits"],
)
def test_the_report_is_one_well_formed_file(
    model: str, reward: str, pictures: int, tmp_path: Path
) -> None:
    """Balanced tags, escaped text, embedded figures, and no reference to anything outside."""
    directory, text = reported(tmp_path, model, reward)
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    assert outline.headings >= 6
    assert len(outline.links) == pictures
    assert all(link.startswith("data:image/png;base64,") for link in outline.links)
    assert not re.search("https?:", text)  # the colon: base64 may spell the word by chance
    assert "tiny &lt;b&gt;report" in text
    assert main(["report", str(directory), "--picture", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_are_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert not plots.available()
    model = '{ kind = "Gaussian", mean = [0.0], hidden = [4] }'
    directory, _ = reported(tmp_path, model)
    text = write_report(RunDirectory(directory)).read_text()
    assert "pip install" in text
    assert "<img" not in text
    assert "mean of the worst 20%" in text
    assert main(["report", str(directory), "--picture", str(tmp_path / "p.png")]) == 1


# Numbers


def model_of(mean: float) -> FlowModel:
    net = gaussian([mean]).flow().net
    return FlowModel(net, LinearSchedule(), Euclidean((1,)), predicts="endpoint")


def drawn_of(mean: float, count: int = 4096) -> Any:
    sampler = Sampler(num_steps=40)
    return draw(
        model_of(mean), model_of(0.0), Linear(1.0), {"judge": Linear(-1.0)},
        sampler=sampler, path_sampler=sampler, count=count, seed=Seed(0).child("t"),
    )  # fmt: skip


def test_an_exact_tilt_measures_as_one() -> None:
    """N(m, 1) is N(0, 1) tilted by m x: KL m^2/2, slope 1, R^2 1.

    Both are simulated in 40 Euler steps, by which the shift comes out 4 % and the KL 6 % large.
    """
    after, before = drawn_of(0.7), drawn_of(0.0)
    numbers = (
        measure(after, [0.1]) | compare(after, before, [0.1]) | tilt(after, 0.7 * Linear(1.0))
    )
    assert numbers["path_kl"].value == pytest.approx(0.245, rel=0.08)
    assert numbers["tilt.slope"].value == pytest.approx(1, abs=0.04)
    assert numbers["tilt.r2"].value > 0.98
    assert numbers["tilt.ess"].value > 0.98
    assert numbers["reward_tilt.slope"].value == pytest.approx(0.7, rel=0.04)
    assert numbers["gain.mean"].value == pytest.approx(0.7, rel=0.05)
    assert (
        numbers["gain.mean"].standard_error < 0.01 * numbers["reward.mean"].standard_error + 1e-3
    )
    assert numbers["judge.mean"].value == pytest.approx(-numbers["reward.mean"].value)
    assert numbers["gain.left_cvar"].value == pytest.approx(0.7, rel=0.05)


def test_a_tilt_in_the_wrong_direction_has_a_negative_slope() -> None:
    assert tilt(drawn_of(-0.7), Linear(0.7))["tilt.slope"].value == pytest.approx(-1, abs=0.04)


def test_tail_means_of_a_normal_law() -> None:
    """CVaR of N(0, 1) at 0.1 is -phi(q) / 0.1; the sampler's 1.2 % excess variance allowed for."""
    numbers = measure(drawn_of(0.0, 20_000), [0.1])
    q = 1.2815515655
    exact = math.exp(-(q**2) / 2) / math.sqrt(2 * math.pi) / 0.1
    slack = 0.012 * exact + 4.5 * numbers["tails.left_cvar"].standard_error
    assert abs(numbers["tails.left_cvar"].value + exact) < slack
    assert abs(numbers["tails.right_cvar"].value - exact) < slack


def test_entropy_change_of_scaled_normals() -> None:
    """Scaling by c adds d log c; n = 2000, so that 4.5 standard errors is a fair bound."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2000, 2, generator=generator) for _ in range(2))
    change = entropy_change(0.5 * y, x)
    assert abs(change.value - 2 * math.log(0.5)) < 4.5 * change.standard_error < 0.3


@pytest.mark.parametrize("kl", [0.01, 0.2, 1.0])
def test_the_matching_rate_of_a_gaussian(kl: float) -> None:
    """For N(0, 1) and r = x, the tilt at rate g has KL g^2 / 2."""
    x = torch.special.ndtri((torch.arange(20_000).double() + 0.5) / 20_000)
    assert matching_rate(x, kl) == pytest.approx(math.sqrt(2 * kl), rel=0.01)


def test_the_matching_rate_is_bounded_by_what_a_sample_can_show() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert tilt_kl(x, matching_rate(x, 50.0)) == pytest.approx(math.log(10), rel=1e-6)
    assert matching_rate(x, 0.0) == pytest.approx(0, abs=1e-6)
    two = torch.tensor([0.0] * 500 + [1.0] * 500)  # used up where the better half has 99 %
    assert matching_rate(two, 5.0) == pytest.approx(math.log(99), rel=0.01)


def test_class_shares_sum_to_one() -> None:
    found = class_shares(torch.tensor([0, 0, 1, 2]), ["a", "b", "c"])
    assert [found[k].value for k in "abc"] == [0.5, 0.25, 0.25]


# Findings


def facts(
    *, gain: float = 1.0, kl: float = 1.0, shares: Tensor | None = None, **more: Any
) -> Facts:
    before = {
        "reward.mean": Estimate(0.0, 0.01, 1000), "reward.std": Estimate(1.0),
        "path_kl": Estimate(0.0), "judge.mean": Estimate(0.0, 0.01, 1000),
    }  # fmt: skip
    after = {
        "reward.mean": Estimate(gain, 0.01, 1000), "path_kl": Estimate(kl, 0.01, 1000),
        "gain.mean": Estimate(gain, 0.01, 1000), "judge.mean": Estimate(gain, 0.01, 1000),
        "tilt.slope": Estimate(1.0), "tilt.r2": Estimate(1.0), "tilt.ess": Estimate(0.9),
    }  # fmt: skip
    after |= more.pop("after", {})
    return Facts(before=before, after=after, num_samples=1000, **more)


def share(value: float) -> dict[str, Estimate]:
    return {"7": Estimate(value, 0.01, 1000)}


@pytest.mark.parametrize(
    ("made_up", "title"),
    [
        ({"kl": 12.0}, "The reward rises while the distance explodes"),
        ({"judges": ("judge",), "after": {"judge.mean": Estimate(-1.0, 0.01)}}, "judge disagrees"),
        ({"gain": 0.0, "kl": 0.001}, "Nothing moved"),
        ({"shares_before": share(0.1), "shares_after": share(0.04)}, "Diversity collapsed"),
        ({"stats": {"active": 0.001}}, "Starved gradients"),
        ({"result": Result.STARVED}, "The solver gave up"),
        ({"after": {"tilt.slope": Estimate(0.3)}}, "short of the optimum"),
        ({"after": {"tilt.slope": Estimate(1.9)}}, "beyond the optimum"),
        ({"after": {"tilt.ess": Estimate(0.01)}}, "overlap little"),
        ({"baseline": {"path_kl": Estimate(0.2)}}, "baseline is not as far"),
    ],
)
def test_findings(made_up: dict[str, Any], title: str) -> None:
    (finding,) = diagnose(facts(**made_up))
    assert title in finding.title


def test_a_good_run_has_no_findings() -> None:
    good = facts(
        shares_before=share(0.1), shares_after=share(0.06), judges=("judge",),
        baseline={"path_kl": Estimate(1.1)},
    )  # fmt: skip
    assert diagnose(good) == []


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [(1.23456, 0.0123, "1.235 <small>± 0.012</small>"), (0.5, 0.0, "0.5"), (12.0, 3.2, "12.0 ")],
)
def test_numbers_are_rounded_to_their_error(value: float, error: float, shown: str) -> None:
    assert number({"value": value, "standard_error": error, "count": 9}).startswith(shown)
    assert number(None) == number({"value": None, "standard_error": None})
