"""Random rounding onto a grid that is there already: right on average, and never far."""

import gguf
import pytest
import torch
from torch import Tensor

from lorafit.errors import FormatError
from lorafit.formats import block_format, quantize
from lorafit.kernels.dither import DITHERED, dither

FORMATS = sorted(DITHERED)
# Bytes of a block that are neither integers nor an offset that takes the mean: what must not change.
GRID = {name: (0, 16) if name in ("Q4_K", "Q5_K") else (192, 210) if name == "Q6_K" else (0, 2) for name in FORMATS}


def by_gguf_py(blocks: Tensor, name: str) -> Tensor:
    kind = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind).copy())


def fine_tuned(name: str, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks, the weights that they stand for, and an update of rank 8 with this root mean square."""
    draw = torch.Generator().manual_seed(0)
    blocks = quantize(torch.randn(256, 512, generator=draw), name).blocks
    update = torch.randn(256, 8, generator=draw) @ torch.randn(8, 512, generator=draw) * (size / 8**0.5)
    return blocks, by_gguf_py(blocks, name), update


@pytest.mark.parametrize("name", FORMATS)
def test_what_lies_on_the_grid_stays(name: str) -> None:
    blocks, weights, _ = fine_tuned(name, 0.0)
    # Sums in float32 may put a weight a hair below its place, which one draw in a hundred thousand then rounds down.
    same = by_gguf_py(dither(weights, blocks, name), name) == weights
    assert same.double().mean() > 0.9999


@pytest.mark.parametrize("name", FORMATS)
def test_the_update_survives(name: str) -> None:
    blocks, weights, update = fine_tuned(name, 0.01)
    moved = by_gguf_py(dither(weights + update, blocks, name), name) - weights
    kept = (moved * update).sum() / update.square().sum()
    # A grid's ends cut what goes beyond: one weight in sixteen or fewer, half of the time. The noise on this share is a
    # step (0.3 at most) by 0.01, divided by the root of 131,072 weights, and smaller in most places: below 0.03.
    assert 0.92 < kept < 1.05
    lost = by_gguf_py(quantize(weights + update, name).blocks, name) - weights
    if name != "Q8_0":  # whose steps are not much larger than the update
        assert (lost * update).sum() / update.square().sum() < 0.5


@pytest.mark.parametrize("name", FORMATS)
def test_each_weight_goes_to_a_neighbour_and_the_grid_stays(name: str) -> None:
    blocks, weights, update = fine_tuned(name, 0.002)
    found = dither(weights + update, blocks, name)
    block = block_format(name)
    before, after = (each.view(-1, block.nbytes) for each in (blocks, found))
    start, end = GRID[name]
    assert torch.equal(before[:, start:end], after[:, start:end])
    # The differences between weights with one scale are whole numbers of steps.
    part = 16 if name == "Q6_K" else 32
    ordered = weights.view(-1, part).sort(1).values
    gaps = ordered.diff(dim=1)
    step = torch.where(gaps > 1e-5, gaps, torch.inf).amin(1, keepdim=True)  # one step, or a multiple of it
    error = (by_gguf_py(found, name) - weights - update).view(-1, part).abs()
    # But for the ends, where as much is lost as the update goes beyond (0.03 at most), and offsets in half precision.
    assert bool((error <= step * 1.001 + 0.04).all())
    if block.offset_at is not None:
        offsets = [each[:, 2:4].contiguous().view(torch.float16).float() for each in (before, after)]
        means = update.view(-1, 32).mean(1, keepdim=True)
        # Half precision of offsets above 2 and below 4 has steps of 2^-9: half of one is lost.
        assert bool(((offsets[1] - offsets[0] - means).abs() <= 2.0**-10 + 1e-6)[offsets[0] > -3.9].all())


@pytest.mark.parametrize("name", FORMATS)
def test_the_bits_do_not_depend_on_how_a_tensor_is_cut(name: str) -> None:
    blocks, weights, update = fine_tuned(name, 0.02)
    whole = dither(weights + update, blocks, name)
    parts = [
        dither((weights + update)[rows], blocks[rows], name, rows.start) for rows in (slice(0, 100), slice(100, 256))
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole[100:], dither((weights + update)[100:], blocks[100:], name))


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K"])
def test_blocks_without_a_step_stay(name: str) -> None:
    blocks = quantize(torch.zeros(2, 256), name).blocks
    assert torch.equal(by_gguf_py(dither(torch.zeros(2, 256), blocks, name), name), torch.zeros(2, 256))


@pytest.mark.parametrize("name", FORMATS)
def test_what_outgrows_its_grid_gets_another(name: str) -> None:
    blocks, weights, _ = fine_tuned(name, 0.0)
    weights[3] *= 5
    error = by_gguf_py(dither(weights, blocks, name), name) - weights
    # Half a step of the wider grid: 5 times 3 or 4 to either side, in 15 steps.
    assert float(error[3].abs().max()) < 1.5


def test_what_is_no_number_is_refused() -> None:
    blocks = quantize(torch.zeros(1, 32), "Q4_1").blocks
    with pytest.raises(FormatError, match="NaN or infinite"):
        dither(torch.full((1, 32), torch.nan), blocks, "Q4_1")
