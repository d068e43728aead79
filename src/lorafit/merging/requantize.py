"""Merging what no block can take exactly: a tensor is unpacked, the update added in float32, and the sum rounded anew.

This is what other tools do to every tensor. Here it is for those alone that have plain LoRA because QA-LoRA cannot
train them; it is asked for by name, and what it costs is measured. Some rows are worked on at a time, and packed as
well as lorafit can (``kernels.search``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from lorafit.config import Requantize
from lorafit.containers.gguf import TensorInfo
from lorafit.errors import FormatError, MergeError
from lorafit.formats import block_format, dequantize
from lorafit.kernels import search
from lorafit.merging.exact import differing
from lorafit.modules import AdapterModule, LoRALinear, PackedLinear, PackedWeight
from lorafit.modules.experts import PackedExperts
from lorafit.modules.lora_experts import LoRAExperts


@dataclass(frozen=True)
class RoundedChange:
    """A tensor with an update added and rounded to a format.

    Attributes:
        module: Name of the layer in the model.
        tensor: The tensor in the file.
        format: The format that it gets.
        a: float32 [E, rank, in_dim]; E is the number of experts, 1 for a linear layer.
        b: float32 [E, rows of an expert, rank], scaled, rows as the file has them.
    """

    module: str
    tensor: TensorInfo
    format: str
    a: Tensor
    b: Tensor

    def convert(self, start: int, blocks: Tensor) -> Tensor:
        """Rows ``start`` and following as the merged file has them.

        Raises:
            MergeError: The sum does not fit the format.
        """
        count, height = len(blocks), self.b.shape[1]
        weights = dequantize(blocks, self.tensor.format, (count, self.tensor.shape[-1]))
        for expert in range(start // height, -(-(start + count) // height)):
            top = expert * height
            first, end = max(top, start), min(top + height, start + count)
            weights[first - start : end - start].addmm_(self.b[expert, first - top : end - top], self.a[expert])
        try:
            return search.quantize(weights, self.format).blocks
        except FormatError as error:
            raise MergeError(f"{self.tensor.name}: {error}; choose another --requantize") from None

    def compare(self, start: int, old: Tensor, new: Tensor) -> tuple[int, int, int]:
        """Hold written rows against the same computed again; what differs is the third number, as for offsets."""
        return 0, 0, differing(self.convert(start, old), new)


def rounded_changes(
    name: str, module: AdapterModule, tensors: Mapping[str, TensorInfo], requantize: Requantize
) -> list[RoundedChange]:
    """The changes of one layer with plain LoRA: one for each of its tensors.

    Args:
        name: Name of the layer in the model.
        module: The layer.
        tensors: Name -> tensor in the file.
        requantize: The format to round to; ``keep`` for that of the tensor.

    Raises:
        MergeError: A tensor cannot be written in that format.
    """
    assert isinstance(module, LoRALinear | LoRAExperts)
    a, b = module.lora_A.detach(), module.lora_B.detach() * module.scale
    if isinstance(module, LoRALinear):
        a, b = a.unsqueeze(0), b.unsqueeze(0)
    changes, top = [], 0
    for packed in packed_weights(module):
        height = packed.shape[0]
        of_part = b[:, top : top + height]
        if packed.rows is not None:
            moved = torch.empty_like(of_part)
            moved[:, packed.rows] = of_part
            of_part = moved
        info = tensors[packed.name]
        changes.append(RoundedChange(name, info, _target(info, requantize), a, of_part))
        top += height
    return changes


def packed_weights(module: AdapterModule) -> list[PackedWeight]:
    """What a layer's matrix, or its first expert's, is packed in, one above the other; nothing if it is not packed."""
    if isinstance(module.base, PackedLinear):
        return [module.base.packed]
    return module.base.matrix(0) if isinstance(module.base, PackedExperts) else []


def _target(info: TensorInfo, requantize: Requantize) -> str:
    target = info.format if requantize == "keep" else requantize.upper()
    if block_format(target).pack is None:
        others = ", ".join(name for name in get_args(Requantize) if name != "keep")
        raise MergeError(
            f"{info.name} is {target}, which lorafit reads and does not write, so --requantize keep cannot keep it; "
            f"choose one of {others}"
        )
    try:
        block_format(target).row_bytes(info.shape[-1])
    except FormatError as error:
        raise MergeError(f"{info.name}: {error}; choose --requantize bf16, f16 or f32") from None
    return target
