"""One measurement of TRL and PEFT, at the settings that were fastest on a processor.

    python benchmarks/peers/with_trl.py PLAN RESULT MODEL bf16|fp32

Weights in bf16, its default loss (which projects the vocabulary in chunks, where a token is trained), rows of like
length batched (the plan's batches are), no gradient checkpointing. Runs in .venv-peers and knows nothing of lorafit.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measuring import peak_resident_bytes, read_plan, write_result
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

IGNORED = -100


class Clock(TrainerCallback):
    """Times each step, from the batch at hand to the updated weights."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **options: Any) -> None:
        """Start."""
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **options: Any) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.started)


class Noting(SFTTrainer):
    """Notes what went through the model, and the loss."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tokens: list[int] = []
        self.losses: list[float] = []

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As it was, with notes."""
        self.tokens.append(int(inputs["attention_mask"].sum()))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(float(loss))
        return loss


def main(plan_path: Path, result: Path, model_path: str, precision: str) -> None:
    """Train on the plan and leave the figures."""
    plan = read_plan(plan_path)
    rows = [
        {
            "input_ids": document["tokens"],
            "labels": [
                token if trained else IGNORED
                for token, trained in zip(document["tokens"], document["trained"], strict=True)
            ],
        }
        for step in plan
        for document in step
    ]
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Noting(
            model=AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype),
            processing_class=AutoTokenizer.from_pretrained(model_path),
            args=SFTConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=len(plan[0]),
                max_steps=len(plan),
                max_length=None,
                train_sampling_strategy="sequential",  # the plan has grouped the rows by length
                learning_rate=1e-4,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            callbacks=[clock],
            peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"),
        )
        trainer.train()
    write_result(
        result,
        seconds=clock.seconds,
        tokens=trainer.tokens,
        losses=trainer.losses,
        peak_bytes=peak_resident_bytes(),
        threads=torch.get_num_threads(),
        trainable_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
