"""A model that lorafit attached to, under the trainers of transformers and TRL: padded batches, as they make them."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import lorafit
from lorafit.config import AdapterConfig, TrainConfig
from lorafit.data.chat import Document, encode_all
from lorafit.data.packing import split_passes
from lorafit.data.readers import Example
from lorafit.evaluation.loss import evaluate
from lorafit.modules import adapter_modules
from lorafit.objectives.sft import sft_loss
from lorafit.training.loop import Trainer as Loop
from tests.oracles.family_gguf import random_model, write_family
from tests.oracles.tiny_directory import write_tiny_directory
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

ROWS = (
    ("What did the miller leave?", "A mill, a donkey and a cat."),
    ("Who took the mill?", "The eldest, and the second took the donkey."),
    ("And the cat?", "It spoke: have some boots made for me, so that I can go out and be seen among people."),
    ("Why?", "It did."),
)
MESSAGES = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ROWS]
RATE, STEPS = 5e-3, 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    write_tiny_directory(path)
    return path


def attached(path: Path, config: AdapterConfig, compute: Any = "fp32") -> tuple[PreTrainedModel, Any]:
    model, tokenizer = lorafit.load(path, compute=compute)
    torch.manual_seed(0)
    lorafit.attach(model, config)
    return model, tokenizer


def documents(tokenizer: Any) -> list[Document]:
    return encode_all([Example(tuple(messages), "rows.jsonl") for messages in MESSAGES], tokenizer)


def as_rows(found: Sequence[Document]) -> Dataset:
    """The same documents as transformers wants them."""
    return Dataset.from_list(
        [
            {
                "input_ids": each.tokens,
                "labels": [
                    token if trained else -100 for token, trained in zip(each.tokens, each.trained, strict=True)
                ],
            }
            for each in found
        ]
    )


def arguments(kind: Any, output: Path, **options: Any) -> Any:
    return kind(
        **{
            **{"output_dir": str(output), "per_device_train_batch_size": len(ROWS), "max_steps": STEPS, "seed": 0},
            **{"learning_rate": RATE, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": []},
            **{"use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no", "weight_decay": 0.0},
            **options,
        }
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@cache
def losses_of_lorafit(path: Path, method: str, compute: Any = "fp32") -> list[float]:
    """The same steps in lorafit's own loop, which pads nothing."""
    model, tokenizer = attached(path, CONFIGS[method], compute)
    batches = split_passes(documents(tokenizer), 2048)
    settings = TrainConfig("tiny", "", learning_rate=RATE, steps=STEPS, warmup=0.0, decay="constant")
    loop = Loop(model, sft_loss, settings)
    return [loop.step(batches).loss for _ in range(STEPS)]


CONFIGS = {
    "lora": lorafit.LoRA(rank=4),
    "qalora": lorafit.QALoRA(rank=2),
    "dora": lorafit.LoRA(rank=4, dora=True),
    "dropout": lorafit.LoRA(rank=4, dropout=0.5),
}


@pytest.mark.parametrize(
    ("base", "method", "checkpointing"),
    [
        ("packed", "lora", False),
        ("packed", "lora", True),
        ("packed", "qalora", False),
        ("packed", "qalora", True),
        ("packed", "dora", True),
        ("dense", "lora", True),
        ("dense", "dora", False),
    ],
)
def test_trainer_gives_the_losses_of_lorafit(
    base: str, method: str, checkpointing: bool, tiny: TinyLlama, dense: Path, tmp_path: Path
) -> None:
    path = tiny.path if base == "packed" else dense
    model, tokenizer = attached(path, CONFIGS[method])
    trainer = Trainer(
        model=model,
        args=arguments(TrainingArguments, tmp_path / "out", gradient_checkpointing=checkpointing),
        train_dataset=as_rows(documents(tokenizer)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["attention_mask"].sum(1).min() < batch["attention_mask"].shape[1]
    trainer.train()
    expected = losses_of_lorafit(path, method)
    assert expected[-1] < expected[0] - 1
    # Sums of float32 in another order: measured 2e-6 after four steps.
    assert losses(trainer) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3", "qwen3moe"])
def test_families_on_padded_batches(family: str, tmp_path: Path) -> None:
    """Windows, soft caps, fused projections and experts, for which lorafit has code of its own."""
    path = write_family(tmp_path / "base.gguf", family, random_model(family), format="Q8_0")
    model, tokenizer = attached(path, CONFIGS["lora"])
    trainer = Trainer(
        model=model,
        args=arguments(TrainingArguments, tmp_path / "out"),
        train_dataset=as_rows(documents(tokenizer)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    expected = losses_of_lorafit(path, "lora")
    assert losses(trainer) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("method", "compute", "autocast"),
    [
        ("lora", "fp32", False),
        ("lora", "fp32", True),
        ("dora", "fp32", True),
        ("qalora", "fp32", True),
        ("qalora", "bf16", True),
    ],
)
def test_sft_trainer_gives_the_losses_of_lorafit(
    method: str, compute: str, autocast: bool, tiny: TinyLlama, tmp_path: Path
) -> None:
    """With what TRL does by default: gradient checkpointing, autocast, and a loss that multiplies with the head."""
    model, tokenizer = attached(tiny.path, CONFIGS[method], compute)
    trainer = SFTTrainer(
        model=model,
        args=arguments(SFTConfig, tmp_path / "out", bf16=autocast, gradient_checkpointing=True),
        train_dataset=as_rows(documents(tokenizer)),
        processing_class=tokenizer,
    )
    trainer.train()
    expected = losses_of_lorafit(tiny.path, method, compute)
    # Eight bits of mantissa, in other places: measured 0.014 at most.
    assert losses(trainer) == pytest.approx(expected, abs=0.03 if autocast else 1e-4)


def test_sft_trainer_takes_conversations(tiny: TinyLlama, tmp_path: Path) -> None:
    model, tokenizer = attached(tiny.path, CONFIGS["dropout"])
    trainer = SFTTrainer(
        model=model,
        args=arguments(SFTConfig, tmp_path / "out", max_steps=8),
        train_dataset=Dataset.from_list([{"prompt": row[:1], "completion": row[1:]} for row in MESSAGES]),
        processing_class=tokenizer,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 1


def test_evaluation_is_that_of_lorafit(tiny: TinyLlama, tmp_path: Path) -> None:
    model, tokenizer = attached(tiny.path, CONFIGS["qalora"])
    for module in adapter_modules(model).values():
        torch.nn.init.normal_(module.adapter_parameters()["qalora_B"], std=0.05)
    rows = documents(tokenizer)
    trainer = Trainer(
        model=model,
        args=arguments(TrainingArguments, tmp_path / "out", per_device_eval_batch_size=4),
        eval_dataset=as_rows(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    expected = evaluate(model, split_passes(rows, 2048)).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)


def test_what_is_saved_is_a_peft_adapter(tiny: TinyLlama, tmp_path: Path) -> None:
    model, tokenizer = attached(tiny.path, CONFIGS["lora"])
    trainer = SFTTrainer(
        model=model,
        args=arguments(SFTConfig, tmp_path / "out"),
        train_dataset=as_rows(documents(tokenizer)),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not {name for name in names if name.startswith(("model", "pytorch_model"))}
    assert sum(path.stat().st_size for path in (tmp_path / "adapter").glob("*.safetensors")) < 200_000
    tokens = torch.tensor([documents(tokenizer)[0].tokens])
    peft = PeftModel.from_pretrained(tiny.dense(), tmp_path / "adapter").eval()
    again = lorafit.load(tmp_path / "adapter", compute="fp32")[0]
    with torch.no_grad():
        tuned = model.eval()(tokens).logits
        torch.testing.assert_close(peft(tokens).logits, tuned, rtol=0, atol=1e-4)
        assert torch.equal(again(tokens).logits, tuned)


@pytest.mark.parametrize("method", ["lora", "qalora"])
def test_training_goes_on_from_a_checkpoint(method: str, tiny: TinyLlama, tmp_path: Path) -> None:
    def trainer(**options: Any) -> Trainer:
        model, tokenizer = attached(tiny.path, CONFIGS[method])
        made = arguments(TrainingArguments, tmp_path / "out", save_strategy="steps", save_steps=2, **options)
        collator = DataCollatorForSeq2Seq(tokenizer)
        return Trainer(model=model, args=made, train_dataset=as_rows(documents(tokenizer)), data_collator=collator)

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_best_checkpoint_is_loaded(tiny: TinyLlama, tmp_path: Path) -> None:
    """At a rate at which every step makes it worse, the first is the best."""
    model, tokenizer = attached(tiny.path, CONFIGS["lora"])
    rows = as_rows(documents(tokenizer))
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = Trainer(
        model=model,
        args=arguments(
            TrainingArguments, tmp_path / "out", load_best_model_at_end=True, learning_rate=0.5, max_steps=3, **options
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    measured = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(measured) < measured[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(measured), abs=1e-6)
    assert math.isfinite(min(measured))
