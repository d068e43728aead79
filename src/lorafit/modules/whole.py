"""Modules that are trained whole, and tokens whose rows of a table are.

PEFT lets a LoRA adapter carry more than low-rank updates: ``modules_to_save`` names modules of which it trains a copy,
``trainable_token_indices`` tokens of which it trains the row in the embedding. Both stand here where the module stood,
keep it, and compute as it does with other numbers. A packed base stays packed: the copy is dense, in float32, and is
rounded to the type of the original where it is used.

The rows of tokens are W[i] themselves and not differences. Where the output head is tied to the embedding, both read
the same trained rows; a copy of either of them is its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lorafit.errors import AdapterError
from lorafit.modules.adapter import AdapterModule
from lorafit.modules.packed import PackedEmbedding, PackedLinear, embedding_rows, is_embedding


class WholeModule(AdapterModule):
    """An adapter that is no update of low rank, and refuses to be taken for one.

    Args:
        base: The frozen module.
        name: Its full name, for errors.
    """

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__(base)
        self.name = name

    @property
    @abstractmethod
    def fate(self) -> str:
        """What becomes of the module, in a few words."""

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        raise AdapterError(f"{self.name} is not adapted by LoRA but trained itself, which has no factors A and B")

    def set_lora_factor(self, part: Literal["A", "B"], value: Tensor) -> None:
        self.lora_factors()

    def delta_weight(self) -> Tensor:
        weight = dense_weight(self.base)
        return self.merged_weight(weight) - weight


class TrainedCopy(WholeModule):
    """A module of which a dense copy is trained; takes and gives what the module does.

    Args:
        base: A linear layer, an embedding, a norm, or whatever else has parameters of its own and no parts with any.
        name: Its full name.
    """

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__(base, name)
        values = {part: parameter.detach().float().clone() for part, parameter in base.named_parameters()}
        if isinstance(base, PackedLinear | PackedEmbedding):
            values = {"weight": dense_weight(base), **values}
        self.copies = nn.ParameterDict({part: nn.Parameter(value) for part, value in values.items()})

    @property
    def fate(self) -> str:
        return "trained whole, as a dense copy"

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.copies.items())

    def merged_weight(self, base: Tensor) -> Tensor:
        return self.copies["weight"].detach().clone()

    def forward(self, *args: Any, **named: Any) -> Any:
        base = self.base
        if not self.enabled:
            return base(*args, **named)
        if isinstance(base, PackedLinear):
            (x,) = args
            bias = self.copies["bias"].to(x.dtype) if base.bias is not None else None
            return F.linear(x, self.copies["weight"].to(x.dtype), bias)
        if isinstance(base, PackedEmbedding):
            return embedding_rows(base, F.embedding(args[0], self.copies["weight"].to(base.dtype)))
        values = {name: self.copies[name].to(parameter.dtype) for name, parameter in base.named_parameters()}
        return functional_call(base, values, args, named)


class TrainedTokens(WholeModule):
    """An embedding, or an output head, of which some rows are trained; takes and gives what it does.

    Args:
        base: The embedding or the linear layer.
        name: Its full name.
        indices: The tokens.
        tied: The embedding whose trained rows this head reads.

    Raises:
        AdapterError: There are no such tokens.
    """

    tokens: Tensor
    places: Tensor
    rows: nn.Parameter

    def __init__(self, base: nn.Module, name: str, indices: Sequence[int], tied: TrainedTokens | None = None) -> None:
        super().__init__(base, name)
        self.indices = tuple(indices)
        self.tied = tied is not None
        count, device = _table(base)
        if len(set(indices)) < len(indices) or not indices or min(indices) < 0 or max(indices) >= count:
            raise AdapterError(
                f"the tokens of {name} that are to be trained must differ and lie between 0 and {count - 1}"
            )
        self.register_buffer("tokens", torch.tensor(self.indices, device=device), persistent=False)
        # Where the row of a token stands among the trained ones; -1 for all others.
        places = torch.full((count,), -1, device=device)
        places[self.tokens] = torch.arange(len(indices), device=device)
        self.register_buffer("places", places, persistent=False)
        self.rows = nn.Parameter(_rows(base, self.tokens)) if tied is None else tied.rows

    @property
    def fate(self) -> str:
        return f"trained in the rows of {len(self.indices)} tokens" + (", those of the embedding" if self.tied else "")

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {} if self.tied else {"rows": self.rows}

    def merged_weight(self, base: Tensor) -> Tensor:
        return base.index_copy(0, self.tokens, self.rows.detach().to(base.dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        rows = self.rows.to(y.dtype)
        if not is_embedding(self.base):
            return y.index_copy(-1, self.tokens, F.linear(x, rows))
        places = self.places[x]
        taken = embedding_rows(self.base, F.embedding(places.clamp(min=0), rows))
        return torch.where((places >= 0).unsqueeze(-1), taken, y)


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of an embedding or a linear layer, packed or not: float32 [rows, dim], in memory of its own."""
    if isinstance(layer, PackedLinear | PackedEmbedding):
        return layer.packed.dense(torch.float32).clone()
    weight: Any = layer.weight
    return weight.detach().float().clone()


def _table(layer: nn.Module) -> tuple[int, torch.device]:
    """How many rows the weight of an embedding or a linear layer has, and where it is."""
    if isinstance(layer, PackedLinear | PackedEmbedding):
        return layer.packed.shape[0], layer.packed.blocks.device
    weight: Any = layer.weight
    return len(weight), weight.device


def _rows(layer: nn.Module, tokens: Tensor) -> Tensor:
    """Some rows of that weight, float32 [n, dim]."""
    if isinstance(layer, PackedLinear | PackedEmbedding):
        return layer.packed.take(tokens, torch.float32)
    weight: Any = layer.weight
    return weight.detach()[tokens].float()
