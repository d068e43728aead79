"""``lorafit train``: what it says, and in which order; what it does is in ``lorafit.training.run``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lorafit.commands.console import Console, readable_bytes, readable_seconds
from lorafit.commands.importing import import_for_good
from lorafit.config import TrainConfig
from lorafit.errors import ConfigError, MissingFileError

if TYPE_CHECKING:
    from lorafit.training.estimate import Estimate
    from lorafit.training.run import Run
    from lorafit.training.summary import Summary


def train(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> Summary:
    """Train an adapter and leave a run directory.

    Args:
        config: The settings.
        resume: Go on from the last checkpoint in ``config.output``, with the settings that the run began with.
        console: Where to say what is going on; nowhere if missing.

    Returns:
        What ``summary.json`` holds.

    Raises:
        LorafitError: Of the type that fits: a bad option, model, row, or a run that cannot go on.
        KeyboardInterrupt: After Ctrl-C; once a step was taken, the run can be resumed.
    """
    from lorafit.training.run import Run

    console = console or Console(quiet=True)
    run = Run.prepare(config, resume=resume, say=console.print)
    _introduce(run, console)
    try:
        if resume:
            run.go_on()
        else:
            run.begin()
        _fit(run, console)
        summary = run.finish()
    except KeyboardInterrupt:
        _say_what_is_kept(run, console)
        raise
    except OSError as error:
        # A full disk is noticed by a write, which does not know of which file.
        if error.filename is None:
            error.filename = str(run.directory.path)
        raise
    _conclude(summary, console)
    return summary


def estimate(config: TrainConfig, *, console: Console | None = None) -> Estimate:
    """Attach, measure the longest step of the run, and estimate the rest; writes nothing.

    Raises:
        LorafitError: Whatever the run itself would stop at before its first step.
    """
    from lorafit.training.estimate import estimate
    from lorafit.training.run import Run

    console = console or Console(quiet=True)
    run = Run.prepare(config, resume=False, say=console.print)
    _introduce(run, console)
    cost = estimate(run.trainer, run.data.training, run.memory, run.size, run.coverage)
    memory = cost.peak_rss_bytes
    console.fields(
        "Dry run; nothing was written",
        {
            "longest step": f"{cost.step_tokens:,} tokens in {cost.step_seconds:.2f} s, "
            f"{cost.tokens_per_second:,.0f} tokens/s",
            "peak memory": readable_bytes(memory) if memory else "not measured on this system",
            "training": f"{cost.tokens:,} tokens, about {readable_seconds(cost.total_seconds)}, "
            "and the evaluations before and after",
        },
    )
    return cost


def _introduce(run: Run, console: Console) -> None:
    """Say what will be trained on what."""
    from lorafit.training.report import describe_base

    base, config, held_out, both = run.base, run.config, len(run.rows.held_out), run.rows.both()
    data = f"{config.data}: {_count(len(run.rows.training), 'row')}"
    if held_out:
        data += f", {held_out:,} held out" + ("" if config.eval_data else " by a hash of the prompt")
        data += f", {both:,} of them trained on too" if both else ""
    console.fields(
        "",
        {
            "model": config.model,
            "weights": "; ".join(describe_base(run.size, base.quantize, base.kept, base.second_quantization)),
            "data": data,
            "method": f"{config.method}{' with DoRA' if config.dora else ''}, rank {config.rank}, "
            f"learning rate {config.learning_rate:g}"
            + (f", from the adapter in {config.adapter}" if config.adapter else ""),
            "compute": str(run.base.compute).removeprefix("torch."),
            "memory": f"{run.memory.level}: {run.memory.reason}",
            "run": f"{_count(run.last_step, 'step')} of {_step_size(config)} -> {config.output}",
        },
    )
    console.coverage(run.coverage)


def _fit(run: Run, console: Console) -> None:
    """Train until the last step or Ctrl-C, and save."""
    from lorafit.training.interrupt import deferred_interrupt

    def announce() -> None:
        console.print("Stopping after this step; press Ctrl-C again to stop at once.")

    with (
        deferred_interrupt(announce) as interrupt,
        console.progress("training", run.last_step, done=run.trainer.done) as progress,
    ):
        for step in run.steps():
            progress.update(step.step, loss=step.loss, tokens_per_second=step.tokens / step.seconds)
            if interrupt.requested:
                break
        run.save()
    if interrupt.requested:
        raise KeyboardInterrupt


def _say_what_is_kept(run: Run, console: Console) -> None:
    """After Ctrl-C, say how to go on."""
    from lorafit.training.checkpoint import last_checkpoint

    if not run.begun:
        return
    try:
        kept = last_checkpoint(run.directory.path).name.replace("-", " ")
    except MissingFileError:
        console.print("Stopped before a step was saved; train anew with --overwrite.")
        return
    command = shlex.join(["lorafit", "train", "--resume", str(run.directory.path)])
    console.print(f"Saved: {kept} of {run.last_step}. Go on with: {command}")


def _conclude(summary: Summary, console: Console) -> None:
    """Say what came out and what to do with it."""
    before, after = summary.eval_before, summary.eval_after
    if before and after:
        started = {"adapter at the start": summary.eval_started} if summary.eval_started else {}
        measured = {"base": before, **started, "tuned": after}
        rows = [(name, m.loss, m.perplexity, f"{m.token_accuracy:.1%}") for name, m in measured.items()]
        console.table(f"Held out: {after.tokens:,} answer tokens", ["", "loss", "perplexity", "accuracy"], rows)
    if summary.samples:
        sample = summary.samples[0]
        console.side_by_side(f"A held-out prompt: {sample.prompt}", {"base": sample.base, "tuned": sample.tuned})
    run = summary.output
    console.fields("Files", {"report": f"{run}/report.md", "figure": f"{run}/loss.png", "adapter": f"{run}/adapter"})
    merged = [f"{run}-merged"]
    if summary.method == "qalora" and not summary.quantize:
        merged = [f"{run}.gguf", *(["--requantize", "q8_0"] if summary.coverage.beside else [])]
    following = {"talk": ["lorafit", "chat", run], "ship": ["lorafit", "merge", run, *merged]}
    console.fields("Next", {name: shlex.join(command) for name, command in following.items()})


def _step_size(config: TrainConfig) -> str:
    if config.tokens_per_step is not None:
        return f"at most {_count(config.tokens_per_step, 'token')}"
    return _count(config.batch_size or 0, "row")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


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
    if dry_run and resume is not None:
        raise ConfigError("--dry-run and --resume exclude each other; give one")
    import_for_good("lorafit.training.run")
    if dry_run:
        console.result(estimate(config, console=console).as_dict())
        return
    if resume is not None:
        config.output = resume
    console.result(train(config, resume=resume is not None, console=console).as_dict())
