"""Attention for documents laid end to end, active only where lorafit's own loops ask for it.

A batch is one row of tokens in which documents follow one another without padding. transformers lets a model be
switched to a registered attention function; this one cuts the row at the document boundaries and lets every document
attend to itself alone. Outside ``document_attention`` a model behaves as it always did, so that generation and other
people's training loops are unaffected.

Short documents are attended to with plain batched products: the query heads that share a key head are folded into
one matrix, which keeps the processor's matrix units busier than the fused kernel does on few tokens. Long ones go to
torch's fused kernel, whose memory does not grow with the square of the length. That kernel knows neither windows nor
soft-capped scores, so long documents of the models that have them are cut into pieces for the plain products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel

_NAME = "lorafit_documents"
_FOLDED_LENGTH = 512  # up to here plain products are faster than the fused kernel; see benchmarks/NOTES.md


@lru_cache(maxsize=64)
def _causal_mask(length: int, window: int | None, repeats: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zero where a token may look, -inf where not: [repeats·length, length]."""
    with torch.inference_mode(False):
        return _mask(length, length, window, dtype, device).repeat(repeats, 1)


def _mask(queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same for the last ``queries`` of ``keys`` tokens: [queries, keys]."""
    mask = torch.full((queries, keys), float("-inf"), dtype=dtype, device=device)
    offset = keys - queries
    allowed = mask.triu(offset + 1)
    return allowed if window is None else allowed + mask.tril(offset - window)


def _attend_folded(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """The last tokens of a document to all of it: query [heads, Q, dim], key and value [key heads, K, dim]."""
    heads, length, dim = query.shape
    shared = key.shape[0]
    folded = query.reshape(shared, heads // shared * length, dim)
    if length == key.shape[1]:
        mask = _causal_mask(length, window, heads // shared, query.dtype, query.device)
    else:
        mask = _mask(length, key.shape[1], window, query.dtype, query.device).repeat(heads // shared, 1)
    if softcap is None:
        scores = torch.baddbmm(mask.expand(shared, -1, -1), folded, key.transpose(1, 2), alpha=scaling)
    else:
        products = torch.bmm(folded, key.transpose(1, 2))
        scores = (products * (scaling / softcap)).tanh() * softcap + mask
    return torch.bmm(scores.softmax(-1), value).reshape(heads, length, dim)


def _attend_fused(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    batch = (query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0))
    return F.scaled_dot_product_attention(*batch, is_causal=True, scale=scaling, enable_gqa=True).squeeze(0)


def _attend_in_pieces(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """What torch's kernel cannot do, some queries at a time, each piece's scores computed again in the backward pass.

    So the memory grows with the length and not with its square, and a window's work with the window.
    """
    pieces = []
    for start in range(0, query.shape[1], _FOLDED_LENGTH):
        stop = min(start + _FOLDED_LENGTH, query.shape[1])
        first = 0 if window is None else max(0, start - window + 1)
        parts = (query[:, start:stop], key[:, first:stop], value[:, first:stop])
        pieces.append(
            checkpoint(_attend_folded, *parts, scaling, window, softcap, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(pieces, dim=1)


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
    sliding_window: int | None = None,
    softcap: float | None = None,
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
        sliding_window: How many tokens a token sees, itself included; None for all before it.
        softcap: Scores s become softcap·tanh(s/softcap) before the mask; None leaves them.

    Returns:
        [1, tokens, heads, head_dim], and None for the attention weights.
    """
    assert query.shape[0] == 1 and sum(document_lengths) == query.shape[2] and dropout == 0.0
    results = []
    pieces = [part[0].split(list(document_lengths), dim=1) for part in (query, key, value)]
    for q, k, v in zip(*pieces, strict=True):
        length = q.shape[1]
        window = None if sliding_window is None or length <= sliding_window else sliding_window
        plain = window is None and softcap is None
        if length <= _FOLDED_LENGTH and not (plain and q.is_cuda):  # a GPU's fused kernel is fast on short ones too
            result = _attend_folded(q, k, v, scaling, window, softcap)
        elif plain:
            result = _attend_fused(q, k, v, scaling)
        else:
            result = _attend_in_pieces(q, k, v, scaling, window, softcap)
        results.append(result.transpose(0, 1))
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
