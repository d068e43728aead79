"""Tiny random models as directories of safetensors, saved by transformers, for tests of what is read from them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorafit.models.load import load
from tests.oracles.tiny_gguf import write_tiny_llama

# Fields that make any family tiny. 192 is a multiple of 64 and no power of two; 96 is a multiple of 32 only.
TINY = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip


def write_tiny_directory(path: Path, model_type: str = "llama", *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Write a random model and a tokenizer.

    Args:
        path: The directory.
        model_type: Family, as transformers calls it.
        seed: Seed of the weights.
        fields: Of the configuration, in place of `TINY`'s or beside them.

    Returns:
        The same model, in float32.
    """
    config = AutoConfig.for_model(model_type, **{**TINY, **fields})
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wider than transformers draws them, so that tokens differ; norms and biases are not what they begin as.
            parameter.normal_(std=0.3 if "norm" in name or "bias" in name else 2 * parameter.shape[-1] ** -0.5)
            if "norm" in name and not model_type.startswith("gemma"):
                parameter.add_(1.0)
    model.save_pretrained(path)
    write_tiny_llama(path / "tokenizer.gguf", layers=1, vocab=config.vocab_size)
    load(path / "tokenizer.gguf")[1].save_pretrained(path)
    (path / "tokenizer.gguf").unlink()
    return model
