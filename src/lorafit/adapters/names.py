"""How PEFT names what an adapter adapts: linear layers are modules, stacks of experts are parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set

from torch import nn

from lorafit.modules import AdapterModule, LoRAExperts, WholeModule, adapter_modules
from lorafit.modules.experts import ExpertStack
from lorafit.modules.packed import is_embedding, is_linear


def places(modules: dict[str, AdapterModule]) -> dict[str, str]:
    """Full name -> the module that has its factors in PEFT.

    PEFT wraps a module once for each of its parameters that is adapted, in their order. So the last is the outermost
    wrapper, which stands where the module stood, and the one before it is its ``base_layer``.
    """
    result, depths = {}, Counter[str]()
    for name, module in reversed(modules.items()):
        result[name] = name
        if isinstance(module, LoRAExperts):
            owner = name.rpartition(".")[0]
            result[name] = owner + ".base_layer" * depths[owner]
            depths[owner] += 1
    return result


def target_fields(model: nn.Module) -> dict[str, list[str]]:
    """What is adapted, in PEFT's configuration: short names where they say exactly that, full names otherwise."""
    wrapped = {n: module for n, module in adapter_modules(model).items() if not isinstance(module, WholeModule)}
    stacks = {name for name, module in wrapped.items() if isinstance(module, LoRAExperts)}
    left = {name for name, module in model.named_modules() if is_linear(module) or is_embedding(module)}
    left_stacks = {name for name, module in model.named_modules() if isinstance(module, ExpertStack)}
    fields = {"target_modules": _shortened(wrapped.keys() - stacks, left, 1)}
    return fields | ({"target_parameters": _shortened(stacks, left_stacks, 2)} if stacks else {})


def _shortened(names: Set[str], others: Set[str], parts: int) -> list[str]:
    """The last parts of each name, where no other name ends so; else the names."""

    def end(name: str) -> str:
        return ".".join(name.split(".")[-parts:])

    ends = {end(name) for name in names}
    return sorted(names if any(end(name) in ends for name in others) else ends)
