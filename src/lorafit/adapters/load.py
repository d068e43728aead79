"""An adapter from a directory onto a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafit.adapters.parts import parts, place_in_base
from lorafit.adapters.peft import AdapterRecord, read_offsets_file, read_record, read_weights
from lorafit.adapters.pretrained import save_as_adapter
from lorafit.config import QALoRA
from lorafit.errors import AdapterError, ConfigError
from lorafit.modules import AdapterModule, Coverage, QALoRALinear, adapter_modules, attach
from lorafit.modules.packed import is_embedding, is_linear
from lorafit.modules.whole import dense_weight


def load_adapter(
    model: nn.Module, directory: str | Path, *, hold_offsets: bool = True
) -> tuple[AdapterRecord, Coverage]:
    """Attach the adapter in a directory to the base that it was trained on.

    Args:
        model: The base.
        directory: Where the adapter lies.
        hold_offsets: Compute with the offsets that the run stored, as is wanted for everything but training on.

    Raises:
        MissingFileError: A file is missing.
        AdapterError: The adapter does not fit the model; one error for all missing, unexpected and misshapen tensors.
    """
    directory = Path(directory)
    record = read_record(directory)
    weights = read_weights(directory)
    try:
        coverage = attach(model, record.config)
    except (AdapterError, ConfigError) as error:
        raise AdapterError(f"{directory} does not fit the model: {error}") from None
    expected = parts(model)
    problems = [f"{key} is missing" for key in sorted(expected.keys() - weights.keys())]
    for key in sorted(weights.keys() - expected.keys()):
        if not _is_of_base(model, key, weights[key]):
            problems.append(f"{key} is unexpected")
    for key, part in expected.items():
        problem = part.set(weights[key]) if key in weights else None
        problems += [f"{key} {problem}"] if problem else []
    modules = adapter_modules(model)
    if hold_offsets and isinstance(record.config, QALoRA):
        problems += _hold_offsets(modules, read_offsets_file(directory))
    save_as_adapter(model, record.config)
    if problems:
        rest = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AdapterError(f"{directory} does not fit the model: {'; '.join(problems[:5])}{rest}")
    return record, coverage


def _is_of_base(model: nn.Module, key: str, value: Tensor) -> bool:
    """Whether a tensor is a copy of the base's own, as PEFT adds them to adapters of embeddings and heads.

    Raises:
        AdapterError: It is a copy from another base.
    """
    place = place_in_base(key)
    if place is None:
        return False
    module: nn.Module
    try:
        module = model.get_submodule(place[0])
    except AttributeError:
        return False
    module = module.base if isinstance(module, AdapterModule) else module
    if place[1] != "weight" or not (is_linear(module) or is_embedding(module)):
        return False
    if torch.equal(dense_weight(module).to(value.dtype), value):
        return True
    raise AdapterError(
        f"{key} is a copy of the base's own weight, and not that of this base: the adapter is for another one, or was "
        "trained with a changed vocabulary; if neither, save it with PEFT's save_embedding_layers=False"
    )


def _hold_offsets(modules: Mapping[str, AdapterModule], stored: Mapping[str, Tensor]) -> list[str]:
    """Let every QA-LoRA module compute with its stored offsets; returns what is wrong with them."""
    takers = {name: module for name, module in modules.items() if isinstance(module, QALoRALinear)}
    problems = [f"offsets of {name} are unexpected" for name in sorted(stored.keys() - takers.keys())]
    for name, module in takers.items():
        offsets = stored.get(name)
        if offsets is None:
            problems.append(f"offsets of {name} are missing")
        elif offsets.dtype != torch.float16 or offsets.shape != module.offsets.shape:
            found, expected = list(offsets.shape), list(module.offsets.shape)
            problems.append(f"offsets of {name} are {offsets.dtype} {found}, not torch.float16 {expected}")
        else:
            module.hold(offsets.to(module.offsets.device))
    return problems
