"""The search for a block's scale and offset in vector code: ``search.best_by_torch``, operation by operation."""

from __future__ import annotations

from llvmlite import ir

from lorafit.kernels.rows import RowBuilder, RowOperation
from lorafit.kernels.search_plan import MOVES, ROUNDS, TRIMS
from lorafit.kernels.vectors import F32, I32, I64, LANES, constant, vector

_ZERO, _ONE = constant(F32, 0.0), constant(F32, 1.0)

# A block is two vectors, and a number of a block is the same in all lanes of one.
Pair = tuple[ir.Value, ir.Value]


class _Search:
    """The search for one block."""

    def __init__(self, v: RowBuilder, row: ir.Value) -> None:
        self.v = v
        self.largest = v.real("largest")
        self.weights = self._two(v.place("weights", v.mul(row, I64(2 * LANES)), 4))
        group = v.srem(row, v["groups"])
        self.importance = self._two(v.place("importance", v.mul(group, I64(2 * LANES)), 4))
        self.total = self.sum(self.importance)
        self.first = self.sum(self.times(self.importance, self.weights))

    def _two(self, place: ir.Value) -> Pair:
        return self.v.read(vector(F32), place), self.v.read(vector(F32), place, 4 * LANES)

    def times(self, one: Pair, other: Pair) -> Pair:
        return self.v.fmul(one[0], other[0]), self.v.fmul(one[1], other[1])

    def sum(self, values: Pair) -> ir.Value:
        return self.v.sum(self.v.fadd(*values))

    def codes(self, scale: ir.Value, offset: ir.Value) -> Pair:
        v = self.v
        inverse = v.select(v.fcmp_ordered("==", scale, _ZERO), _ZERO, v.fdiv(_ONE, scale))

        def one(weights: ir.Value) -> ir.Value:
            q = v.nearest(v.fmul(v.fsub(weights, offset), inverse))
            q = v.select(v.fcmp_ordered("<", q, _ZERO), _ZERO, q)
            return v.select(v.fcmp_ordered(">", q, self.largest), self.largest, q)

        return one(self.weights[0]), one(self.weights[1])

    def error(self, scale: ir.Value, offset: ir.Value) -> ir.Value:
        v = self.v

        def one(q: ir.Value, weights: ir.Value, importance: ir.Value) -> ir.Value:
            gap = v.fsub(v.fadd(v.fmul(q, scale), offset), weights)
            return v.fmul(importance, v.fmul(gap, gap))

        q = self.codes(scale, offset)
        return self.sum((
            one(q[0], self.weights[0], self.importance[0]), one(q[1], self.weights[1], self.importance[1])
        ))  # fmt: skip

    def descend(self, scale: ir.Value, offset: ir.Value, times: int) -> Pair:
        v = self.v
        for _ in range(times):
            q = self.codes(scale, offset)
            weighted = self.times(self.importance, q)
            sum_q, sum_qq = self.sum(weighted), self.sum(self.times(weighted, q))
            sum_qw = self.sum(self.times(weighted, self.weights))
            spread = v.fsub(v.fmul(self.total, sum_qq), v.fmul(sum_q, sum_q))
            slope = v.fdiv(v.fsub(v.fmul(self.total, sum_qw), v.fmul(sum_q, self.first)), spread)
            scale = v.select(v.fcmp_ordered(">", spread, _ZERO), slope, _ZERO)
            offset = v.fdiv(v.fsub(self.first, v.fmul(scale, sum_q)), self.total)
        return scale, offset


def _search(v: RowBuilder, row: ir.Value) -> None:
    search = _Search(v, row)
    low = v.minimum(v.smaller(*search.weights))
    span = v.fsub(v.maximum(v.larger(*search.weights)), low)
    scale, offset = v.fdiv(span, search.largest), low
    least = search.error(scale, offset)

    def consider(start: Pair, times: int, scale: ir.Value, offset: ir.Value, least: ir.Value) -> list[ir.Value]:
        candidate = search.descend(*start, times)
        reached = search.error(*candidate)
        better = v.fcmp_ordered("<", reached, least)
        return [v.select(better, *pair) for pair in zip((*candidate, reached), (scale, offset, least), strict=True)]

    for trim in TRIMS:
        # As torch does it: the factor is computed in double precision and rounded to float32.
        start = v.fmul(span, v.real(f"range_{trim}")), v.fadd(low, v.fmul(constant(F32, trim), span))
        scale, offset, least = consider(start, 2, scale, offset, least)

    def round_(_: ir.Value, best: list[ir.Value]) -> list[ir.Value]:
        scale, offset = best[:2]
        for factor, shift in MOVES:
            start = v.fmul(scale, constant(F32, factor)), v.fadd(offset, v.fmul(constant(F32, shift), scale))
            best = consider(start, 1, *best)
        return best

    scale, offset, _ = v.each(I64(ROUNDS), round_, scale, offset, least)
    v.write(v.extract_element(scale, I32(0)), v.place("scale", row, 4))
    v.write(v.extract_element(offset, I32(0)), v.place("offset", row, 4))


SEARCH = RowOperation(
    "search",
    ("weights", "importance", "groups", "largest", *(f"range_{trim}" for trim in TRIMS), "scale", "offset"),
    _search,
    exact=True,
)
