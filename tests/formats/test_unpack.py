"""Dequantisation against gguf-py, bit for bit: there is one right float32 for every block."""

import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.formats import FORMATS, dequantize, finite
from tests.oracles import ggml

NAMES = sorted(name for name, block in FORMATS.items() if block.type_id is not None)
# Byte of a block -> mask that clears a bit of an exponent there, so that no number is infinite or NaN.
_HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))}
CLEARED = {"F32": {2: 0x7F}, "BF16": {0: 0x7F}, "MXFP4": {0: 0x7F}}
CLEARED |= {name: {at + 1: 0xFB for at in _HALVES.get(name, (0,))} for name in NAMES if name not in CLEARED}


@st.composite
def finite_blocks(draw: st.DrawFn, name: str) -> np.ndarray:
    """Random bytes but for the numbers that would not be finite: uint8 [rows, row_bytes]."""
    rows, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    nbytes = FORMATS[name].nbytes
    seed = draw(st.integers(0, 2**32 - 1))
    blocks = np.random.default_rng(seed).integers(0, 256, (rows, groups, nbytes), np.uint8)
    for at, mask in CLEARED[name].items():
        # Numbers of all sizes: small, large, zero and denormal, of either sign.
        blocks[..., at] = draw(st.sampled_from((0x00, 0x01, 0x3C, 0x7F, 0x80, 0x83, 0xAF, 0xFF))) & mask
        blocks[0, 0, at] = draw(st.integers(0, 255)) & mask
    return blocks.reshape(rows, -1)


def assert_as_gguf_py(blocks: np.ndarray, name: str) -> None:
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    weights = dequantize(torch.from_numpy(blocks), name, expected.shape).numpy()
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_blocks_are_read_as_gguf_py_reads_them(name: str, data: st.DataObject) -> None:
    blocks = data.draw(finite_blocks(name))
    assert finite(torch.from_numpy(blocks), name)
    assert_as_gguf_py(blocks, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0.02, 1e-6])  # that of a model's weights, and one where scales are denormal
def test_blocks_of_ggmls_quantiser_are_read_as_gguf_py_reads_them(name: str, size: float) -> None:
    weights = np.random.default_rng(0).standard_t(4, (6, 512)).astype(np.float32) * np.float32(size)
    weights[2] = 0
    blocks = ggml.quantize(weights, name)
    assert_as_gguf_py(blocks, name)
    if size == 0.02:
        error = dequantize(torch.from_numpy(blocks), name, weights.shape).numpy() - weights
        # The coarsest format has two bits; a wrong order of weights would make it 1.4.
        assert np.sqrt((error**2).mean() / (weights**2).mean()) < 0.4


def test_q4_1_by_hand() -> None:
    packed = bytes(range(0, 256, 16))  # low nibbles 0, high nibbles 0 to 15
    block = struct.pack("<ee", 0.5, -2.0) + packed
    expected = [-2.0] * 16 + [0.5 * q - 2.0 for q in range(16)]
    assert dequantize(torch.frombuffer(bytearray(block), dtype=torch.uint8), "Q4_1", (32,)).tolist() == expected
