"""Operations on packed weights, each declared once here and carried out by a backend.

``reference`` is readable torch and defines what is right; ``cpu`` compiles vector code with numba. Backends agree to
the last bit for dequantisation, and the tests hold them to it.

A packed weight is described by its blocks, uint8 [rows, row_bytes] in the file's row order, and optionally by

* ``rows``, int64 [rows]: row i of the weight is row ``rows[i]`` of the blocks (GGUF permutes rows of some layers, and
  looking up embeddings is taking some of the rows);
* ``offsets``, float16 [rows, groups]: use these instead of the block offsets (QA-LoRA's m'), in the weight's row order.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lorafit.formats import block_format
from lorafit.kernels import reference

try:
    from lorafit.kernels import cpu
except ImportError:  # without numba everything works, slower
    cpu = None  # type: ignore[assignment]


def dequantize(
    blocks: Tensor,
    format_name: str,
    dtype: torch.dtype,
    *,
    rows: Tensor | None = None,
    offsets: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Unpack a weight into a compute dtype, rounding once, from float32.

    Args:
        blocks: uint8 [rows, row_bytes].
        format_name: Its block format.
        dtype: Floating-point type of the result.
        rows: Row order, see the module.
        offsets: Other block offsets, see the module.
        out: Where to write, [rows, width] of ``dtype`` and contiguous; allocated if missing.

    Returns:
        [rows, width] of ``dtype``.
    """
    block = block_format(format_name)
    count = blocks.shape[0] if rows is None else rows.shape[0]
    shape = (count, blocks.shape[1] // block.nbytes * block.elements)
    assert offsets is None or offsets.shape == (shape[0], shape[1] // block.elements), "one offset per block"
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=blocks.device)
    assert out.shape == shape and out.dtype == dtype and out.is_contiguous()
    _backend(blocks, format_name, dtype).dequantize(blocks, format_name, rows, offsets, out)
    return out


def linear(
    x: Tensor, blocks: Tensor, format_name: str, *, rows: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """x·Wᵀ for a few vectors, reading the packed weight once and never unpacking it: what decoding needs.

    Args:
        x: [tokens, width], any floating-point type; worth it for a handful of tokens.
        blocks: uint8 [rows, row_bytes].
        format_name: Its block format.
        rows: Row order, see the module.
        offsets: Other block offsets, see the module.

    Returns:
        [tokens, rows] in the type of ``x``, accumulated in float32.
    """
    return _backend(blocks, format_name, torch.float32).linear(x, blocks, format_name, rows, offsets)


def fuses_linear(blocks: Tensor, format_name: str) -> bool:
    """Whether ``linear`` runs without unpacking the weight on this device and format."""
    return _backend(blocks, format_name, torch.float32) is not reference


def _backend(blocks: Tensor, format_name: str, dtype: torch.dtype) -> ModuleType:
    if cpu is not None and blocks.device.type == "cpu" and cpu.supports(format_name, dtype):
        return cpu
    return reference
