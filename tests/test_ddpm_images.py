"""Published image models: they are the original networks, and wrong files are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from published import MODELS, published
from tiltflow.adapters.checkpoint import save_tensors
from tiltflow.adapters.ddpm_images import (
    EVENT,
    LEVELS,
    DenoisingCNN,
    DenoisingUNet,
    MnistClassifier,
    load_cnn,
    load_mnist_classifier,
    load_unet,
    pixels_of_centred,
    pixels_of_half,
)
from tiltflow.config import interpret
from tiltflow.errors import CheckpointError, ConfigError
from tiltflow.flow import FlowModel
from tiltflow.kernel import Ancestral
from tiltflow.models import DenoisingCNN as CNNRecipe
from tiltflow.models import DenoisingUNet as UNetRecipe
from tiltflow.models import Model
from tiltflow.rewards import MnistDigit
from tiltflow.sample import Sampler
from tiltflow.seed import Seed

KINDS = {
    "unet": (DenoisingUNet, load_unet),
    "cnn": (DenoisingCNN, load_cnn),
    "classifier": (MnistClassifier, load_mnist_classifier),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights of each network, as this library saves them."""
    folder = tmp_path_factory.mktemp("models")
    paths = {kind: folder / f"{kind}.safetensors" for kind in KINDS}
    for kind, (build, _) in KINDS.items():
        save_tensors(paths[kind], random_weights(build()))
    return paths


def random_weights(net: nn.Module) -> dict[str, Tensor]:
    generator = Seed(3).generator()
    state = {
        name: 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in net.state_dict().items()
    }
    if "alpha_bar" in state:
        state["alpha_bar"] = torch.linspace(0.9999, 0.001, LEVELS + 1)
    return state


def images(count: int, seed: int = 5) -> Tensor:
    return torch.randn(count, *EVENT, generator=Seed(seed).generator())


# --- the published weights ----------------------------------------------------------------------


def agrees(net: Any, file: dict[str, Tensor], suffix: str = "") -> None:
    """Outputs and vector-Jacobian products of the original code, to 1e-4 of their norm."""
    x = file["x"].clone().requires_grad_()
    eps = net.at(x, file["t"])
    (vjp,) = torch.autograd.grad((eps * file["v"]).sum(), x)
    for own, name in ((eps.detach(), "eps"), (vjp, "vjp")):
        original = file[f"{name}{suffix}"]
        assert float((own - original).norm()) < 1e-4 * float(original.norm())


@published("ddpm_unet_28")
@pytest.mark.parametrize("data", ["mnist", "fashion"])
def test_the_unet_is_the_original(data: str) -> None:
    model = load_unet(MODELS / f"ddpm_unet_28/model_{data}.safetensors")
    file = load_file(MODELS / "ddpm_unet_28/reference_io.safetensors")
    agrees(model.net, file, f"_{data}")
    t = (LEVELS - 1 - file["t"]) / LEVELS
    assert torch.equal(model.net(file["x"], t), model.net.at(file["x"], file["t"]))


@published("ddpm_cnn_mnist")
def test_the_cnn_is_the_original() -> None:
    model = load_cnn(MODELS / "ddpm_cnn_mnist/model.safetensors")
    agrees(model.net, load_file(MODELS / "ddpm_cnn_mnist/reference_io.safetensors"))


@published("mnist_classifier")
def test_the_classifier_is_the_original() -> None:
    net = load_mnist_classifier(MODELS / "mnist_classifier/model.safetensors")
    file = load_file(MODELS / "mnist_classifier/reference_io.safetensors")
    error = (net(file["pixels01"]) - file["logits"]).norm()
    assert float(error) < 1e-4 * float(file["logits"].norm())
    assert torch.equal(net(file["pixels01"]).argmax(1), file["label"])


@published("ddpm_unet_28")
def test_a_tampered_file_is_refused(tmp_path: Path) -> None:
    """One changed byte of the weights."""
    path = tmp_path / "model_mnist.safetensors"
    shutil.copy(MODELS / "ddpm_unet_28/model_mnist.safetensors", path)
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="but other content"):
        load_unet(path)


@published("ddpm_unet_28", "mnist_classifier")
@pytest.mark.slow
def test_samples_are_as_good_as_measured() -> None:
    """0.701 of 512 samples of the original code have a confidence above 0.9 (100 steps)."""
    made = UNetRecipe(
        MODELS / "ddpm_unet_28/model_mnist.safetensors",
        MODELS / "mnist_classifier/model.safetensors",
    ).load()
    x = Sampler(Ancestral(), 100, batch_size=128).sample(made.model, 256, seed=Seed(0))
    sure = (made.judges["confidence"].value(x).exp() > 0.9).double().mean()
    error = (0.7 * 0.3 * (1 / 256 + 1 / 512)) ** 0.5
    assert abs(float(sure) - 0.701) < 4.5 * error
    assert made.classify is not None
    assert int(made.classify(x).bincount(minlength=10).min()) > 0


# --- random weights -----------------------------------------------------------------------------


def test_levels_are_nodes_of_the_schedule(files: dict[str, Path]) -> None:
    """alpha^2 at t = (999 - i) / 1000 is the product of 1 - beta up to i; t = 1 is clean."""
    schedule = load_unet(files["unet"]).schedule
    betas = torch.linspace(1e-4, 0.02, LEVELS, dtype=torch.float64)
    level = torch.arange(LEVELS)
    t = (LEVELS - 1 - level) / torch.tensor(LEVELS, dtype=torch.float64)
    assert torch.allclose(schedule.alpha(t) ** 2, (1 - betas).cumprod(0), rtol=1e-9)
    assert float(schedule.beta(torch.tensor(1.0, dtype=torch.float64))) == pytest.approx(0)
    table = load_cnn(files["cnn"]).schedule.alpha(1 - level[1:] / LEVELS) ** 2
    assert torch.allclose(table, torch.linspace(0.9999, 0.001, LEVELS + 1)[1:-1], rtol=1e-4)


@pytest.mark.parametrize(("level", "to"), [(999, 979), (500, 480), (20, 0)])
def test_a_step_is_that_of_ddpm(files: dict[str, Path], level: int, to: int) -> None:
    """Ho et al. (2020), equation 7, with strides: the posterior of x_to given x_level and eps."""
    model, x = load_unet(files["unet"]), images(2)
    x = model.space.project(x)
    bars = (1 - torch.linspace(1e-4, 0.02, LEVELS, dtype=torch.float64)).cumprod(0)
    a, b = bars[level], bars[to]
    eps = model.space.project(model.net.at(x, torch.full((2,), level)))
    ratio, variance = (a / b).sqrt(), (1 - a) - a / b * (1 - b)
    mean = x / ratio - variance / (ratio * (1 - a).sqrt()) * eps
    t, s = (torch.full((2,), (LEVELS - 1 - i) / LEVELS) for i in (level, to))
    step = Ancestral().transition(model, x, t, s)
    assert torch.allclose(step.mean, mean.float(), atol=2e-4)
    assert torch.allclose(
        step.variance, (variance * (1 - b) / (1 - a)).float().expand(2), rtol=2e-3
    )


def test_the_last_step_returns_the_predicted_image(files: dict[str, Path]) -> None:
    model = load_unet(files["unet"])
    x = model.space.project(images(2))
    t = torch.full((2,), (LEVELS - 1) / LEVELS)
    step = Ancestral().transition(model, x, t, torch.ones(2))
    eps = model.space.project(model.net.at(x, torch.zeros(2, dtype=torch.long)))
    assert torch.allclose(step.mean, (x - 0.01 * eps) / 0.9999**0.5, atol=1e-5)
    assert float(step.variance.abs().max()) < 1e-12


def test_the_unet_lives_on_images_of_zero_mean(files: dict[str, Path]) -> None:
    """Brightness is neither seen nor predicted; 783 dimensions; samples have zero mean."""
    model = load_unet(files["unet"])
    x, t = images(3), torch.tensor([0.1, 0.5, 0.9])
    assert torch.allclose(model.net(x + 7, t), model.net(x, t), atol=1e-4)
    assert float(model.noise(x, t).mean((1, 2, 3)).abs().max()) < 1e-6
    assert model.space.dimension(3).tolist() == [783] * 3
    samples = Sampler(Ancestral(), 4).sample(model, 3, seed=Seed(0))
    assert samples.shape == (3, *EVENT)
    assert float(samples.mean((1, 2, 3)).abs().max()) < 1e-5


def test_the_cnn_is_of_full_space_and_smooth_in_time(files: dict[str, Path]) -> None:
    model = load_cnn(files["cnn"])
    x = images(2)
    assert model.space.dimension(2).tolist() == [784] * 2
    near, at = model.net(x, torch.full((2,), 0.5004)), model.net(x, torch.full((2,), 0.5))
    assert 0 < float((near - at).norm()) < 1e-2 * float(at.norm())


def test_training_moves_what_the_network_uses(files: dict[str, Path]) -> None:
    """The table of times and the unused norm of the file are held fixed."""
    model = load_unet(files["unet"]).clone()
    names = [name for name, _ in model.trainable.named_parameters()]
    assert not any(n.startswith(("time_embed", "b_out.2.ln")) for n in names)
    model.trainable.requires_grad_(True)
    model.noise(images(2), torch.tensor([0.3, 0.6])).square().sum().backward()
    assert all(p.grad is not None for p in model.trainable.parameters())
    assert sum(p.numel() for p in model.trainable.parameters()) == 491_172


@pytest.mark.parametrize("kind", KINDS)
def test_foreign_weights_of_the_right_shape_are_refused(kind: str, tmp_path: Path) -> None:
    build, load = KINDS[kind]
    path = tmp_path / "foreign.safetensors"
    save_file(random_weights(build()), path)
    with pytest.raises(CheckpointError, match=r"but other content .*save_tensors wrote them"):
        load(path)


def test_wrong_files_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_unet(files["cnn"])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, foreign)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_cnn(foreign)
    small = random_weights(MnistClassifier()) | {"fc2.bias": torch.zeros(7)}
    save_tensors(tmp_path / "small.safetensors", small)
    with pytest.raises(CheckpointError, match=r"'fc2.bias' has shape \(7,\)"):
        load_mnist_classifier(tmp_path / "small.safetensors")
    pickled = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(3)}, pickled)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_unet(pickled)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(files["cnn"].read_bytes()[:-1] + b"\x55")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_cnn(damaged)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_unet(tmp_path / "missing.safetensors")


# --- pixels, rewards, recipes -------------------------------------------------------------------


def test_pixels_undo_the_subspace(files: dict[str, Path]) -> None:
    """An image in [-1, 1] with a black background, centred, is itself again; any shift is undone;
    the other model's images are shifted by one half."""
    pixels = torch.rand(2, *EVENT, generator=Seed(1).generator())
    pixels[:, :, :6] = 0
    state = load_unet(files["unet"]).space.project(2 * pixels - 1)
    assert torch.allclose(pixels_of_centred(state), pixels, atol=1e-6)
    assert torch.allclose(pixels_of_centred(state + 3), pixels, atol=1e-6)
    assert torch.allclose(pixels_of_half(pixels - 0.5), pixels)


@pytest.mark.parametrize("kind", ["centred", "half"])
@pytest.mark.parametrize("label", [None, 4])
def test_the_gradient_of_the_reward(files: dict[str, Path], label: int | None, kind: Any) -> None:
    """Central differences in float64; along the gradient the reward rises at its rate."""
    reward = MnistDigit(files["classifier"], label, 2.0, kind)
    x = (0.4 * images(3)).double()
    value, grad = reward.value_and_grad(x)
    assert bool((value < 0).all())
    h = 1e-6 / float(grad.abs().max())
    slope = (reward.value(x + h * grad) - reward.value(x - h * grad)) / (2 * h)
    assert torch.allclose(slope, grad.square().flatten(1).sum(1), rtol=1e-3)


def test_the_reward_of_the_best_class(files: dict[str, Path]) -> None:
    x = images(8)
    best = MnistDigit(files["classifier"]).value(x)
    each = torch.stack([MnistDigit(files["classifier"], c).value(x) for c in range(10)], 1)
    assert torch.equal(best, each.amax(1))
    assert torch.equal(MnistDigit(files["classifier"]).class_of(x), each.argmax(1))
    assert torch.allclose(each.exp().sum(1), torch.ones(8), atol=1e-5)
    for wrong in ({"label": 10}, {"pixels": "grey"}):
        with pytest.raises(ConfigError, match="MnistDigit: "):
            MnistDigit(files["classifier"], **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("recipe", "kind"), [(UNetRecipe, "unet"), (CNNRecipe, "cnn")])
def test_recipes(files: dict[str, Path], recipe: Any, kind: str) -> None:
    """From a run file, with the classifier and without it."""
    table = {"kind": recipe.__name__, "path": str(files[kind])}
    plain = interpret(Model, table, "models.pretrained").build({}).load()
    assert (plain.picture, plain.classify, dict(plain.judges)) == ((28, 28), None, {})
    table["classifier"] = str(files["classifier"])
    judged = interpret(Model, table, "models.pretrained").build({}).load()
    assert isinstance(judged.model, FlowModel)
    assert judged.classes == tuple("0123456789")
    pixels = pixels_of_centred if kind == "unet" else pixels_of_half
    logits = load_mnist_classifier(files["classifier"])(pixels(images(4)))
    assert torch.equal(judged.classify(images(4)), logits.argmax(1))
    confidence = judged.judges["confidence"].value(images(4))
    assert torch.allclose(confidence, logits.log_softmax(1).amax(1))
