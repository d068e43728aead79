"""LoRA as textbooks write it, for any ``torch.nn.Module``.

Three small modules to read, to experiment with, and to put into a model of your own. They scale by alpha itself, as
textbooks do. For language models, packed weights and speed there is ``lorafit.attach``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LoRALayer(nn.Module):
    """The update alone: x -> alpha · x A B, zero at the start (arXiv 2106.09685, section 4.1).

    Args:
        in_dim: Width of the input.
        out_dim: Width of the output.
        rank: Width in between.
        alpha: Factor on the output.
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        # Kaiming-uniform with a = √5 over the inputs: torch takes the second dimension for those, hence the transpose.
        self.A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, in_dim), a=math.sqrt(5)).T.contiguous())
        self.B = nn.Parameter(torch.zeros(rank, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., out_dim]."""
        return self.alpha * (x @ self.A @ self.B)


class LinearWithLoRA(nn.Module):
    """A linear layer with an update beside it; the layer itself is frozen.

    Args:
        linear: The layer.
        rank: Rank of the update.
        alpha: Factor on the update.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha).to(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.linear(x) + self.lora(x)


def replace_linear_with_lora(model: nn.Module, rank: int, alpha: float) -> list[str]:
    """Put a ``LinearWithLoRA`` around every linear layer of a model, in place.

    Everything else in the model stays as trainable as it was.

    Args:
        model: Any module; it must not be a linear layer itself, since that could not be replaced in place.
        rank: Rank of the updates.
        alpha: Factor on the updates.

    Returns:
        The names of the layers that were replaced.

    Raises:
        ValueError: There is no linear layer in the model.
    """
    names = [name for name, layer in model.named_modules() if name and type(layer) is nn.Linear]
    # Those that are part of a LinearWithLoRA have their update already.
    names = [name for name in names if not isinstance(model.get_submodule(name.rpartition(".")[0]), LinearWithLoRA)]
    if not names:
        raise ValueError("the model has no linear layer to put an update beside")
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, LinearWithLoRA(layer, rank, alpha))
    return names
