"""What it means for two backends to agree."""

import torch
from torch import Tensor

from lorafit.formats import FORMATS
from lorafit.kernels import reference


def any_blocks(name: str, rows: int, groups: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Random bytes, so that scales are of all sizes, denormal, infinite and NaN: blocks and constants."""
    block = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (rows, groups * block.nbytes), dtype=torch.uint8, generator=generator)
    count = block.constants(rows * groups)
    return blocks, torch.randn(count, generator=generator) if count else None


def by_reference(
    blocks: Tensor,
    name: str,
    dtype: torch.dtype,
    rows: Tensor | None = None,
    offsets: Tensor | None = None,
    constants: Tensor | None = None,
) -> Tensor:
    """The weight by the readable backend."""
    count = len(blocks) if rows is None else len(rows)
    out = torch.empty(count, blocks.shape[1] // FORMATS[name].nbytes * FORMATS[name].elements, dtype=dtype)
    reference.dequantize(blocks, name, rows, offsets, constants, out)
    return out


def assert_same_bits(result: Tensor, expected: Tensor) -> None:
    """Equal to the last bit, the sign of zeros included; which NaN it is does not matter."""
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    nan = expected.isnan()
    assert torch.equal(result.isnan(), nan)
    integer = {4: torch.int32, 2: torch.int16}[expected.itemsize]
    assert torch.equal(result.view(integer)[~nan], expected.view(integer)[~nan])
