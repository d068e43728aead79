"""Block formats: how quantised weights lie in a file, as data and pure functions.

``block`` says what a format is; ``floats``, ``simple``, ``kquants``, ``lookup`` and ``nf4`` each describe a family of
them, and adding a format touches one of these files; ``ksearch`` finds the scales of K-quants; ``registry`` finds a
format; ``tensors`` works on whole tensors; ``promote`` moves a tensor into a format that QA-LoRA can train.
"""

from lorafit.formats.block import BlockFormat
from lorafit.formats.promote import EXACTLY_PROMOTED, PROMOTED, promote
from lorafit.formats.registry import FORMATS, block_format, format_by_id
from lorafit.formats.tensors import (
    Packed,
    bits_per_weight,
    dequantize,
    finite,
    quantize,
    read_offsets,
    write_offsets,
)

__all__ = [
    "EXACTLY_PROMOTED",
    "FORMATS",
    "PROMOTED",
    "BlockFormat",
    "Packed",
    "bits_per_weight",
    "block_format",
    "dequantize",
    "finite",
    "format_by_id",
    "promote",
    "quantize",
    "read_offsets",
    "write_offsets",
]
