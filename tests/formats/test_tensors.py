"""Whole tensors: shapes, what does not fit, what is not finite, sizes, offsets."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.errors import FormatError
from lorafit.formats import FORMATS, bits_per_weight, dequantize, finite, read_offsets, write_offsets
from tests.oracles.blocks import random_blocks

NAMES = sorted(FORMATS)
WITH_OFFSETS = ["Q4_1", "Q5_1"]
DOUBLE = ["FP4_DQ", "NF4_DQ"]


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
    block, constants = random_blocks(name, 1, 1)
    buffer = torch.cat((torch.zeros(1, dtype=torch.uint8), block[0]))
    shape = (FORMATS[name].elements,)
    assert torch.equal(dequantize(buffer[1:], name, shape, constants), dequantize(block, name, shape, constants))
    assert finite(buffer[1:], name, constants)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_is_its_rows(name: str) -> None:
    """Large enough to be unpacked in pieces, none of which ends where a row does."""
    groups = -(-2000 // FORMATS[name].elements)
    blocks, constants = random_blocks(name, 70, groups)
    width = groups * FORMATS[name].elements
    whole = dequantize(blocks, name, (70, width), constants)
    assert whole.isfinite().all()
    for row in (0, 33, 69):
        if constants is None:
            alone = dequantize(blocks[row], name, (width,))
        else:
            numbers = torch.arange(row * groups, (row + 1) * groups)
            alone = FORMATS[name].unpack(blocks[row].view(groups, -1), constants, numbers).flatten()
        assert torch.equal(whole[row], alone)


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


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 3), groups=st.integers(1, 3), wrong=st.sampled_from((-17, -1, 1, 16)))
def test_any_other_number_of_bytes_is_refused(name: str, rows: int, groups: int, wrong: int) -> None:
    block = FORMATS[name]
    right = rows * groups * block.nbytes
    constants = torch.zeros(block.constants(rows * groups)) if name in DOUBLE else None
    shape = (rows, groups * block.elements)
    assert dequantize(torch.zeros(right, dtype=torch.uint8), name, shape, constants).shape == shape
    with pytest.raises(FormatError, match=f"in {name} takes {right} bytes"):
        dequantize(torch.zeros(max(0, right + wrong), dtype=torch.uint8), name, shape, constants)


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_constants_that_do_not_fit_are_refused(name: str, count: int) -> None:
    blocks = torch.zeros(257, 33, dtype=torch.uint8)
    with pytest.raises(FormatError, match=f"257 blocks of {name} have 3 constants, but {count} were given"):
        dequantize(blocks, name, (257, 64), torch.zeros(count) if count else None)
    with pytest.raises(FormatError, match=f"257 blocks of {name} have 3 constants, but {count} were given"):
        finite(blocks, name, torch.zeros(count) if count else None)


def test_constants_of_a_format_that_has_none_are_refused() -> None:
    with pytest.raises(FormatError, match="NF4 have 0 constants, but 2 were given"):
        dequantize(torch.zeros(1, 36, dtype=torch.uint8), "NF4", (64,), torch.zeros(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "code", "at"),
    [
        ("F32", "f", 0), ("F16", "e", 0), ("Q8_0", "e", 0), ("Q4_0", "e", 0), ("Q4_1", "e", 0), ("Q4_1", "e", 2),
        ("Q5_0", "e", 0), ("Q5_1", "e", 0), ("Q5_1", "e", 2), ("Q2_K", "e", 80), ("Q2_K", "e", 82), ("Q3_K", "e", 108),
        ("Q4_K", "e", 0), ("Q4_K", "e", 2), ("Q5_K", "e", 0), ("Q5_K", "e", 2), ("Q6_K", "e", 208), ("IQ4_NL", "e", 0),
        ("IQ4_XS", "e", 0), ("NF4", "f", 0), ("FP4", "f", 0),
    ],
)  # fmt: skip
def test_numbers_that_are_not_finite_are_found(name: str, code: str, at: int, bad: float) -> None:
    nbytes = FORMATS[name].nbytes
    blocks = np.full((3, 2, nbytes), 0xFF, np.uint8)  # integers have no NaN
    for start in FORMATS[name].floats:
        blocks[..., start : start + struct.calcsize(code)] = 0
    assert finite(torch.from_numpy(blocks).view(3, -1), name)
    struct.pack_into(f"<{code}", blocks[1, 1], at, bad)
    assert not finite(torch.from_numpy(blocks).view(3, -1), name)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_brain_floats_that_are_not_finite_are_found(number: float) -> None:
    weights = torch.tensor([1.0, -3e38, 1e-40]).bfloat16()
    assert finite(weights.view(torch.uint8), "BF16")
    weights[1] = number
    assert not finite(weights.view(torch.uint8), "BF16")


@pytest.mark.parametrize(("exponent", "usable"), [(0, True), (252, True), (253, False), (254, False), (255, False)])
def test_powers_of_mxfp4_beyond_float32_are_found(exponent: int, usable: bool) -> None:
    blocks = torch.full((2, 17), 0x77, dtype=torch.uint8)  # 12, the largest value, everywhere
    blocks[:, 0] = torch.tensor([100, exponent], dtype=torch.uint8)
    assert finite(blocks, "MXFP4") is usable
    if exponent < 255:  # which is NaN by the standard, and which gguf-py reads as a power
        assert bool(dequantize(blocks, "MXFP4", (2, 32)).isfinite().all()) is usable


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_constants_that_are_not_finite_are_found(name: str, at: int, bad: float) -> None:
    """3e38 is finite, and added to another it is not: the absmax would not be."""
    blocks = torch.full((257, 33), 0xFF, dtype=torch.uint8)
    constants = torch.tensor([1.0, 1.0, 1.0])
    assert finite(blocks, name, constants)
    constants[at] = bad
    assert finite(blocks, name, constants) is (bad == 3e38)
    constants[0 if at else 1] = 3e38
    assert not finite(blocks, name, constants)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_called_finite_makes_finite_weights(name: str, seed: int) -> None:
    block = FORMATS[name]
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (2, block.nbytes), dtype=torch.uint8, generator=random)
    count = block.constants(2)
    constants = torch.randint(-(2**31), 2**31, (count,), generator=random).int().view(torch.float32) if count else None
    if finite(blocks, name, constants):
        assert dequantize(blocks, name, (2, block.elements), constants).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_bits_per_weight_are_bytes_for_weights(name: str) -> None:
    blocks, constants = random_blocks(name, 512, 2)
    weights = 512 * 2 * FORMATS[name].elements
    nbytes = blocks.numel() + (0 if constants is None else 4 * (1 + 1024 // 256))
    assert bits_per_weight(blocks, name, constants) == 8 * nbytes / weights


def with_random_offsets(name: str, rows: int, groups: int, seed: int) -> np.ndarray:
    """Random bytes in every place: offsets of all sizes, infinite and NaN."""
    return np.random.default_rng(seed).integers(0, 256, (rows, groups * FORMATS[name].nbytes), np.uint8)


@pytest.mark.parametrize("name", WITH_OFFSETS)
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 3), groups=st.integers(1, 3), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_offsets_are_read_and_written_and_nothing_else(
    name: str, rows: int, groups: int, seed: int, data: st.DataObject
) -> None:
    blocks = with_random_offsets(name, rows, groups, seed)
    nbytes = FORMATS[name].nbytes
    before = torch.from_numpy(blocks.copy())
    of_blocks = blocks.reshape(-1, nbytes)
    by_hand = [struct.unpack_from("<e", one.tobytes(), 2)[0] for one in of_blocks]
    offsets = read_offsets(before, name)
    assert (offsets.dtype, offsets.shape) == (torch.float16, (rows, groups))
    np.testing.assert_array_equal(offsets.flatten().numpy(), np.array(by_hand, np.float16))

    other = data.draw(st.lists(st.floats(width=16), min_size=len(by_hand), max_size=len(by_hand)))
    wanted = torch.tensor(other, dtype=torch.float16).view_as(offsets)
    after = write_offsets(before, name, wanted)
    assert np.array_equal(before.numpy(), blocks), "the original was changed"
    assert torch.equal(read_offsets(after, name).view(torch.int16), wanted.view(torch.int16)), "not to the last bit"
    mask = np.ones(nbytes, bool)
    mask[2:4] = False
    assert np.array_equal(after.numpy().reshape(-1, nbytes)[:, mask], of_blocks[:, mask])


@pytest.mark.parametrize("name", WITH_OFFSETS)
def test_offsets_read_are_a_copy(name: str) -> None:
    blocks = torch.zeros(1, FORMATS[name].nbytes, dtype=torch.uint8)  # a single block, which a view could serve
    read_offsets(blocks, name).fill_(1.0)
    assert not blocks.any()


@pytest.mark.parametrize("name", WITH_OFFSETS)
def test_another_offset_moves_all_weights_of_its_block_by_the_same(name: str) -> None:
    blocks, _ = random_blocks(name, 2, 2)
    blocks = write_offsets(blocks, name, torch.zeros(2, 2, dtype=torch.float16))
    # Halves times integers, so that sums with small integers are exact.
    moved = write_offsets(blocks, name, torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float16))
    change = dequantize(moved, name, (2, 2, 32)) - dequantize(blocks, name, (2, 2, 32))
    # Each sum is rounded to float32: to 2^-19 at 16 to 32, and weights here are up to 100.
    torch.testing.assert_close(
        change, torch.tensor([[1.0, 2.0], [3.0, 4.0]])[..., None].expand(2, 2, 32), rtol=0, atol=2**-17
    )


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
