"""Names and orders of tensors: a GGUF file's and transformers', for both directions.

llama.cpp's converter reorders the rows of the query and key projections of llama-like families. Hugging Face's rotary
embedding pairs element j of a head with element j + d/2, ggml's pairs neighbours 2j and 2j + 1, so row (head, half, j)
of the Hugging Face layout lies at (head, j, half) in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import ModelError
from lorafit.models.families import FAMILIES, Family

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_TOP_BACK = {module: name for name, module in _TOP.items()}
_ROTATED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def family_of_file(metadata: Mapping[str, Any], where: str) -> Family:
    """The family of a GGUF file.

    Raises:
        ModelError: lorafit does not know it.
    """
    architecture = metadata.get("general.architecture")
    found = [family for family in FAMILIES if isinstance(architecture, str) and family.architecture == architecture]
    if not found:
        raise _unknown(architecture, where, [family.architecture for family in FAMILIES])
    plain, *windowed = found
    window = metadata.get(f"{architecture}.attention.sliding_window", 0)
    return plain if not windowed or (isinstance(window, int) and window == 0) else windowed[0]


def family_of_model(model_type: object, where: str) -> Family:
    """The family that transformers calls ``model_type``.

    Raises:
        ModelError: lorafit does not know it.
    """
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    raise _unknown(model_type, where, [family.model_type for family in FAMILIES])


def _unknown(name: object, where: str, known: Sequence[str]) -> ModelError:
    shown, all_known = repr(str(name)[:40]), ", ".join(dict.fromkeys(known))
    return ModelError(f"{where}: the architecture {shown} is not supported; lorafit knows {all_known}")


def hf_name(gguf_name: str, family: Family) -> str | None:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; None for a name without a counterpart."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf_name)
    if layer and layer[2] in family.layer:
        return f"model.layers.{layer[1]}.{family.layer[layer[2]]}.{layer[3]}"
    top = re.fullmatch(r"(\w+)\.(weight|bias)", gguf_name)
    if top and top[1] in _TOP:
        return f"{_TOP[top[1]]}.{top[2]}"
    return None


def gguf_name(hf_name: str, family: Family) -> str | None:
    """The inverse of :func:`hf_name`."""
    module, _, kind = hf_name.rpartition(".")
    if module in _TOP_BACK:
        return f"{_TOP_BACK[module]}.{kind}"
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    names = [name for name, place in family.layer.items() if layer and place == layer[2]]
    return f"blk.{layer[1]}.{names[0]}.{kind}" if layer and names else None


def row_order(gguf_name: str, family: Family, config: Any) -> Tensor | None:
    """Where each row of a weight lies in the file: int64 [rows], or None where the orders agree."""
    heads_field = _ROTATED.get(gguf_name.split(".")[-2]) if family.permuted else None
    if heads_field is None:
        return None
    heads = getattr(config, heads_field)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    in_file = torch.arange(heads * size).view(heads, size // 2, 2)
    return in_file.transpose(1, 2).reshape(-1)


def norm_shift(gguf_name: str, family: Family) -> float:
    """What a file's tensor has more than transformers' parameter: Gemma's norms are stored as factors, 1 + weight."""
    return family.norm_shift if gguf_name.endswith("norm.weight") else 0.0


def to_file(hf_name: str, values: Tensor, family: Family, config: Any) -> tuple[str, Tensor]:
    """A parameter of transformers as a GGUF file has it: its name there, and its values in the file's order.

    Args:
        hf_name: Its name; of fused experts, the three matrices apart, as ``mlp.experts.gate_proj.weight`` and so on.
        values: Its values.
        family: The family.
        config: The model's configuration.

    Raises:
        ModelError: The family has no such tensor.
    """
    name = gguf_name(hf_name, family)
    if name is None:
        raise ModelError(f"{hf_name} is not a tensor of the {family.architecture} family")
    rows = row_order(name, family, config)
    if rows is not None:
        values = torch.empty_like(values).index_copy_(0, rows, values)
    shift = norm_shift(name, family)
    return name, values + shift if shift else values  # adding zero would make 0 of -0
