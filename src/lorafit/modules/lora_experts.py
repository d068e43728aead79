"""LoRA on the experts of a layer: one A and one B for each expert, stored as PEFT stores them.

PEFT adapts a parameter of three dimensions (``target_parameters``) by a LoRA for each of its E matrices, all of one
rank r, and keeps them in two matrices: A [E·r, in_dim], whose row e·r + i is row i of expert e, and B [out_dim, r·E],
whose column i·E + e is column i of expert e. In memory an expert's factors lie together: A [E, r, in_dim] and
B [E, out_dim, r].

For each expert A starts uniform within 1/√in_dim and B at zero, as in ``lorafit.modules.lora``. Dropout on the input
would leave the form that PEFT can train, W + s·B A, so there is none.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorafit.config import LoRA
from lorafit.modules.adapter import AdapterModule
from lorafit.modules.experts import ExpertStack
from lorafit.modules.packed import chooses_type
from lorafit.modules.routing import Routing


class LoRAExperts(AdapterModule):
    """A frozen stack of experts with a low-rank update beside each; takes and gives what the stack does.

    Args:
        base: The stack.
        config: Rank and scaling.
    """

    base: ExpertStack

    def __init__(self, base: ExpertStack, config: LoRA) -> None:
        super().__init__(base)
        assert not config.dropout, "checked where adapters are attached"
        self.scale = config.scale
        device = next(t.device for t in [*base.buffers(), *base.parameters()])
        self.lora_A = nn.Parameter(torch.empty(base.experts, config.rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.experts, self.out_features, config.rank, device=device))
        nn.init.uniform_(self.lora_A, -(self.in_features**-0.5), self.in_features**-0.5)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """As PEFT stores them: A [E·rank, in_dim] and B [out_dim, rank·E]."""
        return self.lora_A.detach().flatten(0, 1), self.lora_B.detach().permute(1, 2, 0).flatten(1)

    def set_lora_factor(self, part: Literal["A", "B"], value: Tensor) -> None:
        experts, rank = self.lora_A.shape[:2]
        with torch.no_grad():
            if part == "A":
                self.lora_A.copy_(value.view(experts, rank, -1))
            else:
                self.lora_B.copy_(value.view(-1, rank, experts).permute(2, 0, 1))

    def delta_weight(self) -> Tensor:
        """The scaled update of all experts, [E, out_dim, in_dim] float32."""
        return self.scale * torch.bmm(self.lora_B.detach(), self.lora_A.detach())

    def merged_expert(self, expert: int, base: Tensor) -> Tensor:
        """As ``merged_weight``, for the matrix of one expert, [out_dim, in_dim] float32."""
        return base + self.scale * (self.lora_B[expert].detach() @ self.lora_A[expert].detach())

    @chooses_type
    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        if not self.enabled:
            return self.base(x, routing)
        if torch.is_grad_enabled():
            return _LoRAExperts.apply(x, self.lora_A, self.lora_B, self.scale, self.base, routing)

        def product(rows: Tensor, expert: int, _: slice) -> Tensor:
            h = rows @ self.lora_A[expert].T.to(x.dtype)
            return self.base.product(rows, expert, routing) + (h * self.scale) @ self.lora_B[expert].T.to(x.dtype)

        return routing.apply(product, x, self.out_features, sums=self.base.sums)


class _LoRAExperts(torch.autograd.Function):
    """y = W x + s·B(A x), expert by expert; what is kept for the backward pass is x and h = A x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, stack: ExpertStack, routing: Routing
    ) -> Tensor:
        h = x.new_empty(len(routing.tokens), a.shape[1])

        def product(rows: Tensor, expert: int, slots: slice) -> Tensor:
            torch.mm(rows, a[expert].T.to(x.dtype), out=h[slots])
            y = rows @ stack.dense(expert, x.dtype).T
            return y.addmm_(h[slots], b[expert].T.to(x.dtype), alpha=scale)

        y = routing.apply(product, x, stack.out_features, sums=stack.sums)
        ctx.save_for_backward(x, h, a, b)
        ctx.scale, ctx.stack, ctx.routing = scale, stack, routing
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b = ctx.saved_tensors
        scale, stack, routing = ctx.scale, ctx.stack, ctx.routing
        da, db = torch.zeros_like(a), torch.zeros_like(b)  # an expert without a token gets no gradient

        def product(dy: Tensor, expert: int, slots: slice) -> Tensor:
            dh = (dy @ b[expert].to(dy.dtype)).mul_(scale)
            da[expert] = dh.T @ routing.rows(x, slots, sums=stack.sums)
            db[expert] = (h[slots].T @ dy).T * scale
            dx = dy @ stack.dense(expert, dy.dtype)
            return dx.addmm_(dh, a[expert].to(dy.dtype))

        dx = routing.apply(product, grads[0], stack.in_features, sums=not stack.sums)
        return dx, da, db, None, None, None
