"""The tensors of a model as a checkpoint of transformers has them, unpacked one at a time.

The model's modules are asked, not its file: in memory rows and names are Hugging Face's already, whatever the family,
and norms are transformers' parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lorafit.containers.mapped import release
from lorafit.modules import PackedEmbedding, PackedLinear, PackedWeight
from lorafit.modules.experts import ExpertStack, PackedExperts


@dataclass(frozen=True)
class Unpacked:
    """A tensor that is unpacked when it is asked for.

    Attributes:
        shape: Its shape.
        format: Block format that it is unpacked from; None for one that was not packed.
        values: Gives its values in a type, rounded once; valid until the next tensor is asked for.
    """

    shape: tuple[int, ...]
    format: str | None
    values: Callable[[torch.dtype], Tensor]


def unpacked_tensors(model: PreTrainedModel) -> dict[str, Unpacked]:
    """Name in transformers' checkpoints -> tensor; a tied head is not there twice.

    Args:
        model: A base without adapters.
    """
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    shared = getattr(embedding, "packed", None)
    tensors: dict[str, Unpacked] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            if module is not head or module.packed is not shared:
                tensors[f"{name}.weight"] = _of_packed(module.packed)
        elif isinstance(module, ExpertStack):
            tensors |= expert_tensors(name, module)
    stacked = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ExpertStack))
    for name, parameter in model.named_parameters():
        if not (stacked and name.startswith(stacked)):
            tensors[name] = _of_parameter(parameter)
    return tensors


def _of_packed(packed: PackedWeight) -> Unpacked:
    def values(dtype: torch.dtype) -> Tensor:
        unpacked = packed.dense(dtype)
        release(packed.blocks)  # nobody reads them again soon
        return unpacked

    return Unpacked(packed.shape, packed.format_name, values)


def _of_parameter(parameter: nn.Parameter) -> Unpacked:
    return Unpacked(tuple(parameter.shape), None, parameter.detach().to)


def expert_tensors(
    name: str, stack: ExpertStack, matrix: Callable[[int, torch.dtype], Tensor] | None = None
) -> dict[str, Unpacked]:
    """A matrix for each expert, as checkpoints have them; transformers fuses them when it loads.

    Args:
        name: Name of the stack.
        stack: The experts.
        matrix: Gives the matrix of an expert in a type; by default the one in the stack.
    """
    prefix, kind = name.rsplit(".", 1)
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    rows = stack.out_features // len(parts)

    def unpacked(expert: int, dtype: torch.dtype) -> Tensor:
        result = stack.dense(expert, dtype)
        if isinstance(stack, PackedExperts):
            for packed in stack.matrix(expert):
                release(packed.blocks)
        return result

    def values(expert: int, part: int) -> Callable[[torch.dtype], Tensor]:
        return lambda dtype: (matrix or unpacked)(expert, dtype)[part * rows : (part + 1) * rows]

    return {
        f"{prefix}.{expert}.{part}.weight": Unpacked((rows, stack.in_features), stack.format_name, values(expert, i))
        for expert in range(stack.experts)
        for i, part in enumerate(parts)
    }


def plain_config(model: PreTrainedModel, dtype: torch.dtype, extra: Mapping[str, Any]) -> PreTrainedConfig:
    """What config.json says beside the unpacked weights.

    Args:
        model: The model.
        dtype: Type of the weights.
        extra: More entries.
    """
    config = deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):  # of a checkpoint that bitsandbytes quantised
        del config.quantization_config
    for name, value in extra.items():
        setattr(config, name, value)
    return config
