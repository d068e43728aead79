"""Different adapters for different rows of one batch: y_i = W x_i + s_j·B_j (A_j x_i), where row i has the adapter j.

The product with the frozen weight, which is nearly all of the work, is one for the whole batch. The factors of the
adapters are stacked, filled up by zeros to the largest rank, and picked for each row; two batched products add the
updates. A row without an adapter, or whose adapter leaves this layer alone, picks zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lorafit.errors import AdapterError
from lorafit.modules.adapter import AdapterModule
from lorafit.modules.lora import LoRALinear


class LoRARows(AdapterModule):
    """A frozen linear layer with another update for each row: [rows, tokens, in_dim] -> [rows, tokens, out_dim].

    Args:
        base: The layer.
        adapters: What stands in for it, by adapter; they are used, not owned.
        rows: For each row of a batch, which of these; None for the layer alone.
    """

    def __init__(self, base: nn.Module, adapters: Sequence[LoRALinear], rows: Sequence[int | None]) -> None:
        super().__init__(base)
        self.adapters = tuple(adapters)
        device = adapters[0].lora_A.device
        # Behind the last adapter lie the zeros.
        self.rows = torch.tensor([len(adapters) if row is None else row for row in rows], device=device)
        self._stacked: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        if x.dim() != 3 or len(x) != len(self.rows):
            raise AdapterError(
                f"adapters were named for {len(self.rows)} rows, but a layer got a batch of the shape {list(x.shape)}; "
                "name one for each row, and for each beam or sequence of a row"
            )
        a, b = self._factors(x.dtype)
        return torch.baddbmm(self.base(x), x @ a[self.rows].mT, b[self.rows].mT)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [adapters + 1, rank, in_dim] and s·B [adapters + 1, out_dim, rank]; kept from one call to the next."""
        if self._stacked is not None and self._stacked[0].dtype == dtype and not torch.is_grad_enabled():
            return self._stacked
        rank = max(len(adapter.lora_A) for adapter in self.adapters)
        a = [pad(each.lora_A, (0, 0, 0, rank - len(each.lora_A))) for each in self.adapters]
        b = [pad(each.lora_B * each.scale, (0, rank - len(each.lora_A))) for each in self.adapters]
        stacked = (
            torch.stack([*a, torch.zeros_like(a[0])]).to(dtype),
            torch.stack([*b, torch.zeros_like(b[0])]).to(dtype),
        )
        # With gradients the factors are being trained, and these are of this step only.
        self._stacked = None if torch.is_grad_enabled() else stacked
        return stacked

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        self._refuse()

    def set_lora_factor(self, part: Literal["A", "B"], value: Tensor) -> None:
        self._refuse()

    def delta_weight(self) -> Tensor:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise AdapterError("rows have different adapters here; leave the context in which they do, and use one of them")
