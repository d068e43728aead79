"""Which rows each step of a run trains on.

Every epoch sees each row once, in the permutation drawn from (seed, epoch). Steps are cut from the rows in that order:
`batch_size` rows each, the last ones of an epoch together with the first of the next; or, with a budget of tokens, as
many rows as fit, and none across the end of an epoch. So the rows of a step follow from the seed, the lengths of the
rows and the limit alone, and a run that is resumed goes on exactly where it stopped, with nothing to store.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np


class Schedule:
    """Rows of steps, as many as are asked for.

    Args:
        lengths: Tokens of each row; with a budget, none above it.
        seed: Seed of the order.
        batch_size: Rows in a step; excludes ``tokens_per_step``.
        tokens_per_step: Most tokens in a step.
    """

    def __init__(
        self, lengths: Sequence[int], seed: int, *, batch_size: int | None = None, tokens_per_step: int | None = None
    ) -> None:
        assert (batch_size is None) != (tokens_per_step is None), "one limit, not two"
        assert tokens_per_step is None or max(lengths) <= tokens_per_step, "rows above the budget are refused before"
        self._lengths = lengths
        cut = self._by_rows(seed, batch_size) if batch_size else self._by_tokens(seed, tokens_per_step or 0)
        # Where a step begins depends on the steps before, so they are cut once, and in turn.
        self._more = cut
        self._steps: list[list[int]] = []

    def rows(self, step: int) -> list[int]:
        """The rows of the zero-based ``step``, in order."""
        while len(self._steps) <= step:
            self._steps.append(next(self._more))
        return self._steps[step]

    def tokens(self, step: int) -> int:
        """Tokens in a step."""
        return sum(self._lengths[row] for row in self.rows(step))

    def steps_in(self, epochs: float) -> int:
        """The fewest steps that see so many epochs' rows."""
        wanted, seen = math.ceil(epochs * len(self._lengths)), 0
        for step in itertools.count():
            seen += len(self.rows(step))
            if seen >= wanted:
                return step + 1
        raise AssertionError("steps do not end")

    def _epochs(self, seed: int) -> Iterator[list[int]]:
        for epoch in itertools.count():
            yield np.random.default_rng((seed, epoch)).permutation(len(self._lengths)).tolist()

    def _by_rows(self, seed: int, batch_size: int) -> Iterator[list[int]]:
        rows = itertools.chain.from_iterable(self._epochs(seed))
        while True:
            yield list(itertools.islice(rows, batch_size))

    def _by_tokens(self, seed: int, budget: int) -> Iterator[list[int]]:
        for order in self._epochs(seed):
            step: list[int] = []
            left = budget
            for row in order:
                if self._lengths[row] > left:
                    yield step
                    step, left = [], budget
                step.append(row)
                left -= self._lengths[row]
            yield step
