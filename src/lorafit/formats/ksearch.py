"""Scales for K-quants: numbers of a block and integers of its sub-blocks that give the least squared error.

In Q6_K the weights of sub-block i are w = d·s_i·q. Three things are to be found, and none is independent of the others:
the integers q, the integer scales s_i, and d in half precision.

**Sub-blocks first.** For given q the best factor of a sub-block is a* = Σwq / Σq², and what it leaves is
Σw² - (Σwq)² / Σq². The q are those that rounding w/a gives for a few a, which put the weight of largest magnitude on
different codes: at the ends of the range, a little inside, and beyond, where it is cut. The best of them stays.

**Then the block.** With q kept, replacing a* by d·s costs (d·s - a*)²·Σq², which needs no weight to be looked at
again. So many d are tried, each with the s that cost the least. A larger factor than a* costs less than that, since q
is chosen again in the end: about a twelfth of its square for each weight, the mean square of a rounding error. It
matters where s is a small number: then the next larger one is often better than the nearest.

**And again.** Choosing q for the rounded scales gives new sums, for which d has a best value in closed form and s
another chance. The best of the rounds stays, by the error of what will be read from the file.

All sums are halves added to halves, and everything else is one rounded operation, so that the same weights give the
same bits on every processor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_HALF_MAX, _HALF_MIN = 65504.0, 2.0**-24  # the largest half-precision number, and the smallest above zero
_BEYOND = 65520.0  # from here on, rounding to half precision gives infinity
_NOISE = 2.0**-22  # of sums in float32
_ROUNDS = 2

# Codes for the weight of largest magnitude in a sub-block of Q6_K, whose codes are -32 to 31.
_REACHES = (-32.0, -31.25, -31.6, -32.25, -32.5, -33.0, -33.5, -34.0, 30.7, 31.0, 31.4, 32.0)
# Integers for the largest scale of a block of Q6_K; they are -128 to 127.
_LARGEST = torch.cat((torch.arange(-128.0, -112.0), torch.tensor([127.0])))


class Scaled(NamedTuple):
    """Blocks without offsets.

    Attributes:
        d: float32 [n], numbers that half precision has, or infinite where weights are too large.
        s: Integers of the sub-blocks, float32 [n, 16].
        q: Integers of the weights, float32 [n, 16, 16].
    """

    d: Tensor
    s: Tensor
    q: Tensor


def scaled(weights: Tensor) -> Scaled:
    """The best that the search finds for w = d·s·q, with s in -128..127 and q in -32..31.

    Args:
        weights: Finite, float32 [n, 256].
    """
    too_large = weights.abs().amax(1) >= _BEYOND * 128 * 32
    # Weights, sub-blocks, blocks: sums over the first are sums of long rows.
    w = weights.masked_fill(too_large[:, None], 0).view(-1, 16, 16).permute(2, 1, 0).contiguous()
    factor, squares = _factors(w)
    d = _largest(factor) / _LARGEST[:, None].to(w.device)
    found: tuple[Tensor, ...] = ()
    for _ in range(_ROUNDS):
        d, s = _rounded_scales(d, factor, squares)
        q = _codes(w, d * s, -32, 31)
        error = _sum(_sum((q * (d * s) - w).square_()))
        candidate = error, d, s, q
        found = _better(candidate, found) if found else candidate
        products, squares = _sum(w * q), _sum(q * q)
        factor = products / squares.clamp(min=1)
        fitted = _sum(s * products) / _sum(s * s * squares).clamp(min=1)
        d = torch.stack((fitted, d))
    _, d, s, q = found
    return Scaled(d.masked_fill(too_large, torch.inf), s.T, q.permute(2, 1, 0))


def _factors(w: Tensor) -> tuple[Tensor, Tensor]:
    """The best factors of sub-blocks, and Σq² of their codes: [16, 16, n] -> two [16, n]."""
    inverse = _inverse(_largest(w))
    best: tuple[Tensor, ...] = ()
    for reach in _REACHES:
        q = (w * (inverse * reach)).round_().clamp_(-32, 31)
        products, squares = _sum(w * q), _sum(q * q).clamp_(min=1)
        gain = products.square() / squares
        candidate = -gain, products, squares
        # Less than the sums are off by is no gain: equal weights are best left on -32, a power of two.
        best = _better((-gain + gain * _NOISE, products, squares), best) if best else candidate
    _, products, squares = best
    return products / squares, squares


def _rounded_scales(d: Tensor, factor: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """The d that costs least, in half precision, with the integers of its sub-blocks.

    Args:
        d: Those to choose from, [k, n].
        factor: What d·s shall be, [16, n].
        squares: Σq² of each sub-block, [16, n].

    Returns:
        d [n] and s [16, n].
    """
    # Where d would be zero in half precision, the least that is not: its first multiples are what scales there are.
    nonzero = torch.where(d == 0, 0, d.abs().clamp(_HALF_MIN, _HALF_MAX).copysign(d))
    d = nonzero.half().float()
    below = (factor * _inverse(d)[:, None]).floor_().clamp_(-128, 127)
    above = (below + 1).clamp_(max=127)

    def cost(s: Tensor) -> Tensor:
        rounded = d[:, None] * s
        kept = (rounded - factor).square_() * squares
        return torch.where(rounded.abs() > factor.abs(), kept.minimum(rounded.square() * (16 / 12)), kept)

    of_below, of_above = cost(below), cost(above)
    s = torch.where(of_above < of_below, above, below)
    best = _sum(of_below.minimum(of_above).transpose(0, 1)).argmin(0, keepdim=True)
    return d.gather(0, best)[0], s.gather(0, best[:, None].expand(1, *factor.shape))[0]


def _codes(w: Tensor, factor: Tensor, least: int, largest: int) -> Tensor:
    return (w * _inverse(factor)).round_().clamp_(least, largest)


def _inverse(factor: Tensor) -> Tensor:
    """1 / factor; 0 of what is too small for any block to hold."""
    return torch.where(factor.abs() < _HALF_MIN / 2**10, 0, 1 / factor)


def _largest(values: Tensor) -> Tensor:
    """What is farthest from zero, with its sign: [k, ...] -> [...]."""
    low, high = values.aminmax(dim=0)
    return torch.where(-low > high, low, high)


def _better(candidate: tuple[Tensor, ...], best: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of two results, for each block or sub-block the one with the smaller error, which is their first member."""
    less = candidate[0] < best[0]
    return tuple(torch.where(less, one, other) for one, other in zip(candidate, best, strict=True))


def _sum(values: Tensor) -> Tensor:
    """Sum over the first dimension, a power of two, always in the same order: [k, ...] -> [...]."""
    while len(values) > 1:
        values = values[: len(values) // 2] + values[len(values) // 2 :]
    return values[0]
