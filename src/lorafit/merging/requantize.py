"""Merging what no block can take exactly: the update is added to the unpacked weight, and the sum rounded anew.

This is what other tools do to every tensor. Here it is asked for by name, and what it costs is measured. The sum is
formed in float32, of one matrix at a time, and packed some rows at a time. A tensor that stays in its format keeps its
grid, and the update is rounded onto that at random (``kernels.dither``): the least squared error would be that of
forgetting the update. In another format the best blocks are searched (``kernels.search``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from lorafit.config import Requantize
from lorafit.containers.gguf import TensorInfo
from lorafit.errors import FormatError, MergeError
from lorafit.formats import block_format, quantize
from lorafit.kernels import search
from lorafit.kernels.dither import DITHERED, dither
from lorafit.merging.exact import differing
from lorafit.modules import AdapterModule, LoRAExperts, PackedEmbedding, PackedLinear, PackedWeight
from lorafit.modules.experts import PackedExperts

# ``best`` is what the module's docstring says; the others are for comparison: the least squared error always, and
# rounding as the format's maker does it.
Packing = Literal["best", "search", "rounding"]


@dataclass(frozen=True)
class RoundedChange:
    """A tensor with an update added and rounded to a format.

    Attributes:
        module: Name of the layer in the model.
        tensor: The tensor in the file.
        format: The format that it gets.
        height: Rows of each of its matrices: an expert's, or all.
        matrix: Gives a matrix with the update, float32 [height, in_dim], rows as the file has them.
        packing: How the sum is packed.
    """

    module: str
    tensor: TensorInfo
    format: str
    height: int
    matrix: Callable[[int], Tensor]
    packing: Packing = "best"
    _last: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def dithered(self) -> bool:
        """Whether the tensor stays on its grid."""
        return self.packing == "best" and self.format == self.tensor.format and self.format in DITHERED

    def convert(self, start: int, blocks: Tensor) -> Tensor:
        """Rows ``start`` and following as the merged file has them; whoever asks for rows asks for the last ones too.

        Raises:
            MergeError: The sum does not fit the format.
        """
        end = start + len(blocks)
        parts = []
        for number in range(start // self.height, -(-end // self.height)):
            top = number * self.height
            parts.append(self._matrix(number)[max(start - top, 0) : min(end - top, self.height)])
        weights = parts[0] if len(parts) == 1 else torch.cat(parts)
        if end * self.tensor.shape[-1] == math.prod(self.tensor.shape):
            self._last.clear()
        try:
            if self.dithered:
                return dither(weights, blocks, self.format, start)
            return (quantize if self.packing == "rounding" else search.quantize)(weights, self.format).blocks
        except FormatError as error:
            raise MergeError(f"{self.tensor.name}: {error}; choose another --requantize") from None

    def compare(self, start: int, old: Tensor, new: Tensor) -> tuple[int, int, int]:
        """Hold written rows against the same computed again; what differs is the third number, as for offsets."""
        return 0, 0, differing(self.convert(start, old), new)

    def _matrix(self, number: int) -> Tensor:
        if number not in self._last:
            self._last.clear()
            self._last[number] = self.matrix(number)
        return self._last[number]


def rounded_changes(
    name: str, module: AdapterModule, tensors: Mapping[str, TensorInfo], requantize: Requantize, packing: Packing
) -> list[RoundedChange]:
    """The changes of one layer: one for each of its tensors.

    Args:
        name: Name of the layer in the model.
        module: The layer.
        tensors: Name -> tensor in the file.
        requantize: The format to round to; ``keep`` for that of the tensor.
        packing: How the sums are packed.

    Raises:
        MergeError: A tensor cannot be written in that format.
    """
    changes, top = [], 0
    for packed in packed_weights(module):
        info, height = tensors[packed.name], packed.shape[0]
        matrix = partial(_in_file_order, module, slice(top, top + height), packed.rows)
        changes.append(RoundedChange(name, info, _target(info, requantize), height, matrix, packing))
        top += height
    return changes


def merged_matrix(module: AdapterModule, number: int) -> Tensor:
    """A layer's weight with the update, or that of one of its experts: float32 [out_dim, in_dim]."""
    if isinstance(module, LoRAExperts):
        return module.merged_expert(number, module.base.dense(number, torch.float32))
    (packed,) = packed_weights(module)
    return module.merged_weight(packed.dense(torch.float32))


def _in_file_order(module: AdapterModule, part: slice, rows: Tensor | None, number: int) -> Tensor:
    merged = merged_matrix(module, number)[part]
    return merged if rows is None else torch.empty_like(merged).index_copy_(0, rows, merged)


def packed_weights(module: AdapterModule) -> list[PackedWeight]:
    """What a layer's matrix, or its first expert's, is packed in, one above the other; nothing if it is not packed."""
    if isinstance(module.base, PackedLinear | PackedEmbedding):
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
