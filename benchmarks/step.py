"""What this machine does with a model: matrix rate, unpacking, training steps, decoding.

    python benchmarks/step.py [MODEL] [--rounds 5]

LoRA and QA-LoRA are measured in turn (A B A B) on the same packed file and the same rows, and medians are printed, so
that the ratios hold on a machine whose speed drifts. The rows are made up: 8 documents of 150 tokens a step, a third of
them trained.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

# isort: off
import lorafit  # noqa: F401  first, because it sets how OpenMP waits before torch is loaded
import torch

# isort: on
from lorafit.config import LoRA, QALoRA, TrainConfig
from lorafit.data.chat import Document
from lorafit.data.packing import split_passes
from lorafit.evaluation.generate import generate
from lorafit.models.load import load
from lorafit.modules import PackedLinear, attach
from lorafit.objectives.sft import sft_loss
from lorafit.training.loop import Trainer

DOCUMENTS, LENGTH = 8, 150


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    started = time.perf_counter()
    base, tokenizer = load(options.model)
    print(f"{torch.get_num_threads()} threads, {base.dtype}")
    print(f"load, tokenizer included          {time.perf_counter() - started:8.2f} s")
    print(f"matrix products                   {matrix_rate(base.dtype) / 1e9:8.0f} GFLOP/s")
    print(f"unpacking a million weights       {unpacking(base) * 1e6:8.0f} µs")
    print(f"decoding                          {decoding(base, tokenizer):8.1f} tokens/s")
    rates: dict[str, list[float]] = {"lora": [], "qalora": []}
    trainers = {"lora": trainer(options.model, LoRA()), "qalora": trainer(options.model, QALoRA())}
    for _ in range(options.rounds + 1):
        for name, this in trainers.items():
            step = this.step(split_passes(documents(base.config.vocab_size), DOCUMENTS * LENGTH))
            rates[name].append(step.tokens / step.seconds)
    for name, measured in rates.items():
        # The first step compiles kernels and touches memory for the first time.
        print(f"training, {name:<7}                 {statistics.median(measured[1:]):8.0f} tokens/s")


def trainer(model: str, adapter: LoRA | QALoRA) -> Trainer:
    """A model of its own with an adapter."""
    loaded, _ = load(model)
    attach(loaded, adapter)
    return Trainer(loaded, sft_loss, TrainConfig(model, "", learning_rate=1e-3, steps=10**6))


def documents(vocabulary: int) -> list[Document]:
    """Made-up rows, the same each time."""
    random = torch.Generator().manual_seed(0)
    trained = [place >= LENGTH * 2 // 3 for place in range(LENGTH)]
    ids = torch.randint(vocabulary, (DOCUMENTS, LENGTH), generator=random).tolist()
    return [Document(tokens, trained, f"row {i}") for i, tokens in enumerate(ids)]


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a square product."""
    size = 2048
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / median_seconds(lambda: a @ b)


def unpacking(model: torch.nn.Module) -> float:
    """Seconds for a million weights, over all packed layers but the head."""
    layers = [
        module.packed for name, module in model.named_modules() if isinstance(module, PackedLinear) and "." in name
    ]
    weights = sum(packed.shape[0] * packed.shape[1] for packed in layers)
    return median_seconds(lambda: [packed.dense(torch.bfloat16) for packed in layers]) / (weights / 1e6)


def decoding(model: torch.nn.Module, tokenizer: object) -> float:
    """Tokens per second of a greedy answer, prompt included."""
    question = [{"role": "user", "content": "Tell me a long story about a lighthouse."}]
    count = 64
    seconds = median_seconds(lambda: list(generate(model, tokenizer, question, max_tokens=count)), repeats=3)
    return count / seconds


def median_seconds(work: Callable[[], object], repeats: int = 10) -> float:
    """Median time of some work, after one round of warm-up."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
