"""Which learning rate serves a method: held-out loss after short runs on the product example.

    python benchmarks/learning_rates.py [--steps 40]

Each method is run at half, once, and twice its default rate, everything else alike.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from lorafit import TrainConfig, train
from lorafit.training.optim import default_learning_rate

PRODUCTS = Path(__file__).resolve().parent.parent / "examples" / "products"
WIDTH = 576  # of SmolLM2-135M


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    for method in ("lora", "qalora"):
        for factor in (0.5, 1.0, 2.0):
            rate = factor * default_learning_rate(method, WIDTH)
            with tempfile.TemporaryDirectory() as folder:
                config = TrainConfig(
                    "smollm2-135m",
                    str(PRODUCTS / "train.jsonl"),
                    eval_data=str(PRODUCTS / "heldout.jsonl"),
                    output=f"{folder}/run",
                    method=method,
                    learning_rate=rate,
                    steps=options.steps,
                    samples=0,
                )
                summary = train(config)
            print(f"{method:<7} {rate:8.2e} ({factor:g} x default)  {summary.eval_loss_after:.4f}", flush=True)


if __name__ == "__main__":
    main()
