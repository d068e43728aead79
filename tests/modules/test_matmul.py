"""Products in pieces are products."""

import pytest
import torch

from lorafit.modules.matmul import multiply, rows_at_once


@pytest.mark.parametrize(("rows", "inner", "columns"), [(784, 32, 24), (513, 32, 24), (400, 2048, 8), (5, 32, 24)])
def test_pieces_are_put_together(rows: int, inner: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right, before = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, inner), (inner, columns), (rows, columns))
    )
    expected = left @ right
    # Sums of float64 in another order.
    torch.testing.assert_close(multiply(left, right), expected, rtol=1e-12, atol=1e-12)
    out = torch.full_like(expected, torch.nan)
    assert multiply(left, right, out=out) is out
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    total = before.clone()
    assert multiply(left, right, added_to=total) is total
    torch.testing.assert_close(total, before + expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "together"),
    [
        (512, 576, 576, 512),
        (784, 576, 576, 400),  # two pieces of like size, of whole tiles of 16 rows
        (1200, 576, 576, 400),
        (1280, 576, 576, 1280),
        (784, 3072, 576, 272),
        (784, 576, 960, 784),
        (784, 576, 3072, 784),
        (0, 576, 576, 1),
    ],
)
def test_only_narrow_products_of_some_hundred_rows_are_cut(rows: int, inner: int, columns: int, together: int) -> None:
    assert rows_at_once(rows, inner, columns) == together
