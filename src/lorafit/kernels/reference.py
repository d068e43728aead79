"""What the operations mean, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorafit.formats import block_format, write_offsets


def dequantize(
    blocks: Tensor,
    format_name: str,
    rows: Tensor | None,
    offsets: Tensor | None,
    constants: Tensor | None,
    out: Tensor,
) -> None:
    """Write the weight into ``out`` [rows, width]."""
    if out.numel() == 0:
        return
    block = block_format(format_name)
    unpack: Callable[..., Tensor] = block.unpack
    height, groups = blocks.shape[0], blocks.shape[1] // block.nbytes
    if rows is not None:
        blocks = blocks[rows]
    if offsets is not None:
        blocks = write_offsets(blocks, format_name, offsets)
    blocks = blocks.reshape(-1, block.nbytes)
    if constants is None:
        weights = unpack(blocks)
    else:  # a block's constants go by its number in the tensor
        numbers = torch.arange(height * groups, device=blocks.device).view(height, groups)
        weights = unpack(blocks, constants, (numbers if rows is None else numbers[rows]).reshape(-1))
    out.copy_(weights.view(out.shape))


def linear(
    x: Tensor,
    blocks: Tensor,
    format_name: str,
    rows: Tensor | None,
    offsets: Tensor | None,
    constants: Tensor | None,
) -> Tensor:
    """x·Wᵀ in float32: [tokens, width] -> [tokens, rows]."""
    block = block_format(format_name)
    count, width = blocks.shape[0] if rows is None else len(rows), blocks.shape[1] // block.nbytes * block.elements
    weight = torch.empty(count, width, dtype=torch.float32, device=blocks.device)
    dequantize(blocks, format_name, rows, offsets, constants, weight)
    return (x.float() @ weight.T).to(x.dtype)
