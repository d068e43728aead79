"""Answers, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lorafit.data.chat import encode_prompt
from lorafit.data.readers import Message
from lorafit.errors import ConfigError, DataError, ModelError
from lorafit.models.longrope import long_from
from lorafit.models.tokenizer import end_of_turn_ids
from lorafit.modules.dora import gains_held
from lorafit.modules.qalora import offsets_held


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Stream the model's next turn in a conversation, with a key-value cache.

    Args:
        model: The model; its adapter takes part unless it is disabled.
        tokenizer: Its tokenizer, with a chat template.
        messages: The conversation so far; the last message is usually the user's.
        max_tokens: Stop after this many tokens, or where the model's context ends.
        temperature: 0 always takes the most likely token; otherwise tokens are drawn from softmax(logits/temperature).
        top_p: Draw only from the most likely tokens that together have this probability.
        seed: Seed of the draws.

    Yields:
        Pieces of text, whole characters each; their concatenation is the answer.

    Raises:
        ConfigError: An option is out of range.
        DataError: The conversation leaves no room in the model's context.
        ModelError: What the model computes is not a number.
    """
    if max_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError("max_tokens must be at least 1, temperature at least 0, and top_p in (0, 1]")
    prompt = encode_prompt(messages, tokenizer)
    context = model.config.max_position_embeddings
    if len(prompt) >= context:
        raise DataError(f"the conversation has {len(prompt)} tokens, but the model's context is {context}; shorten it")
    random = torch.Generator().manual_seed(seed)
    endings = end_of_turn_ids(tokenizer)
    cache = DynamicCache(config=model.config)
    inputs = torch.tensor([prompt], device=model.device)
    tokens: list[int] = []
    written = ""
    switch = long_from(model)
    model.eval()
    with offsets_held(model), gains_held(model):
        for _ in range(min(max_tokens, context - len(prompt))):
            output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = _choose(output.logits[0, -1].float(), temperature, top_p, random)
            if token in endings:
                break
            tokens.append(token)
            if len(prompt) + len(tokens) == switch:  # what is in the cache belongs to a shorter text
                cache = DynamicCache(config=model.config)
                inputs = torch.tensor([[*prompt, *tokens]], device=model.device)
            else:
                inputs = torch.tensor([[token]], device=model.device)
            text = str(tokenizer.decode(tokens))
            # A character of several tokens shows as a replacement character until its last byte is there.
            if not text.endswith("\ufffd"):
                yield text[len(written) :]
                written = text
    rest = str(tokenizer.decode(tokens))[len(written) :]
    if rest:
        yield rest


def _choose(logits: Tensor, temperature: float, top_p: float, random: torch.Generator) -> int:
    """The next token from logits [vocabulary]."""
    if logits.isnan().any():
        raise ModelError(
            "the model computes what is not a number: its weights are damaged or too large; fetch it again"
        )
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = (logits / temperature).softmax(-1).sort(descending=True)
    # A token stays if those before it do not reach top_p yet, so that one always stays.
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= top_p] = 0.0
    return int(ids[torch.multinomial(probabilities.cpu(), 1, generator=random)])
