"""One measurement of lorafit, at its default settings but for --memory.

    python benchmarks/peers/with_lorafit.py PLAN RESULT MODEL bf16|fp32 lora|qalora high|low|lowest

When the steps are done and the peak of memory is read, it also measures how fast the machine multiplies matrices.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

# isort: off
import lorafit  # noqa: F401  first, because it sets how OpenMP waits before torch is loaded
import torch

# isort: on
from measuring import peak_resident_bytes, read_plan, write_result

from lorafit.data.chat import Document
from lorafit.data.packing import split_passes
from lorafit.models.load import load_base
from lorafit.training.speed import frozen_work, make_trainer, matrix_rate


def main(plan_path: Path, result: Path, model: str, compute: Any, method: Any, memory: Any) -> None:
    """Train on the plan and leave the figures."""
    plan = read_plan(plan_path)
    base = load_base(model, compute=compute)
    work = frozen_work(base.model)
    trainer = make_trainer(base.model, method, memory=memory)
    seconds, steps = [], []
    for number, rows in enumerate(plan):
        documents = [Document(row["tokens"], row["trained"], f"step {number + 1}") for row in rows]
        started = time.perf_counter()
        steps.append(trainer.step(split_passes(documents, trainer.config.pass_tokens)))
        seconds.append(time.perf_counter() - started)
    peak = peak_resident_bytes()
    write_result(
        result,
        seconds=seconds,
        tokens=[step.tokens for step in steps],
        flops=[work.flops(step.tokens, step.trained_tokens) for step in steps],
        losses=[step.loss for step in steps],
        peak_bytes=peak,
        threads=torch.get_num_threads(),
        trainable_parameters=sum(parameter.numel() for parameter in trainer.parameters),
        matrix_flops_per_second=matrix_rate(base.compute),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
