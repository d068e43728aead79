"""Causal attention for documents laid end to end, as batched products of documents of like length.

Queries and keys are rotated while they are laid side by side, so that the scores of all heads and documents are one
batched product each; the query heads that share a key head are folded into one matrix. What is between the products,
mask and softmax, is one pass over the scores. Nothing of the size of the scores is kept for the backward pass, which
computes them again: that is cheaper than the memory.

With S = s·Q Kᵀ and P = softmax(S) over the keys that a query sees, O = P V, and

    dV = Pᵀ dO        dP = dO Vᵀ        dS = P ∘ (dP - rowsum(P ∘ dP))        dQ = s·dS K        dK = s·dSᵀ Q

Long documents are computed in pieces of queries, each against the keys up to its own end only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafit.kernels.step import LANES, Documents, Scores, pack_heads, softmax_, softmax_backward_, unpack_heads
from lorafit.modules.packed import scratch

_PIECE = 256  # queries at a time in a document longer than twice that
_EVERYTHING = 2**40  # a window that leaves nothing out
_SCORES = 2**22  # scores at a time: documents beyond are taken in turn, so that memory stays small
Angles = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Attention:
    """How tokens attend.

    Attributes:
        angles: Cosines and sines of the rotation of queries and keys, see ``pack_heads``; without gradient.
        documents: All documents, from ``side_by_side``.
        dim: Size of a head.
        scale: Factor before the softmax.
        window: How many tokens a token sees, itself included; None for all before it.
    """

    angles: Angles
    documents: tuple[Documents, ...]
    dim: int
    scale: float
    window: int | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, how: Attention) -> Tensor:
    """Rotate queries and keys, and attend within each document.

    Args:
        q: [tokens, heads·dim]; rows of this and the others may be apart, as columns of one tensor are.
        k: [tokens, key heads·dim].
        v: [tokens, key heads·dim].
        how: How.

    Returns:
        [tokens, heads·dim].
    """
    return _Attention.apply(q, k, v, how)


def forward(q: Tensor, k: Tensor, v: Tensor, how: Attention, out: Tensor) -> list[Tensor]:
    """What ``attend`` gives, into ``out``; returns what ``backward`` needs."""
    kept: list[Tensor] = []
    for documents in how.documents:
        packed = _packed(q, k, v, documents, how)
        result = _like(packed[0], "attended")
        for piece in _pieces(packed, documents, how):
            piece.multiply(piece.shares(), piece.values, piece.rows_of(result))
        unpack_heads(result, documents, None, out)
        kept += packed
    return kept


def backward(grad: Tensor, kept: Sequence[Tensor], how: Attention, out: Tensor) -> None:
    """The gradients of queries, keys and values.

    Args:
        grad: Of the result, [tokens, heads·dim].
        kept: From ``forward``.
        how: The same.
        out: Where they go, beside one another: [tokens, (heads + 2·key heads)·dim].
    """
    heads, key_heads, dim = kept[0].shape[1], kept[1].shape[1], how.dim
    results = out.split([heads * dim, key_heads * dim, key_heads * dim], 1)
    for place, documents in enumerate(how.documents):
        packed = kept[3 * place], kept[3 * place + 1], kept[3 * place + 2]
        dout = pack_heads(grad, documents, heads, None)
        grads = _backward(packed, dout, documents, how)
        for each, result, angles in zip(grads, results, (how.angles, how.angles, None), strict=True):
            unpack_heads(each, documents, angles, result)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: Attention) -> Tensor:
        out = q.new_empty(q.shape)
        ctx.save_for_backward(*forward(q, k, v, how, out))
        ctx.how, ctx.widths = how, [each.shape[1] for each in (q, k, v)]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        out = grad.new_empty(len(grad), sum(ctx.widths))
        backward(grad, ctx.saved_tensors, ctx.how, out)
        return *out.split(ctx.widths, 1), None


def _like(places: Tensor, use: str) -> Tensor:
    return scratch(tuple(places.shape), places.dtype, places.device, use)


def _packed(q: Tensor, k: Tensor, v: Tensor, documents: Documents, how: Attention) -> list[Tensor]:
    rotations = (how.angles, how.angles, None)
    return [
        pack_heads(each, documents, each.shape[1] // how.dim, angles)
        for each, angles in zip((q, k, v), rotations, strict=True)
    ]


def _backward(
    packed: tuple[Tensor, ...], dout: Tensor, documents: Documents, how: Attention
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the packed queries, keys and values."""
    dq, dk, dv = (_like(each, use) for each, use in zip(packed, ("dq", "dk", "dv"), strict=True))
    in_pieces = _queries_at_once(documents.padded) < documents.padded
    # The queries of other pieces add to the gradients of a key, which bfloat16 is too coarse for.
    sums = [torch.zeros(each.shape) for each in (dk, dv)] if in_pieces else [dk, dv]
    for piece in _pieces(packed, documents, how):
        shares, grads = piece.shares(), piece.folded(dout)
        scores = piece.scores("grads")
        torch.bmm(grads, piece.values.transpose(1, 2), out=scores)
        softmax_backward_(shares, scores, piece.meaning)
        piece.multiply(scores, piece.keys, piece.rows_of(dq))
        for total, left, right in zip(sums, (scores, shares), (piece.queries, grads), strict=True):
            target = piece.keys_of(total)
            if in_pieces:
                target += torch.bmm(left.transpose(1, 2), right)
            else:
                torch.bmm(left.transpose(1, 2), right, out=target)
    if in_pieces:
        dk, dv = (total.to(dq.dtype) for total in sums)
    return dq, dk, dv


class _Piece:
    """Some documents, some of their queries, and the keys that these may see."""

    def __init__(
        self, packed: tuple[Tensor, ...], which: slice, first: int, last: int, documents: Documents, how: Attention
    ) -> None:
        window = how.window or _EVERYTHING
        start = max(0, first - window + 1) // LANES * LANES
        self.which, self.place, self.seen = which, slice(first, last), slice(start, last)
        self.shared = packed[1].shape[1]
        self.queries = self.folded(packed[0])
        self.keys, self.values = (self.keys_of(each) for each in packed[1:])
        self.meaning = Scores(documents.lengths[which], last - first, first, start, window, how.scale)

    def keys_of(self, places: Tensor) -> Tensor:
        """What belongs to the keys at hand: [documents·key heads, keys, dim], a view."""
        return places[self.which].flatten(0, 1)[:, self.seen]

    def rows_of(self, places: Tensor) -> Tensor:
        """What belongs to the queries at hand: [documents, heads, queries, dim], a view."""
        return places[self.which, :, self.place]

    def folded(self, places: Tensor) -> Tensor:
        """The same, heads that share a key head one below the other: [documents·key heads, heads each·queries, dim]."""
        rows = self.rows_of(places)
        return rows.reshape(len(rows) * self.shared, -1, rows.shape[3])

    def multiply(self, left: Tensor, right: Tensor, rows: Tensor) -> None:
        """Write left·right to rows of queries."""
        if rows.is_contiguous():
            torch.bmm(left, right, out=rows.view(len(left), -1, rows.shape[3]))
        else:
            rows.copy_(torch.bmm(left, right).view(rows.shape))

    def scores(self, use: str) -> Tensor:
        """A reused buffer for numbers of each query and key."""
        shape = *self.queries.shape[:2], self.keys.shape[1]
        return scratch(shape, self.queries.dtype, self.queries.device, use)

    def shares(self) -> Tensor:
        """How much each query takes of each key."""
        scores = torch.bmm(self.queries, self.keys.transpose(1, 2), out=self.scores("shares"))
        return softmax_(scores, self.meaning)


def _pieces(packed: Any, documents: Documents, how: Attention) -> Iterator[_Piece]:
    count, heads, length, _ = packed[0].shape
    queries = _queries_at_once(length)
    together = max(1, _SCORES // (heads * queries * length))
    for some in range(0, count, together):
        for first in range(0, length, queries):
            last = min(first + queries, length)
            yield _Piece(packed, slice(some, some + together), first, last, documents, how)


def _queries_at_once(length: int) -> int:
    return length if length <= 2 * _PIECE else _PIECE
