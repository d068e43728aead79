"""Putting adapters onto a model, and finding out what they cover and what not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set

from torch import nn

from lorafit.config import AdapterConfig, LoRA, QALoRA, QLoRA, pattern_key
from lorafit.errors import AdapterError, ConfigError
from lorafit.formats import EXACTLY_PROMOTED, block_format
from lorafit.modules.adapter import AdapterModule, adapter_modules
from lorafit.modules.beside import whole_modules
from lorafit.modules.coverage import Coverage, Promotion
from lorafit.modules.dora import DoRALinear
from lorafit.modules.experts import Experts, ExpertStack, is_fused, unfused
from lorafit.modules.lora import LoRALinear
from lorafit.modules.lora_embedding import LoRAEmbedding
from lorafit.modules.lora_experts import LoRAExperts
from lorafit.modules.packed import PackedEmbedding, PackedLinear, PackedWeight, is_embedding, is_linear
from lorafit.modules.qalora import QALoRALinear, has_offsets
from lorafit.modules.whole import WholeModule

_QALORA_NEEDS = (
    "QA-LoRA trains the offsets of packed blocks, which Q4_1 and Q5_1 have and Q4_0, Q5_0, Q4_K and Q5_K can be given; "
    "use --method lora here, or quantise a full-precision base while it is loaded (--quantize q4_1)"
)


def attach(model: nn.Module, config: AdapterConfig) -> Coverage:
    """Freeze a model and put adapters where linear layers and experts stood, in place.

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
    if adapter_modules(model):
        raise AdapterError("the model has adapters already; load the base again to attach others")
    head = _output_head(model)
    stand_ins = {name: unfused(module) for name, module in model.named_modules() if name and is_fused(module)}
    layers = dict(_layers(model, stand_ins))
    embeddings = {name: layer for name, layer in model.named_modules() if is_embedding(layer)}
    chosen = _choose(layers, embeddings, config, head)
    layers |= {name: layer for name, layer in embeddings.items() if name in chosen}
    left = "output head (all-linear leaves it out)" if config.targets == "all-linear" else "not among the targets"
    frozen = {name: left for name in layers if name not in chosen}
    frozen |= dict.fromkeys(embeddings.keys() - layers.keys(), "embedding (not a linear layer)")
    others = _others(model, layers.keys() | embeddings.keys() | stand_ins.keys())
    frozen |= {name: _why_other(model, name) for name in others}
    unsuited = {name: reason for name in chosen if (reason := _why_unsuited(layers[name], config))}
    if len(unsuited) == len(chosen):
        raise AdapterError(
            f"no target layer can take {config.method} ({unsuited[chosen[0]]}): "
            + (_QALORA_NEEDS if isinstance(config, QALoRA) else "leave out --dropout")
        )
    if isinstance(config, QLoRA) and not any(_is_quantized(layers[name]) for name in chosen):
        raise AdapterError(
            "qlora trains beside a quantised base, but no target layer is quantised: quantise the base while it is "
            "loaded (--quantize nf4), or use --method lora"
        )
    beside: dict[str, str] = {}
    if isinstance(config, QALoRA) and config.frozen_tensors == "lora":
        if not unsuited:
            raise ConfigError(
                "--frozen-tensors lora has no effect: every target has block offsets or is given them; leave it out"
            )
        beside, unsuited = unsuited, beside
    frozen |= unsuited
    total = count_parameters(model)
    formats = {name: _format_of(layer) for name, layer in (embeddings | others | layers).items()}
    # All adapters before the first is placed: one that cannot be made leaves the model as it was.
    trained = [name for name in chosen if name not in unsuited]
    adapters: dict[str, AdapterModule] = {name: _wrap(layers[name], name, config, name in beside) for name in trained}
    whole: dict[str, WholeModule] = {}
    if isinstance(config, LoRA):
        _check_patterns(config, trained)
        whole = whole_modules(model, config, adapters.keys())
        frozen = {name: why for name, why in frozen.items() if name not in whole}
        formats |= {name: _format_of(module.base) for name, module in whole.items()}
    model.requires_grad_(False)
    for name, experts in stand_ins.items():
        model.set_submodule(name, experts)
    wrapped, promoted = {}, {}
    for name, adapter in (adapters | whole).items():
        wrapped[name] = sum(parameter.numel() for parameter in adapter.adapter_parameters().values())
        if isinstance(adapter, QALoRALinear) and adapter.promoted is not None:
            promoted[name] = _promotion(adapter.base.packed, adapter.promoted)
        model.set_submodule(name, adapter)
    fates = {name: module.fate for name, module in whole.items()}
    return Coverage(config.method, wrapped, frozen, formats, total, beside, promoted, fates)


def count_parameters(model: nn.Module) -> int:
    """Weights of a model, each tensor once, packed ones counted as the weights that they hold."""
    seen: dict[int, int] = {id(parameter): parameter.numel() for parameter in model.parameters()}
    seen |= {id(packed): packed.shape[0] * packed.shape[1] for packed in _packed_weights(model)}
    return sum(seen.values())


def _wrap(layer: nn.Module, name: str, config: AdapterConfig, beside: bool) -> AdapterModule:
    if isinstance(config, QALoRA):
        if not beside:
            assert isinstance(layer, PackedLinear), "checked by _why_unsuited"
            return QALoRALinear(layer, config)
        config = LoRA(rank=config.rank, alpha=config.alpha)
    own = config.at(name)
    if isinstance(layer, ExpertStack):
        return LoRAExperts(layer, own)
    if is_embedding(layer):
        return LoRAEmbedding(layer, own)
    return DoRALinear(layer, own) if own.dora else LoRALinear(layer, own)


def _check_patterns(config: LoRA, trained: Sequence[str]) -> None:
    """Every rank and alpha of its own goes to some layer."""
    for option, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        used = {key for name in trained if (key := pattern_key(pattern, name)) is not None}
        if idle := [key for key in pattern if key not in used]:
            raise AdapterError(f"{option}: no layer that is trained takes what is said of {', '.join(idle)}")


def _packed_weights(module: nn.Module) -> Iterator[PackedWeight]:
    return (part for part in module.modules() if isinstance(part, PackedWeight))


def _layers(model: nn.Module, stand_ins: Mapping[str, Experts]) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and stacks of experts by full name, those of stand-ins as if they were in place."""
    for name, layer in model.named_modules():
        if name in stand_ins:
            stacks = {role: part for role, part in stand_ins[name].named_children() if isinstance(part, ExpertStack)}
            yield from ((f"{name}.{role}", stack) for role, stack in stacks.items())
        elif name and (is_linear(layer) or isinstance(layer, ExpertStack)):
            yield name, layer


def _others(model: nn.Module, known: Set[str]) -> dict[str, nn.Module]:
    """What else has matrices of its own, so that no weight is left frozen in silence."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and name not in known and any(weight.dim() > 1 for weight in module.parameters(recurse=False))
    }


def _why_other(model: nn.Module, name: str) -> str:
    beside_experts = hasattr(model.get_submodule(name.rpartition(".")[0]), "experts")
    return "router (not a linear layer)" if beside_experts else "not a linear layer"


def _promotion(source: PackedWeight, target: PackedWeight) -> Promotion:
    exact = source.format_name in EXACTLY_PROMOTED
    return Promotion(source.format_name, target.format_name, exact, source.nbytes, target.nbytes)


def _output_head(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    return get_head() if get_head else None


def _choose(
    linear: Mapping[str, nn.Module],
    embeddings: Mapping[str, nn.Module],
    config: AdapterConfig,
    head: nn.Module | None,
) -> list[str]:
    """PEFT's rules: all-linear leaves out the head; names match a full name or its end; else a regular expression.

    Embeddings have to be named. What is trained whole is no target.
    """
    layers = {**embeddings, **linear}
    targets, whole = config.targets, config.modules_to_save if isinstance(config, LoRA) else ()
    parts = [part.strip() for part in targets.split(",")]
    if targets == "all-linear":
        matched = {targets: {name for name, layer in linear.items() if layer is not head}}
    elif all(re.fullmatch(r"[\w.]+", part) for part in parts):
        matched = {part: {name for name in layers if f".{name}".endswith(f".{part}")} for part in parts}
    else:
        try:
            matched = {targets: {name for name in layers if re.fullmatch(targets, name)}}
        except re.error as error:
            raise ConfigError(f"--targets {targets!r} is neither names nor a regular expression: {error}") from None
    idle = [part for part, names in matched.items() if not names]
    if idle:
        endings = sorted({name.rsplit(".", 1)[-1] for name in layers})
        raise AdapterError(f"--targets: no linear layer matches {', '.join(idle)}; there are {', '.join(endings)}")
    chosen = {name for names in matched.values() for name in names if not any(f".{w}." in f".{name}." for w in whole)}
    return [name for name in layers if name in chosen]


def _why_unsuited(layer: nn.Module, config: AdapterConfig) -> str | None:
    if isinstance(layer, ExpertStack):
        if isinstance(config, QALoRA):
            return "experts (QA-LoRA trains linear layers)"
        if config.dora:
            return "experts (DoRA trains linear layers)"
        return "experts (dropout, which PEFT's adapters of experts lack)" if config.dropout else None
    if is_embedding(layer):
        if isinstance(config, QALoRA):
            return "embedding (QA-LoRA trains linear layers)"
        return "embedding (DoRA trains linear layers)" if config.dora else None
    if not isinstance(config, QALoRA):
        return None
    if not isinstance(layer, PackedLinear):
        return "not packed"
    if not has_offsets(layer.packed.format_name):
        return f"{layer.packed.format_name} has no block offsets"
    return None


def _is_quantized(layer: nn.Module) -> bool:
    return any(block_format(packed.format_name).elements > 1 for packed in _packed_weights(layer))


def _format_of(layer: nn.Module) -> str:
    if isinstance(layer, PackedLinear | PackedEmbedding):
        return layer.packed.format_name
    if isinstance(layer, ExpertStack):
        return layer.format_name
    return str(next(layer.parameters(recurse=False)).dtype).removeprefix("torch.")
