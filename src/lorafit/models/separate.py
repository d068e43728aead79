"""Experts of a checkpoint: each of their matrices is a tensor of its own there, where transformers has fused ones.

While such a checkpoint streams in, every matrix is a linear layer like any other: quantised, left as it is, or
quantised by somebody before. Then they are joined to the stacks that ``lorafit.modules.experts`` computes with.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from lorafit.modules import Experts, PackedExperts, PackedLinear, PackedWeight
from lorafit.modules.experts import is_fused

_PLAIN = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class _SeparateExperts(nn.Module):
    """Linear layers on the meta device, called as the tensors of a checkpoint are."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.count, hidden, inner = fused.down_proj.shape
        self.act_fn = fused.act_fn
        for expert in range(self.count):
            with torch.device("meta"):
                gate, up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
                down = nn.Linear(inner, hidden, bias=False)
            self.add_module(str(expert), nn.ModuleDict({"gate_proj": gate, "up_proj": up, "down_proj": down}))

    def packed(self, role: str) -> list[PackedWeight]:
        """One matrix of each expert, in blocks; one that was left as it is, in those of its type."""
        layers = [self.get_submodule(f"{expert}.{role}") for expert in range(self.count)]
        return [layer.packed if isinstance(layer, PackedLinear) else _as_blocks(layer.weight) for layer in layers]


def separate_experts(model: nn.Module) -> None:
    """Put a linear layer for each matrix where transformers' fused experts stand."""
    for name, fused in [item for item in model.named_modules() if is_fused(item[1])]:
        model.set_submodule(name, _SeparateExperts(fused))


def join_experts(model: nn.Module) -> None:
    """Put experts where their linear layers stand, once these are filled."""
    for name, separate in list(model.named_modules()):
        if isinstance(separate, _SeparateExperts):
            gate, up, down = (separate.packed(role) for role in ("gate_proj", "up_proj", "down_proj"))
            gate_up_stack = PackedExperts(list(zip(gate, up, strict=True)), sums=False)
            down_stack = PackedExperts(list(zip(down, strict=True)), sums=True)
            model.set_submodule(name, Experts(gate_up_stack, down_stack, separate.act_fn))


def joined_name(name: str) -> str:
    """The stack that has a linear layer in it; other names stay as they are."""
    inner = re.fullmatch(r"(.*\.experts)\.\d+\.(gate|up|down)_proj", name)
    return f"{inner[1]}.{'down_proj' if inner[2] == 'down' else 'gate_up_proj'}" if inner else name


def _as_blocks(weight: Any) -> PackedWeight:
    return PackedWeight(weight.detach().view(torch.uint8), _PLAIN[weight.dtype])
