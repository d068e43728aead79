"""Scales for K-quants: numbers of a block and integers of its sub-blocks that give the least squared error.

In Q6_K the weights of sub-block i are w = d·s_i·q. Three things are to be found, and none without the others: the
integers q of the weights, the integer scales s_i, and d in half precision.

**Sub-blocks first.** For given q the best factor of a sub-block is a* = Σwq / Σq², and what it leaves is
Σw² - (Σwq)² / Σq². The q are those that rounding w/a gives for a few a, which put the weight of largest magnitude on
different codes: at the ends of the range, a little inside, and beyond, where it is cut. The best of them stays.

**Then the block.** With q kept, replacing a* by d·s costs (d·s - a*)²·Σq², which needs no weight to be looked at
again. So many d are tried, each with the s that cost the least. A larger factor than a* costs less than that, since q
is chosen again in the end: about a twelfth of its square for each weight, the mean square of a rounding error. It
matters where s is a small number: then the next larger one is often better than the nearest.

**And again.** Choosing q for the rounded scales gives new sums, for which d has a best value in closed form and s
another chance. The best of the rounds stays, by the error of what will be read from the file.

All sums but those of integers are halves added to halves, and everything else is one rounded operation, so that the
same weights give the same bits on every processor. ``koffset`` does the same for blocks with offsets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_HALF_MAX, HALF_MIN = 65504.0, 2.0**-24  # the largest half-precision number, and the smallest above zero
BEYOND = 65520.0  # from here on, rounding to half precision gives infinity
NOISE = 2.0**-22  # of sums in float32; less than it is no gain
_ROUNDS = 2

# Codes for the weight of largest magnitude in a sub-block of Q6_K, whose codes are -32 to 31. The first is best for
# equal weights: a power of two.
_REACHES = (-32.0, -31.25, -31.6, -32.25, -32.5, -33.0, -33.5, -34.0, 30.7, 31.0, 31.4, 32.0)
# Integers for the largest scale of a block of Q6_K, which are -128 to 127.
_LEVELS = torch.cat((torch.arange(-128.0, -112.0), torch.tensor([127.0])))


class Scaled(NamedTuple):
    """Blocks without offsets.

    Attributes:
        d: float32 [n], numbers that half precision has, or infinite where weights are too large.
        s: Integers of the sub-blocks, float32 [n, 16].
        q: Integers of the weights and 32, uint8 [n, 16, 16].
    """

    d: Tensor
    s: Tensor
    q: Tensor


def scaled(weights: Tensor) -> Scaled:
    """The best that the search finds for w = d·s·q, with s in -128..127 and q in -32..31.

    Args:
        weights: Finite, float32 [n, 256].
    """
    too_large = weights.abs().amax(1) >= BEYOND * 128 * 32
    w = in_columns(weights.masked_fill(too_large[:, None], 0), 16)
    factor, squares = _factors(w)
    d = extreme(factor) / _LEVELS[:, None].to(w.device)
    found: tuple[Tensor, ...] = ()
    for _ in range(_ROUNDS):
        d, s = rounded_scales(d, factor, squares, (-128, 127), 16)
        a = d * s
        q = (w * inverse(a)).round_().clamp_(-32, 31)
        error = added(added((q * a - w).square_()))
        found = better((error, d, s, q), found)
        products, squares = added(w * q), (q * q).sum(0)
        factor = products / squares.clamp(min=1)
        fitted = added(s * products) / added(s * s * squares).clamp(min=1)
        d = torch.stack((fitted, d))
    _, d, s, q = found
    return Scaled(d.masked_fill(too_large, torch.inf), s.T, (q + 32).to(torch.uint8).permute(2, 1, 0))


def _factors(w: Tensor) -> tuple[Tensor, Tensor]:
    """The best factors of sub-blocks, and Σq² of their codes: [16, 16, n] -> two [16, n]."""
    one_code, total = inverse(extreme(w)), added(w * w)
    best: tuple[Tensor, ...] = ()
    for reach in _REACHES:
        q = (w * (one_code * reach)).round_().clamp_(-32, 31)
        products, squares = added(w * q), (q * q).sum(0).clamp_(min=1)
        best = better((total - products.square() / squares, products, squares), best, NOISE * total)
    _, products, squares = best
    return products / squares, squares


def rounded_scales(
    d: Tensor, factor: Tensor, squares: Tensor, limits: tuple[int, int], weights: int | None
) -> tuple[Tensor, Tensor]:
    """The d that costs least, in half precision, with the integers of its sub-blocks.

    Args:
        d: Those to choose from, [k, n].
        factor: What d·s shall be, [sub-blocks, n].
        squares: What the square of the difference counts in each sub-block, [sub-blocks, n].
        limits: The least and the largest s.
        weights: How many a sub-block has, for what a larger factor costs at most; None if that does not hold.

    Returns:
        d [n] and s [sub-blocks, n].
    """
    # Where d would be zero in half precision, the least that is not: its first multiples are what scales there are.
    nonzero = torch.where(d == 0, 0, d.abs().clamp(HALF_MIN, _HALF_MAX).copysign(d))
    d = nonzero.half().float()
    below = (factor * inverse(d)[:, None]).floor_().clamp_(*limits)
    above = (below + 1).clamp_(max=limits[1])

    of_below, of_above = (cost(d[:, None] * s, factor, squares, weights) for s in (below, above))
    best = added(of_below.minimum(of_above).transpose(0, 1)).min(0, keepdim=True).indices
    for_all = best[:, None].expand(1, *factor.shape)
    below, of_below, of_above = (x.gather(0, for_all)[0] for x in (below, of_below, of_above))
    return d.gather(0, best)[0], below + (of_above < of_below)


def cost(rounded: Tensor, factor: Tensor, squares: Tensor, weights: int | None) -> Tensor:
    """What it costs to have a rounded factor in place of the best one, see ``rounded_scales``."""
    kept = (rounded - factor).square_().mul_(squares)
    if weights is None:
        return kept
    # What a smaller factor costs is less than the last term, which a larger one lacks. A choice in place of this sum
    # would take ten times as long, for no processor guesses right which it will be.
    square = rounded.square()
    beyond = square * (weights / 12)
    return kept.minimum((factor.square() - square).relu_().mul_(squares).add_(beyond))


def in_columns(weights: Tensor, sub_blocks: int) -> Tensor:
    """Weights first, blocks last, so that to sum over weights is to add long rows: [n, 256] -> [k, sub-blocks, n]."""
    return weights.unflatten(1, (sub_blocks, -1)).permute(2, 1, 0).contiguous()


def inverse(factor: Tensor) -> Tensor:
    """1 / factor; 0 of what is too small for any block to hold."""
    return torch.where(factor.abs() < HALF_MIN / 2**10, 0, 1 / factor)


def extreme(values: Tensor) -> Tensor:
    """What is farthest from zero, with its sign: [k, ...] -> [...]."""
    low, high = values.amin(0), values.amax(0)  # together they take ten times as long
    return torch.where(-low > high, low, high)


def better(candidate: tuple[Tensor, ...], best: tuple[Tensor, ...], margin: Tensor | float = 0.0) -> tuple[Tensor, ...]:
    """Of two results, for each block or sub-block the one with the smaller error, which is their first member.

    Args:
        candidate: One result.
        best: The other; empty if there is none yet.
        margin: By how much the candidate has to be better.
    """
    if not best:
        return candidate
    less = candidate[0] + margin < best[0]
    return tuple(torch.where(less, one, other) for one, other in zip(candidate, best, strict=True))


def added(values: Tensor) -> Tensor:
    """Sum over the first dimension, a power of two, always in the same order: [k, ...] -> [...].

    The values are overwritten.
    """
    while len(values) > 1:
        values = values[: len(values) // 2].add_(values[len(values) // 2 :])
    return values[0]
