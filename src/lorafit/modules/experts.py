"""Mixture-of-experts layers whose experts stay packed.

A router sends each token to k of E experts, each a gated MLP of its own, and adds up what they say (Qwen3-MoE, arXiv
2505.09388, after arXiv 2401.06066):

    y = Σₑ wₑ · Dₑ (act(Gₑ x) ∘ Uₑ x)        over the k experts e of the token x

transformers fuses the experts of a layer into two tensors, ``gate_up_proj`` [E, 2I, H], in which G stands above U, and
``down_proj`` [E, H, I]. GGUF keeps three: ``ffn_gate_exps`` and ``ffn_up_exps`` [E, I, H], ``ffn_down_exps`` [E, H, I].
Here each of transformers' two tensors is a stack of matrices, a module, and so what an adapter can stand in for.

Each expert that has a token is unpacked once, multiplied with its tokens, and forgotten, in the backward pass again.
Nothing as large as the hidden states of each token k times is ever made: ``gate_up_proj`` takes its rows from the
tokens expert by expert, ``down_proj`` adds its rows to the tokens likewise (``lorafit.modules.routing``). For that the
router's weight w goes to the input of D, which is linear, so that its gradient needs no output of D either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafit import kernels
from lorafit.modules.packed import FUSED_TOKENS, PackedWeight, chooses_type, scratch
from lorafit.modules.routing import Routing


class ExpertStack(nn.Module, ABC):
    """One frozen matrix [out_dim, in_dim] for each expert of a layer, and the product with all of them.

    Args:
        experts: Number of experts E.
        out_features: Width of what an expert gives.
        in_features: Width of what an expert takes.
        sums: Whether results are added up over the experts of a token, [slots, in_dim] -> [tokens, out_dim];
            otherwise an expert takes its tokens' rows, [tokens, in_dim] -> [slots, out_dim].
    """

    def __init__(self, experts: int, out_features: int, in_features: int, *, sums: bool) -> None:
        super().__init__()
        self.experts = experts
        self.out_features = out_features
        self.in_features = in_features
        self.sums = sums

    @property
    @abstractmethod
    def format_name(self) -> str:
        """What the weights are packed in, or their type."""

    @abstractmethod
    def dense(self, expert: int, dtype: torch.dtype) -> Tensor:
        """An expert's matrix [out_dim, in_dim], valid until the next one is asked for."""

    def product(self, x: Tensor, expert: int, routing: Routing) -> Tensor:
        """x·Wᵀ for the matrix of an expert, without a gradient: [n, in_dim] -> [n, out_dim]."""
        return x @ self.dense(expert, x.dtype).T

    @chooses_type
    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _FrozenExperts.apply(x, self, routing)

        def product(rows: Tensor, expert: int, _: slice) -> Tensor:
            return self.product(rows, expert, routing)

        return routing.apply(product, x, self.out_features, sums=self.sums)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, out_features={self.out_features}, in_features={self.in_features}"


class PackedExperts(ExpertStack):
    """Experts over packed blocks.

    Args:
        matrices: For each expert its matrix, as one or more packed ones that stand above one another. A file's tensor
            of all experts is cut into views, one for each of them.
        sums: See ``ExpertStack``.
    """

    def __init__(self, matrices: Sequence[Sequence[PackedWeight]], *, sums: bool) -> None:
        first = matrices[0]
        assert all([part.shape for part in parts] == [part.shape for part in first] for parts in matrices)
        assert len({part.shape[1] for part in first}) == 1, "parts of one matrix"
        super().__init__(len(matrices), sum(part.shape[0] for part in first), first[0].shape[1], sums=sums)
        self.parts = nn.ModuleList(part for parts in matrices for part in parts)

    @property
    def format_name(self) -> str:
        return "+".join(dict.fromkeys(part.format_name for part in self.parts))  # type: ignore[misc]

    def dense(self, expert: int, dtype: torch.dtype) -> Tensor:
        parts = self.matrix(expert)
        out = scratch((self.out_features, self.in_features), dtype, parts[0].blocks.device)
        for part, piece in zip(parts, out.split([part.shape[0] for part in parts]), strict=True):
            kernels.dequantize(
                part.blocks, part.format_name, dtype, rows=part.rows, constants=part.constants, out=piece
            )
        return out

    def product(self, x: Tensor, expert: int, routing: Routing) -> Tensor:
        parts = self.matrix(expert)
        # By the number of all tokens: in a longer text an expert that gets few is to compute as it does in training.
        few = routing.token_count <= FUSED_TOKENS
        if not few or not all(kernels.fuses_linear(part.blocks, part.format_name) for part in parts):
            return super().product(x, expert, routing)
        return torch.cat([part.product(x) for part in parts], dim=-1)

    def matrix(self, expert: int) -> list[PackedWeight]:
        """What an expert's matrix is made of, from top to bottom."""
        count = len(self.parts) // self.experts
        return [self.parts[i] for i in range(expert * count, (expert + 1) * count)]  # type: ignore[misc]


class DenseExperts(ExpertStack):
    """Experts of a base that is not packed.

    Args:
        weight: [E, out_dim, in_dim].
        sums: See ``ExpertStack``.
    """

    def __init__(self, weight: nn.Parameter, *, sums: bool) -> None:
        super().__init__(*weight.shape, sums=sums)
        self.weight = weight

    @property
    def format_name(self) -> str:
        return str(self.weight.dtype).removeprefix("torch.")

    def dense(self, expert: int, dtype: torch.dtype) -> Tensor:
        return self.weight[expert].to(dtype)


class _FrozenExperts(torch.autograd.Function):
    """The products with frozen matrices, unpacked in the forward pass and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: ExpertStack, routing: Routing) -> Tensor:
        def product(rows: Tensor, expert: int, _: slice) -> Tensor:
            return rows @ stack.dense(expert, rows.dtype).T

        ctx.stack, ctx.routing = stack, routing
        return routing.apply(product, x, stack.out_features, sums=stack.sums)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        stack = ctx.stack

        def product(dy: Tensor, expert: int, _: slice) -> Tensor:
            return dy @ stack.dense(expert, dy.dtype)

        # What was taken from the tokens is added to them, and the other way round.
        return ctx.routing.apply(product, grads[0], stack.in_features, sums=not stack.sums), None, None


class Experts(nn.Module):
    """Stands where transformers' fused experts stood, and computes what they compute.

    Args:
        gate_up_proj: G above U, [E, 2I, H].
        down_proj: D, [E, H, I].
        activation: What is applied to G x.
    """

    def __init__(
        self, gate_up_proj: ExpertStack, down_proj: ExpertStack, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        assert down_proj.sums and not gate_up_proj.sums and gate_up_proj.out_features == 2 * down_proj.in_features
        self.experts = gate_up_proj.experts
        self.gate_up_proj: nn.Module = gate_up_proj
        self.down_proj: nn.Module = down_proj
        self.act_fn = activation

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the experts of each token say, added up.

        Args:
            hidden_states: [tokens, H].
            top_k_index: The experts of each token, int64 [tokens, k].
            top_k_weights: The weights of each, [tokens, k].

        Returns:
            [tokens, H].
        """
        # oneDNN, which multiplies bfloat16 on a CPU, prepares for each new shape, for longer than a product takes.
        prepares = hidden_states.dtype == torch.bfloat16 and hidden_states.device.type == "cpu"
        few_sizes = prepares and len(hidden_states) > FUSED_TOKENS
        routing = Routing.of(top_k_index, self.experts, few_sizes=few_sizes)
        gate_up = self.gate_up_proj(hidden_states, routing)
        weights = routing.weights(top_k_weights)[:, None].to(gate_up.dtype)
        # What lies between two products is computed again in the backward pass: of four tensors, two are kept.
        gated = checkpoint(self._gate, gate_up, weights, use_reentrant=False, preserve_rng_state=False)
        return self.down_proj(gated, routing)

    def _gate(self, gate_up: Tensor, weights: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up * weights


def is_fused(module: nn.Module) -> bool:
    """Whether this is a module of transformers that computes what ``Experts`` does.

    Those that do not are experts with transposed matrices, with biases, without a gate, or with gate and up in turns.
    """
    weights = (getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None))
    if not all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights):
        return False
    marks = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    return all(getattr(module, mark, None) is value for mark, value in marks.items())


def unfused(module: Any) -> Experts:
    """``Experts`` over the same parameters as a fused module of transformers."""
    stacks = DenseExperts(module.gate_up_proj, sums=False), DenseExperts(module.down_proj, sums=True)
    return Experts(*stacks, module.act_fn)
