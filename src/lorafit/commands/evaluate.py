"""``lorafit evaluate``: how well a model predicts answers that it was not trained on.

For a run the base is measured beside the tuned model. With ``--shots`` the base also gets worked examples as earlier
turns of every prompt, which answers the question to ask before any training: would a prompt do?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorafit.commands.console import Console
from lorafit.commands.importing import import_for_good
from lorafit.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from lorafit.data.chat import Document
    from lorafit.data.readers import Example
    from lorafit.evaluation.loss import Metrics

# Tokens in one forward pass: enough to keep the processor busy, without a gradient to remember.
_PASS_TOKENS = 2048


def evaluate(
    model: str,
    data: str,
    *,
    adapter: str | None = None,
    shots: int = 0,
    shots_from: str | None = None,
    console: Console | None = None,
) -> dict[str, Metrics]:
    """Measures a model, or the base and the tuned model of a run, on a file of examples.

    Args:
        model: A .gguf file, a Hugging Face directory, smollm2-135m, or the directory of a run.
        data: Held-out rows.
        adapter: Directory of an adapter for this model, as PEFT or lorafit writes them.
        shots: How many examples the base is also given in its prompt.
        shots_from: The file whose first rows these examples are.
        console: Where to say what is going on.

    Returns:
        ``base``, then ``base + N shots`` if there are any, then ``tuned`` with an adapter.

    Raises:
        ConfigError: Only one of ``shots`` and ``shots_from`` is given, or the file has fewer rows.
        DataError: A row is longer than the model's context.
        ModelError: The loss is not a number.
    """
    if shots < 0 or bool(shots) != (shots_from is not None):
        raise ConfigError("--shots N and --shots-from FILE go together: N examples from the top of FILE")

    from lorafit.data.chat import encode_all
    from lorafit.data.packing import split_passes
    from lorafit.data.readers import read_examples
    from lorafit.evaluation import loss
    from lorafit.models.load import load
    from lorafit.modules import adapter_modules, adapters_disabled

    examples = read_examples(data)
    given = read_examples(shots_from) if shots_from else []
    if shots > len(given):
        raise ConfigError(f"--shots is {shots}, but {shots_from} has {len(given)} rows")
    loaded, tokenizer = load(model, adapter=adapter)
    context = loaded.config.max_position_embeddings

    def measure(name: str, documents: Sequence[Document]) -> Metrics:
        for document in documents:
            if len(document.tokens) > context:
                raise DataError(
                    f"{document.source}: {len(document.tokens)} tokens, but the model's context is {context}; "
                    "shorten or remove the row" + (", or give fewer --shots" if shots else "")
                )
        if console:
            console.print(f"measuring {name}: {len(documents)} rows, {sum(len(d.tokens) for d in documents):,} tokens")
        metrics = loss.evaluate(loaded, split_passes(documents, _PASS_TOKENS))
        if not math.isfinite(metrics.loss):
            raise ModelError(
                f"{model}: the loss on {data}, {name}, is {metrics.loss}: its weights are damaged or too large; "
                "fetch it again, or train it anew"
            )
        return metrics

    plain = encode_all(examples, tokenizer)
    results = {}
    with adapters_disabled(loaded):
        results["base"] = measure("base", plain)
        if shots:
            name = f"base + {shots} shots"
            rows = zip(examples, plain, strict=True)
            results[name] = measure(
                name, [_with_shots(row, given[:shots], sum(d.trained), tokenizer) for row, d in rows]
            )
    if adapter_modules(loaded):
        results["tuned"] = measure("tuned", plain)
    return results


def _with_shots(example: Example, shots: Sequence[Example], own: int, tokenizer: Any) -> Document:
    """The example after other examples; its system message, if any, comes first, and only its ``own`` targets count."""
    from lorafit.data.chat import encode

    system = [message for message in example.messages if message["role"] == "system"]
    turns = [message for shot in (*shots, example) for message in shot.messages if message["role"] != "system"]
    document = encode(replace(example, messages=(*system, *turns)), tokenizer)
    # Whatever was said before, these are the last targets, and as many as without it.
    first = [place for place, counts in enumerate(document.trained) if counts][-own]
    return replace(document, trained=[counts and place >= first for place, counts in enumerate(document.trained)])


def evaluate_command(
    model: str,
    data: str,
    /,
    *,
    adapter: str | None = None,
    shots: int = 0,
    shots_from: str | None = None,
    json: bool = False,
) -> None:
    """Measure a model on a file of examples; for a run or with an adapter, base against tuned.

    Args:
        model: A .gguf file, a Hugging Face directory, smollm2-135m, or the directory of a run.
        data: Held-out rows, in a .jsonl file as for training.
        adapter: Directory of an adapter for this model, as PEFT or lorafit writes them.
        shots: Also measure the base with this many examples as earlier turns of every prompt: would a prompt do?
        shots_from: The file whose first rows are these examples, for example the training data.
        json: Print one JSON document on stdout; the text goes to stderr.
    """
    import_for_good("lorafit.models.load")
    console = Console(json=json)
    results = evaluate(model, data, adapter=adapter, shots=shots, shots_from=shots_from, console=console)
    rows = [(name, m.loss, m.perplexity, f"{m.token_accuracy:.1%}", m.tokens) for name, m in results.items()]
    console.table("", ["model", "loss", "perplexity", "token accuracy", "answer tokens"], rows)
    console.result({"model": model, "data": data, **{name: metrics.as_dict() for name, metrics in results.items()}})
