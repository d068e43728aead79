"""A directory in Hugging Face's layout: config.json, safetensors, a tokenizer."""

from __future__ import annotations

import json
import logging
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lorafit.adapters.peft import CONFIG_FILE
from lorafit.config import Quantize
from lorafit.containers.gguf import GGUFFile
from lorafit.containers.safetensors import SafetensorsDirectory
from lorafit.containers.stamp import take_stamp
from lorafit.errors import FormatError, ModelError
from lorafit.formats import block_format
from lorafit.models import keymap
from lorafit.models.base import Base
from lorafit.models.configuration import check_experts
from lorafit.models.fuse import fuse
from lorafit.models.problems import raise_problems
from lorafit.models.quantizing import Importance
from lorafit.models.skeleton import empty_model
from lorafit.models.streaming import fill_model

# Where config.json says what an exported model was unpacked from: the file's name and hash, each tensor's format, and
# under "general" what the file says of itself.
ORIGIN = "lorafit_origin"

# Where config.json says which runs were merged into a model: a list of what ``lorafit.merging`` says of each.
MERGED = "lorafit_merged"

# Settings of config.json that change what a model computes or how it is stored, and that lorafit does not carry out.
_UNSUPPORTED = {
    "quantization_config": "lorafit does not read weights that are quantised so; use a GGUF file of the model",
    "auto_map": "it brings its own modelling code, which lorafit does not run",
    "attention_dropout": "lorafit trains without dropout in attention; set it to 0 there",
    "embd_pdrop": "lorafit trains without dropout in the model; set it to 0 there",
    "resid_pdrop": "lorafit trains without dropout in the model; set it to 0 there",
    "use_bidirectional_attention": "lorafit trains models that see only what comes before",
}


def load_directory(
    path: Path,
    dtype: torch.dtype,
    quantize: Quantize | None = None,
    importance: Importance | None = None,
    *,
    mapped: bool = False,
) -> Base:
    """Load a directory.

    A checkpoint that bitsandbytes quantised, one that is to be quantised, and one that is to stay in its files is read
    tensor by tensor (`lorafit.models.streaming`); any other as transformers does.

    Args:
        path: With config.json, safetensors and a tokenizer.
        dtype: Type of all parameters that are not packed.
        quantize: What to quantise the linear layers to.
        importance: How strongly each input of each layer is used, for the search of q4_1 and q5_1.
        mapped: Leave matrices that are not quantised in their files.

    Raises:
        ContainerError: A file is broken.
        ModelError: Something is missing, broken, or not what lorafit can use; or it is quantised already.
    """
    stamp = take_stamp(path)
    fields = read_fields(path)
    if quantize and not is_full_precision(fields):
        raise ModelError(
            f"{path} is quantised already, and rounding it again would lose more; train it as it is, without "
            "--quantize, or quantise the original"
        )
    with _quiet_transformers():
        if mapped or quantize or not is_full_precision(fields):
            model, kept = _stream(path, dtype, quantize, importance, mapped)
        else:
            model, kept = _load_plain(path, dtype), {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:
            raise ModelError(f"{path}: its tokenizer cannot be loaded: {_in_one_line(error)}") from error
    config = model.config
    check_experts(getattr(config, "num_experts_per_tok", 0), getattr(config, "num_experts", 0), str(path))
    _check_finite(path, model)
    fuse(model.requires_grad_(False).eval())
    origin = _quantized_origin(path, fields)
    return Base(model, tokenizer, path, dtype, stamp, quantize=quantize, kept=kept, origin=origin)


def read_fields(path: Path) -> dict[str, Any]:
    """The settings in config.json, if lorafit can carry them out.

    Raises:
        ModelError: There are none, or one of them cannot be.
    """
    config_file = path / "config.json"
    if (path / "adapter").is_dir():
        raise ModelError(f"{path} is a run, but a base is wanted here; give the base")
    if not config_file.is_file():
        raise ModelError(f"{path} is neither a model nor a run: it has no config.json and no adapter/")
    if (path / CONFIG_FILE).is_file():
        raise ModelError(
            f"{path} holds a model and an adapter ({CONFIG_FILE}); move the adapter to a directory of its own, and "
            "give it by --adapter if it is meant"
        )
    try:
        fields = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ModelError(f"{config_file} is not a JSON object")
    keymap.family_of_model(fields.get("model_type"), str(path))
    for name, why in _UNSUPPORTED.items():
        if fields.get(name) and not (name == "quantization_config" and _is_bitsandbytes(fields[name])):
            raise ModelError(f"{config_file} sets {name}: {why}")
    if fields.get("mlp_only_layers") or fields.get("decoder_sparse_step", 1) != 1:
        raise ModelError(
            f"{config_file} has layers without experts among those with them (mlp_only_layers, decoder_sparse_step): "
            "neither llama.cpp nor PEFT knows such models, so lorafit does not train them"
        )
    if not list(path.glob("*.safetensors")):
        raise ModelError(f"{path} holds no .safetensors file; lorafit does not load pickled weights")
    return fields


def is_full_precision(fields: Mapping[str, Any]) -> bool:
    """Whether the weights beside this config.json are numbers that nobody quantised."""
    return not fields.get("quantization_config")


def merges(path: Path) -> list[dict[str, str]]:
    """What was merged into the model in a directory, in that order; nothing for a file."""
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))[MERGED]
        return [{key: str(value) for key, value in merge.items()} for merge in found]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def said_of_itself(path: Path) -> dict[str, Any]:
    """What a GGUF file says in general: name, licence, authors and so on; nothing for a directory."""
    if path.is_dir():
        return {}
    metadata = GGUFFile.open(path).metadata
    said = {key.removeprefix("general."): value for key, value in metadata.items() if key.startswith("general.")}
    of_the_file = ("architecture", "alignment", "file_type", "quantization_version")
    return {key: value for key, value in said.items() if key not in of_the_file and not isinstance(value, np.ndarray)}


def _is_bitsandbytes(settings: object) -> bool:
    return isinstance(settings, dict) and settings.get("quant_method") == "bitsandbytes"


def _quantized_origin(path: Path, fields: Mapping[str, Any]) -> str | None:
    """What the weights are of, if quantised: a file that `lorafit export` unpacked, or numbers of bitsandbytes."""
    if _is_bitsandbytes(fields.get("quantization_config")):
        return f"{path.name} (bitsandbytes)"
    try:
        origin = fields[ORIGIN]
        formats = sorted({name for name in origin["formats"].values() if block_format(name).elements > 1})
        return f"{origin['file']} ({', '.join(formats)})" if formats else None
    except (KeyError, TypeError, AttributeError, FormatError):
        return None


def _stream(
    path: Path, dtype: torch.dtype, quantize: Quantize | None, importance: Importance | None, mapped: bool
) -> tuple[PreTrainedModel, dict[str, str]]:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model = empty_model(config, dtype)
    except Exception as error:
        raise ModelError(f"{path} cannot be loaded: {_in_one_line(error)}") from error
    kept = fill_model(model, SafetensorsDirectory.open(path), dtype, quantize, importance, mapped=mapped)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model, kept


def _load_plain(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        # Differences of shape are let through, to be reported below together with all others.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # of many kinds: transformers', safetensors', Python's
        raise ModelError(f"{path} cannot be loaded: {_in_one_line(error)}") from error
    model, report = loaded
    _check_report(path, report)
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No warnings and bars from transformers inside: what they report is raised as one error, or is no concern."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _in_one_line(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def _check_finite(path: Path, model: PreTrainedModel) -> None:
    """Refuse numbers that are not finite, as of a GGUF file: what a damaged one does would be seen late or never."""
    for name, parameter in model.named_parameters():
        # The extremes need no memory, and one that is not a number is an extreme.
        if not all(extreme.isfinite() for extreme in parameter.aminmax()):
            raise ModelError(f"{path}: {name} holds numbers that are not finite; fetch the model again")


def _check_report(path: Path, report: dict[str, Any]) -> None:
    problems = [f"{name} is missing" for name in report["missing_keys"]]
    problems += [f"{name} is not a weight of this architecture" for name in report["unexpected_keys"]]
    problems += [
        f"{name} has the shape {list(found)}, not {list(expected)}"
        for name, found, expected in report["mismatched_keys"]
    ]
    problems += [str(message) for message in report["error_msgs"]]
    raise_problems(path, sorted(problems))
