"""Low-rank adapters of a frozen network, by peft: the default for large models.

Hu et al., LoRA (arXiv 2106.09685): a linear or convolutional layer W is tuned as W + B A, with A
and B of small rank and B = 0 at the start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from tiltflow.delta import Delta
from tiltflow.errors import ConfigError
from tiltflow.flow import FlowModel
from tiltflow.seed import Seed
from tiltflow.types import Cond

M = TypeVar("M", bound=nn.Module)

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The layers of attention in diffusers' networks, by the ends of their names."""

_PARTS = ("lora_A", "lora_B")


def _none(name: str) -> bool:
    return False


def sharing_copy(module: M, own: Callable[[str], bool] = _none) -> M:
    """A copy of a module's structure whose parameters and buffers are the module's own.

    It takes no memory to speak of, and layers can be added to it or switched in it without the
    other noticing: there is no state in common that a forward pass would have to set.

    Args:
        module: to be copied.
        own: which tensors to copy all the same, by their names.
    """
    tensors = (*module.named_parameters(), *module.named_buffers())
    memory = {id(tensor): tensor for name, tensor in tensors if not own(name)}
    return copy.deepcopy(module, memory)


def _is_adapter(name: str) -> bool:
    return any(part in name.split(".") for part in _PARTS)


@final
class LoRA(Delta):
    """Train low-rank adapters; the network itself is shared by reference and tuned model.

    The adapters are part of the network (``with_lora`` puts them there). ``clone`` copies the
    adapters and the structure around them, and shares every other tensor. The reference of a
    training then is the same network with adapters of its own: at the start these are zero, which
    is the network itself, bit by bit. Nothing is switched during a forward pass, so that
    checkpointed activations are recomputed with the right adapters.
    """

    def trainable(self, net: nn.Module) -> nn.Module:
        layers = {
            f"{path}.{part}".replace(".", "/"): getattr(layer, part)
            for path, layer in _adapted(net).items()
            for part in _PARTS
        }
        if not layers:
            raise ConfigError(
                f"LoRA: {type(net).__name__} has no adapters; make the model by "
                "with_lora(model, rank=...)."
            )
        return nn.ModuleDict(layers)

    def clone(self, net: nn.Module) -> tuple[nn.Module, Delta]:
        return sharing_copy(net, own=_is_adapter), self

    def shift(
        self, x: Tensor, t: Tensor, cond: Cond | None, endpoint: Tensor | None = None
    ) -> Tensor | None:
        return None


def with_lora(
    model: FlowModel,
    rank: int = 16,
    *,
    targets: Sequence[str] = ATTENTION,
    seed: Seed | None = None,
) -> FlowModel:
    """The same model, trained by low-rank adapters; the function is unchanged until then.

    The scale of the adapters is 1 (peft's ``lora_alpha = rank``), so that their tensors alone say
    what they do. Adapters of networks in half precision are in single precision. The network of
    ``model`` is not changed, but its tensors are shared and get ``requires_grad=False``.

    Args:
        model: any flow model.
        rank: of the adapters.
        targets: ends of the names of the linear and convolutional layers to adapt.
        seed: of the random initial A.

    Raises:
        ConfigError: if no layer has such a name, the rank is not positive, or peft is missing.
    """
    if rank < 1:
        raise ConfigError(f"with_lora: rank={rank} must be at least 1.")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(
            "with_lora needs peft: pip install 'tiltflow[diffusers]', or train all weights."
        ) from None
    net = sharing_copy(model.net)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed((seed or Seed(0)).child("lora").number)
        try:
            inject_adapter_in_model(config, net)
        except ValueError as error:
            raise ConfigError(f"with_lora: {error}") from None
    for name, parameter in net.named_parameters():
        if _is_adapter(name) and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()  # small steps get lost in half precision
    return FlowModel(
        net.requires_grad_(False).eval(), model.schedule, model.space, predicts=model.predicts,
        delta=LoRA(), takes_cond=model.takes_cond, moments=model.moments,
    )  # fmt: skip


def lora_tensors(net: nn.Module) -> dict[str, Tensor]:
    """The adapters of a network under peft's names, e.g. ``mid.to_q.lora_A.weight``."""
    found = {
        f"{path}.{part}.weight": getattr(layer, part)["default"].weight.detach()
        for path, layer in _adapted(net).items()
        for part in _PARTS
    }
    if not found:
        raise ConfigError(f"lora_tensors: {type(net).__name__} has no adapters.")
    return found


def merged(net: nn.Module) -> nn.Module:
    """A copy of a network with its adapters added to its weights, without adapters.

    The weights that adapters belong to are copied, all others shared.
    """
    adapted = _adapted(net)
    result = sharing_copy(net, own=lambda name: any(name.startswith(p + ".") for p in adapted))
    for path in adapted:
        layer: Any = result.get_submodule(path)
        layer.merge()
        parent, _, name = path.rpartition(".")
        setattr(result.get_submodule(parent), name, layer.get_base_layer())
    return result


def _adapted(net: nn.Module) -> Mapping[str, Any]:
    """The layers with adapters, by their paths."""
    return {
        path: layer
        for path, layer in net.named_modules()
        if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict)
    }
