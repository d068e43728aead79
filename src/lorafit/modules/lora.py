"""LoRA (arXiv 2106.09685, section 4.1): y = W x + s·B(A x), with W frozen.

A [rank, in_dim] starts Kaiming-uniform with a = √5, that is uniform within 1/√in_dim, and B [out_dim, rank] at zero, so
that the model starts as the base. With h = A z (z is the input, after dropout if there is any):

    dB = s·dyᵀ h        dh = s·dy B        dA = dhᵀ z        dz = dh A        dx = dy W

One autograd function does all of it, so that the only tensors kept for the backward pass are the input and h.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafit.config import LoRA
from lorafit.modules.adapter import AdapterModule
from lorafit.modules.packed import frozen_weight


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

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        z = F.dropout(x, self.dropout) if self.dropout and self.training else x
        if torch.is_grad_enabled():
            y = _LoRAProduct.apply(x, None if z is x else z, self.lora_A, self.lora_B, self.scale, self.base)
            return y if self.base.bias is None else y + self.base.bias
        h = z @ self.lora_A.T.to(x.dtype)
        return self.base(x) + (h * self.scale) @ self.lora_B.T.to(x.dtype)


class _LoRAProduct(torch.autograd.Function):
    """y = W x + s·B(A z); z is None where it is x itself, whose two gradients then come from one buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, a: Tensor, b: Tensor, scale: float, base: nn.Module) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inputs = rows if z is None else z.reshape(rows.shape)
        h = inputs @ a.T.to(x.dtype)
        y = rows @ frozen_weight(base, x.dtype).T
        y.addmm_(h, b.T.to(x.dtype), alpha=scale)
        ctx.save_for_backward(inputs, h, a, b)
        ctx.base, ctx.scale, ctx.shape, ctx.dropped = base, scale, x.shape, z is not None
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, h, a, b = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        dh = (grad @ b.to(grad.dtype)).mul_(ctx.scale)
        db = (h.T @ grad).T.to(b.dtype).mul_(ctx.scale)  # faster on a CPU than gradᵀ·h, and the same
        da = (dh.T @ inputs).to(a.dtype)
        dx = dz = None
        if ctx.needs_input_grad[0]:
            dx = grad @ frozen_weight(ctx.base, grad.dtype)
            if not ctx.dropped:
                dx.addmm_(dh, a.to(grad.dtype))
            dx = dx.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dz = (dh @ a.to(grad.dtype)).view(ctx.shape)
        return dx, dz, da, db, None, None
