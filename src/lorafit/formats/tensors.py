"""Whole tensors in blocks: dequantise, quantise, check, and exchange the offsets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorafit.errors import FormatError
from lorafit.formats.block import BlockFormat
from lorafit.formats.registry import block_format

# Tensors are worked on in pieces of about this many weights, so that intermediate results stay small beside the tensor,
# and in the processor's cache.
_PIECE = 2**16


class Packed(NamedTuple):
    """A quantised tensor.

    Attributes:
        blocks: uint8 [rows, row_bytes].
        constants: What a double-quantised format has beside its blocks, float32; None for other formats.
    """

    blocks: Tensor
    constants: Tensor | None


def dequantize(blocks: Tensor, name: str, shape: Sequence[int], constants: Tensor | None = None) -> Tensor:
    """The weights that ``blocks`` hold.

    Args:
        blocks: uint8, any shape; its bytes are whole blocks in row-major order.
        name: Format name, a key of ``FORMATS``.
        shape: Shape of the result; its last dimension must be a whole number of blocks.
        constants: What a double-quantised format has beside its blocks: float32 [1 + ceil(number of blocks / 256)], the
            mean that was subtracted from the absmax, then the scales.

    Returns:
        float32 tensor of ``shape`` that shares no memory with ``blocks``.

    Raises:
        FormatError: Unknown format, or a number of bytes or constants that does not fit the shape.
    """
    block = block_format(name)
    *outer, width = shape or (1,)
    expected = math.prod(outer) * block.row_bytes(width)
    if blocks.dtype != torch.uint8 or blocks.numel() != expected:
        raise FormatError(
            f"{list(shape)} in {name} takes {expected} bytes (uint8), but {blocks.numel()} of {blocks.dtype} were given"
        )
    _check_constants(constants, block, expected // block.nbytes)
    weights = torch.empty(tuple(shape), device=blocks.device)
    in_piece = _PIECE // block.elements
    targets = weights.view(-1, block.elements).split(in_piece)
    pieces = blocks.reshape(-1, block.nbytes).split(in_piece)
    for i, (target, piece) in enumerate(zip(targets, pieces, strict=True)):
        # The copy begins at an even address, which torch's views need and a slice of a byte buffer need not.
        piece = piece.clone()
        if constants is None:
            target.copy_(block.unpack(piece))
        else:
            index = torch.arange(i * in_piece, i * in_piece + len(piece), device=blocks.device)
            target.copy_(block.unpack(piece, constants, index))
    return weights


def quantize(weights: Tensor, name: str) -> Packed:
    """Round weights to a format: as ggml does for its formats, and as bitsandbytes does for NF4 and FP4.

    Args:
        weights: [rows, width], any floating-point type; rounded as float32.
        name: Format name, a key of ``FORMATS``.

    Raises:
        FormatError: Unknown format or one that lorafit only reads, no matrix, a width that is not a whole number of
            blocks, or weights that are not finite numbers or too large for the format.
    """
    block = block_format(name)
    if block.pack is None:
        raise FormatError(f"lorafit reads {name} and does not write it")
    if weights.dim() != 2 or not weights.numel():
        raise FormatError(f"a matrix [rows, width] of weights can be quantised, not the shape {list(weights.shape)}")
    rows, width = weights.shape
    row_bytes = block.row_bytes(width)
    pieces = weights.reshape(-1, block.elements).split(_PIECE // block.elements)
    blocks, constants = torch.cat([block.pack(_all_finite(piece.float())) for piece in pieces]), None
    if block.compress is not None:
        blocks, constants = block.compress(blocks)
    if not finite(blocks, name, constants):
        raise FormatError(f"its weights of up to {float(weights.abs().max()):.3g} are too large for {name}")
    return Packed(blocks.view(rows, row_bytes), constants)


def finite(blocks: Tensor, name: str, constants: Tensor | None = None) -> bool:
    """Whether all weights are finite numbers, told by the floating-point numbers of each block alone.

    A scale, offset or weight that is not a finite number comes from a damaged file.

    Args:
        blocks: uint8, whole blocks.
        name: Format name, a key of ``FORMATS``.
        constants: What a double-quantised format has beside its blocks.

    Raises:
        FormatError: Unknown format, or a number of constants that does not fit the blocks.
    """
    block = block_format(name)
    _check_constants(constants, block, blocks.numel() // block.nbytes)
    kind = block.float_type
    size = np.dtype(kind.bits).itemsize
    for piece in blocks.reshape(-1, block.nbytes).split(_PIECE):
        for at in block.floats:
            numbers = piece.numpy()[:, at : at + size].view(kind.bits)
            if ((numbers & kind.magnitude) >= kind.limit).any():
                return False
    # The largest absmax is at most a scale and the mean.
    return constants is None or bool((constants[1:].abs() + constants[0].abs()).isfinite().all())


def bits_per_weight(blocks: Tensor, name: str, constants: Tensor | None = None) -> float:
    """The size of a tensor, as measured, in bits for each of its weights.

    Args:
        blocks: uint8, whole blocks.
        name: Format name, a key of ``FORMATS``.
        constants: What a double-quantised format has beside its blocks.
    """
    block = block_format(name)
    nbytes = blocks.nbytes + (0 if constants is None else constants.nbytes)
    return nbytes * 8 / (blocks.numel() // block.nbytes * block.elements)


def read_offsets(blocks: Tensor, name: str) -> Tensor:
    """The offset m of every block.

    Args:
        blocks: uint8 [rows, row_bytes].
        name: A format that has offsets.

    Returns:
        float16 [rows, blocks in a row], a copy.

    Raises:
        FormatError: The format has no offsets.
    """
    block = _with_offsets(name)
    per_block = blocks.unflatten(1, (-1, block.nbytes))
    at = block.offset_at
    return per_block[..., at : at + 2].clone().view(torch.float16).squeeze(-1)  # type: ignore[operator]


def write_offsets(blocks: Tensor, name: str, offsets: Tensor) -> Tensor:
    """A copy of ``blocks`` with other offsets; every other byte is the same.

    Args:
        blocks: uint8 [rows, row_bytes].
        name: A format that has offsets.
        offsets: float16 [rows, blocks in a row].

    Raises:
        FormatError: The format has no offsets, or there is not one for each block.
    """
    block = _with_offsets(name)
    result = blocks.clone()
    at = block.offset_at
    per_block = result.unflatten(1, (-1, block.nbytes))
    if offsets.shape != per_block.shape[:2]:
        raise FormatError(f"{list(per_block.shape[:2])} {name} blocks cannot take {list(offsets.shape)} offsets")
    per_block[..., at : at + 2] = offsets.to(torch.float16).unsqueeze(-1).contiguous().view(torch.uint8)  # type: ignore[operator]
    return result


def _with_offsets(name: str) -> BlockFormat:
    block = block_format(name)
    if block.offset_at is None:
        raise FormatError(f"{name} blocks have no offset")
    return block


def _all_finite(weights: Tensor) -> Tensor:
    if not weights.isfinite().all():
        raise FormatError("some weights are NaN or infinite; the tensor is damaged")
    return weights


def _check_constants(constants: Tensor | None, block: BlockFormat, blocks: int) -> None:
    expected = block.constants(blocks)
    given = 0 if constants is None else constants.numel()
    if given != expected:
        raise FormatError(f"{blocks} blocks of {block.name} have {expected} constants, but {given} were given")
