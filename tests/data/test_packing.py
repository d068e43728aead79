"""Documents end to end, counted by hand; and which rows are held out."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.data.chat import Document
from lorafit.data.packing import hold_out, pack, split_passes
from lorafit.data.readers import Example
from lorafit.errors import DataError
from tests.oracles.adapted import documents


def example(prompt: str, answer: str = "yes", line: int = 1) -> Example:
    return Example(
        ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}), f"rows.jsonl:{line}"
    )


# Packing.


def test_positions_and_targets_by_hand() -> None:
    first = Document([10, 11, 12, 13], [False, False, True, True], "a:1")
    second = Document([20, 21, 22], [True, True, False], "a:2")  # nothing precedes 20, so nothing can predict it
    third = Document([30], [True], "a:3")
    batch = pack([first, second, third])
    assert batch.tokens.tolist() == [10, 11, 12, 13, 20, 21, 22, 30]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch.lengths == (4, 3, 1)
    assert batch.predictors.tolist() == [1, 2, 4]  # 11 predicts 12, 12 predicts 13, 20 predicts 21
    assert batch.targets.tolist() == [12, 13, 21]
    assert batch.sources == ("a:1", "a:2", "a:3")
    assert {t.dtype for t in (batch.tokens, batch.positions, batch.predictors, batch.targets)} == {torch.int64}


def test_a_target_is_never_predicted_from_another_document() -> None:
    batch = pack(documents([5, 1, 9, 2, 30], share=1.0))
    starts = torch.tensor([0, 5, 6, 15, 17])
    assert not torch.isin(batch.predictors + 1, starts).any()
    assert len(batch.targets) == sum(batch.lengths) - len(batch.lengths)


@given(st.lists(st.integers(1, 40), max_size=20), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_passes_keep_the_order_and_the_limit(lengths: list[int], limit: int) -> None:
    batches = split_passes(documents(lengths), limit)
    assert [length for batch in batches for length in batch.lengths] == lengths
    sources = [source for batch in batches for source in batch.sources]
    assert sources == [f"rows.jsonl:{i + 1}" for i in range(len(lengths))]
    assert all(sum(batch.lengths) <= limit or len(batch.lengths) == 1 for batch in batches)
    # Nothing is split needlessly: the first document of a pass would not have fitted into the one before.
    for before, batch in pairwise(batches):
        assert sum(before.lengths) + batch.lengths[0] > limit


# Holding out.


def test_five_percent_and_at_least_16() -> None:
    for count, wanted in ((32, 16), (319, 16), (330, 16), (400, 20), (1000, 50)):
        examples = [example(f"question {i}", line=i) for i in range(count)]
        training, held = hold_out(examples)
        assert len(held) == wanted
        assert sorted([*training, *held], key=examples.index) == examples
        # Both in the order of the file, and neither the beginning nor the end of it.
        assert training == [e for e in examples if e in training]
        assert held not in (examples[:wanted], examples[-wanted:])


def test_the_choice_does_not_depend_on_the_order_of_rows() -> None:
    examples = [example(f"question {i % 90}", f"answer {i}", line=i) for i in range(200)]
    _, held = hold_out(examples)
    shuffled = random.Random(1).sample(examples, len(examples))
    assert {e.source for e in hold_out(shuffled)[1]} == {e.source for e in held}


def test_rows_with_one_prompt_stay_together() -> None:
    examples = [example(f"question {i // 3}", f"answer {i}") for i in range(300)]
    training, held = hold_out(examples)
    prompts = [{e.messages[0]["content"] for e in part} for part in (training, held)]
    assert not prompts[0] & prompts[1]
    assert 16 <= len(held) < 16 + 3


def test_a_prompt_that_most_rows_share_is_trained() -> None:
    for seed in range(8):  # wherever its hash falls
        examples = [example(f"write a poem {seed}", f"poem {i}") for i in range(500)]
        examples += [example(f"question {i}") for i in range(40)]
        training, held = hold_out(examples)
        assert len(held) == 27  # 5% of 540
        assert sum(e.messages[0]["content"].startswith("write") for e in training) == 500


def test_too_few_rows_or_prompts_are_refused() -> None:
    with pytest.raises(DataError, match="31 rows are too few to hold 16 out; give --eval-data FILE, or --no-eval"):
        hold_out([example(f"question {i}") for i in range(31)])
    with pytest.raises(DataError, match="100 rows share 1 prompts, too few"):
        hold_out([example("always the same", f"answer {i}") for i in range(100)])
