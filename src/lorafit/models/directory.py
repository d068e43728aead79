"""A directory in Hugging Face's layout: config.json, safetensors, a tokenizer. transformers' own loader reads it."""

from __future__ import annotations

import json
import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from lorafit.containers.stamp import take_stamp
from lorafit.errors import ModelError
from lorafit.models import keymap
from lorafit.models.base import Base
from lorafit.models.problems import raise_problems

# Settings of config.json that change what a model computes or how it is stored, and that lorafit does not carry out.
_UNSUPPORTED = {
    "quantization_config": "lorafit does not read weights that are quantised so; use a GGUF file of the model",
    "auto_map": "it brings its own modelling code, which lorafit does not run",
    "attention_dropout": "lorafit trains without dropout in attention; set it to 0 there",
}


def load_directory(path: Path, dtype: torch.dtype) -> Base:
    """Load a directory as transformers does.

    Args:
        path: With config.json, safetensors and a tokenizer.
        dtype: Type of all parameters.

    Raises:
        ModelError: Something is missing, broken, or not what lorafit can use.
    """
    stamp = take_stamp(path)
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelError(f"{path} is neither a model nor a run: it has no config.json and no adapter/")
    try:
        fields = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ModelError(f"{config_file} is not a JSON object")
    keymap.family_of_model(fields.get("model_type"), str(path))
    for name, why in _UNSUPPORTED.items():
        if fields.get(name):
            raise ModelError(f"{config_file} sets {name}: {why}")
    if not list(path.glob("*.safetensors")):
        raise ModelError(f"{path} holds no .safetensors file; lorafit does not load pickled weights")
    with _quiet_transformers():
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
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:
            raise ModelError(f"{path}: its tokenizer cannot be loaded: {_in_one_line(error)}") from error
    return Base(model.requires_grad_(False).eval(), tokenizer, path, dtype, stamp)


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


def _check_report(path: Path, report: dict[str, Any]) -> None:
    problems = [f"{name} is missing" for name in report["missing_keys"]]
    problems += [f"{name} is not a weight of this architecture" for name in report["unexpected_keys"]]
    problems += [
        f"{name} has the shape {list(found)}, not {list(expected)}"
        for name, found, expected in report["mismatched_keys"]
    ]
    problems += [str(message) for message in report["error_msgs"]]
    raise_problems(path, sorted(problems))
