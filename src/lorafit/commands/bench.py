"""``lorafit bench``: what this machine does with a model, and how much of what it could do that is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lorafit.commands.console import Console, readable_bytes
from lorafit.config import Compute
from lorafit.errors import ConfigError

if TYPE_CHECKING:
    from lorafit.config import Method
    from lorafit.models.base import Base
    from lorafit.training.loop import Trainer


def bench_command(
    model: str = "smollm2-135m",
    /,
    *,
    batch_size: int = 8,
    length: int = 150,
    rounds: int = 10,
    compute: Compute = "auto",
    json: bool = False,
) -> None:
    """Measure matrix products, unpacking, decoding and training steps of a model on this machine.

    Args:
        model: A .gguf file, a Hugging Face directory, or smollm2-135m.
        batch_size: Made-up rows in a step.
        length: Tokens in a row; the last third of them is trained.
        rounds: Steps of each method, in turn, after one for warm-up; medians are shown.
        compute: Arithmetic, as for train.
        json: Print one JSON document on stdout; the text goes to stderr.
    """
    for option, value, least in (("--batch-size", batch_size, 1), ("--length", length, 2), ("--rounds", rounds, 1)):
        if value < least:
            raise ConfigError(f"{option} is {value}, but must be at least {least}")

    import torch

    from lorafit.models.load import load_base
    from lorafit.training import speed
    from lorafit.training.memory import peak_rss_bytes

    console = Console(json=json)
    started = time.perf_counter()
    base = load_base(model, compute=compute)
    load_seconds = time.perf_counter() - started
    context = base.model.config.max_position_embeddings
    if length > context:
        raise ConfigError(f"--length is {length}, but the model's context is {context}; lower it")

    arithmetic = str(base.compute).removeprefix("torch.")
    rate = speed.matrix_rate(base.compute)
    unpacking = speed.unpacking_seconds(base.model, base.compute)
    decoding = speed.decoding_rate(base.model, base.tokenizer) if base.tokenizer.chat_template else None
    console.fields(
        "",
        {
            "model": f"{model}, loaded in {load_seconds:.2f} s",
            "threads": torch.get_num_threads(),
            "matrix products": f"{rate / 1e9:,.0f} GFLOP/s in {arithmetic}",
            "unpacking": f"{unpacking * 1e6:,.0f} µs for a million weights" if unpacking else "nothing is packed",
            "decoding": f"{decoding:.1f} tokens/s" if decoding else "the model has no chat template",
        },
    )
    rank = speed.usual_rank(base.model)
    methods = _measure_steps(base, model, rank, batch_size, length, rounds, rate)
    rows = [
        (name, m["step_seconds"], f"{m['tokens_per_second']:,.0f}", f"{m['share_of_limit']:.0%}")
        for name, m in methods.items()
    ]
    console.table(
        f"Training steps of {batch_size} rows of {length} tokens, rank {rank} on all linear layers",
        ["method", "seconds", "tokens/s", "share of the limit"],
        rows,
    )
    peak = peak_rss_bytes()
    console.print("The limit: 4 FLOP for each frozen weight and token at the rate of the matrix products above.")
    if peak:
        console.print(f"Peak resident memory {readable_bytes(peak)}, the models of all methods together.")
    console.result(
        {
            "model": model,
            "compute": arithmetic,
            "threads": torch.get_num_threads(),
            "load_seconds": load_seconds,
            "matrix_flops_per_second": rate,
            "unpacking_seconds_per_million_weights": unpacking,
            "decoding_tokens_per_second": decoding,
            "batch_size": batch_size,
            "length": length,
            "rounds": rounds,
            "rank": rank,
            "methods": methods,
            "peak_rss_bytes": peak,
        }
    )


def _measure_steps(
    base: Base, model: str, rank: int, batch_size: int, length: int, rounds: int, rate: float
) -> dict[str, dict[str, Any]]:
    """Medians of training steps, by method: LoRA, and QA-LoRA where the base has block offsets."""
    import statistics

    from lorafit.models.load import load_base
    from lorafit.training import speed
    from lorafit.training.setup import default_method

    work = speed.frozen_work(base.model)
    documents = speed.made_up_rows(base.model.config.vocab_size, batch_size, length)
    trainers: dict[Method, Trainer] = {}
    if default_method(base.model, None) == "qalora":
        compute: Compute = "fp32" if base.compute.itemsize == 4 else "bf16"
        trainers["qalora"] = speed.make_trainer(load_base(model, compute=compute).model, "qalora", rank)
    trainers = {"lora": speed.make_trainer(base.model, "lora", rank), **trainers}
    taken = list(speed.steps_in_turn(trainers, documents, rounds))
    methods = {}
    for name in trainers:
        step = taken[0][name]
        seconds = statistics.median(turn[name].seconds for turn in taken)
        methods[str(name)] = {
            "step_seconds": seconds,
            "tokens_per_second": step.tokens / seconds,
            "share_of_limit": work.flops(step.tokens, step.trained_tokens) / seconds / rate,
        }
    return methods
