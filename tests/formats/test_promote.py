"""Promotion keeps the weights: exactly from Q4_0 and Q5_0, to half precision from Q4_K and Q5_K."""

import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.errors import FormatError
from lorafit.formats import FORMATS, PROMOTED, bits_per_weight, dequantize, promote, read_offsets
from tests.oracles import ggml

EXACT = {"Q4_0": 8.0, "Q5_0": 16.0}  # format -> what the offset is of -d
K_QUANTS = ["Q4_K", "Q5_K"]


def by_gguf_py(blocks: torch.Tensor, name: str) -> np.ndarray:
    return gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name])


def random_bytes(name: str, rows: int, groups: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, groups * FORMATS[name].nbytes), np.uint8)


def put_halves(blocks: np.ndarray, name: str, at: int, halves: np.ndarray) -> None:
    blocks.reshape(-1, FORMATS[name].nbytes)[:, at : at + 2] = halves.astype(np.float16).view(np.uint8).reshape(-1, 2)


@pytest.mark.parametrize("name", EXACT)
def test_every_scale_that_fits_is_promoted_exactly(name: str) -> None:
    """All halves but those whose multiple would exceed the largest: denormal, negative, zero."""
    scales = np.arange(2**16).astype(np.uint16).view(np.float16)
    scales = scales[np.abs(scales) <= 65504 / EXACT[name]]
    assert len(scales) > 50_000
    blocks = random_bytes(name, 1, len(scales), seed=0)
    put_halves(blocks, name, 0, scales)
    promoted, target = promote(torch.from_numpy(blocks), name)
    assert target == PROMOTED[name]
    # Equal numbers; of a zero the sign may change.
    np.testing.assert_array_equal(by_gguf_py(promoted, target), by_gguf_py(torch.from_numpy(blocks), name))
    assert torch.equal(
        read_offsets(promoted, target)[0].double(), torch.from_numpy(scales.astype(np.float64)) * -EXACT[name]
    )


@pytest.mark.parametrize("name", EXACT)
def test_a_scale_whose_offset_would_be_infinite_is_refused(name: str) -> None:
    blocks = random_bytes(name, 2, 3, seed=1)
    put_halves(blocks, name, 0, np.ones(6))
    largest = 65504 / EXACT[name]
    for scale in (largest, -largest):
        struct.pack_into("<e", blocks[1], FORMATS[name].nbytes, scale)
        promote(torch.from_numpy(blocks), name)
    struct.pack_into("<e", blocks[1], FORMATS[name].nbytes, largest * 1.001)
    with pytest.raises(FormatError, match=f"{name} scales are too large for {PROMOTED[name]}"):
        promote(torch.from_numpy(blocks), name)


def probed(
    blocks: np.ndarray, name: str, *, d: float | None = None, e: float | None = None, q: int | None = None
) -> np.ndarray:
    """Weights, in rows of 32, of K-quant blocks in which each d, e or q is replaced, as gguf-py reads them."""
    changed = blocks.copy().reshape(-1, FORMATS[name].nbytes)
    for at, number in ((0, d), (2, e)):
        if number is not None:
            put_halves(changed, name, at, np.full(len(changed), number))
    if q is not None:
        changed[:, 16:] = 0  # high bits and low ones
        changed[:, -128:] = q * 0x11
    return by_gguf_py(torch.from_numpy(changed), name).reshape(-1, 32)


@pytest.mark.parametrize("name", K_QUANTS)
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 4), groups=st.integers(1, 4), size=st.integers(-24, 4), seed=st.integers(0, 2**32 - 1))
def test_k_quants_keep_their_integers_and_round_two_numbers(
    name: str, rows: int, groups: int, size: int, seed: int
) -> None:
    blocks = random_bytes(name, rows, groups, seed)
    for at, halves in zip((0, 2), np.random.default_rng(seed).standard_normal((2, rows * groups)), strict=True):
        put_halves(blocks, name, at, halves * 2.0**size)
    promoted, target = promote(torch.from_numpy(blocks), name)
    assert promoted.shape == (rows, FORMATS[target].row_bytes(256 * groups))
    of_blocks = promoted.numpy().reshape(-1, FORMATS[target].nbytes).copy()
    d, m = of_blocks[:, :4].copy().view(np.float16).T
    np.testing.assert_array_equal(d, probed(blocks, name, e=0, q=1)[:, 0].astype(np.float16))
    np.testing.assert_array_equal(m, probed(blocks, name, q=0)[:, 0].astype(np.float16))
    put_halves(of_blocks, target, 0, np.ones(len(d)))
    put_halves(of_blocks, target, 2, np.zeros(len(d)))
    ones = blocks.reshape(-1, FORMATS[name].nbytes).copy()
    ones[:, 4:16] = [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]  # every s is 1 and every t is 0
    integers = by_gguf_py(torch.from_numpy(of_blocks), target)
    np.testing.assert_array_equal(integers, probed(ones, name, d=1, e=0))


@pytest.mark.parametrize("name", K_QUANTS)
def test_small_scales_of_k_quants_lose_nothing(name: str) -> None:
    """Where products stay below 2^-13, halves are spaced 2^-24 apart, and products are whole multiples of that."""
    blocks = random_bytes(name, 3, 4, seed=2)
    multiples = np.random.default_rng(2).integers(-30, 30, (2, 12)) * 2.0**-24
    for at, halves in zip((0, 2), multiples, strict=True):
        put_halves(blocks, name, at, halves)
    promoted, target = promote(torch.from_numpy(blocks), name)
    np.testing.assert_array_equal(by_gguf_py(promoted, target), by_gguf_py(torch.from_numpy(blocks), name))


@pytest.mark.parametrize("name", K_QUANTS)
@pytest.mark.parametrize("at", [0, 2])
def test_k_quants_whose_products_exceed_half_precision_are_refused(name: str, at: int) -> None:
    blocks = torch.zeros(2, 2 * FORMATS[name].nbytes, dtype=torch.uint8)
    last = blocks[1, FORMATS[name].nbytes :]
    last[4:16] = 0xFF  # every scale and offset is 63, and 63 · 1040 rounds to infinity
    last[at : at + 2] = torch.tensor([1039.0]).half().view(torch.uint8)
    promote(blocks, name)
    last[at : at + 2] = torch.tensor([1041.0]).half().view(torch.uint8)
    with pytest.raises(FormatError, match=f"{name} scales are too large for {PROMOTED[name]}"):
        promote(blocks, name)


@pytest.mark.parametrize("name", K_QUANTS)
def test_blocks_of_ggmls_quantiser_change_by_less_than_half_precision(name: str) -> None:
    weights = np.random.default_rng(3).standard_normal((300, 1024)).astype(np.float32) * 0.02
    blocks = torch.from_numpy(ggml.quantize(weights, name))  # more than one piece of them
    promoted, target = promote(blocks, name)
    before = dequantize(blocks, name, weights.shape)
    error = dequantize(promoted, target, weights.shape) - before
    # Measured: 6.5e-4. A number rounded to 11 bits is off by 2.0e-4 of itself (root mean square), and d·q and m are
    # each about 2.2 times as large as the weights that they sum up to: 2.0e-4 · 2.2 · √2 = 6.2e-4.
    assert 5e-4 < float(error.norm() / before.norm()) < 8e-4


@pytest.mark.parametrize("name", PROMOTED)
def test_promotion_costs_half_a_bit(name: str) -> None:
    blocks = torch.zeros(4, 3 * FORMATS[name].nbytes, dtype=torch.uint8)
    promoted, target = promote(blocks, name)
    assert bits_per_weight(promoted, target) == bits_per_weight(blocks, name) + 0.5


@pytest.mark.parametrize("name", sorted(set(FORMATS) - set(PROMOTED)))
def test_other_formats_cannot_be_promoted(name: str) -> None:
    with pytest.raises(FormatError, match=f"{name} cannot be promoted"):
        promote(torch.zeros(1, FORMATS[name].nbytes, dtype=torch.uint8), name)
