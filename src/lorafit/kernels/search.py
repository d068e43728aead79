"""The best packing of every format: each block's scale and offset are searched for the least squared error.

K-quants are searched as they are packed (``formats.ksearch``), and this is the search for Q4_1 and Q5_1. The other
formats are rounded as their makers round them.

A block of Q4_1 or Q5_1 represents w = d·q + m with q in 0..L (15 or 31). Plain rounding takes m and m + L·d from the
smallest and the largest weight, so one outlier makes the steps coarse for the 31 others. Here d, m and all q of a block
minimise

    Σ v·(d·q + m - w)²

where v is 1, or how strongly that input of the layer is used: the mean square of its activations on the training
data, which makes the sum an estimate of the squared error of the layer's *output* (what llama.cpp calls an importance
matrix).

For given d and m the best q is found by rounding; for given q the best d and m by linear regression. Alternating the
two only ever lowers the error and soon stands still, at a minimum near where it began. So it begins at several ranges
that leave out some of the extremes, then around the best result so far. Plain rounding is among the candidates: no
block gets worse.

The search itself is in vector code where there is any, and in torch elsewhere. Both do the same operations on float32
in the same order, sums included, so that the same weights give the same bits on every processor.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lorafit.errors import FormatError
from lorafit.formats.block import as_bytes
from lorafit.formats.registry import block_format
from lorafit.formats.simple import pack_integers
from lorafit.formats.tensors import Packed, dequantize
from lorafit.formats.tensors import quantize as quantize_by_rounding
from lorafit.kernels import threads
from lorafit.kernels.search_plan import MOVES, ROUNDS, TRIMS

try:
    from lorafit.kernels.search_code import SEARCH
except ImportError:
    SEARCH = None  # type: ignore[assignment]

_BITS = {"Q4_1": 4, "Q5_1": 5}
_BLOCK = 32
_WORK = 1 << 11  # for one block, in operations on a number
_BLOCKS_AT_ONCE = 1 << 13  # a chunk and its intermediates stay in the cache
_WEIGHTS_AT_ONCE = 1 << 18  # in each thread


def quantize(weights: Tensor, name: str, importance: Tensor | None = None) -> Packed:
    """Pack weights as well as lorafit can; in Q4_1 and Q5_1 no block is worse than by rounding.

    Args:
        weights: [rows, width], any floating-point type; taken as float32, some rows at a time.
        name: Any format that lorafit writes.
        importance: Mean square of each input, [width], not negative, for Q4_1 and Q5_1; None weighs all alike.

    Raises:
        FormatError: As ``formats.quantize``, or importance that does not fit or that another format has no use for.
    """
    block = block_format(name)
    if importance is not None:
        _check(importance, weights, name)
    # What shares constants is packed as a whole, and what is no matrix refused as such.
    whole = block.compress is not None or weights.dim() != 2
    parts = [weights] if whole else weights.split(max(1, _WEIGHTS_AT_ONCE // max(1, weights.shape[1])))
    packed = threads.spread(partial(_pack, name=name, importance=importance), parts)
    return packed[0] if len(packed) == 1 else Packed(torch.cat([part.blocks for part in packed]), None)


def _check(importance: Tensor, weights: Tensor, name: str) -> None:
    if name not in _BITS:
        raise FormatError(f"importance weighs the errors of {' and '.join(_BITS)}, not {name}")
    if importance.shape != weights.shape[1:] or not bool((importance >= 0).all() & importance.isfinite().all()):
        raise FormatError(f"{weights.shape[1]} inputs need as many finite importances, none of them negative")


def _pack(weights: Tensor, name: str, importance: Tensor | None) -> Packed:
    packed = quantize_by_rounding(weights, name)
    if name not in _BITS:
        return packed
    groups = weights.shape[1] // _BLOCK
    of_block = torch.ones(groups, _BLOCK) if importance is None else importance.float().view(groups, _BLOCK)
    of_block = torch.where(of_block.sum(1, keepdim=True) > 0, of_block, 1.0)  # where nothing matters, everything does
    of_format = packed.blocks.view(len(weights), groups, -1)
    rows = max(1, _BLOCKS_AT_ONCE // groups)
    for blocks, chunk in zip(of_format.split(rows), weights.split(rows), strict=True):
        _improve(blocks.flatten(0, 1), name, chunk.reshape(-1, _BLOCK).float(), of_block)
    return packed


def _improve(blocks: Tensor, name: str, rows: Tensor, importance: Tensor) -> None:
    """Replace those of ``blocks`` [n, nbytes] that the search betters.

    Args:
        blocks: What rounding makes of the weights; changed in place.
        name: Their format.
        rows: Weights, [n, 32].
        importance: [groups, 32], for the blocks in turn.
    """
    largest = 2 ** _BITS[name] - 1
    weights, importance_of = rows.T.contiguous(), importance.repeat(len(rows) // len(importance), 1).T.contiguous()
    if SEARCH is None or rows.device.type != "cpu":
        scale, offset = best_by_torch(weights, importance_of, largest)
    else:
        scale, offset = best_by_vector_code(rows, importance, largest)
    # Only now to half precision: first the scale, then the offset that is best with it, then the integers.
    scale = scale.half().float()
    q = _codes(weights, scale, offset, largest)
    total, first = _sum(importance_of), _sum(importance_of * weights)
    offset = ((first - scale * _sum(importance_of * q)) / total).half().float()
    q = _codes(weights, scale, offset, largest)
    rounded = dequantize(blocks, name, rows.shape).T
    error, by_rounding = (
        _error(weights, importance_of, scale, offset, q),
        _sum(importance_of * (rounded - weights).square()),
    )
    better = error < by_rounding  # false where a number is none
    found = (scale.half(), offset.half(), q.to(torch.uint8))
    scale_better, offset_better, q_better = (values[..., better] for values in found)
    fields = (as_bytes(scale_better[:, None]), as_bytes(offset_better[:, None]), pack_integers(q_better.T, _BITS[name]))
    blocks[better] = torch.cat(fields, dim=1)


def best_by_vector_code(rows: Tensor, importance: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Scale and offset of each block: weights [n, 32], importance [groups, 32] -> float32 [n] each."""
    scale, offset = torch.empty(len(rows)), torch.empty(len(rows))
    ranges = [(1 - 2 * trim) / largest for trim in TRIMS]
    rows, importance = rows.contiguous(), importance.contiguous()
    SEARCH(
        len(rows), _WORK, torch.float32, rows, importance, len(importance), float(largest), *ranges, scale, offset
    )  # fmt: skip
    return scale, offset


def best_by_torch(weights: Tensor, importance: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """The same, with the blocks along the last dimension: [32, n] each -> float32 [n] each."""
    total, first = _sum(importance), _sum(importance * weights)

    def descend(scale: Tensor, offset: Tensor, times: int) -> tuple[Tensor, Tensor]:
        for _ in range(times):
            q = _codes(weights, scale, offset, largest)
            weighted = importance * q
            sum_q, sum_qq, sum_qw = _sum(weighted), _sum(weighted * q), _sum(weighted * weights)
            spread = total * sum_qq - sum_q.square()
            scale = torch.where(spread > 0, (total * sum_qw - sum_q * first) / spread, 0)
            offset = (first - scale * sum_q) / total
        return scale, offset

    def error(scale: Tensor, offset: Tensor) -> Tensor:
        return _error(weights, importance, scale, offset, _codes(weights, scale, offset, largest))

    low, span = weights.amin(0), weights.amax(0) - weights.amin(0)
    best = span / largest, low
    least = error(*best)

    def consider(scale: Tensor, offset: Tensor, times: int) -> None:
        nonlocal best, least
        candidate = descend(scale, offset, times)
        reached = error(*candidate)
        better = reached < least
        least = torch.where(better, reached, least)
        best = torch.where(better, candidate[0], best[0]), torch.where(better, candidate[1], best[1])

    for trim in TRIMS:
        consider(span * ((1 - 2 * trim) / largest), low + trim * span, 2)
    for _ in range(ROUNDS):
        scale, offset = best
        for factor, shift in MOVES:
            consider(scale * factor, offset + shift * scale, 1)
    return best


def _codes(weights: Tensor, scale: Tensor, offset: Tensor, largest: int) -> Tensor:
    inverse = torch.where(scale == 0, 0, 1 / scale)
    return ((weights - offset) * inverse).round_().clamp_(0, largest)


def _error(weights: Tensor, importance: Tensor, scale: Tensor, offset: Tensor, q: Tensor) -> Tensor:
    return _sum(importance * (q * scale + offset - weights).square_())


def _sum(values: Tensor) -> Tensor:
    """Sum over the 32 weights of each block, always in the same order: [32, n] -> [n]."""
    while len(values) > 1:
        values = values[: len(values) // 2] + values[len(values) // 2 :]
    return values[0]
