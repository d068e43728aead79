"""Settings, declared once: these dataclasses are the Python API, the YAML file and the command line.

The command line takes option names, defaults, types and help from here (the ``Attributes`` sections are the help
texts), ``--config run.yaml`` fills the same fields, and a run writes them back, resolved, as ``config.yaml``. This
module imports nothing heavy, so that ``lorafit --help`` stays instant.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from lorafit.errors import ConfigError, MissingFileError

Method = Literal["lora", "qalora", "qlora"]
Quantize = Literal["nf4", "fp4", "q4_1", "q5_1", "q8_0"]
Compute = Literal["auto", "bf16", "fp32"]
MemoryLevel = Literal["high", "low", "lowest"]
Memory = Literal["auto", MemoryLevel]
Scaling = Literal["standard", "rslora", "plain"]
FrozenTensors = Literal["frozen", "lora"]
CombineMethod = Literal[
    "linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd", "dare_linear_svd",
    "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip
Requantize = Literal["q8_0", "q6_k", "q5_1", "q5_k", "q5_0", "q4_1", "q4_k", "q4_0", "bf16", "f16", "f32", "keep"]
GGUFType = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k", "q5_1", "q5_0", "q4_k_m", "q4_k", "q4_1", "q4_0"
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adaptation (arXiv 2106.09685): y = W x + s·B(A x), with W frozen.

    Attributes:
        rank: Rank r of the update.
        alpha: Numerator of the scaling.
        scaling: ``standard`` is alpha/r, ``rslora`` alpha/sqrt(r) (arXiv 2312.03732), ``plain`` alpha itself.
        dropout: Probability with which inputs of the adapter are dropped in training.
        targets: ``all-linear`` (every linear layer but the output head), or comma-separated module names such as
            ``q_proj,v_proj``, or a regular expression over full names.
        dora: Train the magnitude of each row of the weight beside its direction (DoRA, arXiv 2402.09353).
        rank_pattern: Name of some layers -> their rank, in place of ``rank``. A name is that of a module or its end, or
            a regular expression for one of these; of those that match a layer, the first counts.
        alpha_pattern: The same for ``alpha``.
        modules_to_save: Ends of the names of modules that are trained whole, as dense copies, such as ``lm_head``.
        trainable_token_indices: End of the name of an embedding -> the tokens whose rows are trained.
    """

    method: ClassVar[Method] = "lora"

    rank: int = 16
    alpha: float = 32.0
    scaling: Scaling = "standard"
    dropout: float = 0.0
    targets: str = "all-linear"
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    trainable_token_indices: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_rank_and_alpha(self.rank, self.alpha)
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout is {self.dropout}, but must be at least 0 and below 1")
        _check_choice("scaling", self.scaling, get_args(Scaling))
        if self.scaling == "plain" and self.rank_pattern:
            raise ConfigError(
                "rank_pattern does not go with scaling plain, which PEFT's files cannot say of each layer"
            )
        for rank in self.rank_pattern.values():
            if not isinstance(rank, int):
                raise ConfigError(f"rank_pattern gives the rank {rank!r}, but must give whole numbers")
            _check_rank_and_alpha(rank, self.alpha)
        for alpha in self.alpha_pattern.values():
            _check_rank_and_alpha(self.rank, alpha)
        for name in (*self.rank_pattern, *self.alpha_pattern):
            _check_pattern(name)
        # Read from JSON, these are lists; two records of one adapter are to be equal.
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))
        indices = {name: tuple(tokens) for name, tokens in self.trainable_token_indices.items()}
        object.__setattr__(self, "trainable_token_indices", indices)

    @property
    def scale(self) -> float:
        """The factor s before B A."""
        return {
            "standard": self.alpha / self.rank,
            "rslora": self.alpha / self.rank**0.5,
            "plain": self.alpha,
        }[self.scaling]

    def at(self, name: str) -> LoRA:
        """The settings of one layer: the same with the rank and alpha that the patterns give it.

        Args:
            name: Full name of the layer.
        """
        rank, alpha = pattern_key(self.rank_pattern, name), pattern_key(self.alpha_pattern, name)
        return replace(
            self,
            rank=self.rank if rank is None else self.rank_pattern[rank],
            alpha=self.alpha if alpha is None else self.alpha_pattern[alpha],
            rank_pattern={},
            alpha_pattern={},
        )


@dataclass(frozen=True, kw_only=True)
class QLoRA(LoRA):
    """LoRA beside a quantised base (arXiv 2305.14314): the computation is LoRA's, over whatever the base is packed in.

    Attributes:
        rank: As for LoRA, and so are the others.
    """

    method: ClassVar[Method] = "qlora"


@dataclass(frozen=True, kw_only=True)
class QALoRA:
    """Quantisation-aware LoRA (arXiv 2309.14717): the update is constant within a block and folds into its offset.

    Attributes:
        rank: Rank r of the update; at most the number of blocks in a row.
        alpha: Numerator of the scaling alpha/r.
        targets: As for LoRA.
        frozen_tensors: What becomes of targets that this cannot train, because their blocks have no offsets and cannot
            be promoted to a format with offsets, or because they are experts: ``frozen`` leaves them as they are,
            ``lora`` puts plain LoRA of the same rank beside them.
    """

    method: ClassVar[Method] = "qalora"

    rank: int = 16
    alpha: float = 32.0
    targets: str = "all-linear"
    frozen_tensors: FrozenTensors = "frozen"

    def __post_init__(self) -> None:
        _check_rank_and_alpha(self.rank, self.alpha)
        _check_choice("frozen_tensors", self.frozen_tensors, get_args(FrozenTensors))

    @property
    def scale(self) -> float:
        """The factor s before B A."""
        return self.alpha / self.rank


AdapterConfig = LoRA | QALoRA


@dataclass(frozen=True, kw_only=True)
class Combination:
    """How several adapters of one base become one.

    Attributes:
        method: ``linear`` is the weighted sum of the updates, in as few ranks as hold it; ``cat`` the same with the
            factors side by side, so that ranks add up; ``svd`` the closest to that sum of rank --rank. ``ties_svd``,
            ``dare_linear_svd``, ``dare_ties_svd`` and ``magnitude_prune_svd`` prune the updates, combine them, and take
            the closest of rank --rank. Without ``_svd`` they prune and combine the factors, as PEFT does, which is
            quicker, needs equal ranks, and is a coarse approximation.
        rank: Rank of the result of a method that ends in svd. [default: the largest of the adapters]
        density: Share of the numbers that pruning keeps. Required by ties, dare and magnitude_prune.
        majority: How ties elects the sign of a number: by the ``total`` of the values, or by the ``frequency`` of
            signs. [default: total]
        seed: Seed of what dare drops. [default: 0]
    """

    method: CombineMethod = "linear"
    rank: int | None = None
    density: float | None = None
    majority: Literal["total", "frequency"] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_choice("method", self.method, get_args(CombineMethod))
        kind = self.method.removesuffix("_svd")
        prunes = kind not in ("linear", "cat", "svd")
        for name, value, used in (
            ("rank", self.rank, self.method.endswith("svd")),
            ("density", self.density, prunes),
            ("majority", self.majority, kind.endswith("ties")),
            ("seed", self.seed, kind.startswith("dare")),
        ):
            if value is not None and not used:
                raise ConfigError(f"{name} has no effect on the method {self.method}; leave it out")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank is {self.rank}, but must be at least 1")
        if prunes and self.density is None:
            raise ConfigError(f"the method {self.method} needs a density, the share of numbers to keep, such as 0.2")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise ConfigError(f"density is {self.density}, but must be above 0 and at most 1")
        if self.majority is not None:
            _check_choice("majority", self.majority, ("total", "frequency"))


def pattern_key(pattern: Mapping[str, Any], name: str) -> str | None:
    """The first key that matches a layer's full name or its end behind a dot, which is PEFT's rule."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", name)), None)


def _check_pattern(name: str) -> None:
    try:
        re.compile(name)
    except re.error as error:
        raise ConfigError(f"{name!r} is neither a name nor a regular expression: {error}") from None


def _check_rank_and_alpha(rank: int, alpha: float) -> None:
    if rank < 1:
        raise ConfigError(f"rank is {rank}, but must be at least 1 (16 is a good start)")
    if not 0.0 < alpha < float("inf"):
        raise ConfigError(f"alpha is {alpha}, but must be a positive number (32 is a good start)")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}, but must be one of {', '.join(choices)}")


@dataclass
class TrainConfig:
    """All settings of a training run.

    Attributes:
        model: A .gguf file, a Hugging Face directory, or ``smollm2-135m``.
        data: Training rows: a .jsonl file of {"messages": [...]} or {"prompt": ..., "completion": ...}.
        output: Directory of the run. [default: runs/MODEL-METHOD]
        adapter: Go on training the adapter in this directory, one of PEFT, of lorafit, or of a run, with its method,
            rank and layers; options that contradict it are refused.
        method: ``qalora`` merges into a 4-bit file without loss, ``lora`` keeps the adapter beside the base, ``qlora``
            is lora beside a quantised base, and quantises a full-precision one to nf4. By default qalora where the base
            has block offsets, qlora with --quantize, else lora.
        quantize: Quantise the linear layers of a full-precision base while it is loaded: ``nf4`` or ``fp4`` (blocks of
            64, their scales quantised too), ``q4_1`` or ``q5_1`` (which qalora can train), ``q8_0``.
        importance_rows: Training rows whose activations weigh the errors of --quantize q4_1 or q5_1 by how strongly
            each input is used; 0 weighs all alike. The base is loaded in full precision for it.
        rank: Rank of the adapter.
        alpha: The adapter is scaled by alpha/rank.
        scaling: ``standard`` is alpha/rank, ``rslora`` alpha/sqrt(rank), ``plain`` alpha. Not with --method qalora.
        dropout: Dropout on the adapter's input. Not with --method qalora.
        dora: Train the length of each row of a weight beside its direction (DoRA). Not with --method qalora.
        targets: Layers to adapt: ``all-linear``, or comma-separated names (q_proj,v_proj), or a regular expression.
        frozen_tensors: What becomes of targets that qalora cannot train, such as those in Q6_K, whose blocks have no
            offsets: ``frozen`` leaves them as they are, ``lora`` trains plain LoRA beside them, which merge can only
            add by rounding those tensors anew (its option --requantize). Only with --method qalora.
        learning_rate: Peak learning rate. By default chosen by method and width of the model.
        steps: Optimiser steps; excludes --epochs.
        epochs: Passes over the data; excludes --steps. [default: 1]
        batch_size: Rows in an optimiser step; excludes --tokens-per-step. [default: 8]
        tokens_per_step: Most tokens in an optimiser step, which takes as many rows as fit; excludes --batch-size.
        pass_tokens: Tokens in one forward pass; a larger batch is split and its gradients accumulated.
        max_length: Longest document in tokens; a longer row is refused unless --truncate. [default: the model's
            context]
        truncate: Cut rows longer than --max-length instead of refusing them.
        warmup: Share of the steps in which the learning rate rises.
        decay: How the learning rate falls after warm-up.
        weight_decay: Decoupled weight decay of AdamW.
        max_grad_norm: Gradients are clipped to this norm; 0 switches clipping off.
        seed: Seed of initialisation, row order and dropout.
        eval_data: Held-out rows. By default 5% of the data (at least 16 rows), picked by hash.
        no_eval: Train on everything and measure nothing.
        eval_every: Steps between evaluations; 0 evaluates before and after only.
        checkpoint_every: Steps between checkpoints; 0 saves at the end only.
        memory: What a step keeps for its backward pass: ``high`` most, ``low`` about half of that, ``lowest`` of every
            layer its input only, at about a third more time; ``auto`` the most that fits into what is free.
        compute: Arithmetic: ``bf16``, ``fp32``, or ``auto`` for bf16 where the processor has it.
        samples: Held-out rows that base and tuned model answer side by side in the report.
        overwrite: Replace the output directory if it exists.
    """

    model: str
    data: str
    _: KW_ONLY
    output: str | None = None
    adapter: str | None = None
    method: Method | None = None
    quantize: Quantize | None = None
    importance_rows: int = 0
    rank: int = 16
    alpha: float = 32.0
    scaling: Scaling = "standard"
    dropout: float = 0.0
    dora: bool = False
    targets: str = "all-linear"
    frozen_tensors: FrozenTensors = "frozen"
    learning_rate: float | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    tokens_per_step: int | None = None
    pass_tokens: int = 2048
    max_length: int | None = None
    truncate: bool = False
    warmup: float = 0.1
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_data: str | None = None
    no_eval: bool = False
    eval_every: int = 0
    checkpoint_every: int = 0
    memory: Memory = "auto"
    compute: Compute = "auto"
    samples: int = 3
    overwrite: bool = False

    def __post_init__(self) -> None:
        # From Python a file may be named by an object, which config.yaml and the messages want as text.
        for name in ("model", "data", "output", "adapter", "eval_data"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                setattr(self, name, os.fspath(value))


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads the settings in a YAML file such as the ``config.yaml`` of a run.

    Returns:
        Field of `TrainConfig` -> value; fields that the file leaves out or sets to null are not in it.

    Raises:
        MissingFileError: There is no such file.
        ConfigError: The file is not a YAML mapping, or a key is no field of `TrainConfig`.
    """
    import yaml

    path = Path(path)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFileError(f"no settings file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold lines such as 'rank: 16', not a {type(settings).__name__}")
    known = [field.name for field in fields(TrainConfig)]
    for key, value in settings.items():
        if key not in known:
            close = get_close_matches(str(key), known, n=2)
            hint = f"; did you mean {' or '.join(close)}?" if close else "; `lorafit train --help` lists the settings"
            raise ConfigError(f"{path}: unknown setting {key!r}{hint}")
        if isinstance(value, list | dict):
            raise ConfigError(f"{path}: {key} must be one value, not a {type(value).__name__}")
    return {key: value for key, value in settings.items() if value is not None}
