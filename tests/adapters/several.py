"""Saved adapters with random factors, for tests that need more than one of them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafit.adapters import AdapterRecord, save_adapter
from lorafit.adapters.updates import Adapter, read_adapter
from lorafit.config import AdapterConfig
from lorafit.models.load import load_base
from lorafit.modules import attach
from tests.oracles.adapted import fill
from tests.oracles.tiny_gguf import TinyLlama

TOKENS = torch.tensor([list(range(40, 90))])


def base(tiny: TinyLlama) -> PreTrainedModel:
    return load_base(tiny.path, compute="fp32").model


def logits(model: Any, tokens: Tensor = TOKENS, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **more).logits


def saved(tiny: TinyLlama, directory: Path, config: AdapterConfig, seed: int = 0, **record: Any) -> Adapter:
    """An adapter that does something, as it lies in a directory."""
    torch.manual_seed(seed)
    model = base(tiny)
    attach(model, config)
    fill(model, seed)
    facts = {"base": "tiny.gguf", "base_sha256": "0" * 64} | record
    save_adapter(model, directory, AdapterRecord(config, **facts))
    return read_adapter(directory)
