"""Generation with a cache, against the most likely token of the whole text, computed anew for each token."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lorafit.data.readers import Message
from lorafit.evaluation.generate import generate
from lorafit.models.load import load
from tests.models.test_families import VARIANTS
from tests.oracles.family_gguf import KINDS, random_model, write_family


@torch.no_grad()
def most_likely(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("variant", [*KINDS, "phi3, longrope", "gemma2, windows by list"])
def test_a_cache_changes_nothing(tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through windows that the text outgrows, and from short to long rotary factors, which are for the whole text."""
    family, config, options = VARIANTS[variant]
    dense = random_model(family, **config)
    path = write_family(tmp_path / "model.gguf", family, dense, **options)
    model, tokenizer = load(path, compute="fp32")
    monkeypatch.setattr("lorafit.evaluation.generate.end_of_turn_ids", lambda _: frozenset())
    filling = "x" * 230 if variant == "phi3, longrope" else "once"
    messages = [Message(role="user", content=filling)]
    prompt = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True).input_ids
    assert len(prompt) < 256
    answer = "".join(generate(model, tokenizer, messages, max_tokens=24))
    expected = most_likely(dense, prompt, 24)
    assert len(prompt) + 24 > (256 if variant == "phi3, longrope" else 20)
    assert answer == tokenizer.decode(expected)
