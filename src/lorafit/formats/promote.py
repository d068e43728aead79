"""Promotion: into a format with an offset in each block, so that QA-LoRA can train and merge a tensor that had none.

====  ====  =================================  ==================================================
from  to    d', m' of a block of 32            what it changes
====  ====  =================================  ==================================================
Q4_0  Q4_1  d, -8·d                            nothing: times a power of two
Q5_0  Q5_1  d, -16·d                           nothing
Q4_K  Q4_1  half(d·s), half(-(e·t))            rounding to half precision, twice for each block
Q5_K  Q5_1  half(d·s), half(-(e·t))            the same
====  ====  =================================  ==================================================

The integers q stay what they are. It costs 0.5 bit for each weight that was in Q4_0, Q5_0, Q4_K or Q5_K.

Half precision has 11 significant bits and d·s up to 17, so that d' and m' are off by at most 2^-11 of themselves; for
Gaussian weights quantised by ggml the result is off by 6.5e-4 of their root mean square, a hundredth of what Q4_K lost
before. Nothing gets lost at the small end: every half is a whole multiple of 2^-24, and so is each of these products;
the halves below 2^-13 are all of those multiples. At the large end a product may exceed the largest half, 65504; such a
tensor is refused. Only a zero's sign may change: -0 in Q4_0 (d negative, q = 8) is +0 in Q4_1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafit.errors import FormatError
from lorafit.formats.block import as_bytes, half
from lorafit.formats.kquants import integers_q4_k, integers_q5_k, scales_q4_k
from lorafit.formats.registry import block_format
from lorafit.formats.simple import pack_integers
from lorafit.formats.tensors import finite

# Format -> the one that it is promoted to.
PROMOTED = {"Q4_0": "Q4_1", "Q5_0": "Q5_1", "Q4_K": "Q4_1", "Q5_K": "Q5_1"}
# Those of them whose weights stay the same to the last bit.
EXACTLY_PROMOTED = frozenset(("Q4_0", "Q5_0"))

_PIECE = 1024  # K-quant blocks, 262,144 weights: what is unpacked of them stays small beside the tensor


def promote(blocks: Tensor, name: str) -> tuple[Tensor, str]:
    """The same weights in a format with offsets.

    Args:
        blocks: uint8 [rows, row_bytes], finite.
        name: Its format, a key of ``PROMOTED``.

    Returns:
        uint8 [rows, row_bytes of the new format], and the new format's name.

    Raises:
        FormatError: The format cannot be promoted, or an offset or scale would exceed half precision.
    """
    if name not in PROMOTED:
        raise FormatError(f"{name} cannot be promoted to a format with offsets; {', '.join(PROMOTED)} can")
    target = PROMOTED[name]
    of_blocks = blocks.reshape(-1, block_format(name).nbytes)
    if name in EXACTLY_PROMOTED:
        promoted = _with_offset(of_blocks, 8 if name == "Q4_0" else 16)
    else:
        promoted = torch.cat([_from_k(piece, name) for piece in of_blocks.split(_PIECE)])
    if not finite(promoted, target):
        raise FormatError(f"some of its {name} scales are too large for {target}, whose numbers end at 65504")
    return promoted.view(len(blocks), -1), target


def _with_offset(blocks: Tensor, centre: int) -> Tensor:
    d = half(blocks, 0)
    return torch.cat((blocks[:, :2], as_bytes((d * -centre).half()), blocks[:, 2:]), dim=1)


def _from_k(blocks: Tensor, name: str) -> Tensor:
    q, bits = (integers_q4_k(blocks), 4) if name == "Q4_K" else (integers_q5_k(blocks), 5)
    s, t = scales_q4_k(blocks[:, 4:16])
    d, m = half(blocks, 0) * s, -(half(blocks, 2) * t)
    return torch.cat(
        (as_bytes(d.half().view(-1, 1)), as_bytes(m.half().view(-1, 1)), pack_integers(q.flatten(0, 1), bits)), dim=1
    )
