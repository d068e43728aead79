"""Rotary embeddings: how GGUF describes them, and making them anew for a model that was built without memory.

A pair of dimensions of a head at position p is rotated by p·f. The frequencies f are theta^(-2j/d) for pair j, and
longer contexts scale them: all alike (``linear``), the slow ones only (``yarn``, arXiv 2309.00071), each by a factor of
its own that llama.cpp's converter writes as a tensor (``rope_freqs``, in which llama 3.1's rule is worked out), or each
by one of two factors, the second for texts longer than the original context (``longrope``, arXiv 2402.13753).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lorafit.errors import ModelError
from lorafit.models.families import Family
from lorafit.models.metadata import Metadata

# Tensors that are no weights of the model, but go into its rotary embedding.
FACTORS, LONG_FACTORS, SHORT_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


_BETAS = (("fast", 32.0), ("slow", 1.0))


def rope_parameters(
    metadata: Metadata, family: Family, fields: Mapping[str, Any], factors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """transformers' description of the rotary embedding, from a GGUF file.

    Args:
        metadata: The file's.
        family: Its family.
        fields: The configuration so far.
        factors: The tensors of the file that go into the rotary embedding.

    Raises:
        ModelError: A kind of scaling that the family does not have, or a number that is impossible.
    """
    where, prefix, size = metadata.where, metadata.prefix, fields["head_dim"]
    parameters = {"rope_theta": metadata.get("rope.freq_base", float, 10000.0), "rope_type": "default"}
    rotated = metadata.get("rope.dimension_count", int, size)
    if family.partial_rotary and rotated < size and rotated % 2 == 0:
        parameters["partial_rotary_factor"] = rotated / size
    elif rotated != size:
        said = f"{prefix}rope.dimension_count = {rotated}"
        raise ModelError(f"{where}: heads of {size} dimensions with {said} are not supported")
    parameters |= _scaling(metadata, family, fields, factors, rotated)
    if not family.local_rotary:
        return parameters
    local = {"rope_theta": metadata.get("rope.freq_base_swa", float, 10000.0), "rope_type": "default"}
    return {"full_attention": parameters, "sliding_attention": local}


def _scaling(
    metadata: Metadata, family: Family, fields: Mapping[str, Any], factors: Mapping[str, Tensor], rotated: int
) -> dict[str, Any]:
    where, prefix = metadata.where, metadata.prefix
    # llama.cpp's defaults: a factor (under its old name, too) that comes without a type is for linear scaling.
    factor = metadata.get("rope.scaling.factor", float, metadata.get("rope.scale_linear", float, 1.0))
    kind = metadata.text("rope.scaling.type", "linear")
    original = metadata.get("rope.scaling.original_context_length", int, fields["max_position_embeddings"])
    magnitude = metadata.get("rope.scaling.attn_factor", float, 1.0)
    fast, slow = (metadata.get(f"rope.scaling.yarn_beta_{end}", float, usual) for end, usual in _BETAS)
    if "longrope" in family.scalings and (LONG_FACTORS in factors or kind == "longrope"):
        if kind not in ("linear", "longrope") or factor != 1.0:
            raise ModelError(f"{where}: rotary scaling {kind[:40]!r} by {factor} and {LONG_FACTORS} exclude each other")
        return {
            "rope_type": "longrope",
            "attention_factor": magnitude,
            "original_max_position_embeddings": original,
            "long_factor": _divisors(factors, LONG_FACTORS, rotated // 2, where).tolist(),
            "short_factor": _divisors(factors, SHORT_FACTORS, rotated // 2, where).tolist(),
        }
    if kind not in ("none", *family.scalings) and (kind, factor) != ("linear", 1.0):
        known = ", ".join(("none", *family.scalings))
        raise ModelError(f"{where}: rotary scaling {kind[:40]!r} is not supported ({known} are)")
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": fast,
            "beta_slow": slow,
            "attention_factor": magnitude * (1.0 + 0.1 * math.log(max(factor, 1.0))),
        }
    if magnitude != 1.0:
        raise ModelError(f"{where}: {prefix}rope.scaling.attn_factor is not supported")
    return {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1.0 else {}


def _divisors(factors: Mapping[str, Tensor], name: str, wanted: int, where: str) -> Tensor:
    """One of the tensors of factors."""
    found = factors.get(name)
    if found is None:
        raise ModelError(f"{where}: the tensor {name} is missing")
    if found.shape != (wanted,) or not bool((found > 0).all()):
        raise ModelError(f"{where}: {name} must be {wanted} positive factors, one for each pair of a head")
    return found


def restore_rotary(model: PreTrainedModel, factors: Mapping[str, Tensor], where: str) -> None:
    """Rotary frequencies are computed, not stored: build them anew off the meta device, with the file's factors."""
    rotary = type(model.model.rotary_emb)(model.config)
    if FACTORS in factors:
        rotary.inv_freq = rotary.inv_freq / _divisors(factors, FACTORS, len(rotary.inv_freq), where)
        rotary.original_inv_freq = rotary.inv_freq.clone()
    model.model.rotary_emb = rotary
