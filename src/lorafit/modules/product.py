"""The product of linear layers that share an input, with their adapters, as one autograd function.

With the weights stacked, W = [W₁; W₂; …], Y = X Wᵀ is one product, and so is the gradient of the input, dX = dY W,
which layer by layer is a sum of as many tensors as there are layers. What adapters need is shared in the same way. A
single layer is a stack of one.

LoRA adds s·B(A z) beside each layer (z is the input, after dropout if there is any). Let A be a stack too, and B have
each s·Bᵢ as a block on its diagonal. With H = Z Aᵀ,

    Y += H Bᵀ        dH = dY B        dA = dHᵀ Z        dZ = dH A        dBᵢ = s·dYᵢᵀ Hᵢ

QA-LoRA is in W already, which is unpacked with m + s·B A for offsets. With X̄ the sums of X over blocks of inputs,

    dM = dYᵀ X̄        dBᵢ = s·dMᵢ Aᵢᵀ        dAᵢ = s·Bᵢᵀ dMᵢ

Weights are unpacked in either pass and not kept. What is kept for the backward pass is X and H of LoRA, X̄ of QA-LoRA,
and the small A and B as they were multiplied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafit.containers.mapped import release
from lorafit.kernels import step
from lorafit.modules.matmul import multiply
from lorafit.modules.packed import PackedLinear, PackedWeight, scratch


@dataclass(frozen=True)
class Part:
    """A linear layer, and what an adapter of either kind has.

    Attributes:
        weight: The frozen weight, [out_dim, in_dim].
        bias: [out_dim].
        a: [rank, in_dim], or [rank, in_dim / group] of QA-LoRA.
        b: [out_dim, rank].
        scale: Factor of the update.
        offsets: QA-LoRA's m', float16 [out_dim, in_dim / group].
        group: How many inputs a column of QA-LoRA's A stands for.
    """

    weight: PackedWeight | Tensor
    bias: Tensor | None = None
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scale: float = 1.0
    offsets: Tensor | None = None
    group: int = 0


def frozen_part(layer: nn.Module) -> Part:
    """A linear layer, packed or not, without an adapter."""
    weight: Any = layer.packed if isinstance(layer, PackedLinear) else layer.weight
    bias: Any = layer.bias
    return Part(weight, bias)


def can_be_stacked(parts: Sequence[Part]) -> bool:
    """Whether the inputs of all of QA-LoRA are summed over blocks of one size."""
    return len({part.group for part in parts if part.group}) <= 1


def product(x: Tensor, parts: Sequence[Part], z: Tensor | None = None) -> list[Tensor]:
    """What each layer of a stack makes of x.

    Args:
        x: [..., in_dim].
        parts: The layers, which ``can_be_stacked``.
        z: What LoRA's A sees, if that is not x.

    Returns:
        [..., out_dim] of each layer; columns of one tensor, unless there are biases.
    """
    results = _Product.apply(x, z, Stack(parts), *trained(parts))
    return [y if part.bias is None else y + part.bias for y, part in zip(results, parts, strict=True)]


def trained(parts: Sequence[Part]) -> list[Tensor | None]:
    """What goes through autograd: offsets, A and B of each layer, in this order."""
    return [tensor for part in parts for tensor in (part.offsets, part.a, part.b)]


class Kept(NamedTuple):
    """What the gradients of a stack need besides its input, as far as it has adapters of either kind.

    Attributes:
        h: LoRA's Z·Aᵀ, [rows, all ranks].
        down: All A, [all ranks, in_dim].
        up: All s·B, [all out_dim, all ranks].
        sums: The input summed over blocks, [rows, in_dim / group].
    """

    h: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    sums: Tensor | None = None


class Stack:
    """Linear layers below one another. ``tensors`` everywhere are what ``trained`` gives."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.weights = [part.weight for part in parts]
        self.biases = [part.bias for part in parts]
        self.scales = [part.scale for part in parts]
        self.columns = _in_turn(weight.shape[0] for weight in self.weights)
        self.ranks = _in_turn(0 if part.a is None or part.group else len(part.a) for part in parts)
        self.shape = self.columns[-1].stop, self.weights[0].shape[1]
        self.has_branch = self.ranks[-1].stop > 0
        self.group = max(part.group for part in parts)
        assert can_be_stacked(parts)

    def forward(
        self,
        x: Tensor,
        tensors: Sequence[Tensor | None],
        *,
        z: Tensor | None = None,
        out: Tensor | None = None,
        added_to: Tensor | None = None,
    ) -> tuple[Tensor, Kept]:
        """What the layers make of x but for biases, beside one another: [rows, in_dim] -> [rows, all out_dim].

        Args:
            x: The input.
            tensors: What is trained.
            z: What LoRA's A sees, if that is not x.
            out: Where the result goes.
            added_to: What the result is added to, in place, instead.
        """
        y = multiply(x, self.weight(tensors, x.dtype, x.device).T, out=out, added_to=added_to)
        h = down = up = None
        if self.has_branch:
            down, up = self.branch(tensors, x.dtype)
            h = (x if z is None else z) @ down.T
            y.addmm_(h, up.T)
        # The sums are all that QA-LoRA's gradient needs of x, and 1/group of its size.
        return y, Kept(h, down, up, _group_sums(x, self.group) if self.group else None)

    def branch_gradient(self, grad: Tensor, kept: Kept) -> Tensor | None:
        """Of H, [rows, all ranks], if there is LoRA, from that of the result [rows, all out_dim]."""
        return None if kept.up is None else grad @ kept.up

    def input_gradient(
        self,
        grad: Tensor,
        dh: Tensor | None,
        kept: Kept,
        tensors: Sequence[Tensor | None],
        out: Tensor | None = None,
    ) -> Tensor:
        """Of x, [rows, in_dim].

        Args:
            grad: Of the result.
            dh: Of H; None if A does not see x.
            kept: From ``forward``.
            tensors: What is trained.
            out: Where it goes.
        """
        dx = multiply(grad, self.weight(tensors, grad.dtype, grad.device), out=out)
        return dx if dh is None or kept.down is None else dx.addmm_(dh, kept.down)

    def gradients(
        self, grad: Tensor, dh: Tensor | None, z: Tensor | None, kept: Kept, tensors: Sequence[Any]
    ) -> Iterator[Tensor | None]:
        """Of ``tensors``.

        Args:
            grad: Of the result.
            dh: Of H.
            z: What LoRA's A saw; None if there is none.
            kept: From ``forward``.
            tensors: What is trained.
        """
        if dh is not None and kept.h is not None and z is not None:
            da, db = dh.T @ z, kept.h.T @ grad  # which a CPU has faster than gradᵀ·h
        if kept.sums is not None:
            dm = kept.sums.T @ grad
        for place, (columns, ranks, scale) in enumerate(zip(self.columns, self.ranks, self.scales, strict=True)):
            _, a, b = tensors[3 * place : 3 * place + 3]
            yield None
            if a is None:
                yield from (None, None)
            elif ranks.start < ranks.stop:
                yield da[ranks].to(a.dtype)
                yield torch.empty_like(b).copy_(db[ranks, columns].T).mul_(scale)
            else:
                of_offsets = dm[:, columns].T.to(a.dtype)
                yield (b.T @ of_offsets).mul_(scale)
                yield (of_offsets @ a.T).mul_(scale)

    def add_biases(self, y: Tensor) -> None:
        """Add them to what ``forward`` gave, in place."""
        for columns, bias in zip(self.columns, self.biases, strict=True):
            if bias is not None:
                y[:, columns] += bias

    def weight(self, tensors: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weights below one another, [all out_dim, in_dim]; valid until the next one is unpacked."""
        dense = [weight for weight in self.weights if isinstance(weight, Tensor)]
        if len(dense) == len(self.weights) and _lie_below_one_another(dense):
            return dense[0].as_strided(self.shape, (self.shape[1], 1)).to(dtype)
        out = scratch(self.shape, dtype, device)
        for weight, columns, offsets in zip(self.weights, self.columns, tensors[::3], strict=True):
            if isinstance(weight, PackedWeight):
                weight.dense(dtype, offsets, out=out[columns])
                release(weight.blocks)
            else:
                out[columns] = weight
        return out

    def branch(self, tensors: Sequence[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """LoRA's A and B of the whole stack, [all ranks, in_dim] and, scaled, [all out_dim, all ranks]."""
        low = [place for place, ranks in enumerate(self.ranks) if ranks.start < ranks.stop]
        down = torch.cat([tensors[3 * place + 1] for place in low]).to(dtype)
        if len(self.weights) == 1:
            return down, (tensors[2] * self.scales[0]).to(dtype)
        up = down.new_zeros(self.shape[0], len(down))
        for place in low:
            up[self.columns[place], self.ranks[place]] = tensors[3 * place + 2] * self.scales[place]
        return down, up


def _in_turn(lengths: Iterable[int]) -> list[slice]:
    """Where things of these lengths are that follow one another."""
    ends = list(accumulate(lengths, initial=0))
    return [slice(start, end) for start, end in pairwise(ends)]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, stack: Stack, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        seen = None if z is None else z.reshape(rows.shape)
        y, kept = stack.forward(rows, tensors, z=seen)
        inputs = (rows if seen is None else seen) if stack.has_branch else None
        ctx.save_for_backward(inputs, *kept, *tensors)
        ctx.stack, ctx.shape, ctx.dropped = stack, x.shape, z is not None
        return tuple(y[:, columns].view(*x.shape[:-1], -1) for columns in stack.columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, stack = ctx.saved_tensors, ctx.stack
        inputs, kept, tensors = saved[0], Kept(*saved[1:5]), saved[5:]
        grad = _side_by_side([each.reshape(-1, each.shape[-1]) for each in grads])
        dh, dx, dz = stack.branch_gradient(grad, kept), None, None
        if ctx.needs_input_grad[0]:
            dx = stack.input_gradient(grad, None if ctx.dropped else dh, kept, tensors).view(ctx.shape)
        if ctx.dropped and dh is not None:
            dz = (dh @ kept.down).view(ctx.shape)
        return dx, dz, None, *stack.gradients(grad, dh, inputs, kept, tensors)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """[rows, widths] as columns of one tensor, without a copy if that is what they are."""
    first, width = parts[0], sum(part.shape[1] for part in parts)
    place = first.data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.data_ptr() != place or part.stride() != (width, 1):
            return torch.cat(list(parts), 1)
        place += part.shape[1] * part.itemsize
    return first.as_strided((len(first), width), (width, 1))


def _lie_below_one_another(parts: Sequence[Tensor]) -> bool:
    """Whether [rows, width] are rows of one tensor already, in this order; one that is contiguous is."""
    place = parts[0].data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()
        if not same or part.data_ptr() != place or not part.is_contiguous():
            return False
        place += part.nbytes
    return True


def _group_sums(x: Tensor, group: int) -> Tensor:
    """Sums over each block: [tokens, in_dim] -> [tokens, in_dim / group]."""
    return step.group_sums(x, group) if step.serves(x, group) else x.unflatten(1, (-1, group)).sum(-1)
