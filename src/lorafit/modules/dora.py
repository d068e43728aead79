"""DoRA (arXiv 2402.09353): the direction of each row of a weight is trained by LoRA, its length on its own.

    V = W + s·B A        n_i = ‖V_i‖        y = (m / n) ∘ (V x) + bias

m [out_dim] starts as the lengths of W's rows, so that the model starts as the base. As the paper says in section 4.3, n
follows V but passes no gradient. With v = V x and h = A x:

    dm = Σ_tokens dy ∘ v / n        dv = dy ∘ m / n        and dB, dA, dx from dv as in ``lorafit.modules.lora``

n needs no matrix of the size of W beside W itself, which is unpacked for the product anyway:

    n_i² = ‖W_i‖² + 2 s (W Aᵀ)_i·B_i + s² B_i (A Aᵀ) B_iᵀ

With dropout the paper's authors, and PEFT, drop inputs of all that differs from the base, which for the dropped input z
is y = W x + (m / n) ∘ (V z) - W z + bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafit.config import LoRA
from lorafit.modules.adapter import AdapterModule
from lorafit.modules.packed import chooses_type, frozen_weight

# A row of zeros, which has no direction, is not divided by its length.
_LEAST = 1e-20


class DoRALinear(AdapterModule):
    """A frozen linear layer whose rows' directions and lengths are trained: [..., in_dim] -> [..., out_dim].

    Args:
        base: The linear layer, packed or not.
        config: Rank, scaling and dropout.
    """

    squares: Tensor

    def __init__(self, base: nn.Module, config: LoRA) -> None:
        super().__init__(base)
        self.scale = config.scale
        self.dropout = config.dropout
        weight = frozen_weight(base, torch.float32)
        self.register_buffer("squares", weight.norm(dim=1).square(), persistent=False)
        self.lora_A = nn.Parameter(torch.empty(config.rank, self.in_features, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.rank, device=weight.device))
        self.lora_magnitude_vector = nn.Parameter(self.squares.sqrt())
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.keeping = False
        self._kept: Tensor | None = None

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {
            "lora_A": self.lora_A,
            "lora_B": self.lora_B,
            "lora_magnitude_vector": self.lora_magnitude_vector,
        }

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """Those of the direction; they are not the whole update."""
        return self.lora_A.detach(), self.lora_B.detach()

    def set_lora_factor(self, part: Literal["A", "B"], value: Tensor) -> None:
        with torch.no_grad():
            (self.lora_A if part == "A" else self.lora_B).copy_(value)

    def delta_weight(self) -> Tensor:
        base = frozen_weight(self.base, torch.float32)
        return self.merged_weight(base) - base

    @torch.no_grad()
    def merged_weight(self, base: Tensor) -> Tensor:
        direction = torch.addmm(base, self.lora_B, self.lora_A, alpha=self.scale)
        return direction * (self.lora_magnitude_vector / direction.norm(dim=1).clamp(min=_LEAST)).unsqueeze(1)

    @torch.no_grad()
    def gain(self, dtype: torch.dtype) -> Tensor:
        """m / n, float32 [out_dim], with n as it is computed in ``dtype``."""
        if self._kept is not None:
            return self._kept
        norms = _norms(frozen_weight(self.base, dtype), self.lora_A, self.lora_B, self.squares, self.scale)
        gain = self.lora_magnitude_vector / norms
        self._kept = gain if self.keeping else None
        return gain

    def keep(self, keeping: bool) -> bool:
        """Whether to compute m / n once only; returns what it was before. See ``gains_held``."""
        before, self.keeping = self.keeping, keeping
        self._kept = None
        return before

    @chooses_type
    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        z = F.dropout(x, self.dropout) if self.dropout and self.training else x
        bias: Any = self.base.bias
        if torch.is_grad_enabled():
            parameters = self.lora_A, self.lora_B, self.lora_magnitude_vector
            y = _DoRAProduct.apply(z, *parameters, self.squares, self.scale, self.base)
            if z is not x:
                return y + self.base(x - z)  # which adds the bias
            return y if bias is None else y + bias
        product = self.base(z) if bias is None else self.base(z) - bias
        h = z @ self.lora_A.T.to(x.dtype)
        y = (product + (h * self.scale) @ self.lora_B.T.to(x.dtype)) * self.gain(x.dtype).to(x.dtype)
        if z is not x:
            return y + self.base(x - z)
        return y if bias is None else y + bias


@contextmanager
def gains_held(model: nn.Module) -> Iterator[None]:
    """Compute every m / n once: for many forward passes without a change of parameters, such as decoding."""
    modules = [module for module in model.modules() if isinstance(module, DoRALinear)]
    before = [module.keep(True) for module in modules]
    try:
        yield
    finally:
        for module, keeping in zip(modules, before, strict=True):
            module.keep(keeping)


def _norms(weight: Tensor, a: Tensor, b: Tensor, squares: Tensor, scale: float) -> Tensor:
    """Length of each row of W + s·B A, float32 [out_dim].

    Args:
        weight: W [out_dim, in_dim] in the compute type.
        a: A [rank, in_dim] float32.
        b: B [out_dim, rank] float32.
        squares: Squared lengths of W's rows, float32 [out_dim].
        scale: s.
    """
    mixed = (weight @ a.T.to(weight.dtype)).to(b.dtype)
    squared = squares + 2 * scale * (mixed * b).sum(1) + scale**2 * (b * (b @ (a @ a.T))).sum(1)
    return squared.clamp(min=0).sqrt().clamp(min=_LEAST)


class _DoRAProduct(torch.autograd.Function):
    """y = (m / n) ∘ (W x + s·B(A x)), with n as a constant."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, m: Tensor, squares: Tensor, scale: float, base: nn.Module
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weight = frozen_weight(base, x.dtype)
        norms = _norms(weight, a, b, squares, scale)
        h = rows @ a.T.to(x.dtype)
        v = rows @ weight.T
        v.addmm_(h, b.T.to(x.dtype), alpha=scale)
        ctx.save_for_backward(rows, h, v, a, b, m, norms)
        ctx.base, ctx.scale, ctx.shape = base, scale, x.shape
        return (v * (m / norms).to(v.dtype)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, h, v, a, b, m, norms = ctx.saved_tensors
        dy = grads[0].reshape(v.shape)
        dm = (dy * v).sum(0, dtype=m.dtype) / norms
        dv = dy * (m / norms).to(dy.dtype)
        dh = (dv @ b.to(dv.dtype)).mul_(ctx.scale)
        db = (h.T @ dv).T.to(b.dtype).mul_(ctx.scale)
        da = (dh.T @ rows).to(a.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dv @ frozen_weight(ctx.base, dv.dtype)
            dx = dx.addmm_(dh, a.to(dv.dtype)).view(ctx.shape)
        return dx, da, db, dm, None, None, None
