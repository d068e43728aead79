"""Adapters in the layout of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

Every adapter is saved as an ordinary LoRA, so that PEFT and whatever reads PEFT's files can load it. A QA-LoRA
adapter is one whose A repeats each column once per weight of a block; what makes it QA-LoRA is said in the header of
the safetensors file, which travels with the weights, under the key ``lorafit``. Beside it lies
``qalora_offsets.safetensors``: the block offsets m' that the run computed with, in half precision and in the row
order of Hugging Face. Merging copies them; they are the trained model, to the last bit. A QA-LoRA run may have plain
LoRA on tensors without offsets; those have no entry there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lorafit.adapters.names import places, read_targets, target_fields
from lorafit.config import AdapterConfig, LoRA, QALoRA, QLoRA, Quantize
from lorafit.containers.atomic import replacing, write_text
from lorafit.errors import AdapterError, ConfigError, MissingFileError
from lorafit.modules import AdapterModule, Coverage, QALoRALinear, adapter_modules, attach

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OFFSETS_FILE = "qalora_offsets.safetensors"
IMPORTANCE_FILE = "importance.safetensors"

_PREFIX = "base_model.model."
_PARTS: tuple[Literal["A"], Literal["B"]] = ("A", "B")

# Fields of PEFT's configuration that are read, or that say nothing about what a trained adapter computes.
_HARMLESS = frozenset((
    "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "target_parameters", "base_model_name_or_path",
    "revision", "task_type", "inference_mode", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
))  # fmt: skip

# Any other field must say nothing, so that a variant of LoRA that is yet to be invented is refused too. These may say
# what lorafit computes. (Other initialisations, such as PiSSA, change the base, and the adapter fits that one only.)
_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class AdapterRecord:
    """What an adapter was trained with.

    Attributes:
        config: Method and settings.
        base: The base as the user named it.
        base_sha256: Its fingerprint; empty for an adapter that lorafit did not write.
        quantize: What the base was quantised to while it was loaded.
        importance: What that weighed its errors by, if by anything: layer -> float32 [in_dim].
    """

    config: AdapterConfig
    base: str
    base_sha256: str
    quantize: Quantize | None = None
    importance: Mapping[str, Tensor] | None = None


def save_adapter(model: nn.Module, directory: str | Path, record: AdapterRecord) -> None:
    """Write a model's adapter, then read it again and compare.

    Raises:
        AdapterError: What is on disk is not what was trained.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    modules = adapter_modules(model)
    weights: dict[str, Tensor] = {}
    for name, place in places(modules).items():
        a, b = modules[name].lora_factors()
        weights[f"{_PREFIX}{place}.lora_A.weight"] = a.contiguous().cpu()
        weights[f"{_PREFIX}{place}.lora_B.weight"] = b.contiguous().cpu()
    write_tensors(directory / WEIGHTS_FILE, weights, {"format": "pt", "lorafit": json.dumps(note_of(record))})
    if isinstance(record.config, QALoRA):
        offsets = {
            name: module.merged_offsets().cpu() for name, module in modules.items() if isinstance(module, QALoRALinear)
        }
        write_tensors(directory / OFFSETS_FILE, offsets, {"format": "pt", "base_sha256": record.base_sha256})
    if record.importance:
        write_importance(directory, record.importance)
    write_text(directory / CONFIG_FILE, json.dumps(peft_fields(record, target_fields(model)), indent=2) + "\n")


def note_of(record: AdapterRecord) -> dict[str, Any]:
    """What the header of the weights says of an adapter."""
    return {
        "method": record.config.method,
        "config": asdict(record.config),
        "base": record.base,
        "base_sha256": record.base_sha256,
        "quantize": record.quantize,
        "importance": bool(record.importance),
    }


def read_record(directory: str | Path) -> AdapterRecord:
    """What an adapter directory says about itself, without loading weights.

    Raises:
        MissingFileError: There is no adapter.
        AdapterError: It is of a kind that lorafit cannot represent.
    """
    directory = Path(directory)
    path = directory / CONFIG_FILE
    fields = read_fields(path)
    for key, value in fields.items():
        if key not in _HARMLESS and value not in _PLAIN.get(key, _NOTHING):
            raise AdapterError(f"{path}: {key} = {value!r} is not supported by lorafit")
    note = _read_note(directory / WEIGHTS_FILE)
    try:
        if note is None:
            return AdapterRecord(_foreign_config(fields), fields.get("base_model_name_or_path") or "", "")
        kind = {"lora": LoRA, "qlora": QLoRA, "qalora": QALoRA}[note["method"]]
        record = AdapterRecord(kind(**note["config"]), note["base"], note["base_sha256"], note.get("quantize"))
        if record.quantize not in (None, *get_args(Quantize)):
            raise AdapterError(f"{directory}: its base was quantised to {record.quantize!r}, which is unknown")
        record = replace(record, importance=read_importance(directory))
        if note.get("importance") and not record.importance:
            raise AdapterError(
                f"{directory}: {IMPORTANCE_FILE} is missing, by which its base was quantised; put it back"
            )
    except ConfigError as error:
        raise AdapterError(f"{directory}: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise AdapterError(f"{directory} does not describe an adapter that lorafit can read") from None
    for key, value in _scaling_fields(record.config).items():
        if fields.get(key, value) != value:
            raise AdapterError(f"{path}: {key} is {fields[key]!r}, but the weights were trained with {value!r}")
    return record


def write_importance(directory: Path, importance: Mapping[str, Tensor]) -> None:
    """Keep what the quantisation of a base weighed its errors by, without which it is not found again."""
    write_tensors(directory / IMPORTANCE_FILE, dict(importance), {"format": "pt"})


def read_importance(directory: Path) -> Mapping[str, Tensor] | None:
    """What ``write_importance`` kept; None if there is nothing."""
    return read_tensors(directory / IMPORTANCE_FILE) if (directory / IMPORTANCE_FILE).exists() else None


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
    weights = read_tensors(directory / WEIGHTS_FILE)
    coverage = attach(model, record.config)
    modules = adapter_modules(model)
    keys = {name: f"{_PREFIX}{place}.lora_%s.weight" for name, place in places(modules).items()}
    expected = {key % part for key in keys.values() for part in _PARTS}
    problems = [f"{key} is missing" for key in sorted(expected - weights.keys())]
    problems += [f"{key} is unexpected" for key in sorted(weights.keys() - expected)]
    for name, module in modules.items():
        for part in _PARTS:
            key = keys[name] % part
            if key in weights:
                problem = _set_factor(module, part, weights[key])
                problems += [f"{key} {problem}"] if problem else []
    if hold_offsets and isinstance(record.config, QALoRA):
        problems += _hold_offsets(modules, read_offsets_file(directory))
    if problems:
        rest = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AdapterError(f"{directory} does not fit the model: {'; '.join(problems[:5])}{rest}")
    return record, coverage


def read_offsets_file(directory: str | Path) -> dict[str, Tensor]:
    """The stored offsets m' of a QA-LoRA run: module name -> float16 [out_dim, blocks in a row]."""
    return read_tensors(Path(directory) / OFFSETS_FILE)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        MissingFileError: There is none.
        AdapterError: It is broken.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; the adapter is not complete")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise AdapterError(f"{path} is not a usable safetensors file: {error}") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file so that it appears whole, and compare it with what was to be written.

    Raises:
        AdapterError: They differ.
    """
    with replacing(path) as temporary:
        # Not by safetensors' own writer, which gives a full disk a type of its own and files to their owner alone.
        temporary.write_bytes(_in_order(save(tensors, metadata)))
        written = read_tensors(temporary)
        if written.keys() != tensors.keys() or not all(torch.equal(written[key], tensors[key]) for key in tensors):
            raise AdapterError(f"{path}: what was written is not what was trained; check the disk")


def _in_order(serialized: bytes) -> bytes:
    """The same safetensors file with its metadata sorted: safetensors orders them by chance, and bytes should not."""
    start = 8 + int.from_bytes(serialized[:8], "little")
    header = json.loads(serialized[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + serialized[start:]


def _set_factor(module: AdapterModule, part: Literal["A", "B"], value: Tensor) -> str | None:
    """Copy a saved factor into a module; returns what is wrong with it, if anything."""
    expected = list(module.lora_factors()[_PARTS.index(part)].shape)
    if list(value.shape) != expected:
        return f"has the shape {list(value.shape)}, not {expected}"
    if not bool(torch.isfinite(value).all()):
        return "holds numbers that are not finite"
    try:
        module.set_lora_factor(part, value)
    except AdapterError as error:
        return str(error)
    return None


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


def _scaling_fields(config: AdapterConfig) -> dict[str, Any]:
    """Rank and scaling as PEFT states them; it divides by the rank or its root, so a plain factor is multiplied."""
    scaling = config.scaling if isinstance(config, LoRA) else "standard"
    alpha = config.alpha * config.rank if scaling == "plain" else config.alpha
    return {"r": config.rank, "lora_alpha": alpha, "use_rslora": scaling == "rslora"}


def _foreign_config(fields: Mapping[str, Any]) -> LoRA:
    """What an adapter that lorafit did not write was trained with."""
    return LoRA(
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        scaling="rslora" if fields.get("use_rslora") else "standard",
        dropout=fields.get("lora_dropout") or 0.0,
        targets=read_targets(fields),
    )


def peft_fields(record: AdapterRecord, targets: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's configuration; ``targets`` are its fields that say what is adapted."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": record.base,
        **_scaling_fields(record.config),
        "lora_dropout": record.config.dropout if isinstance(record.config, LoRA) else 0.0,
        **targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def read_fields(path: Path) -> dict[str, Any]:
    """PEFT's configuration of an adapter.

    Raises:
        MissingFileError: There is none.
        AdapterError: It is broken.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; is {path.parent} an adapter?")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fits = isinstance(fields["r"], int) and isinstance(fields["lora_alpha"], int | float)
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise AdapterError(f"{path} is not the configuration of a LoRA adapter") from None
    return fields


def _read_note(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; the adapter is not complete")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return json.loads(metadata["lorafit"]) if "lorafit" in metadata else None
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"{path} is not a usable safetensors file: {error}") from None
