"""Adapters that do something, documents to run through them, and Q4_1 blocks taken apart byte by byte."""

from collections.abc import Sequence

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from lorafit.data.chat import Document
from lorafit.modules import adapter_modules


def fill(model: nn.Module, seed: int = 0, std: float = 0.02) -> None:
    """Random values into every B, which starts at zero: each adapter, and each of its rows, does something else."""
    generator = torch.Generator().manual_seed(seed)
    for module in adapter_modules(model).values():
        for name, b in module.adapter_parameters().items():
            if name in ("lora_B", "qalora_B"):
                with torch.no_grad():
                    b.copy_(torch.randn(b.shape, generator=generator) * std)


def documents(lengths: Sequence[int], vocab: int = 320, seed: int = 0, share: float = 0.5) -> list[Document]:
    """Random tokens of which the share ``share`` is trained, the last of each document always."""
    random = np.random.default_rng(seed)
    result = []
    for i, length in enumerate(lengths):
        tokens = random.integers(3, vocab, length).tolist()
        trained = [bool(flag) for flag in random.random(length) < share]
        result.append(Document(tokens, [*trained[:-1], True], f"rows.jsonl:{i + 1}"))
    return result


def q4_1(out_dim: int, in_dim: int, seed: int = 0) -> np.ndarray:
    """Random Q4_1 blocks, uint8 [out_dim, row_bytes], quantised by gguf-py."""
    weights = np.random.default_rng(seed).standard_normal((out_dim, in_dim)).astype(np.float32) * in_dim**-0.5
    return gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q4_1)


def q4_1_parts(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
    """Q4_1 blocks as (d·q [out_dim, in_dim], m [out_dim, groups]) in float64; a weight is d·q + m of its block."""
    per_block = blocks.reshape(blocks.shape[0], -1, 20)
    d = per_block[..., 0:2].copy().view(np.float16).astype(np.float64)
    m = per_block[..., 2:4].copy().view(np.float16).astype(np.float64)
    q = np.concatenate((per_block[..., 4:] & 15, per_block[..., 4:] >> 4), axis=-1)
    return torch.from_numpy((d * q).reshape(blocks.shape[0], -1)), torch.from_numpy(m[..., 0])


def with_offsets(blocks: np.ndarray, offsets: Tensor) -> np.ndarray:
    """The same Q4_1 blocks with other offsets, float16 [out_dim, groups], in the order of the blocks' rows."""
    changed = blocks.copy().reshape(blocks.shape[0], -1, 20)
    changed[..., 2:4] = np.ascontiguousarray(offsets.numpy()).view(np.uint8).reshape(*offsets.shape, 2)
    return changed.reshape(blocks.shape)
