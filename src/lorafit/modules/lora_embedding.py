"""LoRA on an embedding: the rows of W + s·B A, with W [vocabulary, dim] frozen.

A [rank, dim] starts Gaussian and B [vocabulary, rank] at zero. PEFT keeps the same two transposed, and calls Bᵀ
``lora_embedding_A`` and Aᵀ ``lora_embedding_B``. An output head that is tied to the embedding keeps the frozen W.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafit.config import LoRA
from lorafit.modules.adapter import AdapterModule
from lorafit.modules.packed import embedding_rows


class LoRAEmbedding(AdapterModule):
    """A frozen embedding with a low-rank update: int64 [...] -> [..., dim]. PEFT has no dropout here either.

    Args:
        base: The embedding, packed or not.
        config: Rank and scaling.
    """

    def __init__(self, base: nn.Module, config: LoRA) -> None:
        super().__init__(base)
        self.scale = config.scale
        rows, dim = base.num_embeddings, base.embedding_dim
        assert isinstance(rows, int) and isinstance(dim, int)
        device = next(t.device for t in [*base.buffers(), *base.parameters()])
        self.lora_A = nn.Parameter(torch.randn(config.rank, dim, device=device))
        self.lora_B = nn.Parameter(torch.zeros(rows, config.rank, device=device))

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.detach(), self.lora_B.detach()

    def set_lora_factor(self, part: Literal["A", "B"], value: Tensor) -> None:
        with torch.no_grad():
            (self.lora_A if part == "A" else self.lora_B).copy_(value)

    def delta_weight(self) -> Tensor:
        return self.scale * (self.lora_B.detach() @ self.lora_A.detach())

    def forward(self, ids: Tensor) -> Tensor:
        y = self.base(ids)
        if not self.enabled:
            return y
        h = F.embedding(ids, self.lora_B).to(y.dtype)
        return y + embedding_rows(self.base, (h @ self.lora_A.to(y.dtype)) * self.scale)
