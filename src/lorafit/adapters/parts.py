"""The tensors of an adapter, and PEFT's names of them.

The factors of a layer are ``lora_A.weight`` and ``lora_B.weight``, the magnitudes of DoRA ``lora_magnitude_vector``;
the factors of an embedding are transposed, and called ``lora_embedding_B`` and ``lora_embedding_A``. What is trained
whole has the names that it has in the base; the trained rows of an embedding have one of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorafit.adapters.names import places
from lorafit.errors import AdapterError
from lorafit.modules import AdapterModule, DoRALinear, LoRAEmbedding, TrainedCopy, TrainedTokens, adapter_modules

_PREFIX = "base_model.model."
_FACTORS: dict[str, Literal["A", "B"]] = {"lora_A.weight": "A", "lora_B.weight": "B"}
_MAGNITUDE = "lora_magnitude_vector"

# Keys of other times and of raw state dicts, which have the adapter's name in them.
_NAMED = re.compile(r"(.*\.(?:lora_(?:embedding_)?[AB]|trainable_tokens_delta))\.(?!weight$)[^.]+(\.weight)?")
_MAGNITUDES = re.compile(rf"(.*\.{_MAGNITUDE})(?:\.[^.]+){{1,2}}")
_SAVED = re.compile(r"(.*)\.modules_to_save(?:\.[^.]+)??\.(weight|bias)")
_OF_BASE = re.compile(rf"{re.escape(_PREFIX)}(.*?)(?:\.base_layer|\.original_module|\.token_adapter)*\.(weight|bias)")


@dataclass(frozen=True)
class Part:
    """A tensor of an adapter.

    Attributes:
        module: The module that holds it.
        name: ``A``, ``B``, or the short name of a parameter.
        transposed: Whether PEFT has it the other way round.
    """

    module: AdapterModule
    name: str
    transposed: bool = False

    def get(self) -> Tensor:
        """Its value, float32."""
        if self.name in ("A", "B"):
            value = self.module.lora_factors()["AB".index(self.name)]
            return value.T if self.transposed else value
        return self.module.adapter_parameters()[self.name].detach()

    def set(self, value: Tensor) -> str | None:
        """Give it a value; returns what is wrong with that, if anything."""
        expected = list(self.get().shape)
        if list(value.shape) != expected:
            return f"has the shape {list(value.shape)}, not {expected}"
        if not bool(torch.isfinite(value).all()):
            return "holds numbers that are not finite"
        value = value.T if self.transposed else value
        try:
            if self.name == "A" or self.name == "B":
                self.module.set_lora_factor("A" if self.name == "A" else "B", value)
            else:
                with torch.no_grad():
                    self.module.adapter_parameters()[self.name].copy_(value)
        except AdapterError as error:
            return str(error)
        return None


def parts(model: nn.Module) -> dict[str, Part]:
    """The tensors of a model's adapter, as PEFT calls them."""
    modules = adapter_modules(model)
    result: dict[str, Part] = {}
    for name, place in places(modules).items():
        module = modules[name]
        ends: Mapping[str, str] = _FACTORS
        if isinstance(module, TrainedCopy):
            ends = {part: part for part in module.adapter_parameters()}
        elif isinstance(module, TrainedTokens):
            ends = {} if module.tied else {"token_adapter.trainable_tokens_delta": "rows"}
        elif isinstance(module, DoRALinear):
            ends = {**_FACTORS, _MAGNITUDE: _MAGNITUDE}
        elif isinstance(module, LoRAEmbedding):
            ends = {"lora_embedding_A": "B", "lora_embedding_B": "A"}
        turned = isinstance(module, LoRAEmbedding)
        result |= {f"{_PREFIX}{place}.{end}": Part(module, part, turned) for end, part in ends.items()}
    return result


def present_key(key: str) -> str:
    """A tensor's name as PEFT writes it today, from the names in older files and raw state dicts."""
    if match := _NAMED.fullmatch(key):
        return f"{match[1]}{match[2] or ''}"
    if match := _MAGNITUDES.fullmatch(key):
        return match[1]
    return f"{match[1]}.{match[2]}" if (match := _SAVED.fullmatch(key)) else key


def place_in_base(key: str) -> tuple[str, str] | None:
    """The module and the parameter of the base of which a tensor could be a copy."""
    match = _OF_BASE.fullmatch(key)
    return (match[1], match[2]) if match else None
