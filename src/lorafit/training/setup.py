"""From what the user asked for to settings in which nothing is left open, and nothing is without effect."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafit.config import (
    AdapterConfig,
    Compute,
    FrozenTensors,
    LoRA,
    Memory,
    Method,
    QALoRA,
    QLoRA,
    Quantize,
    Scaling,
    TrainConfig,
)
from lorafit.data.chat import Document, encode_all
from lorafit.data.packing import hold_out
from lorafit.data.preview import too_long
from lorafit.data.readers import Example, read_examples
from lorafit.errors import ConfigError, DataError
from lorafit.models.load import is_full_precision
from lorafit.models.quantizing import BLOCK_FORMATS, SEARCHED
from lorafit.modules import PackedLinear
from lorafit.modules.qalora import has_offsets
from lorafit.training.loop import schedule_of
from lorafit.training.optim import default_learning_rate

_CHOICES = {
    "method": (None, *get_args(Method)),
    "quantize": (None, *get_args(Quantize)),
    "scaling": get_args(Scaling),
    "frozen_tensors": get_args(FrozenTensors),
    "decay": ("cosine", "linear", "constant"),
    "memory": get_args(Memory),
    "compute": get_args(Compute),
}
_ABOVE_ZERO = ("learning_rate", "epochs")
_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "tokens_per_step": 1,
    "pass_tokens": 1,
    "max_length": 2,  # a token to predict, and one to predict it from
    "warmup": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "seed": 0,
    "eval_every": 0,
    "checkpoint_every": 0,
    "importance_rows": 0,
    "samples": 0,
}
_BATCH_SIZE = 8  # where neither rows nor tokens of a step are given
_LARGEST_SEED = 2**63 - 1  # what torch takes


@dataclass(frozen=True)
class Rows:
    """What a run learns from and what it is measured on.

    Attributes:
        training: Rows to train on.
        held_out: Rows to measure on; none with --no-eval.
    """

    training: list[Example]
    held_out: list[Example]

    def both(self) -> int:
        """How many held-out rows are trained on too, word for word."""
        trained = {json.dumps(row.messages) for row in self.training}
        return sum(json.dumps(row.messages) in trained for row in self.held_out)


@dataclass(frozen=True)
class Data:
    """The same as documents, in the same order.

    Attributes:
        training: Documents to train on.
        held_out: Documents to measure on.
    """

    training: list[Document]
    held_out: list[Document]


def check_options(config: TrainConfig) -> None:
    """Refuse values out of range, options that exclude each other, and options that would have no effect.

    Raises:
        ConfigError: The first such option, by name.
    """
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise ConfigError(f"{_given(config, name)}, but must be one of {', '.join(filter(None, choices))}")
    for name in _ABOVE_ZERO:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{_given(config, name)}, but must be above 0")
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"{_given(config, name)}, but must be at least {least}")
    if config.warmup > 1:
        raise ConfigError(f"{_given(config, 'warmup')}, but is a share of the steps, from 0 to 1")
    if config.seed > _LARGEST_SEED:
        raise ConfigError(f"{_given(config, 'seed')}, but must be at most {_LARGEST_SEED}")
    if config.steps is not None and config.epochs is not None:
        raise ConfigError("--steps and --epochs exclude each other; give one")
    if config.batch_size is not None and config.tokens_per_step is not None:
        raise ConfigError("--batch-size and --tokens-per-step exclude each other; give one")
    if config.no_eval and config.eval_data:
        raise ConfigError("--no-eval and --eval-data exclude each other; give one")
    if (Path(config.model) / "adapter").is_dir():
        raise ConfigError(
            f"{config.model} is a run, but training starts from a base; give the base, or go on with the run by "
            "--resume, or train its adapter on by --adapter"
        )
    if config.truncate and config.max_length is None:
        raise ConfigError("--truncate needs --max-length, the length to cut at")
    if config.no_eval:
        _refuse_idle(config, ("eval_every", "samples"), "with --no-eval")
    if config.quantize and config.method == "qalora" and not has_offsets(BLOCK_FORMATS[config.quantize]):
        raise ConfigError(
            f"--quantize {config.quantize} makes blocks without the offsets that --method qalora trains; use q4_1 or "
            "q5_1, or --method qlora"
        )
    if config.quantize not in SEARCHED:
        _refuse_idle(config, ("importance_rows",), f"without --quantize {' or '.join(SEARCHED)}")
    # Of the methods that may be chosen later, the one that takes more of these settings.
    adapter_config(config, config.method or ("lora" if config.frozen_tensors == "frozen" else "qalora"))


def read_rows(config: TrainConfig) -> Rows:
    """Read and split the rows.

    Raises:
        MissingFileError: A file is not there.
        ConfigError: A model stands where the data should, or data are to be held out of themselves.
        DataError: A row cannot be used, by file and line; or there are too few rows to hold some out.
    """
    if config.data.lower().endswith(".gguf"):
        raise ConfigError(f"{config.data} is a model, but DATA is wanted there: lorafit train MODEL DATA")
    examples = read_examples(config.data)
    if config.no_eval:
        return Rows(examples, [])
    if not config.eval_data:
        return Rows(*hold_out(examples))
    if Path(config.eval_data).exists() and Path(config.eval_data).samefile(config.data):
        raise ConfigError(
            f"--eval-data {config.eval_data} is the training data, and would measure what was learnt by heart; leave "
            "it out, and 5% of the rows are held out"
        )
    return Rows(examples, read_examples(config.eval_data))


def choose_quantization(config: TrainConfig) -> TrainConfig:
    """``--quantize`` as it is given; what ``--method qlora`` trains beside must be quantised, by default to nf4."""
    if config.quantize is None and config.method == "qlora" and is_full_precision(config.model):
        return dataclasses.replace(config, quantize="nf4")
    return config


def encode_rows(rows: Rows, config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Tokenise the rows.

    Raises:
        ConfigError: --max-length is longer than the model's context.
        DataError: A row is too long, or the chat template refuses it.
        ModelError: The model has no chat template.
    """
    context = model.config.max_position_embeddings
    limit = config.max_length or context
    if limit > context:
        raise ConfigError(f"--max-length is {limit}, but the model's context is {context}; leave it out or lower it")
    return Data(
        fit_length(encode_all(rows.training, tokenizer), limit, config.truncate),
        fit_length(encode_all(rows.held_out, tokenizer), limit, config.truncate),
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
            f"{long[0].source}: {len(long[0].tokens)} tokens, but at most {limit} fit{more}; shorten or remove the "
            f"row, raise --max-length if the model allows it, or cut with --truncate --max-length {limit}"
        )
    result = []
    for document in documents:
        if len(document.tokens) > limit:
            document = Document(document.tokens[:limit], document.trained[:limit], document.source)
            if not any(document.trained):
                raise DataError(f"{document.source}: nothing of its answer is left after --truncate; remove the row")
        result.append(document)
    return result


def resolve(config: TrainConfig, model: PreTrainedModel, data: Data) -> TrainConfig:
    """Settings with a method, a learning rate, a size and a number of steps, and an output directory.

    Raises:
        ConfigError: An option has no effect on this model, or on so many rows or steps.
        DataError: A row has more tokens than a step may have.
    """
    method = config.method or default_method(model, config.quantize)
    adapter_config(config, method)
    if config.tokens_per_step is None:
        config = dataclasses.replace(config, batch_size=config.batch_size or _BATCH_SIZE)
    _check_step_size(config, data.training)
    if data.held_out and config.samples > len(data.held_out):
        _refuse_idle(config, ("samples",), f"beyond the {len(data.held_out)} rows that are held out")
    steps = config.steps or schedule_of(data.training, config).steps_in(config.epochs or 1.0)
    for name in ("eval_every", "checkpoint_every"):
        if getattr(config, name) >= steps:
            _refuse_idle(config, (name,), f"in a run of {steps} steps, after which both are done anyway")
    return dataclasses.replace(
        config,
        method=method,
        learning_rate=config.learning_rate or default_learning_rate(method, model.config.hidden_size),
        steps=steps,
        epochs=None,
        output=config.output or default_output(config, method),
    )


def _check_step_size(config: TrainConfig, documents: Sequence[Document]) -> None:
    """Refuse steps that no row or more than all rows would fit into.

    Raises:
        ConfigError: A step would be larger than an epoch.
        DataError: A row is larger than a step.
    """
    count, budget = len(documents), config.tokens_per_step
    if config.batch_size is not None and config.batch_size > count:
        raise ConfigError(f"{_given(config, 'batch_size')}, but rows to train on number {count}; give that or less")
    if budget is None:
        return
    if long := too_long(documents, budget):
        more = f" ({len(long)} rows are larger)" if len(long) > 1 else ""
        raise DataError(
            f"{long[0].source}: {len(long[0].tokens)} tokens, but a step takes at most {budget}{more}; raise "
            f"--tokens-per-step, shorten or remove the row, or cut with --truncate --max-length {budget}"
        )
    tokens = sum(len(document.tokens) for document in documents)
    if budget > tokens:
        raise ConfigError(f"--tokens-per-step is {budget}, but all rows have {tokens} tokens; give that or less")


def adapter_config(config: TrainConfig, method: Method) -> AdapterConfig:
    """The adapter's settings.

    Raises:
        ConfigError: A setting is out of range, or has no effect with this method.
    """
    if method != "qalora":
        _refuse_idle(config, ("frozen_tensors",), f"with --method {method}, only with qalora")
        kind = QLoRA if method == "qlora" else LoRA
        return kind(
            rank=config.rank,
            alpha=config.alpha,
            scaling=config.scaling,
            dropout=config.dropout,
            targets=config.targets,
            dora=config.dora,
        )
    _refuse_idle(config, ("dropout", "scaling", "dora"), "with --method qalora, only with lora and qlora")
    return QALoRA(rank=config.rank, alpha=config.alpha, targets=config.targets, frozen_tensors=config.frozen_tensors)


def default_method(model: PreTrainedModel, quantize: Quantize | None) -> Method:
    """``qalora`` where some layer has block offsets to train; else ``qlora`` with --quantize and ``lora`` without."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear) and has_offsets(layer.packed.format_name):
            return "qalora"
    return "qlora" if quantize else "lora"


def default_output(config: TrainConfig, method: Method) -> str:
    """``runs/MODEL-METHOD``."""
    return str(Path("runs") / f"{Path(config.model).absolute().name.removesuffix('.gguf')}-{method}")


def _refuse_idle(config: TrainConfig, names: Sequence[str], when: str) -> None:
    """Refuse settings that were changed from their defaults although they have no effect.

    Raises:
        ConfigError: The first such setting.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        if getattr(config, name) != defaults[name]:
            raise ConfigError(f"{_option(name)} {getattr(config, name)} has no effect {when}; leave it out")


def _given(config: TrainConfig, name: str) -> str:
    return f"{_option(name)} is {getattr(config, name)}"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
