"""Quantisation against gguf-py, byte for byte."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.errors import FormatError
from lorafit.formats import FORMATS, dequantize, quantize

NAMES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"]
READ_ONLY = [name for name, block in FORMATS.items() if block.pack is None]
# Weights that all of these formats hold: gguf-py writes infinities above, and its MXFP4 exponent wraps around below.
LARGEST, SMALLEST = 60000.0, 2.0**-124

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of numpy, in gguf-py


def by_gguf_py(weights: np.ndarray, name: str) -> np.ndarray:
    return gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name]).view(np.uint8).reshape(len(weights), -1)


def plain_zeros(blocks: np.ndarray, name: str) -> np.ndarray:
    """Without the sign of an offset that is zero: which of 0 and -0 is smaller, numpy leaves to the processor."""
    if FORMATS[name].offset_at is not None:
        offsets = blocks.reshape(-1, FORMATS[name].nbytes)[:, 2:4].view(np.uint16)
        offsets[offsets == 0x8000] = 0
    return blocks


def assert_as_gguf_py(weights: np.ndarray, name: str) -> None:
    blocks, constants = quantize(torch.from_numpy(weights), name)
    assert constants is None
    np.testing.assert_array_equal(plain_zeros(blocks.numpy(), name), plain_zeros(by_gguf_py(weights, name), name))


def test_these_formats_are_packed() -> None:
    packed = {name for name, block in FORMATS.items() if block.pack is not None}
    assert packed == {*NAMES, "Q4_K", "Q5_K", "Q6_K", "NF4", "NF4_DQ", "FP4", "FP4_DQ"}


@st.composite
def weights_of_any_kind(draw: st.DrawFn) -> np.ndarray:
    rows, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    count = rows * groups * 32
    kind = draw(st.sampled_from(("floats", "multiples", "gaussian")))
    if kind == "floats":
        number = st.floats(-LARGEST, LARGEST, width=32, allow_nan=False)
        few = draw(st.lists(number, min_size=1, max_size=12))
        values = np.resize(np.array(few, np.float32), count)
    elif kind == "multiples":  # many ties
        steps = draw(st.lists(st.integers(-16, 16), min_size=4, max_size=40))
        values = np.resize(np.array(steps, np.float32), count) * np.float32(2.0 ** draw(st.integers(-20, 10)))
    else:
        random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        values = random.standard_normal(count).astype(np.float32) * np.float32(10.0 ** draw(st.integers(-9, 3)))
    return values.reshape(rows, groups * 32)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(weights=weights_of_any_kind())
def test_any_weights_are_packed_as_gguf_py_packs_them(name: str, weights: np.ndarray) -> None:
    if name == "MXFP4":
        largest = np.abs(weights.reshape(-1, 32)).max(1).repeat(32).reshape(weights.shape)
        weights = np.where(largest < SMALLEST, np.float32(0), weights)
    assert_as_gguf_py(weights, name)


@pytest.mark.parametrize(("name", "largest"), [("Q4_0", -8), ("Q4_1", 15), ("Q5_0", -16), ("Q5_1", 31), ("Q8_0", 127)])
def test_weights_halfway_between_two_integers(name: str, largest: int) -> None:
    """Every q and q + 1/2 of a scale of 1, in blocks that reach to 0 and to the end of the grid."""
    lowest = 0 if FORMATS[name].offset_at is not None else -abs(largest)
    halves = np.arange(2 * lowest, 2 * abs(largest) + 1, dtype=np.float32) / 2
    weights = np.zeros((17, 32), np.float32)
    weights[:, :30] = np.resize(halves, (17, 30))
    weights[:, 31] = largest
    assert_as_gguf_py(weights, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_larger_than_a_piece_is_packed_as_gguf_py_packs_it(name: str) -> None:
    assert_as_gguf_py(np.random.default_rng(1).standard_t(3, (130, 1056)).astype(np.float32), name)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "MXFP4"])
def test_denormals_and_zeros_of_either_sign(name: str) -> None:
    tiny = np.float32([0.0, -0.0, 1e-45, -1e-45, 1e-41, -3e-39, 1.2e-38, -5e-38, 6e-8, -6e-5])
    weights = np.stack([np.resize(tiny[i : i + 3], 64) for i in range(len(tiny) - 2)])
    assert_as_gguf_py(weights, name)


def test_weights_too_small_for_an_exponent_of_mxfp4_stay_near_themselves() -> None:
    weights = torch.tensor([1e-45, -1e-41, 2e-39, -9e-39]).repeat(8)[None]
    blocks, _ = quantize(weights, "MXFP4")
    # The smallest step is 2^-128, and a weight lies at most half of it from the nearest value.
    assert (dequantize(blocks, "MXFP4", (1, 32)) - weights).abs().max() <= 2.0**-129


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_rounded_as_float32(name: str, dtype: torch.dtype) -> None:
    weights = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(quantize(weights, name).blocks, quantize(weights.float(), name).blocks)


@pytest.mark.parametrize("name", [*NAMES, "NF4", "FP4_DQ"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    weights = torch.zeros(3, 128)
    weights[2, 127] = bad
    with pytest.raises(FormatError, match="NaN or infinite"):
        quantize(weights, name)


@pytest.mark.parametrize(
    ("name", "fits", "too_large"),
    [
        ("F16", 65504.0, 65520.0),
        ("BF16", 3.38e38, 3.4e38),
        ("Q4_0", 8 * 65504.0, 8 * 65520.0),
        ("Q4_1", 65504.0, 65520.0),
        ("Q5_0", 16 * 65504.0, 16 * 65520.0),
        ("Q5_1", 65504.0, 65520.0),
        ("Q8_0", 127 * 65504.0, 127 * 65520.0),
        ("MXFP4", 3.3e38, 3.4028234e38),  # which would round up to 2^128
    ],
)
def test_weights_too_large_for_the_format_are_refused(name: str, fits: float, too_large: float) -> None:
    weights = torch.zeros(2, 32)
    weights[1, 3] = -fits
    quantize(weights, name)
    weights[1, 3] = -too_large
    with pytest.raises(FormatError, match=f"too large for {name}"):
        quantize(weights, name)


@pytest.mark.parametrize("name", ["F32", "NF4", "NF4_DQ", "FP4"])
def test_the_largest_float32_fits(name: str) -> None:
    blocks, constants = quantize(torch.full((1, 64), -3.4028234e38), name)
    assert dequantize(blocks, name, (1, 64), constants).isfinite().all()


@pytest.mark.parametrize("name", ["Q4_1", "NF4", "MXFP4"])
def test_widths_that_are_no_whole_number_of_blocks_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match=f"row of 80 weights is not a whole number of {name} blocks"):
        quantize(torch.zeros(2, 80), name)


@pytest.mark.parametrize("name", READ_ONLY)
def test_formats_without_a_quantiser_say_so(name: str) -> None:
    with pytest.raises(FormatError, match=f"lorafit reads {name} and does not write it"):
        quantize(torch.zeros(1, 256), name)


@pytest.mark.parametrize("shape", [(64,), (2, 2, 64), (0, 64), (4, 0)])
def test_only_matrices_are_quantised(shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match=r"a matrix .* of weights can be quantised, not the shape"):
        quantize(torch.zeros(shape), "NF4_DQ")
