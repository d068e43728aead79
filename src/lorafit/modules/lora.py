"""LoRA (arXiv 2106.09685, section 4.1): y = W x + s·B(A x), with W frozen.

A [rank, in_dim] starts Kaiming-uniform with a = √5, that is uniform within 1/√in_dim, and B [out_dim, rank] at zero, so
that the model starts as the base. Training takes the update together with the frozen product (``product``).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafit.config import LoRA
from lorafit.modules.adapter import AdapterModule
from lorafit.modules.packed import chooses_type
from lorafit.modules.product import Part, frozen_part, product


class LoRALinear(AdapterModule):
    """A frozen linear layer with a low-rank update beside it: [..., in_dim] -> [..., out_dim].

    Args:
        base: The linear layer, packed or not.
        config: Rank, scaling and dropout.
    """

    def __init__(self, base: nn.Module, config: LoRA) -> None:
        super().__init__(base)
        self.scale = config.scale
        self.dropout = config.dropout
        device = next((t.device for t in [*base.buffers(), *base.parameters()]), None)
        self.lora_A = nn.Parameter(torch.empty(config.rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.detach(), self.lora_B.detach()

    def set_lora_factor(self, part: Literal["A", "B"], value: Tensor) -> None:
        with torch.no_grad():
            (self.lora_A if part == "A" else self.lora_B).copy_(value)

    def delta_weight(self) -> Tensor:
        return self.scale * (self.lora_B.detach() @ self.lora_A.detach())

    def part(self) -> Part:
        """The layer as ``product`` takes it."""
        return replace(frozen_part(self.base), a=self.lora_A, b=self.lora_B, scale=self.scale)

    @chooses_type
    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        z = F.dropout(x, self.dropout) if self.dropout and self.training else x
        if torch.is_grad_enabled():
            return product(x, [self.part()], None if z is x else z)[0]
        h = z @ self.lora_A.T.to(x.dtype)
        return self.base(x) + (h * self.scale) @ self.lora_B.T.to(x.dtype)
