"""NF4 and FP4 against bitsandbytes, bit for bit: codes, absmax, their double quantisation, and weights."""

from collections.abc import Iterator

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafit.formats import FORMATS, bits_per_weight, dequantize, quantize

KINDS = ["nf4", "fp4"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """bitsandbytes takes a mean whose rounding depends on the number of threads; ours is that of one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(weights: Tensor, kind: str, double: bool) -> None:
    codes, state = bnb.quantize_4bit(weights, blocksize=64, compress_statistics=double, quant_type=kind)
    name = kind.upper() + ("_DQ" if double else "")
    blocks, constants = quantize(weights, name)
    records = blocks.view(-1, FORMATS[name].nbytes)
    assert torch.equal(records[:, -32:], codes.view(-1, 32))
    if double:
        assert constants is not None
        assert torch.equal(records[:, 0], state.absmax)
        assert torch.equal(constants, torch.cat((state.offset.view(1), state.state2.absmax)))
    else:
        assert constants is None
        assert torch.equal(records[:, :4].contiguous().view(torch.float32)[:, 0], state.absmax)
    unpacked = dequantize(blocks, name, weights.shape, constants)
    theirs = bnb.dequantize_4bit(codes, state)
    assert torch.equal(unpacked.view(torch.int32), theirs.view(torch.int32)), (
        "not to the last bit, zeros' signs included"
    )


def middles(kind: str) -> Tensor:
    """Numbers halfway between neighbouring values of the table, those beside them, and the values themselves."""
    values = bnb.get_4bit_type(kind, device="cpu").sort().values
    halfway = (values[1:] + values[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    return torch.cat((halfway, halfway.nextafter(infinity), halfway.nextafter(-infinity), values))


@st.composite
def weights_of_any_kind(draw: st.DrawFn, kind: str) -> Tensor:
    """Matrices of up to 320 blocks, so that more than one scale is shared."""
    rows, groups = draw(st.integers(1, 80)), draw(st.integers(1, 4))
    shape = (rows, 64 * groups)
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    of_values = draw(st.sampled_from(("gaussian", "ties", "integers", "few")))
    if of_values == "gaussian":
        weights = torch.randn(shape, generator=random)
    elif of_values == "ties":  # with a 1 in each block, so that they are ties after scaling too
        choice = middles(kind)
        weights = choice[torch.randint(len(choice), shape, generator=random)]
        weights[:, ::64] = 1.0
    elif of_values == "integers":
        weights = torch.randint(-4, 5, shape, generator=random).float()
    else:
        few = draw(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=7))
        weights = torch.from_numpy(np.resize(np.array(few, np.float32), shape))
    sizes = 10.0 ** torch.randint(-4, 3, (rows, 1), generator=random)
    return weights * (sizes if draw(st.booleans()) else 1) * 2.0 ** draw(st.sampled_from((0, 0, 60, -100, -130)))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_weights_are_as_in_bitsandbytes(kind: str, double: bool, data: st.DataObject) -> None:
    check(data.draw(weights_of_any_kind(kind)), kind, double)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1.0, 1e-38, 1e-41, 1e-45, 1e30])
def test_extremes_zeros_and_denormals(kind: str, double: bool, size: float) -> None:
    weights = torch.randn(90, 192, generator=torch.Generator().manual_seed(3)) * size
    weights[1], weights[2, :64], weights[3, 5:70] = 0.0, -0.0, 0.0
    weights[4] = size  # a constant row: all at the largest code
    weights[5, ::2], weights[5, 1::2] = 1e-45, -1e-45  # each rounds to a zero, and in FP4 to another one
    check(weights, kind, double)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.0, 1.0])
def test_blocks_that_are_all_alike(kind: str, size: float) -> None:
    """Every absmax equals the mean, so that the shared scales are zero."""
    check(torch.full((300, 64), size), kind, double=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_8_bit_codes_of_many_absmax(kind: str) -> None:
    """Enough for every code, and for numbers so near the middle of two values that rounding before decides."""
    blocks = 60_000
    weights = torch.zeros(blocks, 64)
    weights[:, 7] = 5 + torch.randn(blocks, generator=torch.Generator().manual_seed(4))
    check(weights, kind, double=True)
    assert len(quantize(weights, f"{kind.upper()}_DQ").blocks[:, 0].unique()) > 245  # some lie within one step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_rounded_as_float32(kind: str, dtype: torch.dtype) -> None:
    weights = torch.randn(8, 128, generator=torch.Generator().manual_seed(5)).to(dtype)
    codes, state = bnb.quantize_4bit(weights, blocksize=64, compress_statistics=True, quant_type=kind)
    blocks, constants = quantize(weights, f"{kind.upper()}_DQ")
    assert torch.equal(blocks.view(-1, 33)[:, 1:], codes.view(-1, 32))
    unpacked = dequantize(blocks, f"{kind.upper()}_DQ", weights.shape, constants)
    assert torch.equal(unpacked.to(dtype), bnb.dequantize_4bit(codes, state))


def test_every_byte_of_codes_and_every_code_of_an_absmax() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32)
    absmax_codes = torch.arange(256, dtype=torch.uint8)
    mean, scales = torch.tensor(0.37), torch.tensor([0.11, 0.23])
    for kind in KINDS:
        state = bnb.QuantState(
            absmax=torch.cat((absmax_codes, absmax_codes[:8])), shape=torch.Size((264, 64)), dtype=torch.float32,
            blocksize=64, quant_type=kind, offset=mean,
            state2=bnb.QuantState(absmax=scales, code=bnb.create_dynamic_map(), blocksize=256, dtype=torch.float32),
        )  # fmt: skip
        packed = codes.repeat(33, 1)
        theirs = bnb.dequantize_4bit(packed.view(-1, 1), state)
        blocks = torch.cat((state.absmax[:, None], packed), dim=1)
        constants = torch.cat((mean.view(1), scales))
        ours = dequantize(blocks, f"{kind.upper()}_DQ", (264, 64), constants)
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def test_some_blocks_are_unpacked_by_their_numbers() -> None:
    weights = torch.randn(600, 64, generator=torch.Generator().manual_seed(6)) * torch.rand(600, 1)
    blocks, constants = quantize(weights, "NF4_DQ")
    whole = dequantize(blocks, "NF4_DQ", (600, 64), constants)
    index = torch.tensor([599, 0, 256, 255, 256])
    assert torch.equal(FORMATS["NF4_DQ"].unpack(blocks[index], constants, index), whole[index])


def test_double_quantisation_takes_4_127_bits() -> None:
    blocks, constants = quantize(torch.randn(576, 1536, generator=torch.Generator().manual_seed(7)), "NF4_DQ")
    assert round(bits_per_weight(blocks, "NF4_DQ", constants), 3) == 4.127
    assert bits_per_weight(quantize(torch.ones(3, 64), "NF4").blocks, "NF4") == 4.5
