"""Layers whose weight stays packed.

The blocks are used as they lie in the mapped file. A forward or backward pass unpacks one weight into a scratch
buffer in the compute dtype, multiplies, and moves on, so that a whole model costs its packed size plus one unpacked
layer. Nothing of the unpacked weight is kept for the backward pass: unpacking twice is cheaper than holding every
layer in memory. Even the packed pages of a mapped file are given back while training: the system still has them, and
where it is short of memory it may take them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from lorafit import kernels
from lorafit.containers.mapped import release
from lorafit.formats import block_format

# A weight is read once by the fused kernel, and re-read for every token; unpacking pays from about this many tokens on.
FUSED_TOKENS = 4

PIECE = 2**22  # weights unpacked at once where nothing needs all of them: 8 MB in bfloat16 instead of a vocabulary's 57

_scratch = threading.local()


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, use: str = "weight") -> Tensor:
    """A reused buffer; what is written there is valid until the next call for the same use in this thread."""
    buffers = _scratch.__dict__.setdefault("buffers", {})
    size = math.prod(shape)
    buffer = buffers.get((use, dtype, device))
    if buffer is None or buffer.numel() < size:
        # Inference tensors cannot be written to in training, so the buffer must not be born as one.
        with torch.inference_mode(False):
            buffer = buffers[use, dtype, device] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size].view(shape)


def chooses_type(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a layer's forward pass work under torch.autocast, which knows nothing of products written by hand.

    The input gets autocast's type, as it would in ``nn.Linear``; inside autocast is off, so that no product within
    another one is of two types.
    """

    @wraps(forward)
    def wrapped(self: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return forward(self, x, *rest)
        with torch.autocast(device, enabled=False):
            return forward(self, x.to(torch.get_autocast_dtype(device)), *rest)

    return wrapped


class PackedWeight(nn.Module):
    """A frozen matrix in blocks; an embedding and an output head may share one.

    Args:
        blocks: uint8 [out_dim, row_bytes], usually a view of a mapped file.
        format_name: Block format.
        rows: int64 [out_dim]; row i of the matrix is row ``rows[i]`` of the blocks. None for the natural order.
        constants: float32; what a double-quantised format keeps beside its blocks.
        name: The tensor's name in the file, for reports and merging.
    """

    blocks: Tensor
    rows: Tensor | None
    constants: Tensor | None

    def __init__(
        self,
        blocks: Tensor,
        format_name: str,
        *,
        rows: Tensor | None = None,
        constants: Tensor | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        block = block_format(format_name)
        self.format_name = format_name
        self.name = name
        self.shape = (blocks.shape[0], blocks.shape[1] // block.nbytes * block.elements)
        # Not persistent: a state dict holds what was trained, and the base lies in its file.
        self.register_buffer("blocks", blocks, persistent=False)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("constants", constants, persistent=False)

    @property
    def nbytes(self) -> int:
        """Bytes that hold the weights: blocks and constants."""
        return self.blocks.nbytes + (0 if self.constants is None else self.constants.nbytes)

    def dense(self, dtype: torch.dtype, offsets: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The matrix [out_dim, in_dim] in ``dtype``: in ``out``, or in scratch and valid until the next is unpacked."""
        out = scratch(self.shape, dtype, self.blocks.device) if out is None else out
        return kernels.dequantize(
            self.blocks, self.format_name, dtype, rows=self.rows, offsets=offsets, constants=self.constants, out=out
        )

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The matrix some rows at a time, which rows and what they are; valid until the next piece."""
        height, width = self.shape
        together = max(1, PIECE // width)
        if height <= together:
            yield slice(0, height), self.dense(dtype)
            release(self.blocks)
            return
        device = self.blocks.device
        order = torch.arange(height, device=device) if self.rows is None else self.rows
        for start in range(0, height, together):
            rows = order[start : start + together]
            out = scratch((len(rows), width), dtype, device)
            kernels.dequantize(self.blocks, self.format_name, dtype, rows=rows, constants=self.constants, out=out)
            yield slice(start, start + len(rows)), out
            release(self.blocks if self.rows is not None else self.blocks[start : start + together])

    def take(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of the matrix: int64 [n] -> [n, in_dim]."""
        rows = ids if self.rows is None else self.rows[ids]
        return kernels.dequantize(self.blocks, self.format_name, dtype, rows=rows, constants=self.constants)

    def product(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """x·Wᵀ without a gradient: [..., in_dim] -> [..., out_dim]."""
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] <= FUSED_TOKENS and kernels.fuses_linear(self.blocks, self.format_name):
            result = kernels.linear(
                flat, self.blocks, self.format_name, rows=self.rows, offsets=offsets, constants=self.constants
            )
        elif offsets is not None:
            result = flat @ self.dense(x.dtype, offsets).T
            release(self.blocks)
        else:
            result = flat.new_empty(flat.shape[0], self.shape[0])
            for rows, weights in self.pieces(x.dtype):
                torch.mm(flat, weights.T, out=result[:, rows])
        return result.view(*x.shape[:-1], self.shape[0])

    def extra_repr(self) -> str:
        return f"{self.name} {self.format_name} {list(self.shape)}"


class _FrozenProduct(torch.autograd.Function):
    """x·Wᵀ with W unpacked in the forward pass and again in the backward pass, a piece at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight) -> Tensor:
        ctx.weight = weight
        return weight.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        flat = grad.reshape(-1, grad.shape[-1])
        # Products of several pieces are summed in no less than float32.
        dx = flat.new_zeros(flat.shape[0], ctx.weight.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))
        for rows, weights in ctx.weight.pieces(grad.dtype):
            dx += flat[:, rows] @ weights
        return dx.to(grad.dtype).view(*grad.shape[:-1], -1), None


class PackedLinear(nn.Module):
    """A frozen linear layer over packed blocks: [..., in_dim] -> [..., out_dim].

    Args:
        packed: The matrix.
        bias: [out_dim].
        dtype: Type of ``weight``.
    """

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.packed = packed
        self.dtype = dtype
        self.out_features, self.in_features = packed.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The matrix, unpacked anew for who asks for it: other people's losses multiply with the head themselves."""
        return self.packed.dense(self.dtype).clone()

    @chooses_type
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            y = _FrozenProduct.apply(x, self.packed)
        else:
            y = self.packed.product(x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedEmbedding(nn.Module):
    """An embedding table over packed blocks: rows are unpacked as they are looked up.

    Args:
        packed: The table, [vocabulary, dim].
        dtype: Type of the result.
        padding_idx: Kept for those who ask an embedding for it; it has no effect on a frozen table.
        scale: What rows are multiplied by; rounded to ``dtype``, as transformers' Gemma does.
    """

    def __init__(
        self, packed: PackedWeight, dtype: torch.dtype, padding_idx: int | None = None, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.packed = packed
        self.dtype = dtype
        self.padding_idx = padding_idx
        self.scale = scale
        self.num_embeddings, self.embedding_dim = packed.shape

    def forward(self, ids: Tensor) -> Tensor:
        return self.scaled(self.packed.take(ids.reshape(-1), self.dtype).view(*ids.shape, self.embedding_dim))

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows of the table as the model gets them."""
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=self.dtype, device=rows.device)


def embedding_rows(table: nn.Module, rows: Tensor) -> Tensor:
    """Rows for a table of embeddings, packed or not, as the model gets them: in some families times a factor."""
    if isinstance(table, PackedEmbedding):
        return table.scaled(rows)
    scale: Any = getattr(table, "embed_scale", None)  # Gemma's, in transformers
    return rows if scale is None else rows * scale.to(rows.dtype)


def frozen_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight [out_dim, in_dim] of a packed or ordinary linear layer; of a packed one, valid until the next call."""
    if isinstance(layer, PackedLinear):
        return layer.packed.dense(dtype)
    assert isinstance(layer, nn.Linear)
    return layer.weight.to(dtype)


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(out_dim, in_dim) of a linear layer, packed or ordinary, or of each matrix in a stack of experts."""
    out_dim, in_dim = layer.out_features, layer.in_features
    assert isinstance(out_dim, int) and isinstance(in_dim, int)
    return out_dim, in_dim


def is_linear(layer: nn.Module) -> bool:
    """Whether an adapter can stand in for this layer."""
    return isinstance(layer, PackedLinear | nn.Linear)


def is_embedding(layer: nn.Module) -> bool:
    """Whether this is a table of embeddings, packed or not."""
    return isinstance(layer, PackedEmbedding | nn.Embedding)
