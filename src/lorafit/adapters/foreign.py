"""PEFT's configuration of an adapter, as ``lorafit.config.LoRA`` says the same; what cannot be said is refused.

PEFT tells which modules are adapted by ``target_modules``, minus ``exclude_modules``, in the blocks of
``layers_to_transform``. Here that is one regular expression over full names. ``bias``, ``lora_bias``,
``fan_in_fan_out``, ``layer_replication`` and the variants of LoRA that compute something else are not supported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafit.config import LoRA
from lorafit.errors import AdapterError

# Fields that are read, or that say nothing about what a trained adapter computes.
_HARMLESS = frozenset((
    "r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout", "rank_pattern", "alpha_pattern", "target_modules",
    "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "trainable_token_indices", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
))  # fmt: skip

# Any other field must say nothing, so that a variant of LoRA that is yet to be invented is refused too. These may say
# what lorafit computes. (Other initialisations, such as PiSSA, change the base, and the adapter fits that one only.)
_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
_REMEDIES = {
    "init_lora_weights": "it changed the base; PEFT makes an ordinary LoRA of it by save_pretrained with "
    "path_initial_model_for_weight_conversion",
    "task_type": "lorafit trains language models",
}


def check_fields(path: Path, fields: Mapping[str, Any]) -> None:
    """Refuse what lorafit does not compute.

    Raises:
        AdapterError: The first such field, by name.
    """
    for key, value in fields.items():
        if key not in _HARMLESS and value not in _PLAIN.get(key, _NOTHING):
            remedy = f": {_REMEDIES[key]}" if key in _REMEDIES else ""
            raise AdapterError(f"{path}: {key} = {value!r} is not supported by lorafit{remedy}")
    if not (fields.get("target_modules") or fields.get("target_parameters")):
        raise AdapterError(f"{path}: target_modules is missing, so it is not known what the adapter adapts")
    if _is_all_linear(fields.get("target_modules")) and fields.get("exclude_modules"):
        raise AdapterError(f"{path}: exclude_modules is not supported by lorafit where target_modules is all-linear")


def lora_config(fields: Mapping[str, Any]) -> LoRA:
    """What an adapter that lorafit did not write was trained with."""
    tokens = fields.get("trainable_token_indices") or {}
    return LoRA(
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        scaling="rslora" if fields.get("use_rslora") else "standard",
        dropout=fields.get("lora_dropout") or 0.0,
        targets=read_targets(fields),
        dora=bool(fields.get("use_dora")),
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        modules_to_save=fields.get("modules_to_save") or (),
        trainable_token_indices=tokens if isinstance(tokens, Mapping) else {"embed_tokens": tokens},
    )


def _is_all_linear(targets: object) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def read_targets(fields: Mapping[str, Any]) -> str:
    """What is adapted, as ``--targets`` takes it."""
    targets = fields.get("target_modules") or []
    parameters = fields.get("target_parameters") or []
    if _is_all_linear(targets) and not parameters:
        return "all-linear"
    excluded = _excluded(fields.get("exclude_modules") or [])
    if not isinstance(targets, str):
        targets = sorted(targets)  # PEFT writes a set of them, in any order
        blocks = _in_blocks(fields.get("layers_to_transform"), fields.get("layers_pattern") or [])
        if not (excluded or blocks) and all(re.fullmatch(r"[\w.]+", name) for name in (*targets, *parameters)):
            return ",".join([*targets, *parameters])
        # A full name is meant whatever its block.
        targets = "|".join([*map(re.escape, targets), f"{blocks}{_ends(targets)}"]) if targets else ""
    alternatives = [f"{excluded}(?:{targets})"] if targets else []
    return "|".join([*alternatives, *([_ends(parameters)] if parameters else [])])


def _ends(names: Sequence[str]) -> str:
    """Names, or full names that end so behind a dot."""
    return rf"(?:.*\.)?(?:{'|'.join(map(re.escape, names))})" if names else ""


def _excluded(names: str | Sequence[str]) -> str:
    return f"(?!(?:{names if isinstance(names, str) else _ends(names)})$)" if names else ""


def _in_blocks(numbers: int | Sequence[int] | None, lists: str | Sequence[str]) -> str:
    """The first number in a name, or that behind one of the given names of lists, is one of these."""
    if numbers is None or numbers == []:
        return ""
    numbers = [numbers] if isinstance(numbers, int) else numbers
    lists = [lists] if isinstance(lists, str) else lists
    place = rf"(?:.*?\.)??(?:{'|'.join(lists)})" if lists else r".*?\.[^.]*"
    # The group is atomic, so that the number is the first and no later one.
    return rf"(?=(?>{place}\.(?=\d+\.))(?:{'|'.join(map(str, numbers))})\.)"
