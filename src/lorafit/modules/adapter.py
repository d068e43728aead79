"""What every adapter module has in common: it declares its parameters, and it can step aside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from lorafit.modules.packed import linear_shape


class AdapterModule(nn.Module, ABC):
    """Stands where a linear layer stood, or another module; with the adapter disabled it *is* that module.

    Attributes:
        base: The frozen module.
        enabled: Whether the adapter takes part.
        out_features: Width of what it gives, of a linear layer or a stack of experts.
        in_features: Width of what it takes, of the same.
    """

    out_features: int
    in_features: int

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.enabled = True
        self.training = base.training
        if hasattr(base, "out_features"):
            self.out_features, self.in_features = linear_shape(base)

    @abstractmethod
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by their short names."""

    @abstractmethod
    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """The update as plain LoRA: A [rank, in_dim] and B [out_dim, rank], float32, before scaling."""

    @abstractmethod
    def set_lora_factor(self, part: Literal["A", "B"], value: Tensor) -> None:
        """Set a parameter from a factor in the shape that ``lora_factors`` gives it.

        Raises:
            AdapterError: The parameters cannot express it.
        """

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """The scaled update of the weight, [out_dim, in_dim] float32."""

    def merged_weight(self, base: Tensor) -> Tensor:
        """The weight of the plain layer that computes what this one does beside a frozen weight.

        Args:
            base: The frozen weight, [out_dim, in_dim] float32; it is left as it is.
        """
        return base + self.delta_weight()


def adapter_modules(model: nn.Module) -> dict[str, AdapterModule]:
    """Full name -> adapter, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterModule)}


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Makes the model its own reference: inside, it computes what the base computes. Restores the prior state."""
    before = [(module, module.enabled) for module in adapter_modules(model).values()]
    for module, _ in before:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in before:
            module.enabled = enabled
