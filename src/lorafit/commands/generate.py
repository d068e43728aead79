"""``lorafit generate``: one prompt, one answer, streamed to stdout and nothing else with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorafit.commands.console import Console
from lorafit.commands.importing import import_for_good
from lorafit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorafit.data.readers import Message


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn from the model's probabilities.

    Attributes:
        max_tokens: Longest answer in tokens.
        temperature: 0 takes the likeliest token every time; 1 draws from the model's own probabilities.
        top_p: Draw from the likeliest tokens that have this probability together. Only with --temperature above 0.
        seed: Seed of the draw. Only with --temperature above 0. [default: 0]
        base: Answer as the base model does, with the adapter switched off.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    base: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"--max-tokens is {self.max_tokens}, but must be at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature is {self.temperature}, but must be 0 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"--top-p is {self.top_p}, but must be above 0 and at most 1")
        if self.temperature == 0.0:
            for option, given in (("--top-p", self.top_p < 1.0), ("--seed", self.seed is not None)):
                if given:
                    raise ConfigError(f"{option} has no effect at --temperature 0, which draws nothing; leave one out")

    def answer(self, model: PreTrainedModel, tokenizer: Any, messages: Sequence[Message]) -> Iterator[str]:
        """Streams the pieces of the answer to a conversation.

        Raises:
            ConfigError: The adapter is to be switched off, but there is none.
        """
        from lorafit.evaluation.generate import generate
        from lorafit.modules import adapter_modules, adapters_disabled

        if self.base and not adapter_modules(model):
            raise ConfigError("--base switches a run's adapter off, but this is a model without one; leave --base out")
        with adapters_disabled(model) if self.base else nullcontext():
            yield from generate(
                model,
                tokenizer,
                messages,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=self.seed or 0,
            )


def generate_command(
    model: str,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    adapter: str | None = None,
    sampling: Annotated[Sampling | None, Parameter(name="*")] = None,
) -> None:
    """Answer one prompt.

    Args:
        model: A .gguf file, a Hugging Face directory, smollm2-135m, or the directory of a run.
        prompt: What the user says; - reads it from standard input.
        adapter: Directory of an adapter for this model, as PEFT or lorafit writes them.
        sampling: How the answer is drawn.
    """
    # Hyphens are let through for the sake of "-", and so a mistyped option can end up here.
    if prompt.startswith("-") and len(prompt) > 1 and not any(map(str.isspace, prompt)):
        raise ConfigError(f"unknown option {prompt} (see `lorafit generate --help`)")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ConfigError("the prompt is empty; say something")

    import_for_good("lorafit.models.load")
    from lorafit.models.load import load

    console = Console()
    loaded, tokenizer = load(model, adapter=adapter)
    for piece in (sampling or Sampling()).answer(loaded, tokenizer, [{"role": "user", "content": text}]):
        console.stream(piece)
    console.stream("\n")
