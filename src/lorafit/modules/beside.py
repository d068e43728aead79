"""What is trained beside the low-rank updates: modules as a whole, and rows of embeddings; PEFT's rules of which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from torch import nn

from lorafit.config import LoRA
from lorafit.errors import AdapterError
from lorafit.modules.experts import Experts, ExpertStack, is_fused
from lorafit.modules.packed import PackedWeight, is_embedding, is_linear
from lorafit.modules.whole import TrainedCopy, TrainedTokens, WholeModule


def whole_modules(model: nn.Module, config: LoRA, adapted: Set[str]) -> dict[str, WholeModule]:
    """What stands where modules are trained whole, by full name; nothing is put there yet.

    Args:
        model: The model.
        config: Which modules and tokens.
        adapted: Names of the layers that have low-rank updates.

    Raises:
        AdapterError: There are no such modules or tokens, or they cannot be trained so.
    """
    result: dict[str, WholeModule] = {}
    for end in config.modules_to_save:
        for name in _ending_with(model, end, "modules_to_save"):
            _check_free(name, adapted)
            result[name] = _copied(model.get_submodule(name), name)
    tokens = {
        name: tuple(indices)
        for end, indices in config.trainable_token_indices.items()
        for name in _ending_with(model, end, "trainable_token_indices")
    }
    for name in tokens:
        _check_free(name, adapted | result.keys())
        if not (is_embedding(model.get_submodule(name)) or is_linear(model.get_submodule(name))):
            raise AdapterError(f"trainable_token_indices: {name} is no embedding, so it has no rows of tokens")
    tied = _tied_head(model, tokens) if tokens else None
    for name, indices in tokens.items():
        if name != tied:
            result[name] = TrainedTokens(model.get_submodule(name), name, indices)
    if tied is not None:
        _check_free(tied, adapted | (result.keys() - tokens.keys()))
        table = next(each for name, each in result.items() if name in tokens and is_embedding(each.base))
        assert isinstance(table, TrainedTokens)
        result[tied] = TrainedTokens(model.get_submodule(tied), tied, table.indices, table)
    return result


def _tied_head(model: Any, tokens: Mapping[str, tuple[int, ...]]) -> str | None:
    """The head that reads the trained rows of the embedding: one tied to it that has not other tokens of its own."""
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    table, head = names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]
    tied = model.config.tie_word_embeddings and table in tokens
    return head if tied and tokens.get(head, tokens[table]) == tokens[table] else None


def _ending_with(model: nn.Module, end: str, option: str) -> list[str]:
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name and name.endswith(end)]
    if not names:
        raise AdapterError(f"{option}: the model has no module whose name ends with {end}")
    return names


def _check_free(name: str, taken: Set[str]) -> None:
    if name in taken or any(other.startswith(f"{name}.") for other in taken):
        raise AdapterError(f"{name} cannot be trained in two ways, as the adapter's settings ask for; leave one out")


def _copied(module: nn.Module, name: str) -> TrainedCopy:
    if is_fused(module) or isinstance(module, Experts | ExpertStack):
        raise AdapterError(f"modules_to_save: {name} holds experts, which lorafit trains by LoRA only")
    whole = is_linear(module) or is_embedding(module)
    if not whole and any(_holds_weights(child) for child in module.children()):
        raise AdapterError(f"modules_to_save: {name} consists of several modules; lorafit trains copies of single ones")
    if not whole and not _holds_weights(module):
        raise AdapterError(f"modules_to_save: {name} has no weights to train")
    return TrainedCopy(module, name)


def _holds_weights(module: nn.Module) -> bool:
    return any(True for _ in _weights(module))


def _weights(module: nn.Module) -> Iterator[object]:
    yield from module.parameters()
    yield from (part for part in module.modules() if isinstance(part, PackedWeight))
