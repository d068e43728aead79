"""How much memory the weights of a model take, as measured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lorafit.formats import block_format
from lorafit.modules.packed import PackedWeight


@dataclass(frozen=True)
class Size:
    """Bytes of a base and what they come to for each parameter.

    Attributes:
        nbytes: Of all weights: blocks, constants and parameters.
        bits_per_parameter: Over all weights.
        quantized_bits_per_parameter: Over the weights in quantised blocks; None if there are none.
    """

    nbytes: int
    bits_per_parameter: float
    quantized_bits_per_parameter: float | None


def measure_size(model: nn.Module) -> Size:
    """Measure a base without adapters; a tensor with two readers counts once."""
    weights = {id(module): module for module in model.modules() if isinstance(module, PackedWeight)}.values()
    parameters = list(model.parameters())
    nbytes = sum(weight.nbytes for weight in weights) + sum(parameter.nbytes for parameter in parameters)
    count = sum(_count(weight) for weight in weights) + sum(parameter.numel() for parameter in parameters)
    quantized = [weight for weight in weights if block_format(weight.format_name).elements > 1]
    bits = 8 * sum(weight.nbytes for weight in quantized) / sum(map(_count, quantized)) if quantized else None
    return Size(nbytes, 8 * nbytes / count, bits)


def _count(weight: PackedWeight) -> int:
    return weight.shape[0] * weight.shape[1]
