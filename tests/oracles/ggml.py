"""ggml's own quantisation, out of the shared library in the wheel ``xllamacpp``: gguf-py makes no K-quants."""

import ctypes
from ctypes import POINTER, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache

import gguf
import numpy as np
import xllamacpp


@cache
def _quantize_chunk() -> ctypes._CFuncPtr:
    function = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
    function.restype = c_size_t
    # type, source, destination, first element, rows, width, importance
    function.argtypes = [c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)]
    return function


def quantize(weights: np.ndarray, name: str) -> np.ndarray:
    """Quantise as ``llama-quantize`` does: float32 [rows, width] -> uint8 [rows, row_bytes].

    Args:
        weights: What to quantise; the width is a multiple of the block.
        name: A format that needs no importance matrix, such as Q4_K or IQ4_XS.
    """
    kind = gguf.GGMLQuantizationType[name]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    values = np.ascontiguousarray(weights, np.float32)
    rows, width = values.shape
    assert width % elements == 0
    blocks = np.empty((rows, width // elements * nbytes), np.uint8)
    source = values.ctypes.data_as(POINTER(c_float))
    written = _quantize_chunk()(kind.value, source, blocks.ctypes.data, 0, rows, width, None)
    assert written == blocks.nbytes
    return blocks
