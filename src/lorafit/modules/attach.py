"""Putting adapters onto a model, and saying what was and was not covered."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from torch import nn

from lorafit.config import AdapterConfig, LoRA, QALoRA, QLoRA
from lorafit.errors import AdapterError, ConfigError
from lorafit.formats import EXACTLY_PROMOTED, block_format
from lorafit.modules.adapter import AdapterModule, adapter_modules
from lorafit.modules.lora import LoRALinear
from lorafit.modules.packed import PackedEmbedding, PackedLinear, PackedWeight, is_embedding, is_linear
from lorafit.modules.qalora import QALoRALinear, has_offsets


@dataclass(frozen=True)
class Promotion:
    """A tensor that is trained in another format than it has in the file.

    Attributes:
        source: Its format in the file.
        target: The format with block offsets that it is trained in.
        exact: Whether its weights stay the same to the last bit.
        source_bytes: Its bytes in the file.
        target_bytes: Its bytes while it is trained, in memory, and in the merged file.
    """

    source: str
    target: str
    exact: bool
    source_bytes: int
    target_bytes: int

    def __str__(self) -> str:
        return f"promoted from {self.source} to {self.target}, {'exact' if self.exact else 'rounded'}"


@dataclass(frozen=True)
class Coverage:
    """Which layers an adapter covers.

    Attributes:
        method: ``lora``, ``qlora`` or ``qalora``.
        wrapped: Full name -> number of trained parameters.
        frozen: Full name of a linear layer or embedding that is left as it is -> why.
        formats: Full name -> block format or dtype of the frozen weight, for all of them.
        total_parameters: Parameters of the base, packed ones counted as weights.
        beside: Full name of a layer that has plain LoRA although the method is ``qalora`` -> why.
        promoted: Full name of a layer whose blocks were given offsets -> how, and what it costs.
    """

    method: str
    wrapped: dict[str, int]
    frozen: dict[str, str]
    formats: dict[str, str]
    total_parameters: int
    beside: dict[str, str] = field(default_factory=dict)
    promoted: dict[str, Promotion] = field(default_factory=dict)

    @property
    def trainable_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(self.wrapped.values())

    @property
    def promotion_bytes(self) -> int:
        """By how much promotion makes the merged file larger than the base."""
        return sum(promotion.target_bytes - promotion.source_bytes for promotion in self.promoted.values())

    @property
    def promoted_memory_bytes(self) -> int:
        """Bytes of promoted blocks, which are held in memory while the tensors in the file are not read."""
        return sum(promotion.target_bytes for promotion in self.promoted.values())

    def fate(self, name: str) -> str:
        """What became of a layer, in a few words."""
        if name in self.frozen:
            return f"frozen: {self.frozen[name]}"
        if name in self.beside:
            return f"trained by plain LoRA: {self.beside[name]}"
        return f"trained, {self.promoted[name]}" if name in self.promoted else "trained"

    def as_dict(self) -> dict[str, object]:
        """For ``summary.json``."""
        promoted = {name: asdict(promotion) for name, promotion in self.promoted.items()}
        return {
            "wrapped": self.wrapped,
            "promoted": promoted,
            "beside": self.beside,
            "frozen": self.frozen,
            "formats": self.formats,
        }


def attach(model: nn.Module, config: AdapterConfig) -> Coverage:
    """Freeze a model and put adapters where linear layers stood, in place.

    Args:
        model: Any model; its linear layers may be packed.
        config: The method and its settings.

    Returns:
        What was covered, and what was not and why.

    Raises:
        AdapterError: The model has adapters already, a target matches nothing, or none can take this method.
        ConfigError: The targets are not a valid pattern, or plain LoRA is asked for and no target needs it.
    """
    if adapter_modules(model):
        raise AdapterError("the model has adapters already; load the base again to attach others")
    head = _output_head(model)
    layers = {name: layer for name, layer in model.named_modules() if name and is_linear(layer)}
    chosen = _choose(layers, config.targets, head)
    embeddings = {name: layer for name, layer in model.named_modules() if is_embedding(layer)}
    left = "output head (all-linear leaves it out)" if config.targets == "all-linear" else "not among the targets"
    frozen = {name: left for name in layers if name not in chosen}
    frozen |= dict.fromkeys(embeddings, "embedding (not a linear layer)")
    unsuited = {name: reason for name in chosen if (reason := _why_unsuited(layers[name], config))}
    if len(unsuited) == len(chosen):
        raise AdapterError(
            f"no target layer can take {config.method} ({unsuited[chosen[0]]}): QA-LoRA trains the offsets of packed "
            "blocks, which Q4_1 and Q5_1 have and Q4_0, Q5_0, Q4_K and Q5_K can be given; use --method lora here"
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
    formats = {name: _format_of(layer) for name, layer in (embeddings | layers).items()}
    # All adapters before the first is placed: one that cannot be made leaves the model as it was.
    adapters = {name: _wrap(layers[name], config, name in beside) for name in chosen if name not in unsuited}
    model.requires_grad_(False)
    wrapped, promoted = {}, {}
    for name, adapter in adapters.items():
        wrapped[name] = sum(parameter.numel() for parameter in adapter.adapter_parameters().values())
        if isinstance(adapter, QALoRALinear) and adapter.promoted is not None:
            promoted[name] = _promotion(adapter.base.packed, adapter.promoted)
        model.set_submodule(name, adapter)
    return Coverage(config.method, wrapped, frozen, formats, total, beside, promoted)


def count_parameters(model: nn.Module) -> int:
    """Weights of a model, each tensor once, packed ones counted as the weights that they hold."""
    seen: dict[int, int] = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for module in model.modules():
        packed = getattr(module, "packed", None)
        if packed is not None:
            seen[id(packed)] = packed.shape[0] * packed.shape[1]
    return sum(seen.values())


def _wrap(layer: nn.Module, config: AdapterConfig, beside: bool) -> AdapterModule:
    if isinstance(config, QALoRA):
        if beside:
            return LoRALinear(layer, LoRA(rank=config.rank, alpha=config.alpha))
        assert isinstance(layer, PackedLinear), "checked by _why_unsuited"
        return QALoRALinear(layer, config)
    return LoRALinear(layer, config)


def _promotion(source: PackedWeight, target: PackedWeight) -> Promotion:
    exact = source.format_name in EXACTLY_PROMOTED
    return Promotion(source.format_name, target.format_name, exact, source.nbytes, target.nbytes)


def _output_head(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    return get_head() if get_head else None


def _choose(layers: Mapping[str, nn.Module], targets: str, head: nn.Module | None) -> list[str]:
    """PEFT's rules: all-linear leaves out the head; names match a full name or its end; else a regular expression."""
    parts = [part.strip() for part in targets.split(",")]
    if targets == "all-linear":
        matched = {targets: {name for name, layer in layers.items() if layer is not head}}
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
    chosen = set().union(*matched.values())
    return [name for name in layers if name in chosen]


def _why_unsuited(layer: nn.Module, config: AdapterConfig) -> str | None:
    if not isinstance(config, QALoRA):
        return None
    if not isinstance(layer, PackedLinear):
        return "not packed"
    if not has_offsets(layer.packed.format_name):
        return f"{layer.packed.format_name} has no block offsets"
    return None


def _is_quantized(layer: nn.Module) -> bool:
    return isinstance(layer, PackedLinear) and block_format(layer.packed.format_name).elements > 1


def _format_of(layer: nn.Module) -> str:
    if isinstance(layer, PackedLinear | PackedEmbedding):
        return layer.packed.format_name
    assert isinstance(layer, nn.Linear | nn.Embedding)
    return str(layer.weight.dtype).removeprefix("torch.")
