"""How good images are: fit to prompts, diversity, distance to others; per prompt and pooled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tiltflow.density import Empirical
from tiltflow.errors import ConfigError, NonFiniteError, ShapeError
from tiltflow.metrics.reward import checked
from tiltflow.metrics.tails import left_cvar, right_cvar
from tiltflow.potential import Potential
from tiltflow.rewards.pixels import checked_images
from tiltflow.similarity import CosineSimilarity
from tiltflow.types import Cond, Estimate
from tiltflow.utilities import KernelDiversity

MOST_COMPARED = 2000
"""Images that are compared with each other."""

FLAT = 1e-10
"""Eigenvalues of a covariance matrix below this part of the largest count as none."""

LOOK = "Look at the images, and at the dtype of the network."


@torch.no_grad()
def image_features(
    images: Tensor, features: Callable[[Tensor], Tensor], *, at_once: int = 32
) -> Tensor:
    """Features of images, a few at a time: (N, 3, H, W) in [0, 1] -> (N, m), float64, on the CPU.

    Args:
        images: in [0, 1]; other ranges are refused.
        features: (B, 3, H, W) -> (B, m), such as ``ClipFeatures(model).value``.
        at_once: B.

    Raises:
        ShapeError: if these are no such images, or the features are not (B, m).
        NonFiniteError: if a feature is NaN or infinite.
    """
    checked_images(images, "image_features")
    if not len(images):
        raise ShapeError("image_features: there are no images.")
    parts = [features(part).double().cpu() for part in torch.split(images, at_once)]
    return _checked(torch.cat(parts), len(images))


def vendi(features: Tensor, *, at_most: int = MOST_COMPARED) -> Estimate:
    """Vendi score, the effective number of different images among n::

        exp(-sum_i l_i log l_i),   l_i eigenvalues of K / n,   K_ij cosine of features i and j

    Between 1, all alike, and n (Friedman and Dieng, 2023). It grows with n, for k clear kinds by a
    factor of about 1 - (k - 1) / 2n: compare at equal ``count``. The standard error is that of the
    influence function. Of more than ``at_most`` images, the first.

    Args:
        features: (N, m), of CLIP or Inception, say; not zero.
        at_most: at most this many are compared; no more than 2000.
    """
    if not 1 <= at_most <= MOST_COMPARED:
        raise ConfigError(f"vendi: at_most={at_most} must be between 1 and {MOST_COMPARED}.")
    some = _checked(features)[:at_most]
    functional = KernelDiversity(CosineSimilarity(), ridge=1e-9, num_landmarks=len(some))
    log = functional.value(Empirical(some))
    return Estimate(math.exp(log.value), math.exp(log.value) * log.standard_error, len(some))


def frechet(a: Tensor, b: Tensor) -> Estimate:
    """Frechet distance of two samples of features, as of Gaussians::

        |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)

    with unbiased covariances: with Inception's features it is FID (Heusel et al., 2017), with
    CLIP's another number, which is not comparable with FIDs. The square root's trace is the sum of
    the singular values of A B^T, of centred features A / sqrt(N - 1) and B / sqrt(M - 1), so that
    nothing is inverted and no eigenvalue is negative; N and M may be smaller than m.

    It is biased upwards: for N = M >= m samples of N(0, 1) each it is about (m^2 + 5 m) / 2N
    where 0 is right, 66 for m = 512 and N = 2000. Compare at equal N and M only.
    The standard error is that of the influence functions. It knows nothing of the bias, and is too
    small where a and b are nearly of one law, since the first order vanishes there.

    Args:
        a: (N, m).
        b: (M, m), such as those of real images.

    Raises:
        ShapeError: for fewer than two samples, or different features.
    """
    a, b = _checked(a), _checked(b)
    if a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ShapeError(
            f"frechet: needs at least two samples each of the same features, got {tuple(a.shape)} "
            f"and {tuple(b.shape)}."
        )
    shift = a.mean(0) - b.mean(0)
    left, right = (_factor(x) for x in (a, b))
    cross = torch.linalg.svdvals(left @ right.T).sum()
    value = shift.square().sum() + left.square().sum() + right.square().sum() - 2 * cross
    error = math.hypot(_error(a, shift, left, right), _error(b, -shift, right, left))
    return Estimate(max(float(value), 0.0), error, min(len(a), len(b)))


def _factor(x: Tensor) -> Tensor:
    """R, (min(N, m), m), with R^T R the covariance of x (N, m)."""
    r: Tensor = torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R
    return r


def _error(x: Tensor, shift: Tensor, own: Tensor, other: Tensor) -> float:
    """Of the sampling of x: the scatter of the Frechet distance's influence function::

    2 shift . (x - m) + (x - m)^T (1 - T) (x - m),    T own T = other, the optimal map
    """
    centred = x - x.mean(0)
    _, scales, axes = torch.linalg.svd(own, full_matrices=False)
    keep = scales**2 > FLAT * scales[0] ** 2
    scales, axes = scales[keep], axes[keep]
    crossed = (other @ (axes.T * scales)).T @ (other @ (axes.T * scales))
    values, vectors = torch.linalg.eigh(crossed)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    whitened = (centred @ axes.T) / scales
    moved = ((whitened @ root) * whitened).sum(1)
    influence = 2 * centred @ shift + centred.square().sum(1) - moved
    return float(influence.std()) / math.sqrt(len(x))


def per_prompt(
    values: Tensor, prompt: Tensor, *, left: float = 0.1, right: float = 0.9
) -> Mapping[str, Estimate]:
    """Mean and tails of a reward for each prompt, averaged over prompts, and pooled.

    * ``mean[k]``, ``left_cvar[k]``, ``right_cvar[k]``: of the samples of prompt k.
    * ``mean[each]``, ``left_cvar[each]``, ``right_cvar[each]``: averages of these over prompts,
      each prompt counting the same.
    * ``mean``, ``left_cvar``, ``right_cvar``: of all samples, whatever their prompt.

    The pooled tail and the average tail are different numbers: the worst tenth of all samples is
    that of the hardest prompts, and a model that does these better at the cost of the others has a
    better pooled tail. Prompts are taken as given; errors are of the samples.

    Args:
        values: (N,), the reward of each sample, independent.
        prompt: (N,) of integers, the number of each sample's prompt, as in ``cond["prompt"]``.
        left: as in ``tails``.
        right: as in ``tails``.

    Raises:
        ShapeError: if there is no integer for each value.
    """
    v, number = checked(values), torch.as_tensor(prompt).detach().cpu()
    if number.shape != v.shape or number.is_floating_point():
        raise ShapeError(
            f"per_prompt: {len(v)} values need as many prompts' numbers, integers, got "
            f"{number.dtype} {tuple(number.shape)}."
        )
    found = sorted({int(k) for k in number})
    single = [_three(v[number == k], left, right) for k in found]
    out = dict(_three(v, left, right))
    out |= {f"{name}[each]": _average([one[name] for one in single]) for name in out}
    for k, one in zip(found, single, strict=True):
        out |= {f"{name}[{k}]": estimate for name, estimate in one.items()}
    return out


def image_report(
    images: Tensor,
    cond: Cond | None = None,
    *,
    rewards: Mapping[str, Potential],
    features: Callable[[Tensor], Tensor] | None = None,
    reference: Tensor | None = None,
) -> dict[str, Estimate]:
    """Everything at once, with standard errors: a reward is easily raised alone.

    * for each reward, ``name.mean``, ``name.left_cvar``, ``name.right_cvar``, and the same of each
      prompt, as in ``per_prompt``, where ``cond`` has prompts.
    * with ``features``: ``vendi``, and of each prompt with more than one image, ``vendi[k]``.
    * with ``reference``: ``frechet``, the distance of the images' features to these.

    Args:
        images: (N, 3, H, W) in [0, 1], independent samples.
        cond: their conditions; ``cond["prompt"]`` (N,) has the numbers of their prompts.
        rewards: of images, by name; ``{"clip": ClipScore(...)}``.
        features: see ``image_features``.
        reference: (M, m), features of real images or of the pre-trained model's.
    """
    if reference is not None and features is None:
        raise ConfigError("image_report: a reference needs the features that it was made with.")
    prompt = None if cond is None else cond.get("prompt")
    prompt = prompt if isinstance(prompt, Tensor) else None
    out: dict[str, Estimate] = {}
    for name, reward in rewards.items():
        values = reward.value(images, cond)
        told = _three(checked(values), 0.1, 0.9) if prompt is None else per_prompt(values, prompt)
        out |= {f"{name}.{key}": estimate for key, estimate in told.items()}
    if features is not None:
        phi = image_features(images, features)
        out["vendi"] = vendi(phi)
        if prompt is not None:
            out |= _vendi_of_each(phi, prompt.cpu())
        out |= {} if reference is None else {"frechet": frechet(phi, reference)}
    return out


def _vendi_of_each(phi: Tensor, prompt: Tensor) -> dict[str, Estimate]:
    parts = {k: phi[prompt == k] for k in sorted({int(k) for k in prompt})}
    return {f"vendi[{k}]": vendi(part) for k, part in parts.items() if len(part) > 1}


def _three(v: Tensor, left: float, right: float) -> Mapping[str, Estimate]:
    return {
        "mean": Estimate.of(v), "left_cvar": left_cvar(v, left), "right_cvar": right_cvar(v, right)
    }  # fmt: skip


def _average(parts: list[Estimate]) -> Estimate:
    n = len(parts)
    error = math.sqrt(sum(p.standard_error**2 for p in parts)) / n
    return Estimate(sum(p.value for p in parts) / n, error, sum(p.count for p in parts))


def _checked(features: Tensor, count: int | None = None) -> Tensor:
    f = torch.as_tensor(features).detach().double().cpu()
    if f.ndim != 2 or not f.numel() or len(f) != (count or len(f)):
        raise ShapeError(f"Features are (samples, features), both positive, got {tuple(f.shape)}.")
    if not bool(torch.isfinite(f).all()):
        raise NonFiniteError("A metric of images", f"{len(f)} images", "a feature", LOOK)
    return f


__all__ = ["frechet", "image_features", "image_report", "per_prompt", "vendi"]
