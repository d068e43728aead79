"""Peak memory of training on one long document.

    python benchmarks/long_document.py [MODEL] [--tokens 8192] [--memory lowest] [--method lora]

One step in this process, on made-up tokens of which a third is trained; what is printed is the most that the process
had resident, libraries and mapped file included. On Linux.
"""

from __future__ import annotations

import argparse
import time

# isort: off
import lorafit  # noqa: F401  first, because it sets how OpenMP waits before torch is loaded
import torch

# isort: on
from lorafit.config import LoRA, QALoRA, TrainConfig
from lorafit.data.chat import Document
from lorafit.data.packing import split_passes
from lorafit.models.load import load
from lorafit.modules import attach
from lorafit.objectives.sft import sft_loss
from lorafit.training.loop import Trainer
from lorafit.training.memory import peak_rss_bytes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--memory", default="lowest", choices=["high", "low", "lowest"])
    parser.add_argument("--method", default="lora", choices=["lora", "qalora"])
    options = parser.parse_args()
    model, _ = load(options.model)
    attach(model, LoRA() if options.method == "lora" else QALoRA())
    config = TrainConfig(options.model, "", learning_rate=1e-4, steps=1, memory=options.memory)
    trainer = Trainer(model, sft_loss, config)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (options.tokens,), generator=random).tolist()
    trained = [place >= options.tokens * 2 // 3 for place in range(options.tokens)]
    before, started = peak_rss_bytes(), time.process_time()
    trainer.step(split_passes([Document(ids, trained, "made up")], options.tokens))
    seconds, peak = time.process_time() - started, peak_rss_bytes()
    assert before and peak, "this system does not tell"
    print(f"{options.tokens} tokens, {options.method}, --memory {options.memory}: {seconds:.1f} s of processor time")
    print(f"peak resident memory {peak / 1e9:.2f} GB, {before / 1e9:.2f} GB before the step")


if __name__ == "__main__":
    main()
