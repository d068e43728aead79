"""A model of transformers without its weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """An architecture whose parameters are on the meta device, so that they take no memory, and whose buffers are not.

    Buffers (rotary frequencies, the scale of Gemma's embeddings) are computed from the configuration and stored in no
    file. transformers' own initialisation computes them anew, as it does when it loads a checkpoint.

    Args:
        config: What the model is.
        dtype: Type of its parameters.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in list(model.modules()):
        if module._buffers:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
            with torch.no_grad():
                model._init_weights(module)
    return model


def put_parameter(model: nn.Module, name: str, values: torch.Tensor) -> None:
    """Put values in the place of a parameter."""
    owner, _, kind = name.rpartition(".")
    setattr(model.get_submodule(owner), kind, nn.Parameter(values, requires_grad=False))
