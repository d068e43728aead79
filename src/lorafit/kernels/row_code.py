"""What ``step`` declares, as vector code for one row each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llvmlite import ir

from lorafit.kernels.rows import RowBuilder, RowOperation
from lorafit.kernels.vectors import F32, I32, I64, LANES, constant, vector

_ZERO, _ONE = constant(F32, 0.0), constant(F32, 1.0)
Values = list[ir.Value]


def _weight(v: RowBuilder, i: ir.Value) -> ir.Value:
    """16 of the norm's factors, which are float32 whatever the tensors are."""
    return v.read(vector(F32), v.place("weight", v.mul(i, I64(LANES)), 4))


def _norm(v: RowBuilder, row: ir.Value) -> None:
    count, start = v.sdiv(v["width"], I64(LANES)), v.mul(row, v["width"])
    x, y = v.place("x", start), v.place("y", start)

    def square(i: ir.Value, sums: Values) -> Values:
        values = v.get(x, i)
        return [v.fadd(sums[0], v.fmul(values, values))]

    mean = v.fdiv(v.sum(v.each(count, square, _ZERO)[0]), v.splat(v.sitofp(v["width"], F32)))
    inverse = v.fdiv(_ONE, v.root(v.fadd(mean, v.real("eps"))))
    v.write(v.extract_element(inverse, I32(0)), v.place("inverse", row, 4))

    def scale(i: ir.Value, _: Values) -> Values:
        v.put(v.fmul(v.fmul(v.get(x, i), inverse), _weight(v, i)), y, i)
        return []

    v.each(count, scale)


def _norm_backward(v: RowBuilder, row: ir.Value, *, added: bool = False) -> None:
    count, start = v.sdiv(v["width"], I64(LANES)), v.mul(row, v["width"])
    x, dy, dx = (v.place(name, start) for name in ("x", "dy", "dx"))
    beside = v.place("added", start) if added else None
    inverse = v.splat(v.read(F32, v.place("inverse", row, 4)))

    def product(i: ir.Value, sums: Values) -> Values:
        return [v.fadd(sums[0], v.fmul(v.fmul(v.get(dy, i), _weight(v, i)), v.get(x, i)))]

    dot = v.sum(v.each(count, product, _ZERO)[0])
    cube = v.fmul(v.fmul(inverse, inverse), inverse)
    along = v.fdiv(v.fmul(dot, cube), v.splat(v.sitofp(v["width"], F32)))

    def combine(i: ir.Value, _: Values) -> Values:
        direct = v.fmul(v.fmul(v.get(dy, i), _weight(v, i)), inverse)
        result = v.fsub(direct, v.fmul(v.get(x, i), along))
        v.put(result if beside is None else v.fadd(v.get(beside, i), result), dx, i)
        return []

    v.each(count, combine)


def _silu(v: RowBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """x·σ(x) and its slope."""
    sigmoid = v.inverse(v.fadd(_ONE, v.exp(v.fsub(_ZERO, x))))
    value = v.fmul(x, sigmoid)
    return value, v.fadd(sigmoid, v.fmul(value, v.fsub(_ONE, sigmoid)))


def _gelu(v: RowBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The tanh approximation of x·Φ(x), which is x·σ(2u) with u = √(2/π)·(x + 0.044715·x³), and its slope."""
    double, cubic = constant(F32, 2 * 0.7978845608028654), constant(F32, 0.044715)
    square = v.fmul(x, x)
    twice = v.fmul(double, v.fadd(x, v.fmul(cubic, v.fmul(square, x))))
    sigmoid = v.inverse(v.fadd(_ONE, v.exp(v.fsub(_ZERO, twice))))
    value = v.fmul(x, sigmoid)
    slope = v.fmul(double, v.fadd(_ONE, v.fmul(v.fmul(constant(F32, 3.0), cubic), square)))
    return value, v.fadd(sigmoid, v.fmul(v.fmul(value, v.fsub(_ONE, sigmoid)), slope))


Activation = Callable[[RowBuilder, ir.Value], tuple[ir.Value, ir.Value]]


def _gated(activation: Activation) -> Callable[[RowBuilder, ir.Value], None]:
    def body(v: RowBuilder, row: ir.Value) -> None:
        gate, up = (v.place(name, v.mul(row, v["distance"])) for name in ("gate", "up"))
        y = v.place("y", v.mul(row, v["width"]))

        def one(i: ir.Value, _: Values) -> Values:
            value, _slope = activation(v, v.get(gate, i))
            v.put(v.fmul(value, v.get(up, i)), y, i)
            return []

        v.each(v.sdiv(v["width"], I64(LANES)), one)

    return body


def _gated_backward(activation: Activation, *, again: bool = False) -> Callable[[RowBuilder, ir.Value], None]:
    """With ``again``, what the forward pass gave is computed once more on the way."""

    def body(v: RowBuilder, row: ir.Value) -> None:
        start = v.mul(row, v["width"])
        y = v.place("y", start) if again else None
        gate, up = (v.place(name, v.mul(row, v["distance"])) for name in ("gate", "up"))
        dy, dgate = v.place("dy", start), v.place("both", v.mul(start, I64(2)))
        dup = v.place("both", v.add(v.mul(start, I64(2)), v["width"]))

        def one(i: ir.Value, _: Values) -> Values:
            grad, other = v.get(dy, i), v.get(up, i)
            value, slope = activation(v, v.get(gate, i))
            v.put(v.fmul(v.fmul(grad, other), slope), dgate, i)
            v.put(v.fmul(grad, value), dup, i)
            if y is not None:
                v.put(v.fmul(value, other), y, i)
            return []

        v.each(v.sdiv(v["width"], I64(LANES)), one)

    return body


def _group_sums(v: RowBuilder, row: ir.Value) -> None:
    groups, per_group = v["groups"], v.sdiv(v["group"], I64(LANES))
    x = v.place("x", v.mul(row, v.mul(groups, v["group"])))

    def group(g: ir.Value, _: Values) -> Values:
        def add(i: ir.Value, sums: Values) -> Values:
            return [v.fadd(sums[0], v.get(x, v.add(v.mul(g, per_group), i)))]

        total = v.sum(v.each(per_group, add, _ZERO)[0])
        v.put_one(total, v.place("sums", v.add(v.mul(row, groups), g)))
        return []

    v.each(groups, group)


def _heads(v: RowBuilder, row: ir.Value, token: Callable[[ir.Value, ir.Value, ir.Value], None]) -> None:
    """For every head of one padded place call ``token`` with its number (-1 in the padding) and the two addresses."""
    document, at = v.sdiv(row, v["padded"]), v.srem(row, v["padded"])
    inside = v.icmp_signed("<", at, v.read(I64, v.place("lengths", document, 8)))
    number = v.select(inside, v.add(v.read(I64, v.place("starts", document, 8)), at), I64(-1))

    def head(h: ir.Value, _: Values) -> Values:
        ordinary = v.add(v.mul(number, v["distance"]), v.mul(h, v["dim"]))
        place = v.mul(v.add(v.mul(v.add(v.mul(document, v["heads"]), h), v["padded"]), at), v["dim"])
        token(number, v.place("tokens", ordinary), v.place("places", place))
        return []

    v.each(v["heads"], head)


def _rotated(v: RowBuilder, number: ir.Value, source: ir.Value, target: ir.Value, *, back: bool) -> None:
    """Write one head, its pairs (j, j + half) turned by the angles of its token, or turned back."""
    turned = v.sdiv(v["half"], I64(LANES))
    angles = v.mul(number, v.mul(v["half"], I64(2)))
    cosines, sines = v.place("cos", angles), v.place("sin", angles)

    def pair(i: ir.Value, _: Values) -> Values:
        j = v.add(i, turned)
        first, second = v.get(source, i), v.get(source, j)
        cosine, sine = v.get(cosines, i), v.get(sines, i)
        cross = v.fmul(second, sine), v.fmul(first, sine)
        if back:
            v.put(v.fadd(v.fmul(first, cosine), cross[0]), target, i)
            v.put(v.fsub(v.fmul(second, cosine), cross[1]), target, j)
        else:
            v.put(v.fsub(v.fmul(first, cosine), cross[0]), target, i)
            v.put(v.fadd(v.fmul(second, cosine), cross[1]), target, j)
        return []

    def rest(i: ir.Value, _: Values) -> Values:
        v.put(v.get(source, i), target, i)
        return []

    v.each(turned, pair)
    v.span(v.mul(turned, I64(2)), v.sdiv(v["dim"], I64(LANES)), rest)


def _pack(v: RowBuilder, row: ir.Value) -> None:
    def token(number: ir.Value, tokens: ir.Value, places: ir.Value) -> None:
        def clear(i: ir.Value, _: Values) -> Values:
            v.put(_ZERO, places, i)
            return []

        with v.if_else(v.icmp_signed("<", number, I64(0))) as (padding, ordinary):
            with padding:
                v.each(v.sdiv(v["dim"], I64(LANES)), clear)
            with ordinary:
                _rotated(v, number, tokens, places, back=False)

    _heads(v, row, token)


def _unpack(v: RowBuilder, row: ir.Value) -> None:
    def token(number: ir.Value, tokens: ir.Value, places: ir.Value) -> None:
        with v.if_then(v.icmp_signed(">=", number, I64(0))):
            _rotated(v, number, places, tokens, back=True)

    _heads(v, row, token)


class _Keys:
    """Which keys one row of scores may see: the numbers ``low`` up to ``high``, counted from the first key at hand."""

    def __init__(self, v: RowBuilder, row: ir.Value) -> None:
        self.v = v
        query = v.add(v["first_query"], v.srem(row, v["queries"]))
        length = v.read(I64, v.place("lengths", v.sdiv(row, v["per_document"]), 8))
        oldest = v.sub(v.add(query, I64(1)), v["window"])
        oldest = v.select(v.icmp_signed(">", oldest, I64(0)), oldest, I64(0))
        # A query in the padding sees nothing.
        ends = v.sub(oldest, v["first_key"]), v.sub(v.add(query, I64(1)), v["first_key"])
        self.low, self.high = (v.select(v.icmp_signed("<", query, length), end, I64(0)) for end in ends)
        self.first = v.sdiv(self.low, I64(LANES))
        self.last = v.sdiv(v.add(self.high, I64(LANES - 1)), I64(LANES))
        self.ends = v.splat(self.low), v.splat(self.high)

    def seen(self, values: ir.Value, i: ir.Value, otherwise: ir.Value) -> ir.Value:
        """The values of the keys that are seen, and something else for those that are not."""
        v = self.v
        lanes = ir.Constant(vector(I64), list(range(LANES)))
        number = v.add(v.splat(v.mul(i, I64(LANES))), lanes)
        inside = v.and_(v.icmp_signed(">=", number, self.ends[0]), v.icmp_signed("<", number, self.ends[1]))
        return v.select(inside, values, otherwise)

    def clear(self, row: ir.Value) -> None:
        """Zeros where nothing is seen, before and after."""
        v = self.v

        def one(i: ir.Value, _: Values) -> Values:
            v.put(_ZERO, row, i)
            return []

        v.span(I64(0), self.first, one)
        v.span(self.last, v.sdiv(v["keys"], I64(LANES)), one)


def _softmax(v: RowBuilder, row: ir.Value) -> None:
    keys = _Keys(v, row)
    scores, scale = v.place("scores", v.mul(row, v["keys"])), v.real("scale")
    lowest = constant(F32, float("-inf"))

    def largest(i: ir.Value, found: Values) -> Values:
        return [v.larger(found[0], keys.seen(v.get(scores, i), i, lowest))]

    top = v.maximum(v.span(keys.first, keys.last, largest, lowest)[0])

    def add(i: ir.Value, sums: Values) -> Values:
        power = keys.seen(v.exp(v.fmul(v.fsub(v.get(scores, i), top), scale)), i, _ZERO)
        v.keep(power, i)
        return [v.fadd(sums[0], power)]

    share = v.fdiv(_ONE, v.sum(v.span(keys.first, keys.last, add, _ZERO)[0]))

    def finish(i: ir.Value, _: Values) -> Values:
        v.put(v.fmul(v.kept(i), share), scores, i)
        return []

    v.span(keys.first, keys.last, finish)
    keys.clear(scores)


def _softmax_backward(v: RowBuilder, row: ir.Value) -> None:
    keys = _Keys(v, row)
    start = v.mul(row, v["keys"])
    shares, grads, scale = v.place("shares", start), v.place("grads", start), v.real("scale")

    def product(i: ir.Value, sums: Values) -> Values:
        return [v.fadd(sums[0], keys.seen(v.fmul(v.get(shares, i), v.get(grads, i)), i, _ZERO))]

    mean = v.sum(v.span(keys.first, keys.last, product, _ZERO)[0])

    def finish(i: ir.Value, _: Values) -> Values:
        moved = v.fmul(v.get(shares, i), v.fsub(v.get(grads, i), mean))
        v.put(keys.seen(v.fmul(moved, scale), i, _ZERO), grads, i)
        return []

    v.span(keys.first, keys.last, finish)
    keys.clear(grads)


def _cross_entropy(v: RowBuilder, row: ir.Value) -> None:
    count, start = v.sdiv(v["width"], I64(LANES)), v.mul(row, v["width"])
    logits = v.place("logits", start)
    chosen = v.place("logits", v.add(start, v.read(I64, v.place("targets", row, 8))))
    wanted = v.one(chosen)

    def largest(i: ir.Value, found: Values) -> Values:
        return [v.larger(found[0], v.get(logits, i))]

    top = v.maximum(v.each(count, largest, constant(F32, float("-inf")))[0])

    def add(i: ir.Value, sums: Values) -> Values:
        return [v.fadd(sums[0], v.exp(v.fsub(v.get(logits, i), top)))]

    total = v.sum(v.each(count, add, _ZERO)[0])
    share = v.fdiv(_ONE, total)

    def finish(i: ir.Value, _: Values) -> Values:
        v.put(v.fmul(v.exp(v.fsub(v.get(logits, i), top)), share), logits, i)
        return []

    v.each(count, finish)
    v.put_one(v.fsub(v.fmul(v.exp(v.fsub(wanted, top)), share), _ONE), chosen)
    v.write(v.extract_element(total, I32(0)), v.place("totals", row, 4))
    v.write(v.extract_element(v.fsub(top, wanted), I32(0)), v.place("gaps", row, 4))


_HEADS = ("tokens", "distance", "cos", "sin", "starts", "lengths", "padded", "heads", "dim", "half", "places")
_SCORES = ("lengths", "per_document", "queries", "first_query", "keys", "first_key", "window", "scale")
_ACTIVATIONS = {"silu": _silu, "gelu": _gelu}

NORM = RowOperation("norm", ("x", "weight", "eps", "width", "y", "inverse"), _norm)
_NORM_BACKWARD = ("dy", "x", "weight", "inverse", "width", "dx")
NORM_BACKWARD = RowOperation("norm_backward", _NORM_BACKWARD, _norm_backward)
NORM_BACKWARD_ADDED = RowOperation(
    "norm_backward_added", (*_NORM_BACKWARD, "added"), partial(_norm_backward, added=True)
)
GATED = {
    name: RowOperation(f"gated_{name}", ("gate", "up", "distance", "width", "y"), _gated(activation))
    for name, activation in _ACTIVATIONS.items()
}
_GATED_BACKWARD = ("dy", "gate", "up", "distance", "width", "both")
GATED_BACKWARD = {
    name: RowOperation(f"gated_{name}_backward", _GATED_BACKWARD, _gated_backward(activation))
    for name, activation in _ACTIVATIONS.items()
}
GATED_AGAIN = {
    name: RowOperation(f"gated_{name}_again", (*_GATED_BACKWARD, "y"), _gated_backward(activation, again=True))
    for name, activation in _ACTIVATIONS.items()
}
CROSS_ENTROPY = RowOperation("cross_entropy", ("logits", "targets", "width", "totals", "gaps"), _cross_entropy)
GROUP_SUMS = RowOperation("group_sums", ("x", "groups", "group", "sums"), _group_sums)
PACK = RowOperation("pack_heads", _HEADS, _pack)
UNPACK = RowOperation("unpack_heads", _HEADS, _unpack)
SOFTMAX = RowOperation("softmax", ("scores", *_SCORES), _softmax, room="keys")
SOFTMAX_BACKWARD = RowOperation("softmax_backward", ("shares", "grads", *_SCORES), _softmax_backward)
