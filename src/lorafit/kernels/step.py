"""The element-wise operations of a training step, on tensors: each reads its inputs once and writes its result once.

A chain of library calls goes over its tensors once for every little operation, and keeps intermediate results for the
backward pass. On a processor with fast matrix units that is most of a training step. Here a row is read, computed on in
float32, rounded once and written.

These run on the processor only, and only where ``serves`` says so; elsewhere the modules that use them do what they
did before they were replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

try:
    from lorafit.kernels import row_code
except ImportError:  # without llvmlite, or on a processor that has no vector code of ours
    row_code = None  # type: ignore[assignment]

LANES = 16  # what widths must be multiples of
_PADDING = 32  # documents are padded to multiples of this, which suits matrix units
_WASTE = 1.25  # how much larger padding may make a batch of documents


def is_available() -> bool:
    """Whether this processor has the vector code."""
    return row_code is not None


def serves(x: Tensor, *widths: int) -> bool:
    """Whether tensors like ``x`` with rows of these widths can be handed to the functions below."""
    fits = x.dtype in (torch.bfloat16, torch.float32) and all(width % LANES == 0 for width in widths)
    return is_available() and x.device.type == "cpu" and fits


def norm(x: Tensor, factors: Tensor, eps: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x·factors/√(mean(x²) + eps) over rows.

    Args:
        x: [rows, width].
        factors: float32 [width].
        eps: Keeps the root from zero.
        out: Where the result goes.

    Returns:
        The result, and the inverse roots, float32 [rows], for the backward pass.
    """
    y, inverse = torch.empty_like(x) if out is None else out, torch.empty(len(x))
    row_code.NORM(len(x), x.shape[1], x.dtype, x, factors, float(eps), x.shape[1], y, inverse)
    return y, inverse


def norm_backward(dy: Tensor, x: Tensor, factors: Tensor, inverse: Tensor, added: Tensor | None = None) -> Tensor:
    """The gradient of ``norm`` with respect to x, and something added to it."""
    dx = torch.empty_like(x)
    arguments = dy, x, factors, inverse, x.shape[1], dx
    if added is None:
        row_code.NORM_BACKWARD(len(x), x.shape[1], x.dtype, *arguments)
    else:
        row_code.NORM_BACKWARD_ADDED(len(x), x.shape[1], x.dtype, *arguments, added)
    return dx


def gated(gate: Tensor, up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """activation(gate)·up; ``silu``, or ``gelu`` in its tanh approximation.

    Args:
        gate: [rows, width], with any distance between rows.
        up: The same, with the same.
        activation: Which.
        out: Where the result goes.
    """
    y = gate.new_empty(gate.shape) if out is None else out
    arguments = _apart(gate), _apart(up), _distance(gate, up), y.shape[1], y
    row_code.GATED[activation](len(y), y.shape[1], y.dtype, *arguments)
    return y


def gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, *, out: Tensor | None = None, again: Tensor | None = None
) -> Tensor:
    """The gradients of ``gated`` with respect to gate and up, beside one another: [rows, 2·width].

    Args:
        dy: The gradient of the result, [rows, width].
        gate: As it was.
        up: As it was.
        activation: Which.
        out: Where the gradients go.
        again: Where the result of ``gated`` goes once more, if somebody needs it.
    """
    rows, width = dy.shape
    both = dy.new_empty(rows, 2 * width) if out is None else out
    arguments = dy, _apart(gate), _apart(up), _distance(gate, up), width, both
    if again is None:
        row_code.GATED_BACKWARD[activation](rows, width, dy.dtype, *arguments)
    else:
        row_code.GATED_AGAIN[activation](rows, width, dy.dtype, *arguments, again)
    return both


def _apart(rows: Tensor) -> int:
    """The address of rows that need not follow one another."""
    assert rows.stride(1) == 1
    return rows.data_ptr()


def _distance(*tensors: Tensor) -> int:
    """From one row of each to the next."""
    assert len({rows.stride(0) for rows in tensors}) == 1
    return tensors[0].stride(0)


def group_sums(x: Tensor, group: int) -> Tensor:
    """Sums of ``group`` neighbours: [rows, width] -> [rows, width / group]."""
    sums = torch.empty(len(x), x.shape[1] // group, dtype=x.dtype)
    row_code.GROUP_SUMS(len(x), x.shape[1], x.dtype, x, sums.shape[1], group, sums)
    return sums


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of the targets, and its gradient in place of the logits.

    Args:
        logits: [rows, vocabulary]; becomes softmax(logits) minus one-hot(target).
        targets: int64 [rows].

    Returns:
        float32 [rows].

    Raises:
        IndexError: A target is none of the vocabulary.
    """
    rows, width = logits.shape
    if rows and not 0 <= int(targets.min()) <= int(targets.max()) < width:
        raise IndexError(f"targets must be below {width}, the size of the vocabulary")
    totals, gaps = torch.empty(rows), torch.empty(rows)
    row_code.CROSS_ENTROPY(rows, width, logits.dtype, logits, targets.contiguous(), width, totals, gaps)
    return totals.log() + gaps


@dataclass(frozen=True)
class Documents:
    """Documents of like length, side by side.

    Attributes:
        starts: Where each begins in the row of all tokens, int64 [documents].
        lengths: How long each is, int64 [documents].
        padded: The length that all are padded to, a multiple of 32.
    """

    starts: Tensor
    lengths: Tensor
    padded: int


@lru_cache(maxsize=16)
def side_by_side(lengths: tuple[int, ...]) -> tuple[Documents, ...]:
    """Sort documents that lie end to end into batches whose padding is small."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        longest = _padded(lengths[groups[-1][0]]) if groups else 0
        if longest and longest <= _WASTE * _padded(lengths[number]):
            groups[-1].append(number)
        else:
            groups.append([number])
    return tuple(
        Documents(
            torch.tensor([starts[number] for number in group]),
            torch.tensor([lengths[number] for number in group]),
            _padded(lengths[group[0]]),
        )
        for group in groups
    )


def _padded(length: int) -> int:
    return -(-length // _PADDING) * _PADDING


def pack_heads(tokens: Tensor, documents: Documents, heads: int, angles: tuple[Tensor, Tensor] | None) -> Tensor:
    """Lay the heads of some documents side by side, rotated.

    Args:
        tokens: [all tokens, heads·dim], with any distance between rows.
        documents: Which documents.
        heads: How many heads a token has.
        angles: Cosines and sines, [all tokens, r] in the type of ``tokens``: of each head the first r elements are
            rotated, element j with j + r/2. None rotates nothing.

    Returns:
        [documents, heads, padded, dim]; zeros in the padding.
    """
    places = tokens.new_empty(len(documents.starts), heads, documents.padded, tokens.shape[1] // heads)
    _move(row_code.PACK, tokens, documents, angles, places)
    return places


def unpack_heads(places: Tensor, documents: Documents, angles: tuple[Tensor, Tensor] | None, tokens: Tensor) -> None:
    """The way back: write the documents' rows of ``tokens`` [all tokens, heads·dim], rotated the other way round."""
    _move(row_code.UNPACK, tokens, documents, angles, places)


def _move(
    operation: Any,
    tokens: Tensor,
    documents: Documents,
    angles: tuple[Tensor, Tensor] | None,
    places: Tensor,
) -> None:
    count, heads, padded, dim = places.shape
    cosines, sines = angles or (None, None)
    half = 0 if cosines is None else cosines.shape[1] // 2
    operation(
        count * padded, heads * dim, tokens.dtype, _apart(tokens), _distance(tokens), cosines, sines,
        documents.starts, documents.lengths, padded, heads, dim, half, places,
    )  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """What rows of scores [documents, rows, keys] stand for.

    Attributes:
        lengths: Of the documents, int64 [documents].
        queries: Rows are heads, and in each head this many queries.
        first_query: The first query's place in its document.
        first_key: The first key's.
        window: How many keys up to itself a query sees.
        scale: Factor before the softmax.
    """

    lengths: Tensor
    queries: int
    first_query: int
    first_key: int
    window: int
    scale: float

    def arguments(self, scores: Tensor) -> Sequence[Tensor | int | float]:
        """For the compiled code."""
        return (
            self.lengths, scores.shape[1] * scores.shape[0] // len(self.lengths), self.queries,
            self.first_query, scores.shape[2], self.first_key, self.window, self.scale,
        )  # fmt: skip


def softmax_(scores: Tensor, of: Scores) -> Tensor:
    """Replace scores [documents·key heads, rows, keys] by each query's shares of the keys that it sees, 0 elsewhere."""
    rows = scores.shape[0] * scores.shape[1]
    row_code.SOFTMAX(rows, scores.shape[2], scores.dtype, scores, *of.arguments(scores))
    return scores


def softmax_backward_(shares: Tensor, grads: Tensor, of: Scores) -> Tensor:
    """Replace the gradients of ``softmax_``'s result by those of its scores."""
    rows = shares.shape[0] * shares.shape[1]
    row_code.SOFTMAX_BACKWARD(rows, shares.shape[2], shares.dtype, shares, grads, *of.arguments(shares))
    return grads
