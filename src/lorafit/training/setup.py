"""From what the user asked for to settings in which nothing is left open, and nothing is without effect."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafit.config import AdapterConfig, LoRA, Method, QALoRA, TrainConfig
from lorafit.data.chat import Document, encode_all
from lorafit.data.packing import hold_out
from lorafit.data.preview import too_long
from lorafit.data.readers import Example, read_examples
from lorafit.errors import ConfigError, DataError
from lorafit.formats import block_format
from lorafit.modules import PackedLinear
from lorafit.training.optim import default_learning_rate


@dataclass(frozen=True)
class Data:
    """What a run learns from and what it is measured on.

    Attributes:
        training: Documents to train on.
        held_out: Documents to measure on; empty with --no-eval.
        held_out_examples: The rows behind ``held_out``, in the same order.
    """

    training: list[Document]
    held_out: list[Document]
    held_out_examples: list[Example]


def check_options(config: TrainConfig) -> None:
    """Refuse values out of range, options that exclude each other, and options that would have no effect.

    Raises:
        ConfigError: The first such option, by name.
    """
    for name, least in (
        ("batch_size", 1),
        ("pass_tokens", 1),
        ("eval_every", 0),
        ("checkpoint_every", 0),
        ("samples", 0),
    ):
        if getattr(config, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(config, name)}, but must be at least {least}")
    for name in ("steps", "epochs", "learning_rate", "max_length"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, but must be above 0")
    if not 0 <= config.warmup <= 1:
        raise ConfigError(f"--warmup is {config.warmup}, but is a share of the steps, from 0 to 1")
    if config.weight_decay < 0 or config.max_grad_norm < 0 or config.seed < 0:
        raise ConfigError("--weight-decay, --max-grad-norm and --seed cannot be negative")
    if config.steps is not None and config.epochs is not None:
        raise ConfigError("--steps and --epochs exclude each other; give one")
    if config.no_eval and config.eval_data:
        raise ConfigError("--no-eval and --eval-data exclude each other; give one")
    if config.no_eval and config.eval_every:
        raise ConfigError("--eval-every has no effect with --no-eval; leave one out")
    if config.truncate and config.max_length is None:
        raise ConfigError("--truncate needs --max-length, the length to cut at")
    adapter_config(config, config.method or "lora")


def adapter_config(config: TrainConfig, method: Method) -> AdapterConfig:
    """The adapter's settings.

    Raises:
        ConfigError: A setting is out of range, or has no effect with this method.
    """
    if method == "lora":
        return LoRA(
            rank=config.rank,
            alpha=config.alpha,
            scaling=config.scaling,
            dropout=config.dropout,
            targets=config.targets,
        )
    for name, default in (("dropout", 0.0), ("scaling", "standard")):
        if getattr(config, name) != default:
            raise ConfigError(f"--{name} has no effect with --method qalora; leave it out, or use --method lora")
    return QALoRA(rank=config.rank, alpha=config.alpha, targets=config.targets)


def resolve(config: TrainConfig, model: PreTrainedModel, base: Path, rows: int) -> TrainConfig:
    """Settings with a method, a learning rate, a number of steps and an output directory."""
    method = config.method or default_method(model)
    steps = config.steps
    if steps is None:
        steps = math.ceil((config.epochs or 1.0) * rows / config.batch_size)
    return dataclasses.replace(
        config,
        method=method,
        learning_rate=config.learning_rate or default_learning_rate(method, model.config.hidden_size),
        steps=steps,
        epochs=None,
        output=config.output or default_output(config, method),
    )


def default_method(model: PreTrainedModel) -> Method:
    """``qalora`` where some linear layer has block offsets to train, else ``lora``."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear) and block_format(layer.packed.format_name).offset_at is not None:
            return "qalora"
    return "lora"


def default_output(config: TrainConfig, method: Method) -> str:
    """``runs/MODEL-METHOD``."""
    return str(Path("runs") / f"{Path(config.model).name.removesuffix('.gguf')}-{method}")


def read_data(config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Read, split and tokenise the rows.

    Raises:
        MissingFileError: A file is not there.
        DataError: A row cannot be used, by file and line; or there are too few rows to hold some out.
        ModelError: The model has no chat template.
    """
    examples, held_out = read_examples(config.data), []
    if config.eval_data:
        held_out = read_examples(config.eval_data)
    elif not config.no_eval:
        examples, held_out = hold_out(examples)
    context = model.config.max_position_embeddings
    limit = min(config.max_length or context, context)
    return Data(
        training=fit_length(encode_all(examples, tokenizer), limit, config.truncate),
        held_out=fit_length(encode_all(held_out, tokenizer), limit, config.truncate),
        held_out_examples=held_out,
    )


def fit_length(documents: Sequence[Document], limit: int, truncate: bool) -> list[Document]:
    """Refuse documents longer than ``limit`` tokens, or cut them if the user chose so.

    Raises:
        DataError: A document is too long, or nothing trained is left of it after cutting.
    """
    long = too_long(documents, limit)
    if long and not truncate:
        more = f" ({len(long)} rows are too long)" if len(long) > 1 else ""
        raise DataError(
            f"{long[0].source}: {len(long[0].tokens)} tokens, but at most {limit} fit{more}; shorten or remove the row, "
            f"raise --max-length if the model allows it, or cut with --truncate --max-length {limit}"
        )
    result = []
    for document in documents:
        if len(document.tokens) > limit:
            document = Document(document.tokens[:limit], document.trained[:limit], document.source)
            if not any(document.trained):
                raise DataError(f"{document.source}: nothing of its answer is left after --truncate; remove the row")
        result.append(document)
    return result
