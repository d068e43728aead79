"""Linear layers that share an input: the queries, keys and values of attention, both factors of a gated product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorafit.containers.mapped import release
from lorafit.modules.adapter import AdapterModule
from lorafit.modules.lora import LoRALinear
from lorafit.modules.packed import PackedLinear
from lorafit.modules.product import Part, can_be_stacked, frozen_part, product
from lorafit.modules.qalora import QALoRALinear


def apply_all(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """What each layer makes of x, as one product where that comes to the same.

    It does while training, for layers whose adapters, if any, are known to be nothing but an update of the weight. No
    other layer, and none that somebody watches, is passed by.
    """
    parts = [known_part(layer) for layer in layers] if torch.is_grad_enabled() else [None]
    known = [part for part in parts if part is not None]
    if len(known) < len(layers) or not can_be_stacked(known) or all(part.a is None for part in known):
        return [layer(x) for layer in layers]
    return product(x, known)


@torch.no_grad()
def lay_together(layers: Sequence[nn.Module], files: Sequence[range] = ()) -> None:
    """Move frozen dense weights, of layers with adapters or without, below one another, where they need no copy.

    Each is a part of one tensor then, which would confuse a tool that saves storages and not tensors. So this is for a
    training loop that owns the model.

    Args:
        layers: Those that share an input.
        files: Where files are mapped; pages of a weight that lay in one of them are given back.
    """
    bases = [layer.base if isinstance(layer, AdapterModule) else layer for layer in layers]
    weights = [base.weight for base in bases if type(base) is nn.Linear and not base.weight.requires_grad]
    if len(weights) == len(layers) and len({weight.dtype for weight in weights}) == 1:
        for weight, part in zip(weights, torch.cat(weights).split([len(each) for each in weights]), strict=True):
            original = weight.data
            weight.data = part
            release(original, files)


def known_part(layer: nn.Module) -> Part | None:
    """The layer as ``product`` takes it; None if that would pass by something that it does or that somebody watches."""
    if is_watched(layer):
        return None
    if type(layer) in (PackedLinear, nn.Linear):
        trained = any(parameter.requires_grad for parameter in layer.parameters())
        return None if trained else frozen_part(layer)
    if isinstance(layer, AdapterModule) and not layer.enabled:
        return known_part(layer.base)
    if not isinstance(layer, LoRALinear | QALoRALinear) or type(layer) not in (LoRALinear, QALoRALinear):
        return None
    if is_watched(layer.base) or type(layer.base) not in (PackedLinear, nn.Linear):
        return None
    has_dropout = isinstance(layer, LoRALinear) and layer.dropout and layer.training
    return None if has_dropout else layer.part()


def is_watched(layer: nn.Module) -> bool:
    """Whether calling it calls somebody else too."""
    return any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks))
