"""Operations on packed weights: the compiled backend against the readable one, and both against plain arithmetic."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lorafit import kernels
from lorafit.formats import FORMATS, dequantize, read_offsets, write_offsets
from lorafit.kernels import reference
from tests.oracles.blocks import random_blocks as sane_blocks

PACKED = ["Q4_1", "Q8_0"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def random_blocks(name: str, rows: int, groups: int, seed: int = 0) -> Tensor:
    """Random bytes, so that scales are of all sizes, denormal, infinite and NaN: uint8 [rows, row_bytes]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (rows, groups * FORMATS[name].nbytes), dtype=torch.uint8, generator=generator)


def tame_blocks(name: str, rows: int, groups: int, seed: int = 0) -> Tensor:
    """Random blocks whose scales and offsets are of ordinary size."""
    blocks = random_blocks(name, rows, groups, seed)
    of_blocks = blocks.view(rows, groups, -1)
    generator = torch.Generator().manual_seed(seed)
    for at in FORMATS[name].floats:
        halves = torch.randn(rows, groups, 1, generator=generator).half()
        of_blocks[..., at : at + 2] = halves.view(torch.uint8)
    return blocks


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


def assert_same_bits(result: Tensor, expected: Tensor) -> None:
    """Equal to the last bit, the sign of zeros included; which NaN it is does not matter."""
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    nan = expected.isnan()
    assert torch.equal(result.isnan(), nan)
    integer = {4: torch.int32, 2: torch.int16}[expected.itemsize]
    assert torch.equal(result.view(integer)[~nan], expected.view(integer)[~nan])


def by_reference(
    blocks: Tensor, name: str, dtype: torch.dtype, rows: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    count = len(blocks) if rows is None else len(rows)
    out = torch.empty(count, blocks.shape[1] // FORMATS[name].nbytes * FORMATS[name].elements, dtype=dtype)
    reference.dequantize(blocks, name, rows, offsets, None, out)
    return out


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_dequantize_is_the_format_rounded_once(name: str, dtype: torch.dtype) -> None:
    blocks, constants = sane_blocks(name, 5, 6)
    result = kernels.dequantize(blocks, name, dtype, constants=constants)
    assert_same_bits(result.float(), dequantize(blocks, name, result.shape, constants).to(dtype).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("count", [1, 3, 37])
@pytest.mark.parametrize("choice", row_choices(1))
def test_compiled_dequantize_equals_the_reference(name: str, dtype: torch.dtype, count: int, choice: str) -> None:
    assert kernels.fuses_linear(torch.empty(0, dtype=torch.uint8), name), "the compiled backend is not in use"
    rows = row_choices(count)[choice]
    for groups in (1, 5):
        blocks = random_blocks(name, count, groups, seed=groups)
        assert_same_bits(kernels.dequantize(blocks, name, dtype, rows=rows), by_reference(blocks, name, dtype, rows))
        if FORMATS[name].offset_at is None:
            continue
        shape = (count if rows is None else len(rows), groups)
        offsets = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.float16)
        assert_same_bits(
            kernels.dequantize(blocks, name, dtype, rows=rows, offsets=offsets),
            by_reference(blocks, name, dtype, rows, offsets),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_half_precision_number_as_scale_and_as_offset(dtype: torch.dtype) -> None:
    """All 65,536 of them: denormals, infinities, ties in rounding, and the NaN whose bits are all ones."""
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    blocks = torch.zeros(len(halves), 20, dtype=torch.uint8)
    blocks[:, 0:2] = halves[:, None].view(torch.uint8)
    blocks[:, 4:] = torch.arange(16, dtype=torch.uint8)
    assert_same_bits(kernels.dequantize(blocks, "Q4_1", dtype), by_reference(blocks, "Q4_1", dtype))
    blocks = write_offsets(blocks.roll(9973, 0), "Q4_1", halves[:, None])
    assert_same_bits(kernels.dequantize(blocks, "Q4_1", dtype), by_reference(blocks, "Q4_1", dtype))
    zero = torch.zeros(len(halves), 20, dtype=torch.uint8)
    as_offset = kernels.dequantize(zero, "Q4_1", dtype, offsets=halves[:, None])
    # 0·q + m is m, but for the sign of a zero.
    torch.testing.assert_close(as_offset[:, 7], halves.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_offsets_replace_those_of_the_blocks() -> None:
    blocks, other = tame_blocks("Q4_1", 7, 3), torch.randn(7, 3).half()
    expected = dequantize(write_offsets(blocks, "Q4_1", other), "Q4_1", (7, 96))
    assert torch.equal(kernels.dequantize(blocks, "Q4_1", torch.float32, offsets=other), expected)
    own = read_offsets(blocks, "Q4_1")
    assert torch.equal(
        kernels.dequantize(blocks, "Q4_1", torch.float32, offsets=own), dequantize(blocks, "Q4_1", (7, 96))
    )


def test_out_is_filled_and_nothing_beside_it() -> None:
    blocks = tame_blocks("Q4_1", 3, 2)
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


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(name: str, tokens: int, threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(threads)
    count, groups = 37, 6
    blocks = tame_blocks(name, count, groups)
    x = torch.randn(tokens, groups * 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    for choice, rows in row_choices(count).items():
        if choice == "int32":
            continue  # another compilation, and dequantize has shown that the type does not matter
        weight = by_reference(blocks, name, torch.float32, rows)
        result = kernels.linear(x, blocks, name, rows=rows)
        assert (result.shape, result.dtype) == ((tokens, len(weight)), dtype)
        check_product(result, x, weight)
        slow = reference.linear(x, blocks, name, rows, None, None)
        assert (slow.shape, slow.dtype) == ((tokens, len(weight)), dtype)
        check_product(slow, x, weight)


@pytest.mark.parametrize("rows", [None, torch.randperm(37, generator=torch.Generator().manual_seed(3))])
def test_linear_with_other_offsets(rows: Tensor | None) -> None:
    blocks, offsets = tame_blocks("Q4_1", 37, 6), torch.randn(37, 6).half()
    x = torch.randn(3, 192)
    weight = by_reference(blocks, "Q4_1", torch.float32, rows, offsets)
    check_product(kernels.linear(x, blocks, "Q4_1", rows=rows, offsets=offsets), x, weight)


def test_the_number_of_threads_changes_no_bit() -> None:
    blocks, x = tame_blocks("Q4_1", 101, 6), torch.randn(2, 192)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((kernels.linear(x, blocks, "Q4_1"), kernels.dequantize(blocks, "Q4_1", torch.bfloat16)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_linear_takes_inputs_of_any_kind() -> None:
    blocks = tame_blocks("Q4_1", 5, 2)
    weight = by_reference(blocks, "Q4_1", torch.float32)
    x = torch.randn(64, 3)
    check_product(kernels.linear(x.T, blocks, "Q4_1"), x.T, weight)
    with torch.no_grad():
        wanting_gradient = torch.nn.Parameter(x.T.contiguous())
        check_product(kernels.linear(wanting_gradient, blocks, "Q4_1"), x.T, weight)
    with torch.inference_mode():
        check_product(kernels.linear(x.T.contiguous(), blocks, "Q4_1"), x.T, weight)


@pytest.mark.parametrize("name", sorted(FORMATS))
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
    blocks = tame_blocks("Q4_1", 4, 2)
    half = torch.zeros(4, 2, dtype=torch.float16)
    for offsets in (half[:, :1], half[:3], half.float()):
        with pytest.raises(AssertionError):
            kernels.dequantize(blocks, "Q4_1", torch.float32, offsets=offsets)
        with pytest.raises(AssertionError):
            kernels.linear(torch.zeros(1, 64), blocks, "Q4_1", offsets=offsets)
    with pytest.raises(AssertionError):
        kernels.dequantize(tame_blocks("Q8_0", 4, 2), "Q8_0", torch.float32, offsets=half)
    with pytest.raises(AssertionError):
        kernels.linear(torch.zeros(1, 32), blocks, "Q4_1")
    with pytest.raises(AssertionError):
        kernels.dequantize(blocks[:, :-1], "Q4_1", torch.float32)


def in_a_new_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_numba_everything_works() -> None:
    code = """
import sys
sys.modules["numba"] = None  # makes every import of it fail
import torch
from lorafit import kernels
blocks = torch.arange(120, dtype=torch.uint8).view(3, 40)
assert not kernels.fuses_linear(blocks, "Q4_1")
rows, x = torch.tensor([2, 0, 1]), torch.ones(2, 64)
weight = kernels.dequantize(blocks, "Q4_1", torch.bfloat16, rows=rows)
assert "llvmlite" not in sys.modules
torch.testing.assert_close(kernels.linear(x, blocks, "Q4_1", rows=rows), x @ weight.float().T, rtol=2**-8, atol=0)
print(weight.float().sum().item())
"""
    blocks = torch.arange(120, dtype=torch.uint8).view(3, 40)
    expected = kernels.dequantize(blocks, "Q4_1", torch.bfloat16, rows=torch.tensor([2, 0, 1])).float().sum().item()
    assert float(in_a_new_process(code)) == expected


def test_compiles_where_no_cache_can_be_written() -> None:
    code = """
import torch
from lorafit import kernels
blocks = torch.zeros(1, 20, dtype=torch.uint8)
assert kernels.fuses_linear(blocks, "Q4_1")
print(kernels.dequantize(blocks, "Q4_1", torch.float32).sum().item())
"""
    # The only place that numba may try is one that nobody named.
    said = in_a_new_process(code, NUMBA_CACHE_DIR="", NUMBA_CACHE_LOCATOR_CLASSES="UserProvidedCacheLocator")
    assert float(said) == 0.0
