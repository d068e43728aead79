"""Which rows a step sees: by number of rows and by a budget of tokens."""

import random
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.data.schedule import Schedule

LENGTHS = [30, 12, 25, 40, 9, 33, 18, 21, 14, 28]


def cut_one_by_one(lengths: list[int], budget: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's steps by the letter: rows in the seed's order, and a new step where the next row would exceed it."""
    steps: list[list[int]] = [[]]
    for row in np.random.default_rng((seed, epoch)).permutation(len(lengths)).tolist():
        if sum(lengths[each] for each in [*steps[-1], row]) > budget:
            steps.append([])
        steps[-1].append(row)
    return steps


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_epoch_visits_each_row_once(count: int, batch_size: int, seed: int) -> None:
    schedule = Schedule([1] * count, seed, batch_size=batch_size)
    steps = -(-3 * count // batch_size)
    assert schedule.steps_in(3) == steps
    assert {len(schedule.rows(step)) for step in range(steps)} == {batch_size}
    seen = [row for step in range(steps) for row in schedule.rows(step)]
    for epoch in range(3):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(40, 200), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_step_takes_what_fits_into_its_budget(lengths: list[int], budget: int, seed: int) -> None:
    schedule = Schedule(lengths, seed, tokens_per_step=budget)
    epochs = [cut_one_by_one(lengths, budget, seed, epoch) for epoch in range(3)]
    expected = [step for epoch in epochs for step in epoch]
    assert [schedule.rows(step) for step in range(len(expected))] == expected
    assert [schedule.tokens(step) for step in range(len(expected))] == [sum(lengths[r] for r in s) for s in expected]
    for epoch in epochs:
        assert sorted(row for step in epoch for row in step) == list(range(len(lengths)))
        assert all(0 < sum(lengths[row] for row in step) <= budget for step in epoch)
        # And no row that would have fitted was left to the next step.
        assert all(sum(lengths[row] for row in [*one, other[0]]) > budget for one, other in pairwise(epoch))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_whole_epochs_end_with_a_step(lengths: list[int], seed: int) -> None:
    schedule = Schedule(lengths, seed, tokens_per_step=60)
    ends = [schedule.steps_in(epochs) for epochs in (1, 2, 3)]
    sizes = [len(cut_one_by_one(lengths, 60, seed, epoch)) for epoch in range(3)]
    assert ends == [sizes[0], sizes[0] + sizes[1], sum(sizes)]
    assert sum(schedule.tokens(step) for step in range(ends[1])) == 2 * sum(lengths)


def test_part_of_an_epoch_is_as_many_steps_as_see_its_rows() -> None:
    schedule = Schedule(LENGTHS, 0, tokens_per_step=60)
    seen = 0
    for step in range(20):
        seen += len(schedule.rows(step))
        assert schedule.steps_in(seen / 10) == step + 1
    assert Schedule([1] * 44, 0, batch_size=8).steps_in(0.4) == 3  # 18 rows by 8


def test_rows_are_a_pure_function_of_seed_and_step() -> None:
    for limit in ({"batch_size": 8}, {"tokens_per_step": 90}):
        schedule = Schedule(LENGTHS * 10, 7, **limit)
        rows = [schedule.rows(step) for step in range(60)]
        random.seed(5)
        torch.manual_seed(5)
        other = Schedule(LENGTHS * 10, 7, **limit)
        assert [other.rows(step) for step in reversed(range(60))] == rows[::-1]
        flat = [row for step in rows for row in step]
        assert flat[:100] != list(range(100))  # shuffled
        assert flat[:100] != flat[100:200]  # and otherwise in the next epoch
        assert Schedule(LENGTHS * 10, 8, **limit).rows(0) != rows[0]
