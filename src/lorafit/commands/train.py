"""``lorafit train``: from a model and a file of examples to a run directory whose every claim was checked."""

from __future__ import annotations

import json as jsonlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorafit.commands.console import Console, readable_bytes, readable_seconds
from lorafit.config import TrainConfig
from lorafit.errors import LorafitError, TrainingError

if TYPE_CHECKING:
    from lorafit.evaluation.loss import Metrics
    from lorafit.models.load import Base
    from lorafit.modules import Coverage
    from lorafit.training.loop import Trainer
    from lorafit.training.report import Sample, Summary
    from lorafit.training.setup import Data


@dataclass(frozen=True)
class Estimate:
    """What a dry run measured, and what it means for the whole run.

    Attributes:
        steps: Steps of the run.
        tokens: Tokens that the run would train on.
        step_seconds: Time of the measured step, the longest of the run.
        tokens_per_second: Rate of that step.
        total_seconds: Time of all steps at that rate.
        peak_rss_bytes: Peak resident memory during that step.
        coverage: Which layers would be trained.
    """

    steps: int
    tokens: int
    step_seconds: float
    tokens_per_second: float
    total_seconds: float
    peak_rss_bytes: int | None
    coverage: Coverage

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "coverage": self.coverage.as_dict()}


def train(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> Summary:
    """Train an adapter and leave a run directory.

    Args:
        config: The settings.
        resume: Go on from the last checkpoint in ``config.output``.
        console: Where to say what is going on; nowhere if missing.

    Returns:
        What ``summary.json`` holds.

    Raises:
        LorafitError: Of the type that fits: a bad option, model, row, or a run that cannot go on.
        KeyboardInterrupt: After Ctrl-C; the run was saved and can be resumed.
    """
    run = _Run.prepare(config, resume, console or Console(quiet=True))
    return run.finish(run.fit(resume))


def dry_run(config: TrainConfig, *, console: Console | None = None) -> Estimate:
    """Attach, measure the longest step of the run, and estimate the rest; writes nothing.

    Raises:
        LorafitError: Whatever the run itself would stop at before its first step.
    """
    run = _Run.prepare(config, False, console or Console(quiet=True))
    return run.estimate()


class _Run:
    """A run in progress."""

    def __init__(self, config: TrainConfig, base: Base, data: Data, coverage: Coverage, console: Console) -> None:
        from lorafit.objectives.sft import sft_loss
        from lorafit.training.directory import RunDirectory
        from lorafit.training.loop import Trainer

        assert config.output is not None
        self.config = config
        self.base = base
        self.data = data
        self.coverage = coverage
        self.console = console
        self.directory = RunDirectory(config.output)
        self.trainer: Trainer = Trainer(base.model, sft_loss, config)

    @classmethod
    def prepare(cls, config: TrainConfig, resume: bool, console: Console) -> _Run:
        """Check everything that can be checked before the first step."""
        import torch

        from lorafit.models.load import load_base
        from lorafit.modules import attach
        from lorafit.training import setup
        from lorafit.training.directory import RunDirectory

        setup.check_options(config)
        if config.output and not resume:
            RunDirectory(config.output).check_free(config.overwrite)

        base = load_base(config.model, compute=config.compute)
        data = setup.read_data(config, base.model, base.tokenizer)
        config = setup.resolve(config, base.model, base.path, len(data.training))
        assert config.output is not None and config.method is not None
        if not resume:
            RunDirectory(config.output).check_free(config.overwrite)
        torch.manual_seed(config.seed)
        coverage = attach(base.model, setup.adapter_config(config, config.method))
        run = cls(config, base, data, coverage, console)
        run.introduce()
        return run

    def introduce(self) -> None:
        """Say what will be trained on what."""
        config, data = self.config, self.data
        held = "" if config.no_eval else f", {len(data.held_out)} held out"
        how = " by a hash of the prompt" if held and not config.eval_data else ""
        self.console.fields(
            "",
            {
                "model": config.model,
                "data": f"{config.data}: {len(data.training)} rows{held}{how}",
                "method": f"{config.method}, rank {config.rank}, learning rate {config.learning_rate:g}",
                "compute": str(self.base.compute).removeprefix("torch."),
                "run": f"{config.steps} steps of {config.batch_size} rows -> {config.output}",
            },
        )
        self.console.coverage(self.coverage)

    def estimate(self) -> Estimate:
        """Measure the longest step, after a shorter one for warm-up."""
        from lorafit.data.packing import rows_of_step, split_passes
        from lorafit.training.memory import peak_rss_bytes

        config, documents = self.config, self.data.training
        assert config.steps is not None
        rows = [rows_of_step(step, len(documents), config.batch_size, config.seed) for step in range(config.steps)]
        lengths = [sum(len(documents[row].tokens) for row in chosen) for chosen in rows]
        longest = lengths.index(max(lengths))
        self.trainer.step(split_passes([documents[row] for row in rows[0]], config.pass_tokens))
        measured = self.trainer.step(split_passes([documents[row] for row in rows[longest]], config.pass_tokens))
        rate = measured.tokens / measured.seconds
        estimate = Estimate(
            steps=config.steps,
            tokens=sum(lengths),
            step_seconds=measured.seconds,
            tokens_per_second=rate,
            total_seconds=sum(lengths) / rate,
            peak_rss_bytes=peak_rss_bytes(),
            coverage=self.coverage,
        )
        memory = estimate.peak_rss_bytes
        self.console.fields(
            "Dry run; nothing was written",
            {
                "longest step": f"{measured.tokens} tokens in {measured.seconds:.2f} s, {rate:,.0f} tokens/s",
                "peak memory": readable_bytes(memory) if memory else "not measured on this system",
                "training": f"{sum(lengths):,} tokens, about {readable_seconds(estimate.total_seconds)}, "
                "and the evaluations before and after",
            },
        )
        return estimate

    def fit(self, resume: bool) -> Metrics | None:
        """Train to the last step; returns how the base did on the held-out rows."""
        from lorafit.training.checkpoint import last_checkpoint, restore_checkpoint, save_checkpoint

        config, trainer, directory = self.config, self.trainer, self.directory
        assert config.steps is not None
        if resume:
            restore_checkpoint(trainer, last_checkpoint(directory.path))
            directory.rewind(trainer.done, config, self.base.path)
            before = directory.evaluation_at(0)
        else:
            before = self.evaluate("base")
            directory.create(config, self.base.path, self.data.held_out_examples)
            directory.record_evaluation(0, before)
        every = config.checkpoint_every
        with (
            self.console.progress("training", config.steps, done=trainer.done) as progress,
            self.interruptible() as interrupt,
        ):
            try:
                for step in trainer.steps(self.data.training):
                    rate = step.tokens / step.seconds
                    directory.record({**asdict(step), "tokens_per_second": rate})
                    progress.update(step.step, loss=step.loss, tokens_per_second=rate)
                    if config.eval_every and step.step % config.eval_every == 0 and step.step < config.steps:
                        directory.record_evaluation(step.step, self.evaluate(f"step {step.step}"))
                    if every and step.step % every == 0:
                        save_checkpoint(trainer, directory.path)
                    if interrupt.requested:
                        break
            except LorafitError:
                # The step that failed changed nothing, so this is the last good state.
                if trainer.done:
                    save_checkpoint(trainer, directory.path)
                raise
        save_checkpoint(trainer, directory.path)
        if interrupt.requested:
            self.console.print(f"Saved after step {trainer.done}. Go on with: lorafit train --resume {directory.path}")
            raise KeyboardInterrupt
        return before

    def interruptible(self) -> Any:
        """Ctrl-C ends the run after the current step."""
        from lorafit.training.interrupt import deferred_interrupt

        return deferred_interrupt(
            lambda: self.console.print("Stopping after this step; press Ctrl-C again to stop at once.")
        )

    def finish(self, before: Metrics | None) -> Summary:
        """Measure, save, reopen, and write what people read."""
        from lorafit.modules.qalora import offsets_held

        # What is measured below is, to the bit, what is saved.
        with offsets_held(self.base.model):
            return self._finish(before)

    def _finish(self, before: Metrics | None) -> Summary:
        from lorafit.adapters import AdapterRecord, save_adapter
        from lorafit.containers.atomic import fingerprint, write_text
        from lorafit.training import report, setup
        from lorafit.training.memory import peak_rss_bytes

        config = self.config
        assert config.method is not None and config.steps is not None
        after = self.evaluate("tuned")
        self.directory.record_evaluation(config.steps, after)
        samples = self.samples()
        records = self.directory.records()
        sha256 = records[0]["base_sha256"]
        if fingerprint(self.base.path) != sha256:
            raise TrainingError(
                f"{self.base.path} changed while it was trained on; this run cannot be used, train anew"
            )
        adapter = AdapterRecord(setup.adapter_config(config, config.method), _lasting_name(config.model), sha256)
        save_adapter(self.base.model, self.directory.adapter, adapter)
        steps = [record for record in records if "loss" in record]
        seconds = sum(record["seconds"] for record in steps)
        tokens = sum(record["tokens"] for record in steps)
        summary = report.Summary(
            output=str(self.directory.path),
            model=config.model,
            base_sha256=sha256,
            licence=self.base.licence,
            method=config.method,
            trainable_parameters=self.coverage.trainable_parameters,
            total_parameters=self.coverage.total_parameters,
            steps=config.steps,
            tokens=tokens,
            trained_tokens=sum(record["trained_tokens"] for record in steps),
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            peak_rss_bytes=peak_rss_bytes(),
            compute=str(self.base.compute).removeprefix("torch."),
            eval_before=before,
            eval_after=after,
            coverage=self.coverage,
            samples=samples,
        )
        folder = self.directory.path
        report.draw_loss(folder / "loss.png", records)
        report.write_report(folder / "report.md", summary, config)
        report.write_model_card(self.directory.adapter / "README.md", summary)
        write_text(folder / "summary.json", jsonlib.dumps(summary.as_dict(), indent=2, ensure_ascii=False) + "\n")
        self.conclude(summary)
        return summary

    def conclude(self, summary: Summary) -> None:
        """Say what came out and what to do with it."""
        before, after = summary.eval_before, summary.eval_after
        if before and after:
            rows = [
                (n, m.loss, m.perplexity, f"{m.token_accuracy:.1%}") for n, m in (("base", before), ("tuned", after))
            ]
            self.console.table(
                f"Held out: {after.tokens:,} answer tokens", ["", "loss", "perplexity", "accuracy"], rows
            )
        if summary.samples:
            sample = summary.samples[0]
            self.console.side_by_side(sample.prompt, {"base": sample.base, "tuned": sample.tuned})
        folder = self.directory.path
        files = {"report": folder / "report.md", "figure": folder / "loss.png", "adapter (PEFT)": folder / "adapter"}
        self.console.fields("Files", files)
        nexts = {"talk": f"lorafit chat {folder}"}
        if summary.method == "qalora":
            nexts["ship"] = f"lorafit merge {folder} {folder.name}.gguf"
        self.console.fields("Next", nexts)

    def evaluate(self, what: str) -> Metrics | None:
        """Measure the model as it is on the held-out rows."""
        from lorafit.data.packing import split_passes
        from lorafit.evaluation.loss import evaluate

        if not self.data.held_out:
            return None
        started = time.perf_counter()
        metrics = evaluate(self.base.model, split_passes(self.data.held_out, self.config.pass_tokens))
        took = readable_seconds(time.perf_counter() - started)
        self.console.print(f"held-out loss, {what}: {metrics.loss:.4f} ({took})")
        return metrics

    def samples(self) -> list[Sample]:
        """Some held-out prompts, answered greedily by base and tuned model."""
        from lorafit.evaluation.generate import generate
        from lorafit.modules import adapters_disabled
        from lorafit.training.report import Sample

        model, tokenizer = self.base.model, self.base.tokenizer
        result = []
        for example in self.data.held_out_examples[: self.config.samples]:
            prompt = example.messages[:-1]
            tuned = "".join(generate(model, tokenizer, prompt, max_tokens=160))
            with adapters_disabled(model):
                base = "".join(generate(model, tokenizer, prompt, max_tokens=160))
            question = next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")
            result.append(Sample(question, example.messages[-1]["content"], base, tuned))
        return result


def _lasting_name(model: str) -> str:
    """How a run finds its base again: a known name as it is, a path from anywhere."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def train_command(
    config: Annotated[TrainConfig, Parameter(name="*")],
    *,
    config_file: Annotated[str | None, Parameter(name="--config")] = None,
    resume: str | None = None,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Train an adapter on a model and a file of examples.

    Args:
        config: The settings.
        config_file: YAML file with any of these settings, for example the config.yaml of another run. What the command
            line says wins; a switch is turned off again by --switch=false.
        resume: Directory of a run that was interrupted: go on from its last checkpoint, with its settings.
        dry_run: Show what would be adapted, measure a step, and say how long and how much memory the run would take.
        json: Print the summary as one JSON document on stdout; the text goes to stderr.
    """
    console = Console(json=json)
    if resume:
        from lorafit.training.directory import RunDirectory

        config = RunDirectory(resume).resumable_config(config)
    if dry_run:
        console.result(globals()["dry_run"](config, console=console).as_dict())
        return
    console.result(train(config, resume=resume is not None, console=console).as_dict())
