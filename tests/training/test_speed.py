"""The least work of a step is that of the weights which a token is multiplied with."""

from pathlib import Path
from typing import Any

import pytest

from lorafit.models.load import load_base
from lorafit.training.speed import frozen_work, made_up_rows
from tests.oracles.tiny_directory import TINY, write_tiny_directory


@pytest.mark.parametrize("quantize", [None, "q8_0"])
def test_of_experts_only_those_count_that_a_token_is_sent_to(tmp_path: Path, quantize: Any) -> None:
    hidden, width, layers = TINY["hidden_size"], 64, TINY["num_hidden_layers"]
    write_tiny_directory(
        tmp_path, "qwen3_moe", num_experts=8, num_experts_per_tok=3, moe_intermediate_size=width, head_dim=32
    )
    work = frozen_work(load_base(tmp_path, compute="fp32", quantize=quantize).model)
    attention = 2 * hidden * 4 * 32 + 2 * hidden * 2 * 32
    assert work.decoder == layers * (attention + 3 * 3 * hidden * width)
    assert work.head == hidden * TINY["vocab_size"]
    # Forward and backward, a multiplication and an addition each.
    assert work.flops(tokens=10, trained_tokens=4) == 4 * (work.decoder * 10 + work.head * 4)


def test_made_up_rows_are_the_same_each_time() -> None:
    rows = made_up_rows(320, count=3, length=9)
    assert rows == made_up_rows(320, count=3, length=9)
    assert {tuple(row.trained) for row in rows} == {(False,) * 6 + (True,) * 3}
    assert all(0 <= token < 320 for row in rows for token in row.tokens)
