"""A run: everything between what the user asked for and a complete directory, in the order in which it happens.

    prepare -> begin or go_on -> steps -> finish

Everything that can be refused is refused in ``prepare``, before anything is written. From ``begin`` on the directory
holds a run that can be resumed as soon as it has a checkpoint, and that is complete when ``finish`` returns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from lorafit.adapters import AdapterRecord, load_adapter, save_adapter
from lorafit.adapters.belonging import check_base
from lorafit.adapters.peft import read_importance, write_importance
from lorafit.config import TrainConfig
from lorafit.containers.atomic import fingerprint
from lorafit.containers.identity import hash_tensors
from lorafit.data.packing import pack, split_passes
from lorafit.errors import ConfigError, LorafitError, TrainingError
from lorafit.evaluation.loss import Metrics, evaluate
from lorafit.models.base import Base
from lorafit.models.load import load_base
from lorafit.models.quantizing import Importance
from lorafit.modules import adapters_disabled, attach
from lorafit.modules.qalora import offsets_held
from lorafit.modules.size import measure_size
from lorafit.objectives.sft import sft_loss
from lorafit.training import report, setup
from lorafit.training.checkpoint import last_checkpoint, restore_checkpoint, save_checkpoint
from lorafit.training.directory import RunDirectory, lasting_name
from lorafit.training.importance import input_importance
from lorafit.training.level import choose_level, estimate_step
from lorafit.training.loop import Step, Trainer, longest_pass
from lorafit.training.memory import free_memory, peak_rss_bytes
from lorafit.training.start import start_directory, start_of
from lorafit.training.summary import Summary, answer_samples, promotion_cost

_REMEDY = "try a lower --learning-rate, or --compute fp32"


class Run:
    """A run in progress; made by `Run.prepare`.

    Attributes:
        config: Its settings, resolved.
        base: The model, with the adapter attached.
        rows: What it learns from and is measured on.
        data: The same, tokenised.
        size: What the weights of the base take.
        coverage: Which layers the adapter covers.
        memory: What its steps keep for their backward passes.
        trainer: Takes the steps.
        directory: Where it is kept.
        begun: Whether the directory holds it already.
        last_step: Number of its last step.
    """

    def __init__(
        self,
        config: TrainConfig,
        base: Base,
        rows: setup.Rows,
        data: setup.Data,
        say: Callable[[str], None],
        start: AdapterRecord | None = None,
    ) -> None:
        assert config.output is not None and config.method is not None and config.steps is not None
        self.config = config
        self.last_step = config.steps
        self.base = base
        self.rows = rows
        self.data = data
        self.directory = RunDirectory(config.output)
        self.begun = False
        self._say = say
        self._before: Metrics | None = None
        self._promoted: Metrics | None = None
        self._started: Metrics | None = None
        self._importance: Importance | None = None
        torch.manual_seed(config.seed)
        self._adapter = start.config if start else setup.adapter_config(config, config.method)
        self.size = measure_size(base.model)
        directory = start_directory(config)
        if directory is None:
            self.coverage = attach(base.model, self._adapter)
        else:
            self.coverage = load_adapter(base.model, directory, hold_offsets=False)[1]
        longest = longest_pass(data.training, config)
        need = estimate_step(
            base.model,
            longest,
            itemsize=base.compute.itemsize,
            keeps_inputs=config.method != "qalora",
            keeps_outputs=config.dora,
        )
        self.memory = choose_level(
            config.memory, need, sum(len(each.tokens) for each in longest), free_memory(base.model.device)
        )
        self.trainer = Trainer(base.model, sft_loss, replace(config, memory=self.memory.level))

    @classmethod
    def prepare(cls, config: TrainConfig, *, resume: bool, say: Callable[[str], None]) -> Run:
        """Check everything that can be checked before the first step, the quick things first.

        Args:
            config: What the user asked for.
            resume: Whether ``config.output`` is a run to go on with.
            say: Where to tell what is measured.

        Raises:
            LorafitError: Of the type that fits.
        """
        config, start = start_of(config)
        setup.check_options(config)
        if resume:
            if config.output is None:
                raise ConfigError("to resume a run, its directory must be given as output")
            if config.overwrite:
                raise ConfigError("--overwrite has no effect on a run that is resumed; leave it out")
            RunDirectory(config.output).check_resumable()
            last_checkpoint(config.output)
        elif config.output is not None:
            RunDirectory(config.output).check_free(config)
        rows = setup.read_rows(config)
        config = setup.choose_quantization(config)
        importance = start.importance if start else None
        if config.importance_rows:
            kept = read_importance(Path(config.output)) if resume and config.output else None
            importance = kept or cls._measure_importance(config, rows, say)
        base = load_base(config.model, compute=config.compute, quantize=config.quantize, importance=importance)
        if start and config.adapter:
            check_base(start, base.path, config.adapter)
        data = setup.encode_rows(rows, config, base.model, base.tokenizer)
        config = setup.resolve(config, base.model, data)
        run = cls(config, base, rows, data, say, start)
        run._importance = importance
        if resume:
            run.directory.check_same(config, base.path)
        else:
            run.directory.check_free(config)
        return run

    @staticmethod
    def _measure_importance(config: TrainConfig, rows: setup.Rows, say: Callable[[str], None]) -> Importance:
        """How strongly the base in full precision uses each input of each layer on some training rows."""
        base = load_base(config.model, compute=config.compute)
        chosen = setup.Rows(rows.training[: config.importance_rows], [])
        documents = setup.encode_rows(chosen, config, base.model, base.tokenizer).training
        say(f"the search for blocks weighs errors by the activations on {len(documents)} training rows")
        return input_importance(base.model, split_passes(documents, config.pass_tokens))

    def begin(self) -> None:
        """Measure the base, as it is in its file and as training starts from it, and make the directory."""
        with adapters_disabled(self.base.model):
            self._before = self._evaluate("base")
        if self.coverage.promoted:
            self._promoted = self._evaluate("base with promoted weights")
        if self.config.adapter:
            self._started = self._evaluate("the adapter that it starts from")
        self.directory.create(self.config, self.base.path, self.rows.held_out)
        if self._importance:
            write_importance(self.directory.path, self._importance)
        self.begun = True
        self.directory.record_evaluation(0, self._before)
        self.directory.record_evaluation(0, self._promoted, "promoted")
        self.directory.record_evaluation(0, self._started, "started")

    def go_on(self) -> None:
        """Return to the last checkpoint."""
        self.begun = True
        restore_checkpoint(self.trainer, last_checkpoint(self.directory.path))
        self.directory.rewind(self.trainer.done, self.last_step)
        self._before = self.directory.evaluation_at(0)
        self._promoted = self.directory.evaluation_at(0, "promoted")
        self._started = self.directory.evaluation_at(0, "started")
        self._say(f"going on after step {self.trainer.done}")

    def steps(self) -> Iterator[Step]:
        """Train to the last step; every step is recorded, and checkpoints and evaluations made, before it is yielded.

        Raises:
            TrainingError: The loss or a gradient is not finite, or an adapter got no gradient.
        """
        config = self.config
        try:
            for step in self.trainer.steps(self.data.training):
                self.directory.record({**asdict(step), "tokens_per_second": step.tokens / step.seconds})
                if config.eval_every and step.step % config.eval_every == 0 and step.step < self.last_step:
                    self.directory.record_evaluation(step.step, self._evaluate(f"step {step.step}"))
                if config.checkpoint_every and step.step % config.checkpoint_every == 0:
                    self.save()
                yield step
        except TrainingError:
            # The step that failed changed nothing. What it started from is worth keeping unless it was spoiled before.
            if self.trainer.done:
                with suppress(LorafitError):
                    self.save()
            raise

    def save(self) -> None:
        """Write a checkpoint; not of a model that the last update spoiled, so that the one before stays the last good.

        Raises:
            TrainingError: The model gives no finite loss any more.
            ModelError: The base was written to, so that this is no state of any model.
        """
        self.base.check_unchanged()
        document = self.data.training[0]
        loss = evaluate(self.base.model, [pack([document])]).loss
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} after step {self.trainer.done}, on {document.source}; {_REMEDY}")
        save_checkpoint(self.trainer, self.directory.path)

    def finish(self) -> Summary:
        """Measure the tuned model, save it, and write what people read.

        Raises:
            TrainingError: The tuned model gives no finite loss, or the base has changed meanwhile.
            ModelError: The base was written to.
        """
        self.base.check_unchanged()
        base, directory = self.base, self.directory
        # What is measured is, to the bit, what is saved.
        with offsets_held(base.model):
            after = self._evaluate("tuned")
            directory.record_evaluation(self.last_step, after)
            context = base.model.config.max_position_embeddings
            pairs = zip(self.rows.held_out, self.data.held_out, strict=True)
            # A row that was cut at the end of the context may have no room for an answer.
            rows = [row for row, document in pairs if len(document.tokens) < context]
            samples = answer_samples(base.model, base.tokenizer, rows[: self.config.samples])
            sha256 = directory.records()[0]["base_sha256"]
            if fingerprint(base.path) != sha256:
                raise TrainingError(f"{base.path} changed while it was trained on; this run cannot be used, train anew")
            record = AdapterRecord(
                self._adapter,
                lasting_name(self.config.model),
                sha256,
                base.quantize,
                self._importance,
                hash_tensors(base.path),
            )
            save_adapter(base.model, directory.adapter, record)
        records = directory.records()
        taken = [record for record in records if "loss" in record]
        summary = Summary(
            output=str(directory.path),
            model=self.config.model,
            base_sha256=sha256,
            licence=base.licence,
            method=self._adapter.method,
            trainable_parameters=self.coverage.trainable_parameters,
            total_parameters=self.coverage.total_parameters,
            steps=self.last_step,
            tokens=sum(step["tokens"] for step in taken),
            trained_tokens=sum(step["trained_tokens"] for step in taken),
            seconds=sum(step["seconds"] for step in taken),
            peak_rss_bytes=peak_rss_bytes(),
            memory=self.memory,
            compute=str(base.compute).removeprefix("torch."),
            eval_before=self._before,
            eval_after=after,
            size=self.size,
            quantize=base.quantize,
            kept=dict(base.kept),
            second_quantization=base.second_quantization,
            coverage=self.coverage,
            promotion=promotion_cost(self.coverage, base.path, self._before, self._promoted),
            samples=samples,
            adapter=self.config.adapter,
            eval_started=self._started,
        )
        report.write(directory.path, summary, self.config, records)
        return summary

    def _evaluate(self, what: str) -> Metrics | None:
        """Measure the model as it is on the held-out rows, if there are any."""
        if not self.data.held_out:
            return None
        started = time.perf_counter()
        metrics = evaluate(self.base.model, split_passes(self.data.held_out, self.config.pass_tokens))
        if not math.isfinite(metrics.loss):
            raise TrainingError(f"the held-out loss, {what}, is {metrics.loss}; {_REMEDY}")
        self._say(f"held-out loss, {what}: {metrics.loss:.4f} ({time.perf_counter() - started:.0f} s)")
        return metrics
