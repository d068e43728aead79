"""The model families: how each is stored in GGUF and what it is called in transformers. One table per family.

A table is data, read in both directions: from a file to a configuration and the names of a model's parameters, and
back. What it does not mention is not part of the family, and a file that has more is refused
(`lorafit.models.metadata`). Names of tensors and keys are those of llama.cpp's converter, and where a table gives a
default, it is what llama.cpp takes when the key is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Fields = Mapping[str, Any]  # of transformers' configuration

REQUIRED = object()


@dataclass(frozen=True)
class Entry:
    """A metadata key that holds a positive number of the configuration.

    Attributes:
        key: Without the architecture's prefix.
        kind: int or float.
        default: Where the file does not have the key: a value, or a function of the fields before it. None: nothing.
        zero: Whether a zero in the file means the same as no key.
    """

    key: str
    kind: type = int
    default: Any = REQUIRED
    zero: bool = False


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        architecture: Its name in GGUF.
        model_type: Its name in transformers.
        layer: Tensors of a layer: name in GGUF -> module in transformers' layer.
        config: Numbers: field of the configuration -> metadata entry.
        derived: Fields of the configuration that follow from others.
        permuted: Whether the rows of queries and keys are reordered; see `lorafit.models.keymap.row_order`.
        norm_shift: What the file's norms have more than transformers' parameters.
        window_period: Every so many layers, one looks beyond the sliding window; None: no layer does.
        own_head_dim: Whether heads may have another size than their share of the width.
        local_rotary: Whether layers with a sliding window rotate with a base frequency of their own, and unscaled.
        partial_rotary: Whether rotation may leave out the last dimensions of a head.
        scalings: Kinds of rotary scaling that llama.cpp carries out for it.
        rotary_factors: Whether the file may have ``rope_freqs.weight``, a divisor for each rotary frequency.
        switches: Metadata key -> its only value that is supported, of those that llama.cpp looks at in this family.
        biases: Field of the configuration that switches biases on -> GGUF name of a tensor that then has one.
    """

    architecture: str
    model_type: str
    layer: Mapping[str, str]
    config: Mapping[str, Entry]
    derived: Mapping[str, Callable[[Fields], Any]] = field(default_factory=dict)
    permuted: bool = False
    norm_shift: float = 0.0
    window_period: int | None = None
    own_head_dim: bool = True
    local_rotary: bool = False
    partial_rotary: bool = False
    scalings: tuple[str, ...] = ("linear", "yarn")
    rotary_factors: bool = False
    switches: Mapping[str, bool] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)


_COMMON = {
    "num_hidden_layers": Entry("block_count"),
    "max_position_embeddings": Entry("context_length"),
    "hidden_size": Entry("embedding_length"),
    "intermediate_size": Entry("feed_forward_length"),
    "num_attention_heads": Entry("attention.head_count"),
    "num_key_value_heads": Entry("attention.head_count_kv", default=lambda fields: fields["num_attention_heads"]),
    "head_dim": Entry(
        "attention.key_length", default=lambda fields: fields["hidden_size"] // fields["num_attention_heads"] or 1
    ),
    "rms_norm_eps": Entry("attention.layer_norm_rms_epsilon", float),
}

_LAYER = {
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
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

_LLAMA = Family(
    "llama",
    "llama",
    _LAYER,
    _COMMON,
    permuted=True,
    scalings=("linear", "yarn", "longrope"),
    rotary_factors=True,
    biases={"attention_bias": "attn_q", "mlp_bias": "ffn_up"},
)


def _gemma_scale(wide_layers: int) -> Callable[[Fields], int]:
    """What attention is scaled by the inverse root of: llama.cpp knows each generation's largest model by its depth."""

    def scalar(fields: Fields) -> int:
        share = fields["hidden_size"] // fields["num_attention_heads"]
        return share if fields["num_hidden_layers"] == wide_layers else fields["head_dim"]

    return scalar


_GEMMA2 = Family(
    "gemma2",
    "gemma2",
    _LAYER
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    _COMMON
    | {
        "sliding_window": Entry("attention.sliding_window", default=4096),
        "attn_logit_softcapping": Entry("attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": Entry("final_logit_softcapping", float, 30.0),
    },
    derived={"query_pre_attn_scalar": _gemma_scale(46)},
    norm_shift=1.0,
    window_period=2,
    scalings=("linear",),
)

FAMILIES = (
    _LLAMA,
    # Mistral's files call themselves llama. A sliding window tells it apart; llama.cpp does not look at it.
    replace(
        _LLAMA,
        model_type="mistral",
        config=_COMMON | {"sliding_window": Entry("attention.sliding_window")},
        biases={},
    ),
    Family("qwen2", "qwen2", _LAYER, _COMMON),
    Family("qwen3", "qwen3", _LAYER | _HEAD_NORMS, _COMMON, biases={"attention_bias": "attn_q"}),
    Family(
        "qwen3moe",
        "qwen3_moe",
        {name: module for name, module in _LAYER.items() if module.startswith(("self_attn", "input", "post"))}
        | _HEAD_NORMS
        | {
            "ffn_gate_inp": "mlp.gate",
            "ffn_gate_exps": "mlp.experts.gate_proj",
            "ffn_up_exps": "mlp.experts.up_proj",
            "ffn_down_exps": "mlp.experts.down_proj",
        },
        _COMMON
        | {
            "num_experts": Entry("expert_count"),
            "num_experts_per_tok": Entry("expert_used_count"),
            "moe_intermediate_size": Entry("expert_feed_forward_length"),
        },
        derived={"norm_topk_prob": lambda fields: True},
    ),
    _GEMMA2,
    replace(
        _GEMMA2,
        architecture="gemma3",
        model_type="gemma3_text",
        layer={**_GEMMA2.layer, **_HEAD_NORMS},
        config=_COMMON
        | {
            "sliding_window": Entry("attention.sliding_window", default=None, zero=True),
            "final_logit_softcapping": Entry("final_logit_softcapping", float, default=None, zero=True),
        },
        derived={"query_pre_attn_scalar": _gemma_scale(62)},
        window_period=6,
        local_rotary=True,
    ),
    Family(
        "phi3",
        "phi3",
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        _COMMON | {"sliding_window": Entry("attention.sliding_window", default=None, zero=True)},
        own_head_dim=False,
        partial_rotary=True,
        scalings=("longrope",),
    ),
    Family(
        "olmo2",
        "olmo2",
        {name: module for name, module in _LAYER.items() if not name.endswith("norm")}
        | _HEAD_NORMS
        | {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
        _COMMON,
        own_head_dim=False,
    ),
    replace(
        _LLAMA,
        architecture="granite",
        model_type="granite",
        config=_COMMON
        | {
            "logits_scaling": Entry("logit_scale", float),
            "residual_multiplier": Entry("residual_scale", float, 1.0, zero=True),
            "embedding_multiplier": Entry("embedding_scale", float, 1.0, zero=True),
            "attention_multiplier": Entry(
                "attention.scale", float, lambda fields: fields["head_dim"] ** -0.5, zero=True
            ),
        },
        switches={"rope.scaling.finetuned": True},  # without it there is no rotation at all
    ),
    replace(
        _LLAMA,
        architecture="smollm3",
        model_type="smollm3",
        scalings=("linear", "yarn"),
        rotary_factors=False,
    ),
)
