"""The exact merge: a tensor gets other block offsets, and is then the trained one.

A packed weight is w = d·q + m. QA-LoRA trains m' = fp16(m + s·B A), one number for each block, and computes with
exactly these; a block has room for exactly these; so the merged model *is* the trained one. The run stores m', and
merging copies it into the two bytes of each offset. Nothing is computed, therefore nothing can round, and a format that
has offsets keeps its size. A tensor whose format has none is promoted first, as it was for training: the merged file
then has the very blocks that were trained, and is larger by the offsets.

Rows are stored in Hugging Face's order, and go to where the file has them only when they are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lorafit.adapters.peft import OFFSETS_FILE, read_offsets_file
from lorafit.containers.gguf import TensorInfo
from lorafit.errors import MergeError
from lorafit.formats import block_format, promote, write_offsets
from lorafit.modules import QALoRALinear

# How many recomputed offsets may round otherwise than in training. A sum in float32 is off by 1e-7 of its size and half
# precision rounds in steps of 5e-4 to 1e-3, so about one in a thousand lies so near to an edge that the order of
# summing decides.
_ROUNDED_OTHERWISE = 0.01


@dataclass(frozen=True)
class OffsetChange:
    """New offsets for one tensor of the file.

    Attributes:
        module: Name of the layer in the model.
        tensor: The tensor in the file.
        format: The format that it gets, which has offsets.
        offsets: float16 [rows, blocks in a row], rows in Hugging Face's order.
        rows: int64 [rows]; row i of the layer is row ``rows[i]`` of the tensor. None where the orders agree.
    """

    module: str
    tensor: TensorInfo
    format: str
    offsets: Tensor
    rows: Tensor | None

    @cached_property
    def in_file_order(self) -> Tensor:
        """The offsets as the file has them: float16 [rows, blocks in a row]."""
        if self.rows is None:
            return self.offsets
        moved = torch.empty_like(self.offsets)
        moved[self.rows] = self.offsets
        return moved

    def convert(self, start: int, blocks: Tensor) -> Tensor:
        """Rows ``start`` and following as the merged file has them."""
        return write_offsets(self._promoted(blocks), self.format, self.in_file_order[start : start + len(blocks)])

    def compare(self, start: int, old: Tensor, new: Tensor) -> tuple[int, int, int]:
        """Hold written rows against those of the base.

        Args:
            start: Number of the first row.
            old: The base's rows, uint8 [n, row_bytes].
            new: The merged file's.

        Returns:
            How many bytes of offsets changed, against the base's rows, promoted where the format is another; how many
            are not those of the stored offsets; and how many bytes outside of offsets changed.
        """
        block = block_format(self.format)
        assert block.offset_at is not None
        field = slice(block.offset_at, block.offset_at + 2)
        stored = self.in_file_order[start : start + len(new)].contiguous().view(torch.uint8)
        before, after = (rows.unflatten(1, (-1, block.nbytes)) for rows in (self._promoted(old), new))
        changed = differing(before[..., field], after[..., field])
        wrong = differing(after[..., field].flatten(), stored.flatten())
        return changed, wrong, differing(before, after) - changed

    def _promoted(self, blocks: Tensor) -> Tensor:
        return blocks if self.format == self.tensor.format else promote(blocks, self.tensor.format)[0]


def differing(one: Tensor, other: Tensor) -> int:
    """How many elements are not the same."""
    return int(torch.count_nonzero(one != other))


def hold_stored(adapter: Path, modules: Mapping[str, QALoRALinear]) -> int:
    """Let layers compute with the offsets that a run stored; returns how many round otherwise here.

    Args:
        adapter: Directory of the adapter.
        modules: Name -> layer with the stored A and B.

    Raises:
        MergeError: The offsets are not complete, or not those of the stored A and B.
    """
    stored = read_offsets_file(adapter)
    otherwise = _check_origin(adapter / OFFSETS_FILE, modules, stored)
    for name, module in modules.items():
        module.hold(stored[name])
    return otherwise


def _check_origin(path: Path, modules: Mapping[str, QALoRALinear], stored: Mapping[str, Tensor]) -> int:
    """The stored offsets are complete and those of the stored A and B; returns how many round otherwise here.

    Another processor may add up B A in another order. That moves a number by far less than half precision can tell,
    so it may go to its neighbour where it lies at the edge between two: at most one unit in the last place of the
    larger of m and m' (m' itself can be nearly zero where m and the update cancel), and seldom.
    """
    _check_complete(path, modules, stored)
    otherwise = total = 0
    for name, module in modules.items():
        kept = stored[name].float()
        gap = (module.merged_offsets().float() - kept).abs()
        if bool((gap > _unit_in_last_place(torch.maximum(kept.abs(), module.offsets.float().abs()))).any()):
            raise MergeError(
                f"{path}: the stored offsets of {name} are not those of its adapter; were files exchanged?"
            )
        otherwise += int(gap.count_nonzero())
        total += gap.numel()
    if otherwise > _ROUNDED_OTHERWISE * total:
        raise MergeError(
            f"{path}: {otherwise:,} of {total:,} stored offsets are not those of the adapter; were files exchanged?"
        )
    return otherwise


def _check_complete(path: Path, modules: Mapping[str, QALoRALinear], stored: Mapping[str, Tensor]) -> None:
    """Every layer has its offsets, and no offsets are left over."""
    problems = [f"{name} is no layer of the adapter" for name in stored if name not in modules]
    for name, module in modules.items():
        offsets = stored.get(name)
        if offsets is None:
            problems.append(f"{name} is missing")
        elif offsets.dtype != torch.float16 or offsets.shape != module.offsets.shape:
            expected = f"torch.float16 {list(module.offsets.shape)}"
            problems.append(f"{name} is {offsets.dtype} {list(offsets.shape)}, not {expected}")
        elif not bool(torch.isfinite(offsets).all()):
            problems.append(f"{name} holds numbers that are not finite")
    if problems:
        rest = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise MergeError(f"{path} cannot be merged: {'; '.join(problems[:5])}{rest}")


def _unit_in_last_place(values: Tensor) -> Tensor:
    """Distance of neighbouring half-precision numbers at the size of ``values``, non-negative float32."""
    exponent = torch.frexp(values).exponent.clamp(min=-13)  # from there down numbers are equally spaced
    return torch.ldexp(torch.ones_like(values), exponent - 11)
