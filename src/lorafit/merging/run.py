"""What is merged: a run, the base that it was trained on, and the rows that it held out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafit.adapters import AdapterRecord, load_adapter, read_record
from lorafit.adapters.belonging import check_base
from lorafit.adapters.peft import CONFIG_FILE
from lorafit.config import Compute, TrainConfig, read_settings
from lorafit.containers.atomic import fingerprint
from lorafit.containers.mapped import release
from lorafit.data.chat import Document, encode_all
from lorafit.data.packing import split_passes
from lorafit.data.readers import Example, read_examples
from lorafit.errors import MergeError, MissingFileError
from lorafit.evaluation.loss import Metrics, evaluate
from lorafit.merging.engine import HELD_OUT_FILE
from lorafit.models.base import Base
from lorafit.models.directory import merges
from lorafit.models.load import load_base
from lorafit.models.pull import EMBEDDED
from lorafit.modules import PackedExperts, PackedWeight
from lorafit.training.setup import fit_length

DEFAULT_TOLERANCE = 0.05  # nats per token of held-out loss


@dataclass(frozen=True)
class Run:
    """A run whose base is the one that it was trained on.

    Attributes:
        path: Its directory.
        adapter: Where its adapter lies.
        config: Its settings.
        record: What its adapter says about itself.
        base: Where its base is.
    """

    path: Path
    adapter: Path
    config: TrainConfig
    record: AdapterRecord
    base: str

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.path.resolve().name

    def load_base(self, compute: Compute) -> Base:
        """The base as it was trained on, quantised if it was then, and mapped where it is not.

        Raises:
            MissingFileError: It is not there.
            MergeError: It has other tensors than then.
            LorafitError: It cannot be loaded.
        """
        record = self.record
        if self.base not in EMBEDDED and not (self.base and Path(self.base).exists()):
            raise MissingFileError(
                f"{self.path} was trained on {self.base or 'a base that it does not name'}, which is not here; say "
                "where it is, as in lorafit merge --base BASE"
            )
        base = load_base(
            self.base, compute=compute, quantize=record.quantize, importance=record.importance, mapped=True
        )
        if not record.base_sha256:
            check_base(record, base.path, self.adapter)  # which warns
            return base
        if record.fits(base.path):
            return base
        what = self.why_merged(base.path) or "it is another model, or one that was merged already"
        raise MergeError(
            f"{base.path} is not what {self.path} was trained on (the hash of its tensors is another): {what}; put the "
            "original back, or say where it is"
        )

    def why_merged(self, model: Path) -> str | None:
        """Says that this run was merged into a model, if it says so itself."""
        mine = fingerprint(self.adapter)
        merged = any(merge.get("adapter_sha256") == mine for merge in merges(model))
        return f"{self.name} was merged into it already" if merged else None

    def load(self) -> Base:
        """The base with the adapter on it, computing as it did when it was measured."""
        base = self.load_base(self.config.compute)
        load_adapter(base.model, self.adapter)
        return base

    def held_out(self, tokenizer: PreTrainedTokenizerBase) -> HeldOutRows:
        """The rows that the run was measured on; there may be none."""
        file = self.path / HELD_OUT_FILE
        examples = read_examples(file) if file.is_file() else []
        return HeldOutRows(self.config, examples, encode_all(examples, tokenizer))


@dataclass(frozen=True)
class HeldOutRows:
    """Rows that a run was measured on.

    Attributes:
        config: Its settings.
        examples: The rows.
        documents: The same, tokenised.
    """

    config: TrainConfig
    examples: Sequence[Example]
    documents: Sequence[Document]

    def __bool__(self) -> bool:
        return bool(self.documents)

    def measure(self, model: PreTrainedModel) -> Metrics:
        """What a model makes of them, in the same batches as in the run."""
        context = model.config.max_position_embeddings
        limit = min(self.config.max_length or context, context)
        documents = fit_length(self.documents, limit, self.config.truncate)
        with _pages_released(model):
            return evaluate(model, split_passes(documents, self.config.pass_tokens))


@contextmanager
def _pages_released(model: nn.Module) -> Iterator[None]:
    """Give the pages of mapped experts back once they were used, as linear layers do by themselves."""

    def after(module: nn.Module, *_: object) -> None:
        for part in module.modules():
            if isinstance(part, PackedWeight):
                release(part.blocks)

    handles = [part.register_forward_hook(after) for part in model.modules() if isinstance(part, PackedExperts)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class HeldOut:
    """Loss on the run's held-out rows, in lorafit.

    Attributes:
        base_loss: Of the base that was trained on, nats per answer token.
        run_loss: Of base and adapter, as they are when the adapter is shipped beside the base.
        merged_loss: Of what was written; the same number as the run's where the merge is exact.
        rows: How many rows.
        tokens: How many answer tokens.
        compute: Arithmetic type, the same for all.
    """

    base_loss: float
    run_loss: float
    merged_loss: float
    rows: int
    tokens: int
    compute: str


def check_tolerance(run: Run, tolerance: float | None) -> float:
    """The tolerance that holds where this one was given, or none.

    Raises:
        MergeError: It is no number of nats, or there is nothing to measure it on.
    """
    if tolerance is None:
        return DEFAULT_TOLERANCE
    if not 0 <= tolerance < math.inf:
        raise MergeError(f"--certificate-tolerance is {tolerance:g}, but must be at least 0")
    if not (run.path / HELD_OUT_FILE).is_file():
        raise MergeError(
            f"--certificate-tolerance {tolerance:g} has no effect: {run.path} held no rows out to measure the loss on"
        )
    return tolerance


def check_loss(held_out: HeldOut, tolerance: float, name: str, cause: str) -> None:
    """Refuse what is worse than the run by more than the tolerance.

    Raises:
        MergeError: It is.
    """
    if not held_out.merged_loss <= held_out.run_loss + tolerance:
        raise MergeError(
            f"{name} is not kept: {cause} raised the held-out loss from {held_out.run_loss:.4f} to "
            f"{held_out.merged_loss:.4f}, by more than --certificate-tolerance {tolerance:g}; choose a finer one"
        )


def detect(run: str | Path, base: str | None = None) -> Run:
    """Read what a run says about itself, or an adapter that comes without a run.

    Args:
        run: The directory.
        base: Where its base is; by default where the adapter says.

    Raises:
        MissingFileError: It is neither, or not complete.
        AdapterError: The adapter cannot be read.
    """
    run = Path(run)
    if (run / CONFIG_FILE).is_file():
        record = read_record(run)
        return Run(run, run, TrainConfig(base or record.base, data="", no_eval=True), record, base or record.base)
    if not (run / "adapter").is_dir():
        raise MissingFileError(f"{run} is not a run: it has no directory adapter/; give what `lorafit train` wrote")
    record = read_record(run / "adapter")
    config = TrainConfig(**read_settings(run / "config.yaml"))
    return Run(run, run / "adapter", config, record, base or record.base)
