"""Tiny random models of every family, and their GGUF files, written by gguf-py and none of lorafit's tables.

Names of tensors come from gguf-py's own map, metadata go through its named methods, and what llama.cpp's converter does
to a family's weights (rows of rotated projections that move, Gemma's norms that are stored as factors) is done here one
by one. So these files say what llama.cpp expects, and a mistake in lorafit's tables cannot hide in them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.oracles.llama_gguf import row_in_file
from tests.oracles.tiny_gguf import SPECIAL_TOKENS, _add_tokenizer

VOCAB = len(SPECIAL_TOKENS) + 256 + 5
WINDOW = 8  # of the families that have one: tests use longer documents


@dataclass(frozen=True)
class Kind:
    """What a family's tiny model and its file are made of.

    Attributes:
        model_type: In transformers.
        architecture: In gguf-py.
        config: Fields of its configuration beyond the common ones.
        permuted: Whether the converter moves the rows of queries and keys.
        norms_plus_one: Whether the converter adds one to norms.
        write: Writes the metadata that only this family has.
        mlp_norm: Mean of the norm behind each MLP. llama.cpp looks GELU up in a table of half-precision numbers: its
            error of 2⁻¹¹ would, in an MLP that is as loud as the rest of a random model, exceed what tests allow.
    """

    model_type: str
    architecture: gguf.MODEL_ARCH
    config: Mapping[str, Any] = field(default_factory=dict)
    permuted: bool = False
    norms_plus_one: bool = False
    write: Callable[[gguf.GGUFWriter, Any], None] = lambda writer, config: None
    mlp_norm: float | None = None


def _write_gemma2(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _write_gemma3(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def _write_phi3(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window or 0)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)


def _write_granite(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _write_qwen3moe(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)


_GEMMA = {"head_dim": 24, "hidden_size": 64, "sliding_window": WINDOW, "tie_word_embeddings": True}
_GRANITE = {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 2.0}

KINDS = {
    "llama": Kind("llama", gguf.MODEL_ARCH.LLAMA, permuted=True),
    "mistral": Kind("mistral", gguf.MODEL_ARCH.LLAMA, {"sliding_window": None}, permuted=True),
    "qwen2": Kind("qwen2", gguf.MODEL_ARCH.QWEN2),
    "qwen3": Kind("qwen3", gguf.MODEL_ARCH.QWEN3, {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3moe": Kind(
        "qwen3_moe",
        gguf.MODEL_ARCH.QWEN3MOE,
        {
            **{"head_dim": 24, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
            "norm_topk_prob": True,
        },
        write=_write_qwen3moe,
    ),
    "gemma2": Kind(
        "gemma2",
        gguf.MODEL_ARCH.GEMMA2,
        {
            **{**_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
            **{"num_hidden_layers": 3, "query_pre_attn_scalar": 24},
        },
        norms_plus_one=True,
        write=_write_gemma2,
        mlp_norm=-0.9,
    ),
    "gemma3": Kind(
        "gemma3_text",
        gguf.MODEL_ARCH.GEMMA3,
        {
            **{**_GEMMA, "num_hidden_layers": 7, "query_pre_attn_scalar": 24},
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
        norms_plus_one=True,
        write=_write_gemma3,
        mlp_norm=-0.9,
    ),
    "phi3": Kind("phi3", gguf.MODEL_ARCH.PHI3, {"pad_token_id": None}, write=_write_phi3),
    "olmo2": Kind("olmo2", gguf.MODEL_ARCH.OLMO2, {"pad_token_id": None}),
    "granite": Kind("granite", gguf.MODEL_ARCH.GRANITE, _GRANITE, permuted=True, write=_write_granite),
    "smollm3": Kind(
        "smollm3",
        gguf.MODEL_ARCH.SMOLLM3,
        {"num_hidden_layers": 5, "pad_token_id": None, "tie_word_embeddings": True},
        permuted=True,
    ),
}


def random_model(family: str, *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A small random model whose every parameter, norms and biases too, differs from its usual initial value.

    Args:
        family: A key of `KINDS`.
        seed: Seed of the weights.
        config: Fields of the configuration to set to something else.
    """
    fields = {
        **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5},
        **{"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    kind = KINDS[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind.model_type, **fields | dict(kind.config) | config)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5 * (2 if "embed" in name else 1)
            mean = float("norm" in name and not kind.norms_plus_one)
            if kind.mlp_norm is not None and "post_feedforward" in name:
                mean, spread = kind.mlp_norm, 0.05
            torch.nn.init.normal_(parameter, mean=mean, std=spread)
    return model.eval()


def rounded(model: PreTrainedModel, format: str) -> PreTrainedModel:
    """The model with every matrix but routers as a block format represents it; rounding is along rows."""
    qtype = gguf.GGMLQuantizationType[format]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("mlp.gate.weight"):
                blocks = gguf.quants.quantize(parameter.numpy(), qtype)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, qtype)))
    return model


def write_family(
    path: Path,
    family: str,
    model: PreTrainedModel,
    *,
    format: str | Callable[[str], str] = "F32",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """Write a model.

    Args:
        path: The file to write.
        family: A key of `KINDS`.
        model: What to write.
        format: Block format of the matrices, or that of each by its name; vectors are F32.
        metadata: Keys to add or to set to other values, without the architecture's prefix.
        tensors: Tensors to add as F32, or to replace; None leaves one out.
        tokenizer: Writes another tokenizer than the usual one.

    Returns:
        ``path``.
    """
    kind, config = KINDS[family], model.config
    writer = _Changed(path, gguf.MODEL_ARCH_NAMES[kind.architecture], metadata or {})
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    kind.write(writer, config)
    writer.add_rest()
    if tokenizer is None:
        _add_tokenizer(writer, VOCAB)
    else:
        tokenizer(writer)
    names = gguf.get_tensor_name_map(kind.architecture, config.num_hidden_layers)
    arrays: dict[str, np.ndarray | None] = {}
    for hf_name, array in checkpoint_arrays(model):
        if kind.permuted and ("q_proj" in hf_name or "k_proj" in hf_name):
            moved = np.empty_like(array)
            for row in range(len(array)):
                moved[row_in_file(row, head_dim)] = array[row]
            array = moved
        if kind.norms_plus_one and "norm" in hf_name:
            array = array + 1
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name is not None, hf_name
        arrays[name] = array
    for name, given in (arrays | dict(tensors or {})).items():
        if given is not None:
            plain = given.ndim == 1 or "ffn_gate_inp" in name or name in (tensors or {})
            _add(writer, name, given, "F32" if plain else format if isinstance(format, str) else format(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def checkpoint_arrays(model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the parameters; of experts, which transformers fuses, gate and up apart, as GGUF has them."""
    for name, parameter in model.named_parameters():
        array = parameter.detach().float().numpy()
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(array, 2, axis=1)
            yield name.replace("gate_up_proj", "gate_proj.weight"), gate
            yield name.replace("gate_up_proj", "up_proj.weight"), up
        else:
            yield name + (".weight" if name.endswith("experts.down_proj") else ""), array


def _add(writer: gguf.GGUFWriter, name: str, array: np.ndarray, format: str) -> None:
    qtype = gguf.GGMLQuantizationType[format]
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array, np.float32), qtype), raw_dtype=qtype)


class _Changed(gguf.GGUFWriter):
    """A writer in which some keys have other values than they are given."""

    def __init__(self, path: Path, architecture: str, changes: Mapping[str, Any]) -> None:
        self._changes = {f"{architecture}.{key}": value for key, value in changes.items()}
        super().__init__(path, architecture)

    def add_key_value(self, key: str, *args: Any, **options: Any) -> None:
        if key not in self._changes:
            super().add_key_value(key, *args, **options)

    def add_rest(self) -> None:
        """The changed keys; None leaves one out."""
        changes, self._changes = self._changes, {}
        for key, value in changes.items():
            if value is not None:
                kind = {str: "string", int: "uint32", float: "float32", bool: "bool", list: "array"}[type(value)]
                getattr(self, f"add_{kind}")(key, value)
