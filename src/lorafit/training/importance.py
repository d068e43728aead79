"""How strongly each input of each layer is used: what the search for a 4-bit start weighs its errors by.

A layer computes y = W x. If its weights are off by E, its output is off by E x, and the expected square of that is, for
inputs that are not correlated, Σ_j E[x_j²]·Σ_i E_ij²: an error on input j counts by the mean square of x_j.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lorafit.data.packing import Batch
from lorafit.evaluation.loss import evaluate
from lorafit.modules.packed import is_linear


def input_importance(model: Any, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Mean square of every linear layer's inputs over all tokens of some batches.

    Args:
        model: A transformers model.
        batches: Documents to run through it; a few thousand tokens are enough.

    Returns:
        Full name of the layer -> float32 [in_dim].
    """
    squares: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            squares[name] = squares.get(name, 0) + x.float().square().sum(0)

        return layer.register_forward_pre_hook(add)

    hooks = [watch(name, layer) for name, layer in model.named_modules() if is_linear(layer)]
    try:
        evaluate(model, batches)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = sum(len(batch.tokens) for batch in batches)
    return {name: total / tokens for name, total in squares.items()}
