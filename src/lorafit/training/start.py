"""A run that goes on training an adapter: what the adapter says holds, and settings that say otherwise are refused."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lorafit.adapters import AdapterRecord, read_record
from lorafit.adapters.belonging import quantization_of
from lorafit.adapters.updates import adapter_directory
from lorafit.config import TrainConfig
from lorafit.errors import ConfigError

# Settings that an adapter was trained with, by their names in its own record.
_OWN = ("method", "rank", "alpha", "scaling", "dropout", "targets", "dora", "frozen_tensors")


def start_of(config: TrainConfig) -> tuple[TrainConfig, AdapterRecord | None]:
    """The settings with those of the adapter that the run starts from, and what is known about it, if there is one.

    Raises:
        MissingFileError: There is no such adapter.
        AdapterError: It is of a kind that lorafit cannot represent.
        ConfigError: A setting contradicts the adapter.
    """
    if config.adapter is None:
        return config, None
    directory = adapter_directory(config.adapter)
    record = read_record(directory)
    defaults = {field.name: field.default for field in fields(config)}
    own: dict[str, Any] = {name: getattr(record.config, name, defaults[name]) for name in _OWN}
    for name, value in own.items():
        asked = getattr(config, name)
        if asked != defaults[name] and asked != value:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} {asked}: the adapter in {config.adapter} has {value}, and keeps it; leave it out"
            )
    if config.importance_rows and record.base_sha256:
        raise ConfigError(
            f"--importance-rows {config.importance_rows} has no effect on the base of the adapter in {config.adapter}, "
            "which is quantised as it was; leave it out"
        )
    own["quantize"] = quantization_of(record, config.quantize, config.adapter)
    return replace(config, **own), record


def start_directory(config: TrainConfig) -> Path | None:
    """Where the adapter lies that a run starts from."""
    return None if config.adapter is None else adapter_directory(config.adapter)
