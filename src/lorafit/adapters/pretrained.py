"""What a model with an adapter remembers, so that ``model.save_pretrained`` writes the adapter.

transformers' own method writes the parameters of a model, and a packed base has nearly none. So whoever saves a model
that has adapters, a trainer of transformers or TRL among them, gets PEFT's directory instead. This is said to the one
model, as an attribute of it; its class stays as it is.

Such a trainer goes on from a checkpoint, and loads the best one in the end, by a file with the model's state. So what
is trained lies in its checkpoints once more, by the names that it has in the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafit.adapters.peft import AdapterRecord, save_adapter, write_tensors
from lorafit.config import AdapterConfig, Quantize
from lorafit.containers.atomic import fingerprint
from lorafit.containers.identity import hash_tensors
from lorafit.errors import ConfigError, MissingFileError
from lorafit.modules import Coverage
from lorafit.modules import attach as attach_modules

_STATE_FILE = "model.safetensors"
_CHECKPOINT = r"checkpoint-\d+"  # what transformers' trainer calls its checkpoints


@dataclass(frozen=True)
class Origin:
    """Where a model came from.

    Attributes:
        name: The base, as it is found again.
        path: The file or directory.
        quantize: What it was quantised to while it was loaded.
        importance: What that weighed its errors by.
    """

    name: str
    path: Path
    quantize: Quantize | None = None
    importance: Mapping[str, Tensor] | None = None


def attach(model: nn.Module, config: AdapterConfig) -> Coverage:
    """Freeze a model and put adapters where linear layers stood, in place; ``model.save_pretrained`` then writes them.

    Args:
        model: Any model; its linear layers may be packed.
        config: The method and its settings.

    Returns:
        What was covered, and what was not and why.

    Raises:
        AdapterError: The model has adapters already, a target or another name matches nothing, or no target can take
            this method.
        ConfigError: The targets are not a valid pattern, or plain LoRA is asked for and no target needs it.
    """
    coverage = attach_modules(model, config)
    save_as_adapter(model, config)
    return coverage


def remember_origin(model: nn.Module, origin: Origin) -> None:
    """Note on a model what its adapters will be said to belong to."""
    object.__setattr__(model, "_lorafit_origin", origin)


def origin_of(model: nn.Module) -> Origin | None:
    """What was noted on a model; None if lorafit did not load it."""
    return getattr(model, "_lorafit_origin", None)


def save_as_adapter(model: nn.Module, config: AdapterConfig) -> None:
    """Let ``model.save_pretrained`` write the adapter that the model has."""
    object.__setattr__(model, "save_pretrained", partial(_save_pretrained, model, config))
    object.__setattr__(model, "load_state_dict", partial(_load_state_dict, model))


def _load_state_dict(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """As torch's method, but that frozen parameters may be missing: they are where they were."""
    result = type(model).load_state_dict(model, state_dict, strict=False, assign=assign)
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    result.missing_keys[:] = [name for name in result.missing_keys if name not in frozen]
    if strict and (result.missing_keys or result.unexpected_keys):
        raise RuntimeError(f"{result.missing_keys} are missing and {result.unexpected_keys} are unexpected")
    return result


def _save_pretrained(
    model: nn.Module,
    config: AdapterConfig,
    save_directory: str | Path,
    *,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    **_: Any,
) -> None:
    """As transformers' method of this name; of its other options, none is about adapters.

    Raises:
        ConfigError: The adapter is to be uploaded.
        AdapterError: What is on disk is not what was trained.
    """
    if push_to_hub:
        raise ConfigError(f"push_to_hub: lorafit uploads nothing; upload {save_directory} once it is written")
    if is_main_process:
        save_adapter(model, save_directory, record_of(model, config))
        if re.fullmatch(_CHECKPOINT, Path(save_directory).name):
            trained = {name: each.detach().cpu() for name, each in model.named_parameters() if each.requires_grad}
            write_tensors(Path(save_directory) / _STATE_FILE, trained, {"format": "pt"})


def record_of(model: nn.Module, config: AdapterConfig) -> AdapterRecord:
    """What an adapter that was trained on this model says about itself."""
    origin = origin_of(model)
    if origin is not None:
        hashes = fingerprint(origin.path), hash_tensors(origin.path)
        return AdapterRecord(config, origin.name, hashes[0], origin.quantize, origin.importance, hashes[1])
    name = str(getattr(model, "name_or_path", ""))
    try:
        return AdapterRecord(config, name, fingerprint(name) if name else "")
    except MissingFileError:  # of a hub, or made from a configuration
        return AdapterRecord(config, name, "")
