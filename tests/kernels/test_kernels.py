"""Operations on packed weights: the compiled backend against the readable one, and both against plain arithmetic."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lorafit import kernels
from lorafit.formats import FORMATS, dequantize, read_offsets, write_offsets
from lorafit.formats.block import HALF
from lorafit.kernels import reference
from tests.kernels.comparing import any_blocks, assert_same_bits, by_reference
from tests.oracles.blocks import random_blocks

PLAIN = ["F32", "F16", "BF16"]
PACKED = [name for name in FORMATS if name not in PLAIN]
OFFSETS = [name for name in FORMATS if FORMATS[name].offset_at is not None]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def groups_in(name: str, width: int) -> int:
    """How many blocks make rows of at least ``width`` weights."""
    return -(-width // FORMATS[name].elements)


def row_choices(count: int) -> dict[str, Tensor | None]:
    return {
        "all": None,
        "permuted": torch.randperm(count, generator=torch.Generator().manual_seed(1)),
        "some, repeated": torch.tensor([count - 1, 0, 0, count // 2, count - 1]),
        "one": torch.tensor([count // 2]),
        "none": torch.tensor([], dtype=torch.int64),
        "int32": torch.arange(count, dtype=torch.int32).flip(0),
        "every second, not contiguous": torch.arange(count)[::2],
    }


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_dequantize_is_the_format_rounded_once(name: str, dtype: torch.dtype) -> None:
    blocks, constants = random_blocks(name, 5, groups_in(name, 64))
    result = kernels.dequantize(blocks, name, dtype, constants=constants)
    expected = dequantize(blocks, name, result.shape, constants).to(dtype)
    assert result.dtype == dtype
    assert_same_bits(result.float(), expected.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("count", [1, 37])
def test_compiled_dequantize_equals_the_reference(name: str, dtype: torch.dtype, count: int) -> None:
    for width in (32, 160):
        groups = groups_in(name, width)
        blocks, constants = any_blocks(name, count, groups, seed=width)
        assert kernels.fuses_linear(blocks, name), "the compiled backend is not in use"
        for rows in row_choices(count).values():
            assert_same_bits(
                kernels.dequantize(blocks, name, dtype, rows=rows, constants=constants),
                by_reference(blocks, name, dtype, rows, constants=constants),
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OFFSETS)
def test_compiled_dequantize_with_other_offsets_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    blocks, _ = any_blocks(name, 37, 5)
    for rows in row_choices(37).values():
        shape = (37 if rows is None else len(rows), 5)
        offsets = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.float16)
        assert_same_bits(
            kernels.dequantize(blocks, name, dtype, rows=rows, offsets=offsets),
            by_reference(blocks, name, dtype, rows, offsets),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in PACKED if FORMATS[name].float_type is HALF and FORMATS[name].floats])
def test_every_half_precision_number_as_scale(name: str, dtype: torch.dtype) -> None:
    """All 65,536 of them: denormals, infinities, ties in rounding, and the NaN whose bits are all ones.

    Formats of larger blocks multiply more integers by each, and get every seventh.
    """
    block = FORMATS[name]
    at = block.floats[0]
    halves = torch.arange(-(2**15), 2**15, 1 if block.elements == 32 else 7).to(torch.int16).view(torch.float16)
    blocks = any_blocks(name, 1, 1)[0].repeat(len(halves), 1)
    blocks[:, at : at + 2] = halves[:, None].view(torch.uint8)
    assert_same_bits(kernels.dequantize(blocks, name, dtype), by_reference(blocks, name, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_number_of_16_bits_as_a_weight(name: str, dtype: torch.dtype) -> None:
    blocks = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.uint8).view(16, -1)
    assert_same_bits(kernels.dequantize(blocks, name, dtype), by_reference(blocks, name, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_too_small_for_normal_numbers(dtype: torch.dtype) -> None:
    """Which an instruction that rounds to bfloat16 would take for zero."""
    tiny = torch.tensor([1e-45, -1e-45, 1e-41, -3e-39, 1.1e-38, -1.2e-38, 2.0**-127, -(2.0**-133)] * 2)
    for name, blocks in (
        ("F32", tiny.view(torch.uint8)),
        ("BF16", tiny.bfloat16().view(torch.uint8)),
        ("NF4", torch.cat((tiny[5].view(1).view(torch.uint8), torch.arange(32, dtype=torch.uint8)))),
        ("FP4", torch.cat((tiny[5].view(1).view(torch.uint8), torch.arange(32, dtype=torch.uint8)))),
        ("MXFP4", torch.arange(17, dtype=torch.uint8)),
    ):
        weights = kernels.dequantize(blocks[None], name, dtype)
        assert ((weights != 0) & (weights.float().abs() < 2.0**-126)).any()
        assert_same_bits(weights, by_reference(blocks[None], name, dtype))


@pytest.mark.parametrize("name", ["NF4_DQ", "FP4_DQ"])
def test_constants_go_by_the_place_in_the_tensor(name: str) -> None:
    """More than 256 blocks, so that rows have scales of their own, which a permutation must not mix up."""
    blocks, constants = random_blocks(name, 130, 5)
    assert constants is not None
    assert len(constants) == 4
    rows = torch.randperm(130, generator=torch.Generator().manual_seed(1))
    expected = dequantize(blocks, name, (130, 320), constants)[rows]
    assert torch.equal(kernels.dequantize(blocks, name, torch.float32, rows=rows, constants=constants), expected)
    for wrong in (None, constants[:-1], constants.double()):
        with pytest.raises(AssertionError):
            kernels.dequantize(blocks, name, torch.float32, constants=wrong)
    with pytest.raises(AssertionError):
        kernels.dequantize(torch.zeros(1, 36, dtype=torch.uint8), "NF4", torch.float32, constants=constants)


@pytest.mark.parametrize("name", PACKED)
def test_blocks_may_begin_at_any_address(name: str) -> None:
    """As they do in experts of a fused tensor, or in a row of an odd number of bytes."""
    blocks, constants = random_blocks(name, 3, 2)
    moved = torch.empty(blocks.numel() + 1, dtype=torch.uint8)[1:].view(blocks.shape)
    moved.copy_(blocks)
    expected = dequantize(blocks, name, (3, 2 * FORMATS[name].elements), constants)
    assert torch.equal(kernels.dequantize(moved, name, torch.float32, constants=constants), expected)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_numbers_in_rows_of_any_length(name: str) -> None:
    blocks, _ = random_blocks(name, 3, 37)
    assert not kernels.fuses_linear(blocks, name)
    assert torch.equal(kernels.dequantize(blocks, name, torch.float32), dequantize(blocks, name, (3, 37)))
    x = torch.randn(2, 37)
    check_product(kernels.linear(x, blocks, name), x, dequantize(blocks, name, (3, 37)))


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_half_precision_number_as_offset(name: str, dtype: torch.dtype) -> None:
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    blocks = write_offsets(random_blocks(name, 1, 1)[0].repeat(len(halves), 1), name, halves[:, None])
    assert_same_bits(kernels.dequantize(blocks, name, dtype), by_reference(blocks, name, dtype))
    zero = torch.zeros(len(halves), FORMATS[name].nbytes, dtype=torch.uint8)
    as_offset = kernels.dequantize(zero, name, dtype, offsets=halves[:, None])
    # 0·q + m is m, but for the sign of a zero.
    torch.testing.assert_close(as_offset[:, 7], halves.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_offsets_replace_those_of_the_blocks() -> None:
    blocks, other = random_blocks("Q4_1", 7, 3)[0], torch.randn(7, 3).half()
    expected = dequantize(write_offsets(blocks, "Q4_1", other), "Q4_1", (7, 96))
    assert torch.equal(kernels.dequantize(blocks, "Q4_1", torch.float32, offsets=other), expected)
    own = read_offsets(blocks, "Q4_1")
    assert torch.equal(
        kernels.dequantize(blocks, "Q4_1", torch.float32, offsets=own), dequantize(blocks, "Q4_1", (7, 96))
    )


def test_out_is_filled_and_nothing_beside_it() -> None:
    blocks = random_blocks("Q4_1", 3, 2)[0]
    buffer = torch.full((5, 64), 7.0)
    result = kernels.dequantize(blocks, "Q4_1", torch.float32, out=buffer[1:4])
    assert result.data_ptr() == buffer[1:4].data_ptr()
    assert torch.equal(buffer[1:4], by_reference(blocks, "Q4_1", torch.float32))
    assert (buffer[0] == 7).all()
    assert (buffer[4] == 7).all()


def check_product(result: Tensor, x: Tensor, weight: Tensor) -> None:
    """Against a product in float64, whatever the order of the additions was.

    A sum of n float32 products has an error below (n + 1)·2⁻²⁴ times the sum of their absolute values; rounding the
    result to the type of ``x`` adds half a unit in the last place.
    """
    exact = x.double() @ weight.double().T
    bound = (x.shape[1] + 1) * 2.0**-24 * (x.double().abs() @ weight.double().abs().T)
    bound += torch.finfo(x.dtype).eps / 2 * (exact.abs() + bound)
    assert (result.double() - exact).abs().le(bound).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(name: str, dtype: torch.dtype) -> None:
    count, groups = 37, groups_in(name, 192)
    blocks, constants = random_blocks(name, count, groups)
    inputs = torch.randn(4, groups * FORMATS[name].elements, generator=torch.Generator().manual_seed(2)).to(dtype)
    for tokens, rows in enumerate([None, None, *row_choices(count).values()]):
        x = inputs[: tokens % 5]
        weight = by_reference(blocks, name, torch.float32, rows, constants=constants)
        for result in (
            kernels.linear(x, blocks, name, rows=rows, constants=constants),
            reference.linear(x, blocks, name, rows, None, constants),
        ):
            assert (result.shape, result.dtype) == ((len(x), len(weight)), dtype)
            check_product(result, x, weight)


@pytest.mark.parametrize("rows", [None, torch.randperm(37, generator=torch.Generator().manual_seed(3))])
def test_linear_with_other_offsets(rows: Tensor | None) -> None:
    blocks, offsets = random_blocks("Q4_1", 37, 6)[0], torch.randn(37, 6).half()
    x = torch.randn(3, 192)
    weight = by_reference(blocks, "Q4_1", torch.float32, rows, offsets)
    check_product(kernels.linear(x, blocks, "Q4_1", rows=rows, offsets=offsets), x, weight)


def test_the_number_of_threads_changes_no_bit() -> None:
    blocks, x = random_blocks("Q4_1", 401, 6)[0], torch.randn(2, 192)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((kernels.linear(x, blocks, "Q4_1"), kernels.dequantize(blocks, "Q4_1", torch.bfloat16)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_what_lies_elsewhere_is_refused() -> None:
    """Compiled code would take its address for one of the processor's memory."""
    blocks, offsets, rows = random_blocks("Q4_1", 4, 2)[0], torch.zeros(4, 2).half(), torch.arange(4)
    for wrong in (
        {"rows": rows.to("meta")},
        {"offsets": offsets.to("meta")},
        {"out": torch.empty(4, 64, device="meta")},
    ):
        with pytest.raises(AssertionError):
            kernels.dequantize(blocks, "Q4_1", torch.float32, **wrong)
    with pytest.raises(AssertionError):
        kernels.linear(torch.empty(1, 64, device="meta"), blocks, "Q4_1")


def test_what_torch_makes_by_default_does_not_matter() -> None:
    """Compiled code writes float32 into what it was told is float32."""
    blocks, x = random_blocks("Q4_1", 7, 2)[0], torch.randn(2, 64)
    expected = [kernels.linear(x, blocks, "Q4_1"), reference.linear(x, blocks, "Q4_1", None, None, None)]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = [kernels.linear(x, blocks, "Q4_1"), reference.linear(x, blocks, "Q4_1", None, None, None)]
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_linear_takes_inputs_of_any_kind() -> None:
    blocks = random_blocks("Q4_1", 5, 2)[0]
    weight = by_reference(blocks, "Q4_1", torch.float32)
    x = torch.randn(64, 3)
    check_product(kernels.linear(x.T, blocks, "Q4_1"), x.T, weight)
    with torch.no_grad():
        wanting_gradient = torch.nn.Parameter(x.T.contiguous())
        check_product(kernels.linear(wanting_gradient, blocks, "Q4_1"), x.T, weight)
    with torch.inference_mode():
        check_product(kernels.linear(x.T.contiguous(), blocks, "Q4_1"), x.T, weight)


@pytest.mark.parametrize("name", ["F32", "Q4_1", "Q4_K", "NF4"])
@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_rows_that_are_not_there_are_refused(name: str, wrong: int) -> None:
    """Compiled code would read whatever lies there in memory."""
    blocks = torch.zeros(5, FORMATS[name].nbytes, dtype=torch.uint8)
    rows = torch.tensor([0, wrong, 4])
    with pytest.raises(IndexError, match=f"no row {wrong} in a weight of 5 rows"):
        kernels.dequantize(blocks, name, torch.float32, rows=rows)
    with pytest.raises(IndexError, match=f"no row {wrong} in a weight of 5 rows"):
        kernels.linear(torch.zeros(1, FORMATS[name].elements), blocks, name, rows=rows)


def test_what_does_not_fit_together_is_refused() -> None:
    blocks = random_blocks("Q4_1", 4, 2)[0]
    half = torch.zeros(4, 2, dtype=torch.float16)
    for offsets in (half[:, :1], half[:3], half.float()):
        with pytest.raises(AssertionError):
            kernels.dequantize(blocks, "Q4_1", torch.float32, offsets=offsets)
        with pytest.raises(AssertionError):
            kernels.linear(torch.zeros(1, 64), blocks, "Q4_1", offsets=offsets)
    with pytest.raises(AssertionError):
        kernels.dequantize(random_blocks("Q8_0", 4, 2)[0], "Q8_0", torch.float32, offsets=half)
    with pytest.raises(AssertionError):
        kernels.linear(torch.zeros(1, 32), blocks, "Q4_1")
    with pytest.raises(AssertionError):
        kernels.dequantize(blocks[:, :-1], "Q4_1", torch.float32)
