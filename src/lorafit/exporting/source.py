"""What a GGUF file is to be made of: metadata, and tensors that come some rows at a time.

A model from a directory is asked for its tensors by the names of transformers, and `lorafit.models.keymap` and
`configuration`, which read GGUF files, say what they are called there, how their rows lie and what the metadata are. A
model from a GGUF file is taken as it lies there: its metadata as bytes, and tensors that keep their format, too. Of a
run, the tensors that its adapter changes take the place of its base's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lorafit.adapters.peft import CONFIG_FILE
from lorafit.containers.gguf import GGUFFile
from lorafit.containers.gguf_new import Raw, Value
from lorafit.containers.mapped import release
from lorafit.errors import ModelError
from lorafit.formats import dequantize
from lorafit.merging.run import Run, detect
from lorafit.merging.weights import merged_tensors
from lorafit.models import keymap
from lorafit.models.base import Base
from lorafit.models.configuration import metadata_of
from lorafit.models.directory import ORIGIN
from lorafit.models.families import Family
from lorafit.models.load import load_base
from lorafit.models.unpacked import Unpacked, unpacked_tensors
from lorafit.models.vocabulary import vocabulary

_PIECE_WEIGHTS = 1 << 19
_PHI3 = re.compile("(phi)-?3", re.IGNORECASE)
# What is said of a file that this one no longer is, or that the writer says itself.
_NOT_PASSED_ON = re.compile(r"general\.(architecture|alignment|file_type|quantization_version)|split\.|quantize\.")


@dataclass(frozen=True)
class Model:
    """What is exported.

    Attributes:
        base: A model in float32, for a run its base with the adapter on it.
        tensors: Name in transformers' checkpoints -> tensor; those of the merged model for a run.
        changed: Names of those that differ from the base's.
        run: The run; None for a model without an adapter.
    """

    base: Base
    tensors: Mapping[str, Unpacked]
    changed: frozenset[str] = frozenset()
    run: Run | None = None

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.run.path if self.run else self.base.path


def open_model(model: str | Path) -> Model:
    """Load a model, its matrices mapped.

    Args:
        model: A .gguf file, ``smollm2-135m``, a directory, a run, or an adapter that comes without one.

    Raises:
        LorafitError: As for loading it.
    """
    path = Path(model)
    is_adapter = (path / CONFIG_FILE).is_file() and not (path / "config.json").is_file()
    if not is_adapter and not (path / "adapter").is_dir():
        base = load_base(model, compute="fp32", mapped=True)
        return Model(base, unpacked_tensors(base.model))
    run = detect(model)
    base = run.load_base("fp32")
    tensors, changed = merged_tensors(base.model, run.adapter)
    return Model(base, tensors, frozenset(changed), run)


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the file that is to be written.

    Attributes:
        shape: Its shape there.
        format: The block format that its numbers were in before; None if that says nothing of them.
        values: Gives its rows, float32 [n, width] at a time, in the order of the file.
        blocks: Gives them as they lie in a GGUF file, uint8 [n, row_bytes] at a time; None if they do not.
        before: Of a tensor that an adapter updates, what it is in the base's file, uint8 [rows, row_bytes], mapped.
    """

    shape: tuple[int, ...]
    format: str | None
    values: Callable[[], Iterator[Tensor]]
    blocks: Callable[[], Iterator[Tensor]] | None = None
    before: Tensor | None = None


@dataclass(frozen=True)
class Source:
    """A model that is to be written.

    Attributes:
        metadata: Key -> value, but for what follows from the type.
        tensors: Name in the file -> tensor, in the order of the file.
        differences: Texts that llama.cpp tokenises otherwise than the model's own tokenizer.
    """

    metadata: dict[str, Value]
    tensors: dict[str, SourceTensor]
    differences: tuple[str, ...]


def source_of(model: Model) -> Source:
    """What the file of a model is made of.

    Raises:
        ModelError: GGUF or llama.cpp has no such model, or no such tokenizer.
    """
    if model.base.path.is_dir():
        return _from_checkpoint(model)
    file = GGUFFile.open(model.base.path)  # which lorafit has loaded, and so found sound
    metadata: dict[str, Value] = {"general.architecture": file.metadata["general.architecture"]}
    metadata |= {key: Raw(file.raw_value(key)) for key in file.metadata if not _NOT_PASSED_ON.match(key)}
    tensors = {name: _of_file(file, name) for name in file.tensors}
    if model.changed:
        changed = _by_file_names({name: model.tensors[name] for name in model.tensors if name in model.changed}, model)
        tensors |= {
            name: replace(tensor, before=file.blocks(name)) if tensor.format == file.tensors[name].format else tensor
            for name, tensor in changed.items()
        }
    return Source(metadata, tensors, ())


def _of_file(file: GGUFFile, name: str) -> SourceTensor:
    info = file.tensors[name]

    def blocks() -> Iterator[Tensor]:
        for piece in file.blocks(name).split(max(_PIECE_WEIGHTS // info.shape[-1], 1)):
            yield piece
            release(piece)

    def values() -> Iterator[Tensor]:
        for piece in blocks():
            yield dequantize(piece, info.format, (len(piece), info.shape[-1]))

    return SourceTensor(info.shape, info.format, values, blocks)


def _from_checkpoint(model: Model) -> Source:
    base = model.base
    config: Any = base.model.config
    general = _general(base)
    name = str(general["general.name"])
    architecture, factors = metadata_of(config)
    words = vocabulary(base.tokenizer, config.vocab_size, str(base.path))
    # By this name llama.cpp knows that special tokens swallow white space; with other tokens it would not load.
    if words.swallows and not _PHI3.search(name):
        general["general.name"] = f"Phi-3 {name}"
    elif not words.swallows:
        general["general.name"] = _PHI3.sub(r"\1 3", name)
    found = {key: _of_factors(values) for key, values in factors.items()} | _by_file_names(model.tensors, model)
    in_order = sorted(found, key=_place)
    size = {f"{architecture['general.architecture']}.vocab_size": config.vocab_size}
    metadata = architecture | general | size | words.metadata
    return Source(metadata, {key: found[key] for key in in_order}, words.differences)


def _by_file_names(tensors: Mapping[str, Unpacked], model: Model) -> dict[str, SourceTensor]:
    config: Any = model.base.model.config
    family = keymap.family_of_model(config.model_type, str(model.base.path))
    found = {}
    for key, group in _grouped(tensors).items():
        name = keymap.gguf_name(key, family)
        if name is None:
            raise ModelError(f"{model.path}: GGUF has no place for {key} in the {family.architecture} family")
        found[name] = _of_group(key, group, family, config)
    return found


def _of_factors(values: Tensor) -> SourceTensor:
    return SourceTensor(tuple(values.shape), None, lambda: iter([values.reshape(1, -1)]))


def _grouped(tensors: Mapping[str, Unpacked]) -> dict[str, list[Unpacked]]:
    """The experts' matrices of a layer under one name, as GGUF has them."""
    groups: dict[str, list[Unpacked]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(tensor)
    return groups


def _of_group(name: str, group: list[Unpacked], family: Family, config: Any) -> SourceTensor:
    def values() -> Iterator[Tensor]:
        for tensor in group:
            _, rows = keymap.to_file(name, tensor.values(torch.float32), family, config)
            rows = rows.reshape(-1, rows.shape[-1])
            yield from rows.split(max(_PIECE_WEIGHTS // rows.shape[-1], 1))

    is_stack = ".experts." in name
    return SourceTensor((len(group), *group[0].shape) if is_stack else group[0].shape, group[0].format, values)


def _place(name: str) -> tuple[int, int, str]:
    """Where a tensor stands: the embedding, the layers, what follows them."""
    if name.startswith("blk."):
        return 1, int(name.split(".")[1]), name
    return (0, 0, name) if name.startswith(("token_embd", "rope")) else (2, 0, name)


def _general(base: Base) -> dict[str, Value]:
    """What the file says of itself: what the file did that the directory was unpacked from, and the model card."""
    found: dict[str, Value] = {"general.type": "model", "general.name": base.path.resolve().name}
    origin = getattr(base.model.config, ORIGIN, None)
    said = origin.get("general") if isinstance(origin, dict) else None
    for key, value in (said if isinstance(said, dict) else {}).items():
        if isinstance(value, str | bool | int | float) or (
            isinstance(value, list) and all(isinstance(each, str) for each in value)
        ):
            found[f"general.{key}"] = value
    return found | _card(base)


def _card(base: Base) -> dict[str, Value]:
    """What a directory's model card says: the licence, the languages, and which model it comes from."""
    card = base.path / "README.md"
    try:
        text = card.read_text(encoding="utf-8")
        said = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        said = {}
    said = said if isinstance(said, dict) else {}
    found: dict[str, Value] = {}
    for key, name in (("license", "license"), ("license_name", "license.name"), ("license_link", "license.link")):
        if isinstance(said.get(key), str):
            found[f"general.{name}"] = said[key]
    languages = said.get("language")
    languages = [languages] if isinstance(languages, str) else languages
    if isinstance(languages, list) and all(isinstance(each, str) for each in languages):
        found["general.languages"] = languages
    models = said.get("base_model")
    models = [models] if isinstance(models, str) else models
    if isinstance(models, list) and all(isinstance(each, str) for each in models):
        found["general.base_model.count"] = len(models)
        for i, each in enumerate(models):
            found |= {f"general.base_model.{i}.name": each.rpartition("/")[2]}
            if each.count("/") == 1:
                found |= {f"general.base_model.{i}.organization": each.split("/")[0]}
    return found


def parameters(source: Source) -> int:
    """How many numbers the tensors have."""
    return sum(math.prod(tensor.shape) for tensor in source.tensors.values())
