"""All formats, by name and by their number in GGUF files."""

from __future__ import annotations

from lorafit.errors import FormatError
from lorafit.formats import floats, kquants, lookup, nf4, simple
from lorafit.formats.block import BlockFormat

FORMATS = {block.name: block for group in (floats, simple, kquants, lookup, nf4) for block in group.FORMATS}

# Every format of ggml, so that an error can name one that lorafit does not read.
_GGML = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def format_by_id(type_id: int) -> BlockFormat:
    """The format with a number in a GGUF file.

    Raises:
        FormatError: lorafit does not read that format.
    """
    name = _GGML.get(type_id)
    if name in FORMATS:
        return FORMATS[name]
    known = f"{name} (type {type_id})" if name else f"type {type_id}, which is not a known format"
    readable = (block.name for block in FORMATS.values() if block.type_id is not None)
    raise FormatError(f"has {known}; lorafit reads {', '.join(readable)}")


def block_format(name: str) -> BlockFormat:
    """The format called ``name``.

    Raises:
        FormatError: There is no such format.
    """
    if name not in FORMATS:
        raise FormatError(f"{name} is not a format that lorafit reads ({', '.join(FORMATS)})")
    return FORMATS[name]
