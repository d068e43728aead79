"""Operations on packed weights, each declared once here and carried out by a backend.

``reference`` is readable torch and defines what is right; ``cpu`` compiles vector code with LLVM, ``cuda`` has kernels
in Triton. Backends agree to the last bit for dequantisation, and the tests hold them to it.

A packed weight is described by its blocks, uint8 [rows, row_bytes] in the file's row order, and optionally by

* ``rows``, int64 [rows]: row i of the weight is row ``rows[i]`` of the blocks (GGUF permutes rows of some layers, and
  looking up embeddings is taking some of the rows);
* ``offsets``, float16 [rows, groups]: use these instead of the block offsets (QA-LoRA's m'), in the weight's row order;
* ``constants``, float32: what a double-quantised format keeps beside its blocks, see ``lorafit.formats``.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from lorafit.formats import BlockFormat, block_format
from lorafit.kernels import reference

try:
    from lorafit.kernels import cpu
except ImportError:  # without llvmlite, or on a processor that it cannot serve, everything works, slower
    cpu = None  # type: ignore[assignment]


def dequantize(
    blocks: Tensor,
    format_name: str,
    dtype: torch.dtype,
    *,
    rows: Tensor | None = None,
    offsets: Tensor | None = None,
    constants: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Unpack a weight into a compute dtype, rounding once, from float32.

    Args:
        blocks: uint8 [rows, row_bytes].
        format_name: Its block format.
        dtype: Floating-point type of the result.
        rows: Row order, see the module.
        offsets: Other block offsets, see the module.
        constants: Constants of a double-quantised format, see the module.
        out: Where to write, [rows, width] of ``dtype`` and contiguous; allocated if missing.

    Returns:
        [rows, width] of ``dtype``.

    Raises:
        IndexError: ``rows`` asks for a row that is not there. On a GPU, which would have to be waited for, such a row
            is NaN, or stops the device.
    """
    shape = _checked_shape(blocks, block_format(format_name), rows, offsets, constants)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=blocks.device)
    assert out.shape == shape and out.dtype == dtype and out.is_contiguous() and out.device == blocks.device
    _backend(blocks, format_name, dtype).dequantize(blocks, format_name, rows, offsets, constants, out)
    return out


def linear(
    x: Tensor,
    blocks: Tensor,
    format_name: str,
    *,
    rows: Tensor | None = None,
    offsets: Tensor | None = None,
    constants: Tensor | None = None,
) -> Tensor:
    """x·Wᵀ for a few vectors, reading the packed weight once and never unpacking it: what decoding needs.

    Args:
        x: [tokens, width], any floating-point type; worth it for a handful of tokens.
        blocks: uint8 [rows, row_bytes].
        format_name: Its block format.
        rows: Row order, see the module.
        offsets: Other block offsets, see the module.
        constants: Constants of a double-quantised format, see the module.

    Returns:
        [tokens, rows] in the type of ``x``, accumulated in float32.

    Raises:
        IndexError: ``rows`` asks for a row that is not there.
    """
    shape = _checked_shape(blocks, block_format(format_name), rows, offsets, constants)
    assert x.shape[1:] == shape[1:] and x.device == blocks.device, "a vector as wide as the weight"
    fused = cpu if fuses_linear(blocks, format_name) else reference
    return fused.linear(x, blocks, format_name, rows, offsets, constants)


def fuses_linear(blocks: Tensor, format_name: str) -> bool:
    """Whether ``linear`` runs without unpacking the weight on this device and format."""
    return _backend(blocks, format_name, torch.float32) is cpu is not None


def _checked_shape(
    blocks: Tensor, block: BlockFormat, rows: Tensor | None, offsets: Tensor | None, constants: Tensor | None
) -> tuple[int, int]:
    """The weight's shape. Compiled code reads wherever it is told to, so every claim is checked here."""
    groups = blocks.shape[1] // block.nbytes
    assert blocks.dtype == torch.uint8 and blocks.shape[1] == groups * block.nbytes, "whole blocks"
    assert {t.device for t in (rows, offsets, constants) if t is not None} <= {blocks.device}, "all in one place"
    if rows is not None and len(rows) and not rows.is_cuda:
        low, high = (int(end) for end in torch.aminmax(rows))
        if low < 0 or high >= blocks.shape[0]:
            wrong = low if low < 0 else high
            raise IndexError(f"no row {wrong} in a weight of {blocks.shape[0]} rows (a token that the model lacks?)")
    count = blocks.shape[0] if rows is None else len(rows)
    if offsets is not None:
        assert block.offset_at is not None, f"{block.name} has no offsets"
        assert offsets.shape == (count, groups) and offsets.dtype == torch.float16, "one half for each block"
    expected = block.constants(blocks.shape[0] * groups)
    assert (0 if constants is None else constants.numel()) == expected, f"{expected} constants for {block.name}"
    assert constants is None or constants.dtype == torch.float32
    return count, groups * block.elements


def _backend(blocks: Tensor, format_name: str, dtype: torch.dtype) -> ModuleType:
    if blocks.is_cuda:
        cuda = _cuda()
        return cuda if cuda is not None and cuda.supports(format_name, dtype) else reference
    if cpu is not None and blocks.device.type == "cpu" and cpu.supports(blocks, format_name, dtype):
        return cpu
    return reference


@cache
def _cuda() -> ModuleType | None:
    """The Triton kernels, which take a second to import and which not every installation of torch can run."""
    try:
        from lorafit.kernels import cuda
    except ImportError:
        return None
    return cuda
