"""Products of matrices, cut where the library would leave all but one core idle.

oneDNN, which torch multiplies bfloat16 with, shares out a product by blocks of its result. On processors with AMX a
result of some hundred rows and few columns is a single block to it, whatever the number of threads: 784 rows by 576
columns run at the speed of one core. Cut into pieces of fewer rows, each of which it does share out, the same product
is up to twice as fast; a processor without AMX is as fast either way. benchmarks/NOTES.md has the measurements.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MANY = 1280  # from here on the library shares the product out
_NARROW = 768  # columns of a result that is a single block
_DEEP = 2048  # inner dimension from which fewer rows are
_TILE = 16  # rows that matrix units take at once


def rows_at_once(rows: int, inner: int, columns: int) -> int:
    """How many rows of [rows, inner] by [inner, columns] to multiply at a time."""
    most = 320 if inner >= _DEEP else 512
    if not most < rows < _MANY or columns >= _NARROW:
        return max(rows, 1)
    pieces = -(-rows // most)
    return -(-rows // (pieces * _TILE)) * _TILE


def multiply(left: Tensor, right: Tensor, *, out: Tensor | None = None, added_to: Tensor | None = None) -> Tensor:
    """left·right, [rows, inner] by [inner, columns].

    Args:
        left: The one.
        right: The other.
        out: Where it goes.
        added_to: What it is added to, in place, instead.
    """
    if out is None:
        out = left.new_empty(len(left), right.shape[1]) if added_to is None else added_to
    together = rows_at_once(len(left), left.shape[1], right.shape[1])
    for start in range(0, len(left), together):
        rows = slice(start, start + together)
        if added_to is None:
            torch.mm(left[rows], right, out=out[rows])
        else:
            out[rows].addmm_(left[rows], right)
    return out
