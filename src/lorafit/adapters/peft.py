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
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lorafit.adapters.foreign import check_fields, lora_config
from lorafit.adapters.names import target_fields
from lorafit.adapters.parts import parts, present_key
from lorafit.config import AdapterConfig, LoRA, QALoRA, QLoRA, Quantize
from lorafit.containers.atomic import fingerprint, replacing, write_text
from lorafit.containers.identity import hash_tensors
from lorafit.errors import AdapterError, ConfigError, MissingFileError
from lorafit.modules import QALoRALinear, adapter_modules

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OFFSETS_FILE = "qalora_offsets.safetensors"
IMPORTANCE_FILE = "importance.safetensors"
_PICKLED_FILE = "adapter_model.bin"


@dataclass(frozen=True)
class AdapterRecord:
    """What an adapter was trained with.

    Attributes:
        config: Method and settings.
        base: The base as the user named it.
        base_sha256: Its fingerprint; empty for an adapter that lorafit did not write.
        quantize: What the base was quantised to while it was loaded.
        importance: What that weighed its errors by, if by anything: layer -> float32 [in_dim].
        base_tensors_sha256: Hash of the base's tensors, by which it is known; empty as above, and for adapters of an
            earlier version of lorafit.
    """

    config: AdapterConfig
    base: str
    base_sha256: str
    quantize: Quantize | None = None
    importance: Mapping[str, Tensor] | None = None
    base_tensors_sha256: str = ""

    def fits(self, base: Path) -> bool:
        """Whether a base has the tensors that the adapter was trained beside, as far as the adapter says which."""
        if self.base_tensors_sha256:
            return hash_tensors(base) == self.base_tensors_sha256
        return self.base_sha256 in ("", fingerprint(base))


def save_adapter(model: nn.Module, directory: str | Path, record: AdapterRecord) -> None:
    """Write a model's adapter, then read it again and compare.

    Raises:
        AdapterError: What is on disk is not what was trained.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    modules = adapter_modules(model)
    weights = {key: part.get().contiguous().cpu() for key, part in parts(model).items()}
    write_tensors(directory / WEIGHTS_FILE, weights, {"format": "pt", "lorafit": json.dumps(note_of(record))})
    # What another adapter left here would be taken for a part of this one.
    for name in (OFFSETS_FILE, IMPORTANCE_FILE):
        (directory / name).unlink(missing_ok=True)
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
        "base_tensors_sha256": record.base_tensors_sha256,
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
    check_fields(path, fields)
    note = read_note(directory)
    try:
        if note is None:
            return AdapterRecord(lora_config(fields), fields.get("base_model_name_or_path") or "", "")
        kind = {"lora": LoRA, "qlora": QLoRA, "qalora": QALoRA}[note["method"]]
        record = AdapterRecord(
            kind(**note["config"]),
            note["base"],
            note["base_sha256"],
            note.get("quantize"),
            base_tensors_sha256=note.get("base_tensors_sha256", ""),
        )
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
    for key, value in _setting_fields(record.config).items():
        if (fields.get(key, value) or None) != (value or None):
            raise AdapterError(f"{path}: {key} is {fields[key]!r}, but the weights were trained with {value!r}")
    return record


def write_importance(directory: Path, importance: Mapping[str, Tensor]) -> None:
    """Keep what the quantisation of a base weighed its errors by, without which it is not found again."""
    write_tensors(directory / IMPORTANCE_FILE, dict(importance), {"format": "pt"})


def read_importance(directory: Path) -> Mapping[str, Tensor] | None:
    """What ``write_importance`` kept; None if there is nothing."""
    return read_tensors(directory / IMPORTANCE_FILE) if (directory / IMPORTANCE_FILE).exists() else None


def read_offsets_file(directory: str | Path) -> dict[str, Tensor]:
    """The stored offsets m' of a QA-LoRA run: module name -> float16 [out_dim, blocks in a row]."""
    return read_tensors(Path(directory) / OFFSETS_FILE)


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter, by the names that PEFT gives them today.

    Raises:
        MissingFileError: There are none.
        AdapterError: The file is broken, or holds more than one adapter.
    """
    path = weights_file(Path(directory))
    tensors = read_tensors(path) if path.name == WEIGHTS_FILE else _read_pickled(path)
    weights = {present_key(key): tensor for key, tensor in tensors.items()}
    if len(weights) < len(tensors):
        raise AdapterError(f"{path} holds several adapters; save them one by one")
    return weights


def weights_file(directory: Path) -> Path:
    """The file with the tensors of an adapter.

    Raises:
        MissingFileError: There is none.
    """
    found = [path for name in (WEIGHTS_FILE, _PICKLED_FILE) if (path := directory / name).is_file()]
    if not found:
        raise MissingFileError(f"{directory / WEIGHTS_FILE}: no such file; the adapter is not complete")
    return found[0]


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """What PEFT wrote before it wrote safetensors; nothing but tensors is let in."""
    try:
        tensors = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise AdapterError(f"{path} is not a usable file of tensors: {str(error).splitlines()[0]}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise AdapterError(f"{path} is not a usable file of tensors")
    return tensors


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


def _setting_fields(config: AdapterConfig) -> dict[str, Any]:
    """Ranks, scaling and the rest of the settings as PEFT states them.

    It divides by the rank or its root, so a plain factor is multiplied.
    """
    if not isinstance(config, LoRA):
        return {"r": config.rank, "lora_alpha": config.alpha, "use_rslora": False}
    by_rank = config.rank if config.scaling == "plain" else 1
    tokens = {name: list(indices) for name, indices in config.trainable_token_indices.items()}
    return {
        "r": config.rank,
        "lora_alpha": config.alpha * by_rank,
        "use_rslora": config.scaling == "rslora",
        "use_dora": config.dora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {name: alpha * by_rank for name, alpha in config.alpha_pattern.items()},
        "modules_to_save": list(config.modules_to_save) or None,
        "trainable_token_indices": tokens or None,
    }


def peft_fields(record: AdapterRecord, targets: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's configuration; ``targets`` are its fields that say what is adapted."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": record.base,
        **_setting_fields(record.config),
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


def read_note(directory: Path) -> dict[str, Any] | None:
    """What the header of the weights says of an adapter; None if lorafit did not write it.

    Raises:
        MissingFileError: There are no weights.
        AdapterError: They are broken.
    """
    path = weights_file(directory)
    if path.name != WEIGHTS_FILE:
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return json.loads(metadata["lorafit"]) if "lorafit" in metadata else None
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"{path} is not a usable safetensors file: {error}") from None
