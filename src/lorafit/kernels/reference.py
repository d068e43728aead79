"""What the operations mean, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafit.formats import block_format, write_offsets


def dequantize(blocks: Tensor, format_name: str, rows: Tensor | None, offsets: Tensor | None, out: Tensor) -> None:
    """Write the weight into ``out`` [rows, width]."""
    if rows is not None:
        blocks = blocks[rows]
    if offsets is not None:
        blocks = write_offsets(blocks, format_name, offsets)
    block = block_format(format_name)
    out.copy_(block.unpack(blocks.reshape(-1, block.nbytes)).view(out.shape))


def linear(x: Tensor, blocks: Tensor, format_name: str, rows: Tensor | None, offsets: Tensor | None) -> Tensor:
    """x·Wᵀ in float32: [tokens, width] -> [tokens, rows]."""
    block = block_format(format_name)
    count, width = blocks.shape[0] if rows is None else len(rows), blocks.shape[1] // block.nbytes * block.elements
    weight = torch.empty(count, width, device=blocks.device)
    dequantize(blocks, format_name, rows, offsets, weight)
    return (x.float() @ weight.T).to(x.dtype)
