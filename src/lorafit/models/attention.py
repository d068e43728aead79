"""Attention for documents laid end to end, active only where lorafit's own loops ask for it.

A batch is one row of tokens in which documents follow one another without padding. transformers lets a model be
switched to a registered attention function; this one cuts the row at the document boundaries and lets every document
attend to itself alone. Outside ``document_attention`` a model behaves as it always did, so that generation and other
people's training loops are unaffected.

Short documents are attended to with plain batched products: the query heads that share a key head are folded into
one matrix, which keeps the processor's matrix units busier than the fused kernel does on few tokens. Long ones go to
torch's fused kernel, whose memory does not grow with the square of the length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

_NAME = "lorafit_documents"
_FOLDED_LENGTH = 512  # up to here plain products are faster than the fused kernel; see benchmarks/NOTES.md


@lru_cache(maxsize=64)
def _causal_mask(length: int, repeats: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zero where a token may look, -inf where not: [repeats·length, length]."""
    with torch.inference_mode(False):
        mask = torch.full((length, length), float("-inf"), dtype=dtype, device=device).triu_(1)
        return mask.repeat(repeats, 1)


def _attend_folded(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    heads, length, dim = query.shape
    shared = key.shape[0]
    folded = query.reshape(shared, heads // shared * length, dim)
    mask = _causal_mask(length, heads // shared, query.dtype, query.device).expand(shared, -1, -1)
    scores = torch.baddbmm(mask, folded, key.transpose(1, 2), alpha=scaling)
    return torch.bmm(scores.softmax(-1), value).reshape(heads, length, dim)


def _attend_fused(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    batch = (query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0))
    return F.scaled_dot_product_attention(*batch, is_causal=True, scale=scaling, enable_gqa=True).squeeze(0)


def attend_documents(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    document_lengths: Sequence[int],
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document.

    Args:
        module: The attention layer, unused; part of transformers' interface.
        query: [1, heads, tokens, head_dim].
        key: [1, key heads, tokens, head_dim].
        value: [1, key heads, tokens, head_dim].
        attention_mask: None; the boundaries are all the mask there is.
        scaling: Factor before the softmax.
        document_lengths: Tokens in each document; their sum is ``tokens``.
        dropout: Attention dropout, which no supported model uses.

    Returns:
        [1, tokens, heads, head_dim], and None for the attention weights.
    """
    assert query.shape[0] == 1 and sum(document_lengths) == query.shape[2] and dropout == 0.0
    results = []
    pieces = [part[0].split(list(document_lengths), dim=1) for part in (query, key, value)]
    for q, k, v in zip(*pieces, strict=True):
        attend = _attend_folded if q.shape[1] <= _FOLDED_LENGTH else _attend_fused
        results.append(attend(q, k, v, scaling).transpose(0, 1))
    return torch.cat(results).unsqueeze(0), None


AttentionInterface.register(_NAME, attend_documents)


@contextmanager
def document_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a forward pass takes ``document_lengths`` and documents do not see one another."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
