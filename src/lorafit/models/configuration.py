"""transformers' configuration from a GGUF file's metadata, and back, by the family's table."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from lorafit.errors import ModelError
from lorafit.models.families import REQUIRED, Entry, Family
from lorafit.models.keymap import family_of_file, family_of_model
from lorafit.models.metadata import Metadata
from lorafit.models.rotary import rope_metadata, rope_parameters


def config_fields(values: Mapping[str, Any], where: str, factors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """What transformers' configuration needs, from a GGUF file's metadata.

    Args:
        values: The file's metadata.
        where: What messages start with.
        factors: The tensors of the file that go into the rotary embedding.

    Raises:
        ModelError: A key is missing or has an impossible value, or the file uses a feature that is not supported.
    """
    family = family_of_file(values, where)
    metadata = Metadata(values, family.architecture, where)
    fields: dict[str, Any] = {}
    for name, entry in family.config.items():
        fields[name] = _number(metadata, entry, fields)
    _check_heads(metadata, family, fields)
    fields["rope_parameters"] = rope_parameters(metadata, family, fields, factors or {})
    if family.partial_rotary:  # transformers' Phi-3 wants it twice
        fields["original_max_position_embeddings"] = fields["rope_parameters"].get(
            "original_max_position_embeddings", fields["max_position_embeddings"]
        )
    if family.window_period:
        fields |= _windows(metadata, family.window_period, fields)
    for name, derive in family.derived.items():
        fields[name] = derive(fields)
    experts = metadata.raw("expert_count")
    if "num_experts" not in fields and not (experts is None or (isinstance(experts, int) and experts == 0)):
        raise ModelError(f"{where}: mixture-of-experts models of the {family.architecture} family are not supported")
    check_experts(fields.get("num_experts_per_tok", 0), fields.get("num_experts", 0), where)
    metadata.check_rest(family.switches)
    return fields


def check_experts(chosen: int, experts: int, where: str) -> None:
    """Refuse a mixture whose router is to choose more experts than there are.

    Args:
        chosen: To how many experts each token goes; 0 without experts.
        experts: How many there are.
        where: What the message starts with.

    Raises:
        ModelError: It is.
    """
    if chosen > experts:
        raise ModelError(f"{where}: each token is to go to {chosen} experts, but there are {experts}")


def _number(metadata: Metadata, entry: Entry, fields: Mapping[str, Any]) -> Any:
    default = entry.default
    if default is REQUIRED:
        return metadata.get(entry.key, entry.kind)
    if callable(default):
        default = default(fields)
    return metadata.get(entry.key, entry.kind, default, zero=entry.zero, optional=default is None)


def _check_heads(metadata: Metadata, family: Family, fields: Mapping[str, Any]) -> None:
    width, heads, key_heads = (fields[f] for f in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    where, prefix = metadata.where, metadata.prefix
    if width % heads or heads % key_heads:
        raise ModelError(f"{where}: {heads} attention heads cannot share {width} dimensions and {key_heads} key heads")
    size = fields["head_dim"]
    if size % 2 or (size != width // heads and not family.own_head_dim):
        raise ModelError(f"{where}: heads of {size} dimensions are not supported in this family")
    if metadata.get("attention.value_length", int, size) != size:
        said = f"{prefix}attention.value_length = {metadata.get('attention.value_length', int)}"
        raise ModelError(f"{where}: heads of {size} dimensions with {said} are not supported")


def _windows(metadata: Metadata, period: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers see how far: the last of every ``period`` layers sees everything."""
    layers, window = fields["num_hidden_layers"], fields["sliding_window"]
    pattern = metadata.raw("attention.sliding_window_pattern")
    if pattern is None or type(pattern) is int:
        period = period if pattern is None else pattern
        windowed = [period == 0 or (i + 1) % period != 0 for i in range(layers)]
    elif isinstance(pattern, np.ndarray | list) and len(pattern) >= layers:
        windowed = [bool(flag) for flag in pattern[:layers]]
    else:
        key = f"{metadata.prefix}attention.sliding_window_pattern"
        raise ModelError(f"{metadata.where}: {key} is neither a number nor a list for {layers} layers")
    if window is None:  # transformers wants a number even where no layer has a window
        window, windowed = fields["max_position_embeddings"], [False] * layers
    types = ["sliding_attention" if flag else "full_attention" for flag in windowed]
    return {"sliding_window": window, "layer_types": types}


# Fields that do not change what a model computes, or that the tensors and the tokenizer of a file say.
_NOT_IN_METADATA = frozenset(
    {
        *("vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_parameters", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "max_window_layers", "transformers_version"),
        *("router_aux_loss_coef", "output_router_logits", "original_max_position_embeddings", "pretraining_tp"),
        *("architectures", "dtype", "_name_or_path", "id2label", "label2id", "return_dict"),
    }
)


def metadata_of(config: PreTrainedConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata of a GGUF file for a configuration, and the tensors that go into its rotary embedding.

    Raises:
        ModelError: The family is not known, or the configuration has something that GGUF cannot say.
    """
    family = family_of_model(config.model_type, "the configuration")
    config = copy.deepcopy(config)
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys, factors = rope_metadata(config, family)
    keys["attention.value_length"] = config.head_dim
    for name, entry in family.config.items():
        value = getattr(config, name)
        if value is not None:
            keys[entry.key] = entry.kind(value)
    if family.window_period:
        keys |= _window_keys(config.layer_types, family.window_period)
        window = family.config["sliding_window"]
        if window.default is None and "sliding_attention" not in config.layer_types:
            # llama.cpp ends the process where there is a window that no layer has.
            del keys[window.key], keys["attention.sliding_window_pattern"]
    architecture = family.architecture
    metadata = {"general.architecture": architecture} | {f"{architecture}.{key}": keys[key] for key in keys}
    # What is said must be what is meant: read it back.
    fields = dict.fromkeys(family.config) | config_fields(metadata, "the configuration", factors)
    again = AutoConfig.for_model(family.model_type, **fields)
    for name, value in again.to_dict().items():
        if name not in _NOT_IN_METADATA and getattr(config, name, value) != value:
            raise ModelError(f"GGUF has no place for {name} = {getattr(config, name)} of a {family.model_type} model")
    return metadata, factors


def _window_keys(layer_types: Sequence[str], period: int) -> dict[str, Any]:
    windowed = [kind == "sliding_attention" for kind in layer_types]
    usual = [(i + 1) % period != 0 for i in range(len(windowed))]
    return {} if windowed == usual else {"attention.sliding_window_pattern": windowed}
