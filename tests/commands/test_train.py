"""Train: what a run leaves, that it learnt, that it can be repeated, stopped and gone on with to the same bits."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafit
from lorafit.cli import main
from lorafit.commands.console import Console
from lorafit.commands.evaluate import evaluate
from lorafit.commands.train import estimate, train
from lorafit.config import TrainConfig, read_settings
from lorafit.data.chat import encode_all
from lorafit.data.packing import hold_out
from lorafit.data.readers import read_examples
from lorafit.errors import TrainingError
from lorafit.models.load import load_base
from lorafit.modules import adapter_modules
from lorafit.training.checkpoint import last_checkpoint
from lorafit.training.run import Run
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama
from tests.training.rows import write_rows

COMPLETE = {
    "adapter", "adapter/README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    "checkpoints", "config.yaml", "heldout.jsonl", "loss.png", "metrics.jsonl", "report.md", "summary.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", layers=1, context=128)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 60)


@pytest.fixture
def config(tiny: TinyLlama, data: str, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        str(tiny.path), data, output=str(tmp_path / "run"), method="qalora", rank=2, steps=6, batch_size=4, samples=0
    )


def tree(folder: str | Path | None) -> set[str]:
    assert folder
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}


def bits(folder: str | Path | None) -> dict[str, bytes]:
    """Every file of the adapter but the model card."""
    assert folder
    return {path.name: path.read_bytes() for path in (Path(folder) / "adapter").iterdir() if path.suffix != ".md"}


def metrics(folder: str | Path | None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times, which no two runs share."""
    assert folder
    timed = ("seconds", "tokens_per_second")
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


class Interrupting(Console):
    """Says nothing, and presses Ctrl-C so many times when a line begins with certain words."""

    def __init__(self, words: str, times: int = 1) -> None:
        super().__init__(quiet=True)
        self.words = words
        self.times = times
        self.heard: list[str] = []

    def print(self, text: str = "", *, style: str | None = None) -> None:
        self.heard.append(text)
        for _ in range(self.times if text.startswith(self.words) else 0):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("method", ["lora", "qalora"])
def test_a_run_learns_and_leaves_what_it_promises(
    config: TrainConfig, tiny: TinyLlama, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, method=method, steps=12, samples=2)
    summary = lorafit.train(config)
    assert capsys.readouterr() == ("", ""), "from Python it says nothing"
    extra = {"adapter/qalora_offsets.safetensors"} if method == "qalora" else set()
    assert tree(config.output) == COMPLETE | extra | {"checkpoints/step-12", "checkpoints/step-12/state.pt"}
    assert summary.eval_loss_before is not None
    assert summary.eval_loss_after is not None
    # A loss of ln(320) = 5.8 is that of guessing; the random base is worse, and a dozen steps undo at least that.
    assert summary.eval_loss_after < summary.eval_loss_before - 1
    document = json.loads(Path(f"{config.output}/summary.json").read_text())
    assert document == json.loads(json.dumps(summary.as_dict()))
    assert document.keys() >= {
        "model", "method", "trainable_parameters", "total_parameters", "steps", "tokens", "tokens_per_second",
        "peak_rss_bytes", "eval_loss_before", "eval_loss_after", "coverage",
    }  # fmt: skip
    taken = [line for line in metrics(config.output) if "loss" in line]
    assert [line["step"] for line in taken] == list(range(1, 13))
    assert document["tokens"] == sum(line["tokens"] for line in taken)
    assert document["trained_tokens"] == sum(line["trained_tokens"] for line in taken)
    assert document["total_parameters"] == sum(weight.size for weight in tiny.weights.values())
    assert document["trainable_parameters"] == sum(document["coverage"]["wrapped"].values())
    assert len(document["coverage"]["wrapped"]) == 7
    assert document["peak_rss_bytes"] > 0
    assert [sample["reference"][:4] for sample in document["samples"]] == ["The ", "The "]


def test_what_was_measured_is_what_was_saved(config: TrainConfig) -> None:
    summary = train(config)
    figures = evaluate(str(config.output), f"{config.output}/heldout.jsonl")
    assert figures["base"] == summary.eval_before
    assert figures["tuned"] == summary.eval_after


def test_the_settings_of_a_run_train_it_again(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, steps=None, epochs=0.4, learning_rate=None, method=None)
    train(config)
    settings = read_settings(f"{config.output}/config.yaml")
    assert (settings["steps"], settings["method"], "epochs" in settings) == (5, "qalora", False)
    again = str(tmp_path / "again")
    assert main(["train", "--config", f"{config.output}/config.yaml", "--output", again]) == 0
    assert bits(again) == bits(config.output)
    assert metrics(again) == metrics(config.output)
    other = str(tmp_path / "other")
    assert main(["train", "--config", f"{config.output}/config.yaml", "--output", other, "--seed", "1"]) == 0
    assert bits(other).keys() == bits(again).keys()
    assert bits(other)["adapter_model.safetensors"] != bits(again)["adapter_model.safetensors"]


def test_what_is_held_out(config: TrainConfig, tmp_path: Path) -> None:
    more = write_rows(tmp_path / "more.jsonl", 5, first=80)
    summary = train(replace(config, steps=1, eval_data=more, output=str(tmp_path / "more")))
    assert summary.eval_before
    kept, given = read_examples(tmp_path / "more" / "heldout.jsonl"), read_examples(more)
    assert [row.messages for row in kept] == [row.messages for row in given]
    summary = train(replace(config, steps=1, no_eval=True, samples=3, output=str(tmp_path / "none")))
    assert summary.eval_before is summary.eval_after is None
    assert not (tmp_path / "none" / "heldout.jsonl").exists()
    assert summary.samples == []


def test_a_directory_of_safetensors_trains_with_lora(tiny: TinyLlama, data: str, tmp_path: Path) -> None:
    tiny.dense().save_pretrained(tmp_path / "model")
    load_base(tiny.path).tokenizer.save_pretrained(tmp_path / "model")
    output = str(tmp_path / "run")
    summary = train(TrainConfig(str(tmp_path / "model"), data, output=output, steps=6, batch_size=4, samples=0))
    assert summary.method == "lora"
    assert summary.eval_loss_after is not None
    assert summary.eval_loss_before is not None
    assert summary.eval_loss_after < summary.eval_loss_before
    assert main(["train", str(tmp_path / "model"), data, "--method", "qalora", "--output", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


def test_a_dry_run_writes_nothing_and_estimates(
    config: TrainConfig, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "train",
        config.model,
        data,
        "--rank",
        "2",
        "--epochs",
        "0.4",
        "--batch-size",
        "4",
        "--output",
        str(tmp_path / "run"),
    ]
    assert main([*words, "--dry-run", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert tree(tmp_path) == set()
    assert "Dry run; nothing was written" in captured.err
    assert (document["steps"], len(document["coverage"]["wrapped"])) == (5, 7)
    # What it foretells is what the run does, but for its speed.
    assert main(words) == 0
    lengths = [line["tokens"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert (document["tokens"], document["step_tokens"]) == (sum(lengths), max(lengths))
    assert document["total_seconds"] == pytest.approx(document["tokens"] / document["tokens_per_second"])
    assert document["step_seconds"] == pytest.approx(document["step_tokens"] / document["tokens_per_second"])
    assert estimate(replace(config, output=str(tmp_path / "other"), steps=1)).steps == 1


def test_json_is_all_of_stdout(config: TrainConfig, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", config.model, data, "--rank", "2", "--steps", "2", "--samples", "1", "--output", config.output]
    assert main([*map(str, words), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(Path(f"{config.output}/summary.json").read_text())
    for text in (
        "Coverage",
        "training 2/2",
        "held-out loss, base",
        "held-out loss, tuned",
        "A held-out prompt",
        "Next",
    ):
        assert text in captured.err


def test_an_older_run_stays_until_a_new_one_begins(
    config: TrainConfig, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(config, steps=1))
    before = {path: path.read_bytes() for path in Path(str(config.output)).rglob("*") if path.is_file()}
    broken = tmp_path / "broken.jsonl"
    broken.write_text(Path(data).read_text() + "{\n")
    words = ["train", config.model, "--rank", "2", "--steps", "2", "--samples", "0", "--output", str(config.output)]
    assert main([*words, data]) == 2
    assert "or replace it with --overwrite" in capsys.readouterr().err
    for refused in ([str(broken)], [data, "--rank", "3"], [data, "--targets", "nothing"], [data, "--dry-run"]):
        assert main([*words, *refused, "--overwrite"]) == (0 if "--dry-run" in refused else 2)
        assert {path: path.read_bytes() for path in Path(str(config.output)).rglob("*") if path.is_file()} == before
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, overwrite=True), console=Interrupting("held-out loss, base"))
    assert {path: path.read_bytes() for path in Path(str(config.output)).rglob("*") if path.is_file()} == before
    assert main([*words, data, "--overwrite"]) == 0
    assert last_checkpoint(str(config.output)).name == "step-2"


def test_ctrl_c_saves_and_resuming_gives_the_bits_of_an_uninterrupted_run(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, method="lora", dropout=0.1, steps=40, eval_every=20, output=str(tmp_path / "whole"))
    train(config)
    assert [line["step"] for line in metrics(config.output) if "eval_loss" in line] == [0, 20, 40]
    stopped = str(tmp_path / "stopped run")
    settings = f"{config.output}/config.yaml"
    process = subprocess.Popen(
        [sys.executable, "-m", "lorafit", "train", "--config", settings, "--output", stopped],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("training 1/"):
            process.send_signal(signal.SIGINT)
    assert (process.wait(60), process.stderr.read() if process.stderr else "") == (130, "interrupted\n")
    step = last_checkpoint(stopped).name.removeprefix("step-")
    assert 1 <= int(step) < 40
    assert "Stopping after this step; press Ctrl-C again to stop at once.\n" in said
    assert said[-1] == f"Saved: step {step} of 40. Go on with: lorafit train --resume '{stopped}'\n"
    assert not os.path.exists(f"{stopped}/adapter")
    assert main(["train", "--resume", stopped]) == 0
    assert f"going on after step {step}" in capsys.readouterr().out
    assert bits(stopped) == bits(config.output)
    assert metrics(stopped) == metrics(config.output)
    assert tree(stopped) == tree(config.output)


def test_a_run_stopped_anywhere_goes_on_to_the_same_end(config: TrainConfig, tmp_path: Path) -> None:
    """The second Ctrl-C loses what came after the last checkpoint; at the end only the end is done again."""
    config = replace(config, steps=8, checkpoint_every=3, samples=1)
    whole = replace(config, output=str(tmp_path / "whole"))
    train(whole)
    for words, kept in (
        ("training 5/8", "Saved: step 3 of 8."),
        ("held-out loss, tuned", "Saved: step 8 of 8."),
    ):
        console = Interrupting(words, times=2)
        with pytest.raises(KeyboardInterrupt):
            train(config, console=console)
        assert console.heard[-1].startswith(kept)
        summary = train(config, resume=True)
        assert bits(config.output) == bits(whole.output)
        assert metrics(config.output) == metrics(whole.output)
        assert summary.tokens == sum(line.get("tokens", 0) for line in metrics(whole.output))
        config = replace(config, overwrite=False, output=str(tmp_path / "next"))


def test_steps_with_a_budget_of_tokens(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two epochs see every row twice, no step exceeds its budget, and a run goes on to the same bits."""
    config = replace(config, batch_size=None, tokens_per_step=300, steps=None, epochs=2.0)
    whole = replace(config, output=str(tmp_path / "whole"))
    cost = estimate(whole)
    summary = train(whole)
    tokens = [line["tokens"] for line in metrics(whole.output) if "loss" in line]
    documents = encode_all(hold_out(read_examples(config.data))[0], load_base(config.model).tokenizer)
    assert sum(tokens) == 2 * sum(len(document.tokens) for document in documents) == cost.tokens
    assert max(tokens) <= 300
    assert (summary.steps, max(tokens)) == (cost.steps, cost.step_tokens)
    assert f"- {summary.steps} steps of at most 300 tokens, " in Path(f"{whole.output}/report.md").read_text()
    with pytest.raises(KeyboardInterrupt):
        train(config, console=Interrupting("training 1/"))
    run = str(config.output)
    for words, error in (
        (["--tokens-per-step", "301"], "where tokens_per_step is 300, not 301; leave out --tokens-per-step"),
        (["--batch-size", "4"], "--batch-size and --tokens-per-step exclude each other"),
    ):
        assert main(["train", "--resume", run, *words]) == 2
        assert error in capsys.readouterr().err
    assert main(["train", "--resume", run]) == 0
    assert f"{summary.steps} steps of at most 300 tokens ->" in capsys.readouterr().out
    assert bits(run) == bits(whole.output)
    assert metrics(run) == metrics(whole.output)


def test_a_run_says_what_it_keeps_in_memory_and_goes_on_with_less(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = replace(config, output=str(tmp_path / "whole"))
    summary = train(whole)
    assert (summary.memory.level, summary.memory.automatic) == ("high", True)
    assert summary.memory.tokens == max(line["tokens"] for line in metrics(whole.output) if "loss" in line)
    with pytest.raises(KeyboardInterrupt):
        train(config, console=Interrupting("training 1/"))
    assert read_settings(f"{config.output}/config.yaml")["memory"] == "auto"
    capsys.readouterr()
    assert main(["train", "--resume", str(config.output), "--memory", "lowest"]) == 0
    assert "lowest: as asked; a pass of " in " ".join(capsys.readouterr().out.split())
    kept = json.loads(Path(f"{config.output}/summary.json").read_text())["memory"]
    assert (kept["level"], kept["automatic"]) == ("lowest", False)
    assert kept["step_bytes"]["high"] > kept["step_bytes"]["lowest"]
    assert f"--memory lowest: {kept['reason']}" in Path(f"{config.output}/report.md").read_text()
    assert bits(config.output) == bits(whole.output)


def test_a_run_stopped_before_its_first_checkpoint_says_so(config: TrainConfig) -> None:
    console = Interrupting("training 1/6", times=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, console=console)
    assert console.heard[-1] == "Stopped before a step was saved; train anew with --overwrite."
    assert main(["train", "--resume", str(config.output)]) == 2


def test_what_cannot_be_resumed(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = str(config.output), tmp_path / "rows.jsonl"
    data.write_bytes(Path(config.data).read_bytes())
    config = replace(config, data=str(data))
    with pytest.raises(KeyboardInterrupt):
        train(config, console=Interrupting("training 2/6"))

    def refused(*words: str) -> str:
        assert main(["train", "--resume", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    before = tree(run)
    assert "where rank is 2, not 1; leave out --rank" in refused(run, "--rank", "1")
    assert "where steps is 6, not 7; leave out --steps" in refused(run, "--steps", "7")
    assert "where seed is 0, not 1; leave out --seed" in refused(run, "--seed", "1")
    assert "--overwrite has no effect" in refused(run, "--overwrite")
    assert "--dry-run and --resume exclude each other" in refused(run, "--dry-run")
    assert "is not a run: it has no config.yaml" in refused(str(tmp_path))
    rows = data.read_text().replace("miller", "Miller")
    data.write_text(rows)
    assert "its data changed since it began" in refused(run)
    assert tree(run) == before
    data.write_bytes(Path(replace(config).data).read_bytes().replace(b"Miller", b"miller"))
    assert main(["train", "--resume", run]) == 0
    assert "is complete" in refused(run)


def test_a_loss_that_is_not_finite_stops_the_run(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", config.model, config.data, "--rank", "2", "--batch-size", "2", "--output", str(config.output)]
    assert main([*words, "--learning-rate", "1e30"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the loss is nan in step 2, on ")
    assert error.count("\n") == 1
    assert error.count("rows.jsonl:") == 2
    # What step 2 began with was spoiled by step 1, so it is no good checkpoint.
    assert tree(config.output) == {"config.yaml", "heldout.jsonl", "metrics.jsonl"}


def test_a_model_spoiled_by_its_last_step_is_not_saved(config: TrainConfig) -> None:
    with pytest.raises(TrainingError, match=r"the loss is nan after step 1, on .*rows.jsonl:1; try a lower"):
        train(replace(config, steps=1, learning_rate=1e30, no_eval=True, samples=3))
    assert tree(config.output) == {"config.yaml", "metrics.jsonl"}


@pytest.mark.parametrize("after", [3, 4])
def test_the_last_good_checkpoint_stays(config: TrainConfig, after: int) -> None:
    run = Run.prepare(replace(config, checkpoint_every=2), resume=False, say=lambda text: None)
    run.begin()
    module = next(iter(adapter_modules(run.base.model).values()))
    b = module.adapter_parameters()["qalora_B"]

    def spoil_after(number: int) -> None:
        for step in run.steps():
            if step.step == number:
                b.data[0, 0] = torch.inf

    with pytest.raises(TrainingError, match=rf"the loss is nan in step {after + 1}, on .*rows.jsonl:\d+"):
        spoil_after(after)
    # What was spoiled after step 3 is not saved over step 2; what was spoiled after step 4 had been saved before.
    kept = last_checkpoint(run.directory.path)
    assert kept.name == ("step-2" if after == 3 else "step-4")
    state = torch.load(kept / "state.pt", weights_only=True)
    assert all(bool(t.isfinite().all()) for parts in state["adapter"].values() for t in parts.values())


BEGUN = {"config.yaml", "heldout.jsonl", "metrics.jsonl"}
MEASURED = {
    *BEGUN, "checkpoints/step-3/state.pt", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    "adapter/qalora_offsets.safetensors",
}  # fmt: skip


# A limit on the size of files stands for a full disk. The held-out rows are larger than 1 kB, the checkpoint is larger
# than 10 kB and the figure than 29 kB.
@pytest.mark.parametrize(("kilobytes", "whole"), [(1, set()), (10, BEGUN), (29, MEASURED)])
def test_a_full_disk_is_one_line_and_nothing_looks_complete(
    config: TrainConfig, kilobytes: int, whole: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource", reason="this system cannot limit the size of files")
    run = Path(str(config.output))
    words = ["train", config.model, config.data, "--rank", "2", "--batch-size", "4", "--steps", "3", "--samples", "0"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, hard))
    try:
        code = main([*words, "--output", str(run)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith(f"error: {run}")
    assert "File too large" in error
    assert {name for name in tree(run) if (run / name).is_file()} == whole
    # With room again, what was trained is not trained anew.
    again = ["train", "--resume", str(run)] if whole == MEASURED else [*words, "--output", str(run), "--overwrite"]
    assert main(again) == 0
    train(replace(config, steps=3, output=str(tmp_path / "other")))
    assert bits(run) == bits(tmp_path / "other")
