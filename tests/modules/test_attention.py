"""Attention over packed documents against the formula, document by document, in float64."""

import pytest
import torch
from torch import Tensor

from lorafit.kernels import step
from lorafit.modules.attention import Attention, attend

pytestmark = pytest.mark.skipif(not step.is_available(), reason="no vector code for this processor")

HEADS, KEY_HEADS, DIM = 6, 2, 32
SCALE = 0.17


def formula(
    q: Tensor, k: Tensor, v: Tensor, angles: tuple[Tensor, Tensor] | None, lengths: tuple[int, ...], window: int | None
) -> Tensor:
    results = []
    at = 0
    for length in lengths:
        here = slice(at, at + length)
        at += length
        parts = [x[here].unflatten(1, (-1, DIM)).transpose(0, 1) for x in (q, k, v)]
        if angles is not None:
            cos, sin = (each[here] for each in angles)
            half = DIM // 2
            parts[:2] = [x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin for x in parts[:2]]
        query, key, value = parts[0], *(x.repeat_interleave(HEADS // KEY_HEADS, 0) for x in parts[1:])
        place = torch.arange(length)
        hidden = place[None] > place[:, None]
        if window is not None:
            hidden |= place[None] <= place[:, None] - window
        scores = (query @ key.transpose(1, 2) * SCALE).masked_fill(hidden, -torch.inf)
        results.append((scores.softmax(-1) @ value).transpose(0, 1).flatten(1))
    return torch.cat(results)


@pytest.mark.parametrize("lengths", [(1,), (7, 33, 64, 30), (600,), (40, 777, 513)])
@pytest.mark.parametrize("window", [None, 1, 50, 300])
@pytest.mark.parametrize("rotated", [True, False])
def test_values_and_gradients(lengths: tuple[int, ...], window: int | None, rotated: bool) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    q, k, v = (torch.randn(total, heads * DIM, requires_grad=True) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    out = torch.randn(total, HEADS * DIM)
    angle = torch.rand(total, DIM // 2) * 6
    angles = tuple(torch.cat((part, part), -1) for part in (angle.cos(), angle.sin())) if rotated else None
    documents = step.side_by_side(lengths)
    found = attend(q, k, v, Attention(angles, documents, DIM, SCALE, window))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wide = None if angles is None else tuple(each.double() for each in angles)
    expected = formula(*exact, wide, lengths, window)
    # float32 throughout; up to 777 terms, sums of which are rounded in their own order.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)
    grads = torch.autograd.grad(found, (q, k, v), out)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, exact, out.double()), strict=True):
        torch.testing.assert_close(grad.double(), wanted, rtol=0, atol=5e-6 * float(wanted.abs().max()))


def test_bfloat16_is_as_good_as_its_roundings() -> None:
    torch.manual_seed(0)
    lengths = (70, 61, 600)
    total = sum(lengths)
    q, k, v = (torch.randn(total, heads * DIM).bfloat16().requires_grad_() for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    out = torch.randn(total, HEADS * DIM).bfloat16()
    found = attend(q, k, v, Attention(None, step.side_by_side(lengths), DIM, SCALE))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = formula(*exact, None, lengths, None)
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, (q, k, v), out), torch.autograd.grad(expected, exact, out.double()), strict=True
    )
    for one, other in pairs:
        # Scores and shares are rounded to 2^-9 of themselves; measured: 3e-3 to 6e-3 of the whole.
        assert float((one.detach().double() - other).norm() / other.norm()) < 1e-2


def test_a_score_that_is_no_number_is_seen() -> None:
    q, k, v = (torch.randn(40, heads * DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    k[10, 0] = torch.nan
    found = attend(q, k, v, Attention(None, step.side_by_side((20, 20)), DIM, SCALE))
    assert found[10:20, :DIM].isnan().all()
    assert not found[:10].isnan().any()
    assert not found[20:].isnan().any()
