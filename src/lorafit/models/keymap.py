"""How model families are stored in GGUF: tensor names, configuration keys and row orders, for both directions.

llama.cpp's converter reorders the rows of the query and key projections of llama-family models. Hugging Face's
rotary embedding pairs element j of a head with element j + d/2, ggml's pairs neighbours 2j and 2j + 1, so row (head,
half, j) of the Hugging Face layout lies at (head, j, half) in the file.
"""

from __future__ import annotations

import math
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
        config: Count in the transformers configuration -> metadata key without the architecture's prefix.
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
        shown = repr(str(architecture)[:40])
        raise ModelError(f"{where}: the architecture {shown} is not supported; lorafit knows {', '.join(SUPPORTED)}")
    return _FAMILIES[architecture]


def config_fields(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What transformers' configuration needs, from a GGUF file's metadata.

    Raises:
        ModelError: A key is missing or has an impossible value, or the file uses a feature that is not supported.
    """
    architecture = metadata.get("general.architecture")
    family = family_of(architecture, where)

    def get(key: str, default: Any = None, kind: type = int) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise ModelError(f"{where}: the metadata lack {architecture}.{key}")
        possible = isinstance(value, int | kind) and not isinstance(value, bool)
        if not possible or not 0 < value < (2**31 if kind is int else math.inf):
            shown = value if possible else f"a {type(value).__name__}"
            raise ModelError(f"{where}: {architecture}.{key} is {shown}, which no model has")
        return kind(value)

    defaults = {"num_key_value_heads": metadata.get(f"{architecture}.attention.head_count")}
    fields = {field: get(key, defaults.get(field)) for field, key in family.config.items()}
    width, heads, key_heads = (fields[f] for f in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if width % heads or heads % key_heads:
        raise ModelError(f"{where}: {heads} attention heads cannot share {width} dimensions and {key_heads} key heads")
    size = fields["head_dim"] = get("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, size) != size or size % 2:
            said = f"{architecture}.{key} = {get(key, size)}"
            raise ModelError(f"{where}: heads of {size} dimensions with {said} are not supported")
    fields["rms_norm_eps"] = get("attention.layer_norm_rms_epsilon", kind=float)
    fields["rope_parameters"] = {"rope_theta": get("rope.freq_base", 10000.0, float), "rope_type": "default"}
    # llama.cpp's defaults: a factor (under its old name, too) that comes without a type is for linear scaling.
    factor = get("rope.scaling.factor", get("rope.scale_linear", 1.0, float), float)
    scaling = str(metadata.get(f"{architecture}.rope.scaling.type", "linear"))
    if scaling not in ("none", "linear"):
        raise ModelError(f"{where}: rotary scaling {scaling[:40]!r} is not supported (none and linear are)")
    if scaling == "linear" and factor != 1.0:
        fields["rope_parameters"] |= {"rope_type": "linear", "factor": factor}
    if get("rope.scaling.attn_factor", 1.0, float) != 1.0:
        raise ModelError(f"{where}: {architecture}.rope.scaling.attn_factor is not supported")
    experts = metadata.get(f"{architecture}.expert_count", 0)
    if not isinstance(experts, int) or experts:
        raise ModelError(f"{where}: mixture-of-experts models are not supported")
    return fields


def hf_name(gguf_name: str) -> str | None:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; None for a name without a counterpart."""
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
