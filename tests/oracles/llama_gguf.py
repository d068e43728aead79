"""Any transformers llama model as a GGUF file, for what the tiny random models of ``tiny_gguf`` do not have.

Names of tensors come from gguf-py's own table, rows of rotated projections are moved one by one, and any metadata can
be set to something else, or left out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.oracles.tiny_gguf import SPECIAL_TOKENS, _add_tokenizer

VOCAB = len(SPECIAL_TOKENS) + 256 + 5


def random_llama(*, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A small random model whose every parameter, norms and biases too, differs from its usual initial value."""
    fields = {
        **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5},
        **{"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"},
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**fields | config))
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5 * (2 if "embed" in name else 1)
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=spread)
    return model.eval()


def row_in_file(row: int, head_dim: int) -> int:
    """Where llama.cpp's converter puts a row of a rotated projection: halves of a head become neighbours."""
    head, place = divmod(row, head_dim)
    half, pair = divmod(place, head_dim // 2)
    return head * head_dim + 2 * pair + half


def write_llama(
    path: Path,
    model: LlamaForCausalLM,
    *,
    format: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Write a model.

    Args:
        path: The file to write.
        model: What to write.
        format: Block format of the matrices; vectors are F32.
        metadata: Keys to set to other values than the model's; None leaves one out.
        tensors: Tensors to add as F32, or to replace; None leaves one out.

    Returns:
        ``path``.
    """
    config = model.config
    assert config.vocab_size == VOCAB
    fields: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    fields |= metadata or {}
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", "llama"))
    for key, value in fields.items():
        if value is not None:
            kind = {str: "string", int: "uint32", float: "float32", bool: "bool", list: "array"}[type(value)]
            getattr(writer, f"add_{kind}")(key, value)
    _add_tokenizer(writer, VOCAB)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    arrays: dict[str, np.ndarray | None] = {}
    for hf_name, parameter in model.named_parameters():
        array = parameter.detach().float().numpy()
        if "q_proj" in hf_name or "k_proj" in hf_name:
            moved = np.empty_like(array)
            for row in range(len(array)):
                moved[row_in_file(row, config.head_dim)] = array[row]
            array = moved
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name is not None, hf_name
        arrays[name] = array
    replaced = dict(tensors or {})
    for name, array in (arrays | replaced).items():
        if array is None:
            continue
        qtype = gguf.GGMLQuantizationType["F32" if array.ndim == 1 or name in replaced else format]
        writer.add_tensor(name, gguf.quants.quantize(array.astype(np.float32), qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
