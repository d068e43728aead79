"""Tables of the formats whose codes are places in one, as those formats themselves have them."""

from __future__ import annotations

import struct
from functools import cache

import torch

from lorafit.formats import block_format

# A block of each begins with these bytes where it is to be multiplied by 1.
_ONE = {
    "IQ4_NL": struct.pack("<e", 1),
    "MXFP4": bytes([128]),
    "NF4": struct.pack("<f", 1),
    "FP4": struct.pack("<f", 1),
}
_SAME = {"IQ4_XS": "IQ4_NL", "NF4_DQ": "NF4", "FP4_DQ": "FP4"}


@cache
def table_of(format_name: str) -> tuple[float, ...]:
    """What the 16 codes stand for; nothing for a format without a table."""
    name = _SAME.get(format_name, format_name)
    if name not in _ONE:
        return ()
    block = block_format(name)
    # The codes 0 to 15 in order: in ggml's formats those of the lower halves come first, else two go into each byte.
    codes = bytes(range(16)) if block.elements == 32 else bytes(0x22 * pair + 1 for pair in range(8)) * 4
    weights = block.unpack(torch.tensor(list(_ONE[name] + codes), dtype=torch.uint8)[None])
    return tuple(weights[0, :16].tolist())
