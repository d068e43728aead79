"""Random blocks of every format, their floating-point numbers of the size that real models have."""

import torch
from torch import Tensor

from lorafit.formats import FORMATS

_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "NF4": torch.float32, "FP4": torch.float32}


def random_blocks(name: str, rows: int, groups: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Blocks, uint8 [rows, row_bytes] with ``groups`` in a row, and the constants of a double-quantised format."""
    block = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (rows, groups, block.nbytes), dtype=torch.uint8, generator=generator)
    for at in block.floats:
        if name == "MXFP4":
            numbers = torch.randint(110, 128, (rows, groups, 1), generator=generator).to(torch.uint8)
        else:
            numbers = torch.randn(rows, groups, 1, generator=generator).to(_TYPES.get(name, torch.float16))
        blocks[..., at : at + numbers.itemsize] = numbers.view(torch.uint8)
    constants = None
    if count := block.constants(rows * groups):
        constants = torch.rand(count, generator=generator)
    return blocks.view(rows, -1), constants
