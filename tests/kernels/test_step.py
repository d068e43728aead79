"""Element-wise operations of a step against the same formulas in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorafit.kernels import step

pytestmark = pytest.mark.skipif(not step.is_available(), reason="no vector code for this processor")

# One rounding of the result is half a unit in the last place: 2^-9 of it in bfloat16. In float32 it is 2^-24, and sums
# over a row and the exponential, off by 2e-7, add to it.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float32: 3e-6}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
}


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def close(found: Tensor, expected: Tensor, least: float = 1e-3) -> None:
    """Each element to a tolerance of its own size; what is small beside the others, to one of ``least``."""
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * least)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 64), (300, 576)])
def test_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    x, dy = random(rows, width, dtype=dtype, scale=3), random(rows, width, dtype=dtype, seed=1)
    factors = random(width, dtype=torch.float32, seed=2)
    y, inverse = step.norm(x, factors, 1e-5)
    exact = x.double().requires_grad_()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * factors.double()
    close(y, expected.detach())
    expected.backward(dy.double())
    assert exact.grad is not None
    close(step.norm_backward(dy, x, factors, inverse), exact.grad, least=1.0)
    beside = random(rows, width, dtype=dtype, scale=5, seed=3)
    close(step.norm_backward(dy, x, factors, inverse, added=beside), exact.grad + beside.double(), least=1.0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(dtype: torch.dtype, activation: str) -> None:
    gate, up, dy = (random(40, 96, dtype=dtype, scale=4, seed=seed) for seed in range(3))
    gate[0, :4] = torch.tensor([0.0, -60.0, 80.0, 1e4]).to(dtype)
    exact = gate.double().requires_grad_(), up.double().requires_grad_()
    expected = ACTIVATIONS[activation](exact[0]) * exact[1]
    close(step.gated(gate, up, activation), expected.detach())
    grads = torch.autograd.grad(expected, exact, dy.double())
    found = step.gated_backward(dy, gate, up, activation)
    for half, grad in zip(found.chunk(2, 1), grads, strict=True):
        # Where the slope crosses zero two large terms cancel.
        close(half, grad, least=20.0)
    out, again = torch.empty_like(found), torch.empty_like(gate)
    assert torch.equal(step.gated_backward(dy, gate, up, activation, out=out, again=again), found)
    assert torch.equal(again, step.gated(gate, up, activation))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group", [16, 32, 64])
def test_group_sums(dtype: torch.dtype, group: int) -> None:
    x = random(33, 192, dtype=dtype)
    close(step.group_sums(x, group), x.double().unflatten(1, (-1, group)).sum(-1), least=10.0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [16, 4096])
def test_cross_entropy(dtype: torch.dtype, width: int) -> None:
    logits = random(40, width, dtype=dtype, scale=6)
    logits[0, 3] = 300.0  # sure of it
    targets = torch.randint(width, (40,), generator=torch.Generator().manual_seed(1))
    targets[0] = 3
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    assert exact.grad is not None
    found = step.cross_entropy_(logits, targets)
    # The sum and the logarithm are in float32 whatever the logits are.
    torch.testing.assert_close(found.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    close(logits, exact.grad)
    with pytest.raises(IndexError, match=f"below {width}"):
        step.cross_entropy_(logits, targets + width)


def test_what_is_no_number_stays_none() -> None:
    x = random(3, 32, dtype=torch.float32)
    x[1, 7] = torch.nan
    other = random(3, 32, dtype=torch.float32, seed=1)
    for y in (step.norm(x, torch.ones(32), 1e-5)[0], step.norm_backward(x, other, torch.ones(32), torch.ones(3))):
        assert y.isnan().all(-1).tolist() == [False, True, False]
    for y in (
        step.gated(x, other, "silu"),
        step.gated(other, x, "gelu"),
        *step.gated_backward(other, x, x, "silu").chunk(2, 1),
    ):
        assert y.isnan().nonzero().tolist() == [[1, 7]]
    losses = step.cross_entropy_(x.clone(), torch.tensor([5, 5, 5]))
    assert losses.isnan().tolist() == [False, True, False]
    assert step.group_sums(x, 16).isnan().nonzero().tolist() == [[1, 0]]
    half = x.to(torch.bfloat16)
    assert step.gated(half, half, "silu").isnan().nonzero().tolist() == [[1, 7]]


def test_documents_of_like_length_lie_side_by_side() -> None:
    lengths = (5, 300, 61, 64, 40, 290)
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    batches = step.side_by_side(lengths)
    where = {
        int(start): int(length) for batch in batches for start, length in zip(batch.starts, batch.lengths, strict=True)
    }
    assert where == dict(zip(starts, lengths, strict=True))
    # 5 is too short to be padded to 64: that is more than a quarter above the 32 that it is padded to alone.
    assert [batch.padded for batch in batches] == [320, 64, 32]
    assert all(batch.padded % 32 == 0 and batch.padded >= int(batch.lengths.max()) for batch in batches)


def test_documents_that_need_much_padding_lie_side_by_side_too() -> None:
    """98 tokens are padded to 128, more than a quarter, with company or without."""
    (batch,) = step.side_by_side((98, 97, 98, 102))
    assert batch.padded == 128
    assert batch.lengths.tolist() == [102, 98, 98, 97]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("turned", [0, 32, 64])
def test_heads_are_rotated_and_go_back(dtype: torch.dtype, turned: int) -> None:
    lengths, heads, dim = (3, 40, 33), 2, 64
    total = sum(lengths)
    tokens = random(total, heads * dim, dtype=dtype)
    angles = None
    expected = tokens.double().view(total, heads, dim).clone()
    if turned:
        angle = torch.rand(total, turned // 2, generator=torch.Generator().manual_seed(3)) * 6
        angles = tuple(torch.cat((part, part), -1).to(dtype) for part in (angle.cos(), angle.sin()))
        part = expected[..., :turned]
        flipped = torch.cat((-part[..., turned // 2 :], part[..., : turned // 2]), -1)
        expected[..., :turned] = part * angles[0].double()[:, None] + flipped * angles[1].double()[:, None]
    back = torch.full_like(tokens, torch.nan)
    for batch in step.side_by_side(lengths):
        places = step.pack_heads(tokens, batch, heads, angles)
        for number, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
            close(places[number, :, :length], expected[start : start + length].transpose(0, 1), least=1.0)
            assert not places[number, :, length:].count_nonzero()
        step.unpack_heads(places, batch, angles, back)
    # Turned and turned back, with two roundings of coordinates up to 4.
    torch.testing.assert_close(back.double(), tokens.double(), rtol=0, atol=4 * 3 * TOLERANCE[dtype])
