"""Rotary embeddings: how GGUF describes them, and how transformers does.

A pair of dimensions of a head at position p is rotated by p·f. The frequencies f are theta^(-2j/d) for pair j, and
longer contexts scale them: all alike (``linear``), the slow ones only (``yarn``, arXiv 2309.00071), each by a factor of
its own that llama.cpp's converter writes as a tensor (``rope_freqs``, in which llama 3.1's rule is worked out), or each
by one of two factors, the second for texts longer than the original context (``longrope``, arXiv 2402.13753).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import ModelError
from lorafit.models.families import Family
from lorafit.models.metadata import Metadata

# Tensors that are no weights of the model, but go into its rotary embedding.
FACTORS, LONG_FACTORS, SHORT_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


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
    theta = metadata.get("rope.freq_base", float, 10000.0)
    if theta <= 1.0:
        raise ModelError(f"{where}: {prefix}rope.freq_base is {theta}, which no model has")
    parameters = {"rope_theta": theta, "rope_type": "default"}
    rotated = metadata.get("rope.dimension_count", int, size)
    if family.partial_rotary and rotated < size and rotated % 2 == 0:
        share = rotated / size
        parameters["partial_rotary_factor"] = share if int(size * share) == rotated else math.nextafter(share, 1.0)
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
    stretched = "longrope" in family.scalings and (kind == "longrope" or LONG_FACTORS in factors)
    if kind not in ("none", *family.scalings) and (kind, factor) != ("linear", 1.0):
        known = ", ".join(("none", *family.scalings))
        raise ModelError(f"{where}: rotary scaling {kind[:40]!r} is not supported ({known} are)")
    if (stretched or FACTORS in factors) and (kind == "yarn" or (stretched and (kind == "none" or factor != 1.0))):
        names = ", ".join(sorted(factors))
        raise ModelError(f"{where}: rotary scaling {kind!r} by {factor:g} besides {names} is not supported")
    if stretched:
        long, short = (_divisors(factors, name, rotated // 2, where) for name in (LONG_FACTORS, SHORT_FACTORS))
        return _longrope(long, short, original, fields, magnitude)
    if kind == "yarn":
        return _yarn(metadata, factor, original, magnitude)
    if magnitude != 1.0:
        raise ModelError(f"{where}: {prefix}rope.scaling.attn_factor is not supported")
    factor = factor if kind == "linear" else 1.0
    if FACTORS in factors:
        divisors = _divisors(factors, FACTORS, rotated // 2, where)
        theta = metadata.get("rope.freq_base", float, 10000.0)
        return _as_llama3(divisors, theta, original, factor) or _longrope(
            divisors * factor, divisors * factor, original, fields, 1.0
        )
    return {"rope_type": "linear", "factor": factor} if factor != 1.0 else {}


def _yarn(metadata: Metadata, factor: float, original: int, magnitude: float) -> dict[str, Any]:
    usual = 1.0 + 0.1 * math.log(max(factor, 1.0))
    # llama.cpp does not look at these in the families that are supported, transformers would.
    for name, value in {"attn_factor": usual, "beta_fast": 32.0, "beta_slow": 1.0, "ext_factor": 1.0}.items():
        found = metadata.get(f"rope.scaling.yarn_{name}", float, value)
        if abs(found - value) > 1e-3:
            raise ModelError(f"{metadata.where}: {metadata.prefix}rope.scaling.yarn_{name} = {found} is not supported")
    parameters = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return parameters if magnitude == 1.0 else parameters | {"attention_factor": magnitude * usual}


def _longrope(
    long: Tensor, short: Tensor, original: int, fields: Mapping[str, Any], magnitude: float
) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "factor": max(1.0, fields["max_position_embeddings"] / original),
        "original_max_position_embeddings": original,
        "attention_factor": magnitude,
        "long_factor": long.tolist(),
        "short_factor": short.tolist(),
    }


def _as_llama3(divisors: Tensor, theta: float, original: int, factor: float) -> dict[str, Any] | None:
    """The parameters of llama 3.1's rule, if these divisors come from it with its usual bounds."""
    largest = float(divisors.max())
    for context in (8192, original):
        parameters = {
            "rope_type": "llama3",
            "factor": largest,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": context,
        }
        if factor == 1.0 and torch.allclose(divisors, _llama3_divisors(parameters, theta, len(divisors)), rtol=1e-5):
            return parameters
    return None


def _llama3_divisors(parameters: Mapping[str, Any], theta: float, count: int) -> Tensor:
    """1 for short waves, ``factor`` for waves longer than the original context, and between them a transition."""
    low, high, factor = (parameters[name] for name in ("low_freq_factor", "high_freq_factor", "factor"))
    waves = 2 * math.pi * theta ** (torch.arange(count, dtype=torch.float64) / count)
    turns = parameters["original_max_position_embeddings"] / waves
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).float()


def _divisors(factors: Mapping[str, Tensor], name: str, wanted: int, where: str) -> Tensor:
    """One of the tensors of factors."""
    found = factors.get(name)
    if found is None:
        raise ModelError(f"{where}: the tensor {name} is missing")
    if found.shape != (wanted,) or not bool((found > 0).all()):
        raise ModelError(f"{where}: {name} must be {wanted} positive factors, one for each pair of a head")
    return found


def rope_metadata(config: Any, family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of :func:`rope_parameters`: keys without the architecture's prefix, and tensors of factors.

    Raises:
        ModelError: llama.cpp has no such rotary embedding in this family.
    """
    parameters = config.rope_parameters
    keys: dict[str, Any] = {}
    if family.local_rotary:
        local, parameters = parameters["sliding_attention"], parameters["full_attention"]
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
        if local["rope_type"] != "default":
            raise ModelError(f"GGUF has no rotary scaling {local['rope_type']!r} for {family.model_type}'s windows")
    kind, theta = parameters["rope_type"], float(parameters["rope_theta"])
    rotated = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
    keys |= {"rope.freq_base": theta, "rope.dimension_count": rotated}
    original = parameters.get("original_max_position_embeddings")
    possible = {"default", *family.scalings, *(["llama3"] if family.rotary_factors else [])}
    if kind not in possible:
        raise ModelError(f"GGUF has no rotary scaling {kind!r} for {family.model_type}")
    if kind == "linear":
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(parameters["factor"])}
    if kind == "yarn":
        keys |= _yarn_keys(parameters)
    if kind == "llama3":
        return keys, {FACTORS: _llama3_divisors(parameters, theta, rotated // 2)}
    if kind != "longrope":
        return keys, {}
    long, short = (torch.tensor(parameters[f"{length}_factor"]) for length in ("long", "short"))
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        factor = parameters.get("factor") or config.max_position_embeddings / original
        magnitude = math.sqrt(1.0 + math.log(max(factor, 1.0)) / math.log(original))
    if family.rotary_factors and magnitude == 1.0 and long.equal(short):
        return keys, {FACTORS: long}
    keys |= {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": magnitude}
    if family.rotary_factors:  # Phi-3's files do not say so
        keys["rope.scaling.type"] = kind
    return keys, {LONG_FACTORS: long, SHORT_FACTORS: short}


def _yarn_keys(parameters: Mapping[str, Any]) -> dict[str, Any]:
    usual = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "mscale": None, "mscale_all_dim": None}
    for name, value in usual.items():
        if parameters.get(name) not in (None, value):
            raise ModelError(f"GGUF has no place for rope_parameters[{name!r}] = {parameters[name]}")
    factor = float(parameters["factor"])
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": parameters["original_max_position_embeddings"],
    }
    if magnitude := parameters.get("attention_factor"):
        keys["rope.scaling.attn_factor"] = magnitude / (1.0 + 0.1 * math.log(max(factor, 1.0)))
    return keys
