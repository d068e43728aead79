"""A whole decoder layer, with its adapters, as one autograd function.

    X₁ = X + O(attention(QKV(norm(X))))        X₂ = X₁ + D(gated(GU(norm(X₁))))

with the stacks of linear layers of ``product``: QKV, O, GU (gate and up) and D. Piece by piece a layer is some fifteen
nodes of autograd, each of which allocates its results and keeps what its own gradient needs. As one it keeps X, X₁,
the rotated queries, keys and values, and GU's result; with LoRA also what attention gave and the small products with A.
Norms and the gated product are computed again where LoRA's gradient needs them, which costs a hundredth of the step.
Everything else lies in buffers that all layers and steps share, and the residual sums are taken by the products and by
the norms' backward pass on their way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lorafit.kernels import step
from lorafit.modules import attention
from lorafit.modules.packed import scratch
from lorafit.modules.product import Kept, Part, Stack, trained


@dataclass(frozen=True)
class Norm:
    """An RMS norm.

    Attributes:
        factors: float32 [width].
        eps: Keeps the root from zero.
    """

    factors: Tensor
    eps: float


@dataclass(frozen=True)
class Layer:
    """A decoder layer.

    Attributes:
        norms: Before attention and before the gated product.
        qkv: Queries, keys and values.
        o: What attention's result goes through.
        gate_up: Both factors of the gated product.
        down: What the gated product goes through.
        attention: How tokens attend.
        activation: Of the gated product, as ``step.gated`` has it.
        again: Whether gate and up, half of all that is kept, are computed once more instead.
    """

    norms: tuple[Norm, Norm]
    qkv: Sequence[Part]
    o: Part
    gate_up: Sequence[Part]
    down: Part
    attention: attention.Attention
    activation: str
    again: bool = False


def apply(x: Tensor, layer: Layer) -> Tensor:
    """The layer: [tokens, width] -> [tokens, width].

    Args:
        x: Of a type that ``step.serves``, contiguous.
        layer: What is applied to it.
    """
    stacks = [layer.qkv, [layer.o], layer.gate_up, [layer.down]]
    return _Layer.apply(x, layer, [Stack(parts) for parts in stacks], *(t for parts in stacks for t in trained(parts)))


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, stacks: list[Stack], *tensors: Tensor | None) -> Tensor:
        qkv_of, o_of, gate_up_of, down_of = stacks
        each = _shares(stacks, tensors)
        before, after = layer.norms
        how = layer.attention

        normed, inverse = step.norm(x, before.factors, before.eps, _buffer(x, x.shape[1], "normed"))
        qkv, kept_qkv = qkv_of.forward(normed, each[0], out=_buffer(x, qkv_of.shape[0], "qkv"))
        qkv_of.add_biases(qkv)
        q, k, v = (qkv[:, columns] for columns in qkv_of.columns)
        attended = x.new_empty(q.shape) if o_of.has_branch else _buffer(x, q.shape[1], "normed")
        packed = attention.forward(q, k, v, how, attended)
        middle, kept_o = o_of.forward(attended, each[1], added_to=x.clone())
        o_of.add_biases(middle)

        normed, inverse_after = step.norm(middle, after.factors, after.eps, _buffer(x, x.shape[1], "normed"))
        gate_up, kept_gate_up = _gate_up(gate_up_of, normed, each[2], reused=layer.again)
        gate, up = gate_up.chunk(2, 1)
        product = step.gated(gate, up, layer.activation, _buffer(x, gate.shape[1], "gated"))
        result, kept_down = down_of.forward(product, each[3], added_to=middle.clone())
        down_of.add_biases(result)

        ctx.save_for_backward(
            x, middle, inverse, inverse_after, None if layer.again else gate_up, attended if o_of.has_branch else None,
            *kept_qkv, *kept_o, *kept_gate_up, *kept_down, *tensors, *packed,
        )  # fmt: skip
        ctx.layer, ctx.stacks = layer, stacks
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer, stacks = ctx.layer, ctx.stacks
        saved = iter(ctx.saved_tensors)
        x, middle, inverse, inverse_after, gate_up, attended = islice(saved, 6)
        kept_qkv, kept_o, kept_gate_up, kept_down = (Kept(*islice(saved, len(Kept._fields))) for _ in stacks)
        each = _shares(stacks, list(islice(saved, 3 * sum(len(stack.weights) for stack in stacks))))
        qkv_of, o_of, gate_up_of, down_of = stacks
        before, after = layer.norms
        how = layer.attention
        of_result = grads[0].contiguous()

        if gate_up is None:
            normed, _ = step.norm(middle, after.factors, after.eps, _buffer(x, x.shape[1], "normed"))
            gate_up, _ = _gate_up(gate_up_of, normed, each[2], reused=True)
        gate, up = gate_up.chunk(2, 1)
        dh = down_of.branch_gradient(of_result, kept_down)
        grad = down_of.input_gradient(of_result, dh, kept_down, each[3], _buffer(x, gate.shape[1], "dgated"))
        again = _buffer(x, gate.shape[1], "gated") if down_of.has_branch else None
        of_gate_up = step.gated_backward(
            grad, gate, up, layer.activation, out=_buffer(x, gate_up.shape[1], "dgate_up"), again=again
        )
        of_down = list(down_of.gradients(of_result, dh, again, kept_down, each[3]))

        dh = gate_up_of.branch_gradient(of_gate_up, kept_gate_up)
        grad = gate_up_of.input_gradient(of_gate_up, dh, kept_gate_up, each[2], _buffer(x, x.shape[1], "dnormed"))
        of_middle = step.norm_backward(grad, middle, after.factors, inverse_after, added=of_result)
        seen = _normed(middle, after, gate_up_of)
        of_gate_up_tensors = list(gate_up_of.gradients(of_gate_up, dh, seen, kept_gate_up, each[2]))

        dh = o_of.branch_gradient(of_middle, kept_o)
        grad = o_of.input_gradient(of_middle, dh, kept_o, each[1], _buffer(x, o_of.shape[1], "dnormed"))
        of_o = list(o_of.gradients(of_middle, dh, attended, kept_o, each[1]))
        of_qkv = _buffer(x, qkv_of.shape[0], "qkv")
        attention.backward(grad, list(saved), how, of_qkv)

        dh = qkv_of.branch_gradient(of_qkv, kept_qkv)
        dx = None
        if ctx.needs_input_grad[0]:
            grad = qkv_of.input_gradient(of_qkv, dh, kept_qkv, each[0], _buffer(x, x.shape[1], "dnormed"))
            dx = step.norm_backward(grad, x, before.factors, inverse, added=of_middle)
        seen = _normed(x, before, qkv_of)
        of_qkv_tensors = list(qkv_of.gradients(of_qkv, dh, seen, kept_qkv, each[0]))
        return dx, None, None, *of_qkv_tensors, *of_o, *of_gate_up_tensors, *of_down


def _gate_up(stack: Stack, normed: Tensor, tensors: Sequence[Tensor | None], *, reused: bool) -> tuple[Tensor, Kept]:
    out = _buffer(normed, stack.shape[0], "gate_up") if reused else None
    result, kept = stack.forward(normed, tensors, out=out)
    stack.add_biases(result)
    return result, kept


def _normed(x: Tensor, norm: Norm, of: Stack) -> Tensor | None:
    """A norm once more, if LoRA's gradient needs what it gave."""
    return step.norm(x, norm.factors, norm.eps, _buffer(x, x.shape[1], "normed"))[0] if of.has_branch else None


def _shares(stacks: Sequence[Stack], tensors: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    """What of the tensors belongs to each stack."""
    rest: Iterator[Tensor | None] = iter(tensors)
    return [list(islice(rest, 3 * len(stack.weights))) for stack in stacks]


def _buffer(x: Tensor, width: int, use: str) -> Tensor:
    return scratch((len(x), width), x.dtype, x.device, use)
