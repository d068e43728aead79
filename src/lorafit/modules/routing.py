"""Which tokens go to which experts of a mixture, and products taken expert by expert.

A *pair* is a token and one of its k experts. Pairs are sorted by expert, so that each expert has a range of slots and
works on them at once. On the way in, rows are taken from the tokens, on the way out they are added to them, by one
expert at a time; between the two there is a row for each slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which tokens go to which experts: slots for pairs, those of an expert one after another.

    Attributes:
        tokens: int64 [slots]; the token in each slot. A slot without a pair has any token, and is given no weight.
        groups: The experts that have tokens, each with the range of its slots.
        order: int64 [pairs]; the pairs sorted by expert, as numbers token·k + place among the token's experts.
        places: int64 [pairs]; the slot of each.
        token_count: Number of tokens.
    """

    tokens: Tensor
    groups: tuple[tuple[int, slice], ...]
    order: Tensor
    places: Tensor
    token_count: int

    @classmethod
    def of(cls, top_k_index: Tensor, experts: int, *, few_sizes: bool = False) -> Routing:
        """From the experts of each token, int64 [tokens, k].

        Args:
            top_k_index: The experts of each token, int64 [tokens, k].
            experts: Number of experts.
            few_sizes: Give experts a little more slots than pairs, so that groups come in a few sizes only.
        """
        k, chosen = top_k_index.shape[1], top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=experts)
        assert len(counts) == experts, "the router knows its experts"
        sizes = [_rounded_up(size) if few_sizes else size for size in counts.tolist()]
        ends = list(accumulate(sizes))
        groups = tuple(
            (e, slice(end - size, end)) for e, (size, end) in enumerate(zip(sizes, ends, strict=True)) if size
        )
        gaps = torch.tensor(sizes, device=counts.device) - counts
        places = torch.arange(len(order), device=order.device) + (gaps.cumsum(0) - gaps).repeat_interleave(counts)
        tokens = order.new_zeros(sum(sizes)).index_copy_(0, places, order // k)
        return cls(tokens, groups, order, places, len(top_k_index))

    def weights(self, top_k_weights: Tensor) -> Tensor:
        """The router's weight [slots] of what is in each slot, from [tokens, k]."""
        weights = top_k_weights.new_zeros(len(self.tokens))
        return weights.index_copy(0, self.places, top_k_weights.reshape(-1)[self.order])

    def rows(self, x: Tensor, slots: slice, *, sums: bool) -> Tensor:
        """What goes into a product in some slots: ``x`` has a row for each slot if that sums, else for each token."""
        return x[slots] if sums else x[self.tokens[slots]]

    def apply(self, product: Callable[[Tensor, int, slice], Tensor], x: Tensor, width: int, *, sums: bool) -> Tensor:
        """Every expert's product with its rows, expert by expert.

        Args:
            product: Takes rows [n, in_dim], the number of the expert and the range of their slots; gives [n, width].
            x: [slots, in_dim] if ``sums``, else [tokens, in_dim].
            width: Width of what an expert gives.
            sums: Whether results are added up over the experts of a token, in at least float32.

        Returns:
            [tokens, width] if ``sums``, else [slots, width], in the type of ``x``.
        """
        if sums:
            results = x.new_zeros(self.token_count, width, dtype=torch.promote_types(x.dtype, torch.float32))
        else:
            results = x.new_empty(len(self.tokens), width)
        for expert, slots in self.groups:
            rows = product(self.rows(x, slots, sums=sums), expert, slots)
            if sums:
                results.index_add_(0, self.tokens[slots], rows.to(results.dtype))
            else:
                results[slots] = rows
        return results.to(x.dtype)


def _rounded_up(size: int) -> int:
    """To a multiple of an eighth of itself and of 16: eight sizes between a power of two and the next."""
    step = max(16, 1 << max(size.bit_length() - 4, 0))
    return -(-size // step) * step
