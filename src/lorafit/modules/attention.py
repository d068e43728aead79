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
from typing import Any

import torch
from torch import Tensor

from lorafit.kernels.step import LANES, Documents, Scores, pack_heads, softmax_, softmax_backward_, unpack_heads
from lorafit.modules.packed import scratch

_PIECE = 256  # queries at a time in a document longer than twice that
_SCORES = 2**22  # scores at a time: documents beyond are taken in turn, so that memory stays small
_EVERYTHING = 2**40  # a window that leaves nothing out

Angles = tuple[Tensor, Tensor] | None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Angles,
    documents: tuple[Documents, ...],
    *,
    dim: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Rotate queries and keys, and attend within each document.

    Args:
        q: [tokens, heads·dim]; rows of this and the others may be apart, as columns of one tensor are.
        k: [tokens, key heads·dim].
        v: [tokens, key heads·dim].
        angles: Cosines and sines of the rotation, see ``pack_heads``; without gradient.
        documents: All documents, from ``side_by_side``.
        dim: Size of a head.
        scale: Factor before the softmax.
        window: How many tokens a token sees, itself included; None for all before it.

    Returns:
        [tokens, heads·dim].
    """
    return _Attention.apply(q, k, v, angles, documents, dim, scale, window or _EVERYTHING)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        angles: Angles,
        batches: tuple[Documents, ...],
        dim: int,
        scale: float,
        window: int,
    ) -> Tensor:
        out = q.new_empty(q.shape)
        kept: list[Tensor] = []
        for documents in batches:
            packed = _packed(q, k, v, documents, angles, dim)
            result = torch.empty_like(packed[0])
            for piece in _pieces(packed, documents, scale, window):
                piece.multiply(piece.shares(), piece.values, piece.rows_of(result))
            unpack_heads(result, documents, None, out)
            kept += packed
        ctx.save_for_backward(*kept)
        ctx.angles, ctx.batches, ctx.scale, ctx.window = angles, batches, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out = grads[0].contiguous()
        results: Sequence[Tensor] = ()
        kept = ctx.saved_tensors  # once: asking again would compute a checkpointed layer again
        for place, documents in enumerate(ctx.batches):
            packed = kept[3 * place : 3 * place + 3]
            heads, key_heads, dim = packed[0].shape[1], packed[1].shape[1], packed[0].shape[3]
            if not results:
                widths = [heads * dim, key_heads * dim, key_heads * dim]
                results = out.new_empty(len(out), sum(widths)).split(widths, 1)
            dout = pack_heads(out, documents, heads, None)
            for grad, result, angles in zip(
                _backward(packed, dout, documents, ctx.scale, ctx.window),
                results,
                (ctx.angles, ctx.angles, None),
                strict=True,
            ):
                unpack_heads(grad, documents, angles, result)
        return *results, None, None, None, None, None


def _packed(q: Tensor, k: Tensor, v: Tensor, documents: Documents, angles: Angles, dim: int) -> list[Tensor]:
    heads, key_heads = q.shape[1] // dim, k.shape[1] // dim
    return [
        pack_heads(q, documents, heads, angles),
        pack_heads(k, documents, key_heads, angles),
        pack_heads(v, documents, key_heads, None),
    ]


def _backward(
    packed: tuple[Tensor, ...], dout: Tensor, documents: Documents, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the packed queries, keys and values."""
    dq, dk, dv = (torch.empty_like(each) for each in packed)
    in_pieces = _queries_at_once(documents.padded) < documents.padded
    # The queries of other pieces add to the gradients of a key, which bfloat16 is too coarse for.
    sums = [torch.zeros(each.shape) for each in (dk, dv)] if in_pieces else [dk, dv]
    for piece in _pieces(packed, documents, scale, window):
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
        self,
        packed: tuple[Tensor, ...],
        which: slice,
        first: int,
        last: int,
        documents: Documents,
        scale: float,
        window: int,
    ) -> None:
        start = max(0, first - window + 1) // LANES * LANES
        self.which, self.place, self.seen = which, slice(first, last), slice(start, last)
        self.shared = packed[1].shape[1]
        self.queries = self.folded(packed[0])
        self.keys, self.values = (self.keys_of(each) for each in packed[1:])
        self.meaning = Scores(documents.lengths[which], last - first, first, start, window, scale)

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


def _pieces(packed: Any, documents: Documents, scale: float, window: int) -> Iterator[_Piece]:
    count, heads, length, _ = packed[0].shape
    queries = _queries_at_once(length)
    together = max(1, _SCORES // (heads * queries * length))
    for some in range(0, count, together):
        for first in range(0, length, queries):
            last = min(first + queries, length)
            yield _Piece(packed, slice(some, some + together), first, last, documents, scale, window)


def _queries_at_once(length: int) -> int:
    return length if length <= 2 * _PIECE else _PIECE
