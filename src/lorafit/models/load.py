"""From a name, file or directory to a model that is ready to train, and its tokenizer."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafit.adapters import AdapterRecord, load_adapter, read_record
from lorafit.adapters.belonging import check_base, quantization_of
from lorafit.adapters.peft import CONFIG_FILE
from lorafit.adapters.pretrained import Origin, remember_origin
from lorafit.config import Compute, Quantize
from lorafit.containers.gguf import GGUFFile
from lorafit.containers.stamp import take_stamp
from lorafit.errors import ConfigError, MissingFileError, ModelError
from lorafit.formats import block_format
from lorafit.models import directory, keymap
from lorafit.models.base import Base
from lorafit.models.gguf import model_from_gguf
from lorafit.models.longrope import settle_rotary
from lorafit.models.pull import EMBEDDED, pull
from lorafit.models.quantizing import BLOCK_FORMATS, Importance, quantize_model
from lorafit.models.tokenizer import tokenizer_from_gguf
from lorafit.modules import PackedWeight


def load(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    compute: Compute = "auto",
    quantize: Quantize | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model, with an adapter if there is one.

    Args:
        model: ``smollm2-135m``, a .gguf file, a Hugging Face directory, the directory of a run, or that of an adapter
            whose base is where the adapter says.
        adapter: An adapter for this base: a directory that PEFT or lorafit wrote, or a run.
        compute: Arithmetic; ``auto`` is bf16 where the processor multiplies it in hardware, else fp32.
        quantize: Quantise the linear layers of a full-precision base to this while it is loaded. A run knows how its
            base was quantised.

    Returns:
        The model in evaluation mode and its tokenizer.

    Raises:
        ConfigError: A run is to be quantised otherwise than it was trained, or to get another adapter.
        MissingFileError: Nothing is there, or the base of the run has gone.
        ContainerError: The file is broken.
        ModelError: The architecture or a tensor is not one that lorafit can use.
        AdapterError: The adapter does not fit its base, or another base lies where its own was.

    Warns:
        LorafitWarning: Nothing but the shapes of its tensors says that the adapter was trained on this base.
    """
    if adapter is not None and is_adapted(model):
        raise ConfigError(f"{model} has an adapter of its own; give the base, or leave out the other adapter")
    if adapter is not None:
        base = load_adapted(adapter, model, compute=compute, quantize=quantize)[0]
    elif not is_adapted(model):
        base = load_base(model, compute=compute, quantize=quantize)
    elif quantize:
        raise ConfigError(f"{model} says itself how its base is quantised; leave quantize out")
    else:
        base = load_adapted(model, compute=compute)[0]
    return base.model, base.tokenizer


def is_adapted(model: str | Path) -> bool:
    """Whether this is a run, or an adapter without its base."""
    path = Path(model)
    return (path / "adapter").is_dir() or ((path / CONFIG_FILE).is_file() and not (path / "config.json").is_file())


def load_adapted(
    directory: str | Path,
    base_model: str | Path | None = None,
    *,
    compute: Compute = "auto",
    quantize: Quantize | None = None,
) -> tuple[Base, AdapterRecord]:
    """Load the base that an adapter was trained on, quantised as it was then, with the adapter attached.

    Args:
        directory: Of a run, or of an adapter alone.
        base_model: The base; by default what the adapter names.
        compute: Arithmetic.
        quantize: What a full-precision base is quantised to, if the adapter does not say that.

    Raises:
        LorafitError: As for :func:`load`.
    """
    inner = Path(directory) / "adapter"
    adapter = inner if inner.is_dir() else Path(directory)
    record = read_record(adapter)
    if base_model is None:
        base_model = record.base
        if base_model not in EMBEDDED and not (base_model and Path(base_model).exists()):
            raise MissingFileError(
                f"{directory} is an adapter for {base_model or 'a base that it does not name'}, which is not here; say "
                "where it is, as BASE with --adapter"
            )
    how = quantization_of(record, quantize, directory)
    base = load_base(base_model, compute=compute, quantize=how, importance=record.importance)
    check_base(record, base.path, directory)
    load_adapter(base.model, adapter)
    return base, record


def load_base(
    model: str | Path,
    *,
    compute: Compute = "auto",
    quantize: Quantize | None = None,
    importance: Importance | None = None,
    mapped: bool = False,
) -> Base:
    """Load a base model.

    Args:
        model: ``smollm2-135m``, a .gguf file, or a Hugging Face directory.
        compute: Arithmetic; ``auto`` is bf16 where the processor multiplies it in hardware, else fp32.
        quantize: Quantise the linear layers of a full-precision base to this.
        importance: How strongly each input of each layer is used, for the search of q4_1 and q5_1: full name of the
            layer -> [in_dim]. None weighs all inputs alike.
        mapped: Leave the matrices of a directory in its files, as those of a GGUF file are, where they are not
            quantised: in the type that they have there, and without memory of their own.

    Raises:
        ConfigError: There is no such quantisation, or it fits no layer; or no such arithmetic.
        MissingFileError: Nothing is there.
        ContainerError: The file is broken.
        ModelError: The architecture or a tensor is not one that lorafit can use.
    """
    if quantize is not None and quantize not in BLOCK_FORMATS:
        raise ConfigError(f"quantize is {quantize!r}, but must be one of {', '.join(BLOCK_FORMATS)}")
    base = _load_base(model, compute, quantize, importance, mapped)
    name = str(model) if str(model) in EMBEDDED else os.path.abspath(base.path)
    remember_origin(base.model, Origin(name, base.path, quantize, importance))
    return base


def _load_base(
    model: str | Path, compute: Compute, quantize: Quantize | None, importance: Importance | None, mapped: bool
) -> Base:
    path = resolve(model)
    dtype = compute_dtype(compute)
    _settle_sines()
    if path.is_dir():
        base = directory.load_directory(path, dtype, quantize, importance, mapped=mapped)
        settle_rotary(base.model, str(path))
        _check_effect(base)
        return base
    stamp = take_stamp(path)
    file = GGUFFile.open(path)
    licence = str(file.metadata.get("general.license", "not stated"))
    keymap.family_of_file(file.metadata, str(path))  # of an unknown one, read nothing else
    tokenizer = tokenizer_from_gguf(file)
    if quantize and not _is_full_precision(file):
        raise ModelError(
            f"{path} is quantised already; train it as it is, without --quantize, or unpack it by "
            f"`lorafit export {path} DIRECTORY --format safetensors` and quantise that a second time"
        )
    base = Base(model_from_gguf(file, tokenizer, dtype), tokenizer, path, dtype, stamp, licence)
    if quantize is None:
        return base
    base = replace(base, quantize=quantize, kept=quantize_model(base.model, quantize, path, importance))
    _check_effect(base)
    return base


def _check_effect(base: Base) -> None:
    """Refuse a quantisation that left every layer as it was."""
    if base.quantize is None:
        return
    wanted = BLOCK_FORMATS[base.quantize]
    if not any(isinstance(part, PackedWeight) and part.format_name == wanted for part in base.model.modules()):
        name, why = next(iter(base.kept.items()))
        raise ConfigError(
            f"--quantize {base.quantize} has no effect on {base.path}, of which no layer can be quantised so ({name}: "
            f"{why}); leave it out, or choose one that fits"
        )


def is_full_precision(model: str | Path) -> bool:
    """Whether a base can be quantised while it is loaded, told by its header alone.

    Raises:
        LorafitError: As for loading it.
    """
    path = resolve(model)
    if path.is_dir():
        return directory.is_full_precision(directory.read_fields(path))
    return _is_full_precision(GGUFFile.open(path))


def _is_full_precision(file: GGUFFile) -> bool:
    """Told by its layers: the embedding and the head, which stay as they are, may be quantised."""
    matrices = (info for info in file.tensors.values() if info.name.startswith("blk.") and len(info.shape) > 1)
    return all(block_format(info.format).elements == 1 for info in matrices)


def compute_dtype(compute: Compute) -> torch.dtype:
    """The arithmetic type that ``--compute`` names on this machine."""
    if compute == "auto":
        return torch.bfloat16 if _multiplies_bf16() else torch.float32
    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if compute not in types:
        raise ConfigError(f"compute is {compute!r}, but must be one of auto, {', '.join(types)}")
    return types[compute]


def _settle_sines() -> None:
    """Use the sine and the cosine once, in one thread.

    MKL chooses how to compute them when they are first used. When several threads are first together, which for the
    rotary embedding they are, one of them may get a coarse version that is off by 1e-4: in about one process of a
    hundred, the first forward pass differs from all later ones.
    """
    torch.ones(1).sin()
    torch.ones(1).cos()


def _multiplies_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def resolve(model: str | Path) -> Path:
    """Where a model lies; an embedded one is fetched.

    Raises:
        MissingFileError: Nothing is there.
        DownloadError: It could not be fetched.
    """
    if str(model) in EMBEDDED:
        return pull(str(model))
    path = Path(model)
    if not path.exists():
        names = ", ".join(EMBEDDED)
        raise MissingFileError(
            f"{model}: no such model; give a .gguf file, a directory of safetensors, a run, or one of: {names}"
        )
    return path
