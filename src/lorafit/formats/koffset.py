"""Scales and offsets for K-quants with both: what ``ksearch`` does, where w = d·s_i·q - e·t_i in sub-block i.

For given q the best a and m of w = a·q + m are those of a linear regression, and the q to begin with are those of grids
that end near the smallest and the largest weight: a little inside, a little outside, or one of each. The q that are
best with the best a and m are one more candidate.

Then a is rounded to d·s. If m moves along, the difference δ costs δ²·Σ(q - mean q)², and m falls by δ times the mean q;
what it is then gets rounded to -e·t, for which s may yet change by one. Costs of that kind take the q for given, and
mislead where many weights are equal; so the d and e that the largest s and t can be are tried for themselves too. For
the last round d and e are the best two numbers for all sub-blocks.

The t are not negative, so that all offsets of a block have one sign. It is minus, as ggml has it, unless all weights of
the block are positive, and not all equal: then e is negative. Where the best m would have the other sign it is 0 and
stays 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lorafit.formats.ksearch import BEYOND, NOISE, added, better, cost, extreme, in_columns, inverse, rounded_scales

_WEIGHTS = 32  # in a sub-block
_TOP = 63  # the largest s and t
# Integers to try for the largest scale of a block, and for the largest offset. 32 keeps what lies on a grid of binary
# fractions where it is.
_LEVELS = torch.tensor([*range(63, 47, -1), 32.0])
# Of the variance, a difference in squared error that rounding of scales covers up. Where sub-blocks hold few different
# weights, many grids are as good; if all take the first, their offsets are alike multiples of their scales.
_TIE = 2.0**-18
# How far inside the range of a sub-block its grid begins and ends, in steps; outside where negative.
_ENDS = ((0.0, 0.0), (-0.2, 0.4), (0.2, -0.6), (0.4, -0.2), (-0.6, 0.2), (0.4, 0.4), (-0.6, -0.6))


class Shifted(NamedTuple):
    """Blocks with offsets.

    Attributes:
        d: float32 [n], numbers that half precision has, or infinite where weights are too large.
        e: The same for the offsets, always finite.
        s: Integers of the sub-blocks, float32 [n, 8].
        t: The same for the offsets.
        q: Integers of the weights, uint8 [n, 8, 32].
    """

    d: Tensor
    e: Tensor
    s: Tensor
    t: Tensor
    q: Tensor


def shifted(weights: Tensor, largest: int) -> Shifted:
    """The best that the search finds for w = d·s·q - e·t, with s and t in 0..63 and q in 0..``largest``.

    Args:
        weights: Finite, float32 [n, 256].
        largest: 15 or 31.
    """
    low, high = weights.amin(1), weights.amax(1)
    too_large = (low <= -_TOP * BEYOND) | (high - low.clamp(max=0) >= _TOP * BEYOND * largest)
    w = in_columns(weights.masked_fill(too_large[:, None], 0), 8)
    positive = (low >= 0) & (low < high) & (high < _TOP * BEYOND)  # above, a scale reaches and an offset does not
    sub_blocks = _SubBlocks(w, positive, largest)
    fit = sub_blocks.search()
    found: tuple[Tensor, ...] = ()
    every = _LEVELS[:, None].to(w.device)
    for levels in (every[:1], every):
        d, s, offset = fit.scales(fit.factor.amax(0) / levels)
        found = better(sub_blocks.rounded(fit, d, s, extreme(-sub_blocks.allowed(offset)) / levels), found)
    _, d, e, s, t, q = found
    fit = sub_blocks.fit(q)
    d, e = fit.of_block(s, t, d, e)
    d, s, _ = fit.scales(d)
    _, d, e, s, t, q = better(sub_blocks.rounded(fit, d, s, e), found)
    return Shifted(d.masked_fill(too_large, torch.inf), e, s.T, t.T, q.to(torch.uint8).permute(2, 1, 0))


class _Fit(NamedTuple):
    """The best that sub-blocks with given codes can be, [8, n] each.

    Attributes:
        error: Squared error.
        factor: Of the codes.
        offset: What is added.
        slope: By how much the best offset falls where the factor rises by one.
        curvature: What it costs if the factor is off by one.
        margin: What makes no difference once scales are rounded.
    """

    error: Tensor
    factor: Tensor
    offset: Tensor
    slope: Tensor
    curvature: Tensor
    margin: Tensor

    def offset_with(self, factor: Tensor) -> Tensor:
        """The best offset with another factor."""
        return self.offset - (factor - self.factor) * self.slope

    def scales(self, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best d among some [k, n], the integers with it, and the offsets that are best with both."""
        d, s = rounded_scales(d, self.factor, self.curvature, (0, _TOP), _WEIGHTS)
        return d, s, self.offset_with(d * s)

    def of_block(self, s: Tensor, t: Tensor, d: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """The best d and e for given s and t, and those given: two [2, n].

        The best minimise Σ curvature·(d·s - factor)² + 32·(offset - slope·(d·s - factor) + e·t)².
        """
        falling, start = self.slope * s, self.offset_with(torch.zeros_like(s))
        dd = added(s * s * self.curvature + _WEIGHTS * falling.square())
        de = -_WEIGHTS * added(t * falling)
        ee = _WEIGHTS * added(t * t)
        of_d = added(s * self.factor * self.curvature + _WEIGHTS * falling * start)
        of_e = -_WEIGHTS * added(t * start)
        spread = dd * ee - de.square()
        unique = spread > NOISE * dd * ee
        alone = torch.where(ee == 0, of_d / dd.clamp(min=1), d)
        best_d = torch.where(unique, (of_d * ee - of_e * de) / spread, alone)
        best_e = torch.where(unique, (of_e * dd - of_d * de) / spread, e)
        return torch.stack((best_d, d)), torch.stack((best_e, e))


class _SubBlocks:
    """Sub-blocks as w = a·q + m, with m of one sign in a block.

    Args:
        weights: [32, 8, n].
        positive: Whether that sign is plus, [n].
        largest: The largest q.
    """

    def __init__(self, weights: Tensor, positive: Tensor, largest: int) -> None:
        self.weights = weights
        self.positive = positive
        self.largest = largest
        self.mean = added(weights.clone()) / _WEIGHTS
        self.centred = weights - self.mean
        self.variance = added(self.centred.square())

    def allowed(self, offset: Tensor) -> Tensor:
        """Offsets, or 0 where they have the wrong sign."""
        return torch.where((offset > 0) == self.positive, offset, 0)

    def codes(self, offset: Tensor, one: Tensor) -> Tensor:
        """The nearest q, ``one`` being 1/a."""
        return (self.weights - offset).mul_(one).round_().clamp_(0, self.largest)

    def search(self) -> _Fit:
        """The best of all grids."""
        low, high = self.allowed(self.weights.amin(0)), self.weights.amax(0)
        step = (high - low) / self.largest
        one = inverse(step)
        best: _Fit | None = None
        for first, last in _ENDS:
            fit = self.fit(self.codes(low + first * step, one * (self.largest / (self.largest - first - last))))
            best = fit if best is None else _Fit(*better(fit, best, fit.margin))
        assert best is not None
        return _Fit(*better(self.fit(self.codes(best.offset, inverse(best.factor))), best))

    def fit(self, q: Tensor) -> _Fit:
        """The best factor and offset for given codes."""
        total, squares, products = q.sum(0), (q * q).sum(0), added(q * self.centred)
        mean = total / _WEIGHTS
        spread = squares - total * mean  # exact
        factor = torch.where(spread > 0, products / spread, 0)
        offset = self.mean - factor * mean
        # Offset 0: where the best has the wrong sign, and for equal weights on a code that is not 0.
        without = ((offset > 0) != self.positive) & (offset != 0) | (spread <= 0) & (total > 0)
        alone = (products + self.mean * total) / squares.clamp(min=1)
        around_zero = torch.where(without, _WEIGHTS * self.mean.square(), 0) + self.variance
        return _Fit(
            around_zero - torch.where(without, alone.square() * squares, factor * products),
            torch.where(without, alone, factor),
            torch.where(without, 0, offset),
            torch.where(without, 0, mean),
            torch.where(without, squares, spread),
            _TIE * around_zero,
        )

    def rounded(self, fit: _Fit, d: Tensor, s: Tensor, e: Tensor) -> tuple[Tensor, ...]:
        """The best e among some, all integers, and what comes of it.

        Args:
            fit: What the sub-blocks shall come near to.
            d: Scales, [n].
            s: What of their integers is the best without regard to e, [8, n].
            e: Scales of the offsets, to choose from, [k, n].

        Returns:
            Squared error, d and e [n], s and t [8, n], q [32, 8, n].
        """
        wanted = -self.allowed(fit.offset_with(d * s))
        e, _ = rounded_scales(e, wanted, torch.full_like(wanted, _WEIGHTS), (0, _TOP), None)
        s, t = self._integers(fit, d, e, s)
        a, m = d * s, -(e * t)
        q = self.codes(m, inverse(a))
        return added(added((q * a + m - self.weights).square_())), d, e, s, t, q

    def _integers(self, fit: _Fit, d: Tensor, e: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The s near those given, and the t, that are best together: an s farther off may meet a multiple of e."""
        s = torch.stack((s, s - 1, s + 1)).clamp_(0, _TOP)
        a = d * s
        wanted = -self.allowed(fit.offset_with(a))
        below = (wanted * inverse(e)).floor_().clamp_(0, _TOP)
        above = (below + 1).clamp_(max=_TOP)
        of_below, of_above = ((wanted - e * t).square_() for t in (below, above))
        t = below + (of_above < of_below)
        costs = cost(a, fit.factor, fit.curvature, _WEIGHTS) + _WEIGHTS * of_below.minimum(of_above)
        best = costs.min(0, keepdim=True).indices
        return s.gather(0, best)[0], t.gather(0, best)[0]
