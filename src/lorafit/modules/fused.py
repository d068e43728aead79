"""Norms and gated products as one pass each, forward and backward.

Each function keeps for the backward pass only what cannot be computed again for less than it costs to keep: a norm its
input (which the residual stream keeps anyway) and one number for each token, a gated product its two inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafit.kernels import step


def norm(x: Tensor, factors: Tensor, eps: float) -> Tensor:
    """RMS norm (arXiv 1910.07467): x·factors/√(mean(x²) + eps) over the last dimension.

    Args:
        x: [..., width], of a type that ``step.serves``.
        factors: float32 [width]; they get no gradient.
        eps: Keeps the root from zero.
    """
    return _Norm.apply(x, factors, eps)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate)·up (SwiGLU and GeGLU, arXiv 2002.05202).

    Args:
        gate: [..., width], of a type that ``step.serves``.
        up: The same.
        activation: ``silu``, or ``gelu`` in its tanh approximation.
    """
    return _Gated.apply(gate, up, activation)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, inverse = step.norm(rows, factors, eps)
        ctx.save_for_backward(rows, factors, inverse)
        return y.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, factors, inverse = ctx.saved_tensors
        dy = grads[0].reshape(rows.shape).contiguous()
        return step.norm_backward(dy, rows, factors, inverse).view_as(grads[0]), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        rows, others = (each.reshape(-1, each.shape[-1]) for each in (gate, up))
        if rows.stride() != others.stride():
            rows, others = rows.contiguous(), others.contiguous()
        ctx.save_for_backward(rows, others)
        ctx.activation = activation
        return step.gated(rows, others, activation).view(gate.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dy = grads[0].reshape(gate.shape).contiguous()
        dgate, dup = step.gated_backward(dy, gate, up, ctx.activation).chunk(2, 1)
        return dgate.view(grads[0].shape), dup.view(grads[0].shape), None
