"""Weights onto the grid that their blocks have: only the integers change, and the offset of each block if it has one.

A quantised weight w lies on its block's grid, d·q + m. A fine-tuned one is w + δ, with δ a fraction of the step d.
Packed with the least error, it becomes w again nearly everywhere. What is lost is δ itself, the whole of what was
learnt, and as δ has low rank, the errors of a row add up instead of averaging out. So here the rounding is random, and
right on average:

    q' = ⌊(w + δ - m') / d + u⌋        u uniform in [0, 1), independent for each weight

The error is larger than that to the nearest point of the grid, but it is noise that has nothing to do with the inputs.
m' is m + the mean of δ over the block, which an offset holds nearly exactly, so that only the rest is random. A block
with a weight that goes beyond the grid by more than a step is packed anew (``search``): there δ is not small.

u is a hash of the weight's place in the tensor, the same on every machine and however the tensor is cut into pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lorafit.errors import FormatError
from lorafit.formats import block_format, dequantize, kquants, read_offsets, simple, write_offsets
from lorafit.kernels import search

# Format -> its largest integer, and what writes integers [n, elements] into blocks.
_WRITERS: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "Q4_0": (15, partial(simple.write_integers, bits=4, at=2)),
    "Q4_1": (15, partial(simple.write_integers, bits=4, at=4)),
    "Q5_0": (31, partial(simple.write_integers, bits=5, at=2)),
    "Q5_1": (31, partial(simple.write_integers, bits=5, at=4)),
    "Q8_0": (254, simple.write_integers_q8_0),
    "Q4_K": (15, kquants.write_integers_q4_k),
    "Q5_K": (31, kquants.write_integers_q5_k),
    "Q6_K": (63, kquants.write_integers_q6_k),
}
DITHERED = frozenset(_WRITERS)
_WEIGHTS_AT_ONCE = 1 << 18


def dither(weights: Tensor, blocks: Tensor, name: str, start: int = 0) -> Tensor:
    """Put weights onto the grid of blocks by random rounding.

    Args:
        weights: float32 [rows, width].
        blocks: What they were before, uint8 [rows, row_bytes].
        name: The format of both, one of ``DITHERED``.
        start: Place of the first row in its tensor.

    Returns:
        Blocks that have the old ones' scales, but where the grid was too short.

    Raises:
        FormatError: A weight is not finite.
    """
    if not bool(weights.isfinite().all()):
        raise FormatError("some weights are NaN or infinite; the tensor is damaged")
    width = weights.shape[1]
    rows = max(_WEIGHTS_AT_ONCE // width, 1)
    pieces = zip(weights.split(rows), blocks.split(rows), strict=True)
    return torch.cat([_dither(w, b, name, (start + place * rows) * width) for place, (w, b) in enumerate(pieces)])


def _dither(weights: Tensor, blocks: Tensor, name: str, first: int) -> Tensor:
    """``dither`` for some rows, of which the first weight has this place in its tensor."""
    block, (largest, write) = block_format(name), _WRITERS[name]
    if block.offset_at is not None:
        change = weights - dequantize(blocks, name, weights.shape)
        means = change.unflatten(1, (-1, block.elements)).mean(-1)
        blocks = write_offsets(blocks, name, (read_offsets(blocks, name).float() + means).half())
    flat, wanted = blocks.view(-1, block.nbytes), weights.reshape(-1, block.elements)
    integers = torch.zeros(wanted.shape, dtype=torch.uint8)
    lowest = block.unpack(write(flat, integers))
    step = (block.unpack(write(flat, integers.fill_(largest))) - lowest) / largest
    place = torch.where(step == 0, 0, (wanted - lowest) / step)
    beyond = torch.maximum(place - largest, -place).amax(1) > 1
    q = place.add_(_uniform(first, wanted.numel()).view_as(place)).floor_().clamp_(0, largest)
    flat = write(flat, q.to(torch.uint8))
    if bool(beyond.any()):
        flat[beyond] = search.quantize(wanted[beyond], name).blocks
    return flat.view_as(blocks)


def _uniform(first: int, count: int) -> Tensor:
    """Numbers in [0, 1) that depend on their places only, float32 [count].

    Two multiplications of 64-bit integers by odd numbers, the upper half brought down between them, mix 24 bits well.
    """
    x = torch.arange(first, first + count) * -7046029254386353131
    x = (x ^ (x >> 32)) * -4658895280553007687
    return ((x >> 40) & 0xFFFFFF).float() * 2.0**-24
