"""Block formats: how quantised weights lie in a file, as data and pure functions."""

from lorafit.formats.ggml import FORMATS, BlockFormat, block_format, dequantize, finite, read_offsets, write_offsets

__all__ = ["FORMATS", "BlockFormat", "block_format", "dequantize", "finite", "read_offsets", "write_offsets"]
