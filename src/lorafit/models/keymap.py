"""How model families are stored in GGUF: tensor names, configuration keys and row orders, for both directions.

llama.cpp's converter reorders the rows of the query and key projections of llama-family models. Hugging Face's
rotary embedding pairs element j of a head with element j + d/2, ggml's pairs neighbours 2j and 2j + 1, so row (head,
half, j) of the Hugging Face layout lies at (head, j, half) in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import ModelError

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

# Factors on the rotary frequencies, not a weight of the model: read into its rotary embedding.
ROTARY_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        model_type: Its name in transformers.
        config: Field of the transformers configuration -> metadata key without the architecture's prefix.
        permuted: GGUF name of a layer's weight -> configuration field that counts its heads.
    """

    model_type: str
    config: Mapping[str, str]
    permuted: Mapping[str, str]


_FAMILIES = {
    "llama": Family(
        model_type="llama",
        config={
            "num_hidden_layers": "block_count",
            "max_position_embeddings": "context_length",
            "hidden_size": "embedding_length",
            "intermediate_size": "feed_forward_length",
            "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv",
            "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        },
        permuted={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
    ),
}

SUPPORTED = tuple(_FAMILIES)


def family_of(architecture: object, where: str) -> Family:
    """The family of an architecture.

    Raises:
        ModelError: lorafit does not know it.
    """
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise ModelError(
            f"{where}: the architecture {architecture!r} is not supported; lorafit knows {', '.join(SUPPORTED)}"
        )
    return _FAMILIES[architecture]


def config_fields(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What transformers' configuration needs, from a GGUF file's metadata.

    Raises:
        ModelError: A key is missing or has an impossible value, or the file uses a feature that is not supported.
    """
    architecture = metadata.get("general.architecture")
    family = family_of(architecture, where)

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise ModelError(f"{where}: the metadata lack {architecture}.{key}")
        return value

    defaults = {"num_key_value_heads": get("attention.head_count")}
    fields = {field: get(key, defaults.get(field)) for field, key in family.config.items()}
    for field, value in fields.items():
        if not isinstance(value, int | float) or not 0 < value < 2**31:
            raise ModelError(f"{where}: {architecture}.{family.config[field]} is {value!r}, which no model has")
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    if heads % fields["num_key_value_heads"]:
        raise ModelError(f"{where}: {heads} attention heads cannot share {fields['num_key_value_heads']} key heads")
    fields["head_dim"] = metadata.get(f"{architecture}.attention.key_length", width // heads)
    rotated = metadata.get(f"{architecture}.rope.dimension_count", fields["head_dim"])
    if rotated != fields["head_dim"]:
        raise ModelError(f"{where}: rotary embedding on {rotated} of {fields['head_dim']} dimensions is not supported")
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ModelError(f"{where}: rotary scaling {scaling!r} is not supported (none and linear are)")
    if metadata.get(f"{architecture}.expert_count"):
        raise ModelError(f"{where}: mixture-of-experts models are not supported")
    rope = {"rope_theta": float(get("rope.freq_base", 10000.0)), "rope_type": "default"}
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": float(get("rope.scaling.factor"))}
    fields["rope_parameters"] = rope
    return fields


def hf_name(gguf_name: str) -> str | None:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; None for a tensor that has no counterpart."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf_name)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
    top = re.fullmatch(r"(\w+)\.(weight|bias)", gguf_name)
    if top and top[1] in _TOP_NAMES:
        return f"{_TOP_NAMES[top[1]]}.{top[2]}"
    return None


def row_order(gguf_name: str, family: Family, config: Any) -> Tensor | None:
    """Where each row of a weight lies in the file: int64 [rows], or None where the orders agree."""
    heads_field = family.permuted.get(gguf_name.split(".")[-2])
    if heads_field is None:
        return None
    heads = getattr(config, heads_field)
    in_file = torch.arange(heads * config.head_dim).view(heads, config.head_dim // 2, 2)
    return in_file.transpose(1, 2).reshape(-1)
