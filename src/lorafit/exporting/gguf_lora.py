"""An adapter as a GGUF-LoRA, the file that llama.cpp adds to a base when it loads it (``--lora FILE``).

For each matrix NAME of the base the file has two tensors, NAME.lora_a [rank, in_dim] and NAME.lora_b [out_dim, rank],
in the base file's names and row order, and for experts one pair of three dimensions [E, ., .]. llama.cpp computes

    y = W x + scale · alpha / rank_of_the_tensor · B (A x)

with one alpha for the whole file. LoRA's own scaling is that; rsLoRA's alpha/√rank, a plain factor, and ranks and
alphas that differ by module are not. So the file's alpha is the one that suits most tensors, and B is multiplied by
what any other still lacks.

QA-LoRA is written as the plain LoRA that it is but for rounding, every column of A repeated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafit.config import LoRA
from lorafit.containers.gguf import GGUFFile
from lorafit.containers.gguf_new import NewTensor, Value, write_gguf
from lorafit.errors import AdapterError, FormatError, MergeError
from lorafit.formats import dequantize, quantize
from lorafit.models.families import Family
from lorafit.models.keymap import gguf_name, row_order
from lorafit.modules import AdapterModule, LoRAExperts, LoRALinear, QALoRALinear, adapter_modules

_SAME = 2.0**-22  # factors nearer to one than float32 tells apart


@dataclass(frozen=True)
class Piece:
    """What an adapter adds to one matrix of the base.

    Attributes:
        module: The layer that has the adapter.
        tensor: The matrix, as the base's file calls it.
        a: float32 [rank, in_dim], or [E, rank, in_dim].
        b: float32 [out_dim, rank], or [E, out_dim, rank]; rows in the file's order, without any scaling.
        scale: What B A is multiplied by.
        order: Where each row of the layer lies in the file; None where the orders agree.
    """

    module: str
    tensor: str
    a: Tensor
    b: Tensor
    scale: float
    order: Tensor | None

    @property
    def rank(self) -> int:
        """Of the update."""
        return self.a.shape[-2]

    def missing_factor(self, alpha: float) -> float:
        """What llama.cpp's scaling, with this alpha, has to be multiplied by."""
        factor = self.scale * self.rank / alpha
        return 1.0 if abs(factor - 1.0) < _SAME else factor


def pieces_of(model: PreTrainedModel, family: Family) -> list[Piece]:
    """All that a model's adapter adds, matrix by matrix of the base's file.

    Args:
        model: With its adapter.
        family: The model's family.

    Raises:
        AdapterError: llama.cpp cannot represent the adapter of a layer.
    """
    return [piece for name, module in adapter_modules(model).items() for piece in _pieces(name, module, model, family)]


def _pieces(name: str, module: AdapterModule, model: PreTrainedModel, family: Family) -> Iterator[Piece]:
    # Exactly these: what is derived from them computes something else.
    if type(module) not in (LoRALinear, LoRAExperts, QALoRALinear):
        kind = type(module).__name__
        raise AdapterError(f"{name} has an adapter of the kind {kind}, which a GGUF-LoRA cannot express; merge it")
    assert isinstance(module, LoRALinear | LoRAExperts | QALoRALinear)
    if module is model.get_output_embeddings() and model.config.tie_word_embeddings:
        raise AdapterError(
            f"{name} shares its matrix with the embedding, which llama.cpp's LoRA cannot adapt alone; train without it"
        )
    if isinstance(module, LoRAExperts):
        a, b = module.lora_A.detach(), module.lora_B.detach()
        names = [f"{name}.weight"]
        if name.endswith(".gate_up_proj"):
            names = [f"{name.removesuffix('gate_up_proj')}{half}_proj.weight" for half in ("gate", "up")]
    else:
        (a, b), names = module.lora_factors(), [f"{name}.weight"]
    for hf_name, rows in zip(names, b.chunk(len(names), dim=-2), strict=True):
        tensor = gguf_name(hf_name, family)
        if tensor is None:
            raise AdapterError(f"{name} has no counterpart in a GGUF file of the {family.architecture} family")
        order = row_order(tensor, family, model.config)
        moved = rows if order is None else torch.empty_like(rows).index_copy_(0, order, rows)
        yield Piece(name, tensor, a.float().cpu(), moved.float().cpu(), module.scale, order)


def common_alpha(pieces: Sequence[Piece]) -> float:
    """The alpha that suits most tensors, as float32 has it."""
    ((alpha, _),) = Counter(float(np.float32(piece.scale * piece.rank)) for piece in pieces).most_common(1)
    return alpha


def write_gguf_lora(
    path: Path, pieces: Sequence[Piece], architecture: str, dtype: str, notes: Mapping[str, Value]
) -> None:
    """Write the file, then read it again and compare.

    Args:
        path: The file.
        pieces: What it holds.
        architecture: Of the base, as its file says it.
        dtype: F32 or F16.
        notes: More metadata.

    Raises:
        MergeError: A number is too large for the type, or what was written is not what should have been.
    """
    alpha = common_alpha(pieces)
    metadata: dict[str, Value] = {
        "general.type": "adapter",
        "general.architecture": architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
        **notes,
    }
    tensors: dict[str, NewTensor] = {}
    for piece in pieces:
        for end, values in (("lora_a", piece.a), ("lora_b", piece.b * piece.missing_factor(alpha))):
            tensors[f"{piece.tensor}.{end}"] = _new_tensor(values, dtype, piece.module)
    write_gguf(path, metadata, tensors)
    written = GGUFFile.open(path)
    same = written.metadata == metadata and written.tensors.keys() == tensors.keys()
    if not same or not all(
        torch.equal(written.blocks(name), torch.cat(list(tensor.pieces()))) for name, tensor in tensors.items()
    ):
        raise MergeError(f"{path.name} is not kept: what was written is not the adapter; check the disk")


def _new_tensor(values: Tensor, dtype: str, module: str) -> NewTensor:
    try:
        blocks = quantize(values.reshape(-1, values.shape[-1]), dtype).blocks
    except FormatError as error:
        raise MergeError(f"the adapter of {module} cannot be written: {error}") from None
    return NewTensor(dtype, tuple(values.shape), lambda: [blocks])


def read_gguf_lora(path: Path, pieces: Sequence[Piece]) -> list[Piece]:
    """The same pieces as a file has them, with the scaling that llama.cpp gives them."""
    file = GGUFFile.open(path)
    alpha = file.metadata["adapter.lora.alpha"]

    def values(name: str) -> Tensor:
        info = file.tensors[name]
        return dequantize(file.blocks(name), info.format, info.shape)

    found = []
    for piece in pieces:
        a, b = values(f"{piece.tensor}.lora_a"), values(f"{piece.tensor}.lora_b")
        found.append(Piece(piece.module, piece.tensor, a, b, alpha / a.shape[-2], piece.order))
    return found


def largest_difference(pieces: Sequence[Piece], found: Sequence[Piece]) -> float:
    """How far the update of a matrix is from what it should be, at most: the norm of the difference, relative."""
    largest = 0.0
    for wanted, got in zip(pieces, found, strict=True):
        difference = size = 0.0
        for a, b, c, d in zip(*(_matrices(each) for each in (wanted.a, wanted.b, got.a, got.b)), strict=True):
            update = (b * wanted.scale) @ a
            difference += float(((d * got.scale) @ c - update).double().square().sum())
            size += float(update.double().square().sum())
        largest = max(largest, (difference / size) ** 0.5 if size else 0.0)
    return largest


def _matrices(values: Tensor) -> Tensor:
    return values if values.dim() == 3 else values.unsqueeze(0)


def place(model: PreTrainedModel, pieces: Sequence[Piece]) -> None:
    """Let a model compute with pieces in place of the adapter that they were taken from.

    Args:
        model: The model; every layer that has an adapter gets a plain one.
        pieces: In the order of ``pieces_of``.
    """
    by_module: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_module.setdefault(piece.module, []).append(piece)
    for name, module in adapter_modules(model).items():
        parts = by_module[name]
        b = torch.cat([each.b if each.order is None else each.b[each.order] for each in parts], dim=-2)
        model.set_submodule(name, _plain(module, parts[0], b))


def _plain(module: AdapterModule, piece: Piece, b: Tensor) -> AdapterModule:
    config = LoRA(rank=piece.rank, alpha=piece.scale * piece.rank)
    plain: LoRALinear | LoRAExperts
    plain = LoRAExperts(module.base, config) if isinstance(module, LoRAExperts) else LoRALinear(module.base, config)
    for parameter, values in ((plain.lora_A, piece.a), (plain.lora_B, b)):
        parameter.data.copy_(values)
    return plain
