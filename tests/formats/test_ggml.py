"""Block formats against gguf-py, bit for bit: there is one right float32 for every block."""

import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.errors import FormatError
from lorafit.formats import FORMATS, block_format, dequantize, finite, read_offsets, write_offsets
from lorafit.formats.ggml import format_by_id

NAMES = sorted(FORMATS)
WITH_OFFSETS = [name for name in NAMES if FORMATS[name].offset_at is not None]
# Byte of a block -> mask that clears the last bit of the exponent there, so that no number is infinite or NaN.
CLEARED = {"F32": {2: 0x7F}, "F16": {1: 0xFB}, "Q8_0": {1: 0xFB}, "Q4_1": {1: 0xFB, 3: 0xFB}}


@st.composite
def finite_blocks(draw: st.DrawFn, name: str) -> np.ndarray:
    """Random bytes but for the numbers that would not be finite: uint8 [rows, row_bytes]."""
    rows, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    nbytes = FORMATS[name].nbytes
    raw = draw(st.binary(min_size=rows * groups * nbytes, max_size=rows * groups * nbytes))
    blocks = np.frombuffer(raw, np.uint8).reshape(rows, groups, nbytes).copy()
    for at, mask in CLEARED[name].items():
        blocks[..., at] &= mask
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", NAMES)
def test_table_agrees_with_gguf_py(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    block = block_format(name)
    assert (block.type_id, (block.elements, block.nbytes)) == (kind.value, gguf.GGML_QUANT_SIZES[kind])
    assert format_by_id(kind.value) is block


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_dequantize_is_bit_exact(name: str, data: st.DataObject) -> None:
    blocks = data.draw(finite_blocks(name))
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    weights = dequantize(torch.from_numpy(blocks), name, expected.shape).numpy()
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights.view(np.uint32), expected.view(np.uint32))


def test_q4_1_by_hand() -> None:
    packed = bytes(range(0, 256, 16))  # low nibbles 0, high nibbles 0 to 15
    block = struct.pack("<ee", 0.5, -2.0) + packed
    expected = [-2.0] * 16 + [0.5 * q - 2.0 for q in range(16)]
    assert dequantize(torch.frombuffer(bytearray(block), dtype=torch.uint8), "Q4_1", (32,)).tolist() == expected


def test_dequantize_keeps_the_shape_and_copies() -> None:
    values = np.arange(24, dtype="<f4")
    blocks = torch.from_numpy(values.copy().view(np.uint8))
    weights = dequantize(blocks, "F32", (2, 3, 4))
    np.testing.assert_array_equal(weights.numpy(), values.reshape(2, 3, 4))
    weights.zero_()
    np.testing.assert_array_equal(blocks.numpy().view("<f4"), values)
    assert dequantize(blocks[:4], "F32", ()).item() == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_blocks_may_start_anywhere_in_a_buffer(name: str) -> None:
    nbytes, elements = FORMATS[name].nbytes, FORMATS[name].elements
    block = torch.arange(nbytes, dtype=torch.uint8)
    buffer = torch.cat((torch.zeros(1, dtype=torch.uint8), block))
    assert torch.equal(dequantize(buffer[1:], name, (elements,)), dequantize(block, name, (elements,)))


@pytest.mark.parametrize("name", WITH_OFFSETS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_offsets_are_read_and_written_and_nothing_else(name: str, data: st.DataObject) -> None:
    blocks = data.draw(finite_blocks(name))
    block = FORMATS[name]
    before = torch.from_numpy(blocks.copy())
    at = block.offset_at
    assert at is not None
    of_blocks = blocks.reshape(-1, block.nbytes)
    by_hand = [struct.unpack_from("<e", one.tobytes(), at)[0] for one in of_blocks]
    offsets = read_offsets(before, name)
    assert offsets.dtype == torch.float16
    assert offsets.shape == (len(blocks), blocks.shape[1] // block.nbytes)
    np.testing.assert_array_equal(offsets.flatten().numpy(), np.array(by_hand, np.float16))

    other = data.draw(st.lists(st.floats(width=16), min_size=len(by_hand), max_size=len(by_hand)))
    wanted = torch.tensor(other, dtype=torch.float16).view_as(offsets)
    after = write_offsets(before, name, wanted)
    assert np.array_equal(before.numpy(), blocks), "the original was changed"
    assert torch.equal(read_offsets(after, name).view(torch.int16), wanted.view(torch.int16)), "not to the last bit"
    mask = np.ones(block.nbytes, bool)
    mask[at : at + 2] = False
    assert np.array_equal(after.numpy().reshape(-1, block.nbytes)[:, mask], of_blocks[:, mask])


@pytest.mark.parametrize("name", WITH_OFFSETS)
def test_offsets_read_are_a_copy(name: str) -> None:
    blocks = torch.zeros(1, FORMATS[name].nbytes, dtype=torch.uint8)  # a single block, which a view could serve
    read_offsets(blocks, name).fill_(1.0)
    assert not blocks.any()


def test_another_offset_moves_all_weights_of_its_block_by_the_same() -> None:
    blocks = torch.zeros(2, 2 * 20, dtype=torch.uint8)
    blocks.view(2, 2, 20)[..., 4:] = torch.arange(16, dtype=torch.uint8)
    moved = write_offsets(blocks, "Q4_1", torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float16))
    change = dequantize(moved, "Q4_1", (2, 2, 32)) - dequantize(blocks, "Q4_1", (2, 2, 32))
    assert torch.equal(change, torch.tensor([[1.0, 2.0], [3.0, 4.0]])[..., None].expand(2, 2, 32))


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2,), (4, 1)])
def test_offsets_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    blocks = torch.zeros(2, 40, dtype=torch.uint8)
    with pytest.raises(FormatError, match=r"\[2, 2\] Q4_1 blocks cannot take"):
        write_offsets(blocks, "Q4_1", torch.zeros(shape, dtype=torch.float16))


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(WITH_OFFSETS)))
def test_formats_without_offsets_say_so(name: str) -> None:
    blocks = torch.zeros(1, FORMATS[name].nbytes, dtype=torch.uint8)
    with pytest.raises(FormatError, match=f"{name} blocks have no offset"):
        read_offsets(blocks, name)
    with pytest.raises(FormatError, match=f"{name} blocks have no offset"):
        write_offsets(blocks, name, torch.zeros(1, 1, dtype=torch.float16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "code", "at"), [("F32", "f", 0), ("F16", "e", 0), ("Q8_0", "e", 0), ("Q4_1", "e", 0), ("Q4_1", "e", 2)]
)
def test_numbers_that_are_not_finite_are_found(name: str, code: str, at: int, bad: float) -> None:
    nbytes = FORMATS[name].nbytes
    blocks = np.zeros((3, 2, nbytes), np.uint8)
    if FORMATS[name].elements > 1:
        blocks[..., FORMATS[name].floats[-1] + 2 :] = 0xFF  # integers have no NaN
    assert finite(torch.from_numpy(blocks).view(3, -1), name)
    struct.pack_into(f"<{code}", blocks[1, 1], at, bad)
    assert not finite(torch.from_numpy(blocks).view(3, -1), name)


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_numbers_are_finite(name: str) -> None:
    largest = struct.pack("<f", 3.4028234e38) if name == "F32" else struct.pack("<ee", 65504.0, -65504.0)
    nbytes = FORMATS[name].nbytes
    blocks = torch.frombuffer(bytearray(largest.ljust(nbytes, b"\xff")[:nbytes]), dtype=torch.uint8)
    assert finite(blocks, name)


def test_unknown_formats_are_named() -> None:
    with pytest.raises(FormatError, match="Q3_X is not a format that lorafit reads"):
        dequantize(torch.zeros(20, dtype=torch.uint8), "Q3_X", (32,))
    with pytest.raises(FormatError, match=r"IQ4_XS \(type 23\)"):
        format_by_id(23)
    with pytest.raises(FormatError, match="type 12345, which is not a known format"):
        format_by_id(12345)


@pytest.mark.parametrize(
    ("size", "dtype", "shape", "message"),
    [
        (20, torch.uint8, (33,), "33 weights is not a whole number"),
        (20, torch.uint8, (2, 32), "takes 40 bytes"),
        (41, torch.uint8, (2, 32), "takes 40 bytes"),
        (20, torch.int8, (32,), "int8"),
        (0, torch.uint8, (32,), "takes 20 bytes"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(size: int, dtype: torch.dtype, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        dequantize(torch.zeros(size, dtype=dtype), "Q4_1", shape)
