"""The command line: how it starts, where its words go, how it ends, and which setting wins."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import lorafit
from lorafit.cli import app, main
from lorafit.commands.console import Console
from lorafit.config import TrainConfig, read_settings
from lorafit.errors import ConfigError, MissingFileError

COMMANDS = ("train", "preview", "evaluate", "generate", "chat", "merge", "bench", "pull")
HEAVY = ("torch", "transformers", "tokenizers", "llvmlite", "numpy", "matplotlib")


def parse(*words: str) -> dict[str, object]:
    """What ``train`` would be called with."""
    _, bound, _ = app.parse_args(["train", *words])
    return bound.arguments


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a user's mistake gives."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, check=False, **options)


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["adapters", "--help"], ["adapters", "combine", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    script = (
        f"import sys; from lorafit.cli import main; main({words!r}); print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert run("-c", script).stdout.splitlines()[-1] == "[]"


def test_import_gives_every_public_name_but_loads_none() -> None:
    modules = (*HEAVY, "lorafit.config")
    script = f"import sys, lorafit; print([m for m in {modules} if m in sys.modules]); print(dir(lorafit))"
    loaded, names = run("-c", script).stdout.splitlines()
    assert loaded == "[]"
    for name in eval(names):
        assert getattr(lorafit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lora'"):
        _ = lorafit.lora


def test_module_and_function_are_the_same_command(capsys: pytest.CaptureFixture[str]) -> None:
    process = run("-m", "lorafit", "--version")
    assert (process.returncode, process.stdout.strip()) == (0, lorafit.__version__)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == lorafit.__version__


@pytest.mark.parametrize("command", [*COMMANDS, *(f"adapters {name}" for name in ("list", "show", "diff", "combine"))])
def test_every_option_is_documented(command: str) -> None:
    chosen = app
    for word in command.split():
        chosen = chosen[word]
    arguments = chosen.assemble_argument_collection(parse_docstring=True)
    undocumented = [
        argument.name
        for argument in arguments
        if argument.parse and not argument.children and not argument.parameter.help
    ]
    assert undocumented == []


def test_every_setting_is_an_option() -> None:
    names = {argument.name for argument in app["train"].assemble_argument_collection()}
    assert {"--" + field.name.replace("_", "-") for field in fields(TrainConfig)} <= names


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], 'Unknown command "trian". Did you mean "train"?'),
        (["train"], "MODEL is missing"),
        (["train", "m"], "DATA is missing"),
        (["train", "m", "d", "x"], "unexpected argument 'x'"),
        (["train", "m", "d", "--rnak", "8"], "Unknown option: --rnak. Did you mean --rank?"),
        (["train", "m", "d", "--rank"], "--rank needs a value"),
        (["train", "m", "d", "--rank", "many"], 'unable to convert "many" into int'),
        (["train", "m", "d", "--method", "dora"], 'Choose from: "lora", "qalora"'),
        (["train", "m", "d", "--resume", "r", "--config", "c"], "leave out --config"),
        (["generate", "m", "p", "--temperature", "-1"], "--temperature is -1.0"),
        (["generate", "m", "p", "--top-p", "0.9"], "--top-p has no effect at --temperature 0"),
        (["generate", "m", "p", "--seed", "3"], "--seed has no effect at --temperature 0"),
        (["generate", "m", "p", "--max-tokens", "0"], "--max-tokens is 0"),
        (["generate", "m", "--bsae"], "unknown option --bsae"),
        (["generate", "m", " "], "the prompt is empty"),
        (["bench", "m", "--rounds", "0"], "--rounds is 0"),
        (["pull", "smollm3"], "there is no embedded model 'smollm3'; the known names are: smollm2-135m"),
    ],
)
def test_mistakes_give_one_line(capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    assert expected in fails(capsys, *words)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "smollm3", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("error: there is no embedded model")


def test_settings_come_from_the_file_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    # YAML reads 5e-4 as text and 1 as an integer; both are numbers for the settings.
    path.write_text(
        "model: m.gguf\ndata: d.jsonl\nrank: 4\nalpha: 1\nlearning_rate: 5e-4\ntruncate: true\noutput: null\n"
    )
    expected = TrainConfig("m.gguf", "d.jsonl", rank=4, alpha=1.0, learning_rate=5e-4, truncate=True)
    assert parse("--config", str(path))["config"] == expected
    config = parse("other.gguf", "--config", str(path), "--rank", "8", "--truncate=false")["config"]
    assert config == TrainConfig("other.gguf", "d.jsonl", rank=8, alpha=1.0, learning_rate=5e-4)


@pytest.mark.parametrize(
    ("line", "words", "steps", "epochs"),
    [("steps: 40", ["--epochs", "2"], None, 2.0), ("epochs: 2", ["--steps", "40"], 40, None)],
)
def test_the_command_line_replaces_a_setting_that_excludes_it(
    tmp_path: Path, line: str, words: list[str], steps: int | None, epochs: float | None
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(line)
    assert parse("m", "d", "--config", str(path), *words)["config"] == TrainConfig("m", "d", steps=steps, epochs=epochs)


def test_resume_takes_the_settings_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: m\ndata: d\nrank: 4\n")
    arguments = parse("--resume", str(tmp_path), "--steps", "9")
    assert arguments == {"config": TrainConfig("m", "d", rank=4, steps=9), "resume": str(tmp_path)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rnak: 8", "unknown setting 'rnak'; did you mean rank?"),
        ("learning-rate: 1", "unknown setting 'learning-rate'; did you mean learning_rate?"),
        ("zzz: 1", "unknown setting 'zzz'; `lorafit train --help` lists"),
        ("- rank", "must hold lines such as 'rank: 16', not a list"),
        ("rank: [1", "is not valid YAML"),
        ("targets: [q_proj]", "targets must be one value, not a list"),
        ("rank: many", 'unable to convert "many" into int'),
        ("method: dora", "Choose from"),
    ],
)
def test_settings_files_with_mistakes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    error = fails(capsys, "train", "m", "d", "--config", str(path))
    assert expected in error
    assert str(path) in error


def test_missing_settings_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no settings file"):
        read_settings(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("model: \xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_settings(tmp_path / "latin.yaml")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "lorafit", "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert process.returncode == 2
    assert process.stderr.splitlines()[0].startswith("error: no space left on ")
    assert "Traceback" not in process.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break differently there")
def test_a_reader_who_leaves_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "lorafit", "--help"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (process.returncode, process.stderr) == (1, "")


def test_json_has_stdout_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(json=True)
    console.print("text")
    console.fields("title", {"name": 1})
    console.table("table", ["a"], [["b"]])
    console.side_by_side("texts", {"base": "one", "tuned": "two"})
    console.stream("piece")
    with console.progress("training", 2) as progress:
        progress.update(1, loss=1.0, tokens_per_second=10.0)
    console.result({"loss": float("nan"), "path": Path("a"), "rows": (1, 2), "title": "é"})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"loss": None, "path": "a", "rows": [1, 2], "title": "é"}
    for text in ("text", "title", "table", "one", "two", "piece", "training 1/2  loss 1.000  10 tokens/s"):
        assert text in captured.err


def test_text_is_never_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.print("[bold]x[/bold] :smile:")
    console.table("", ["[red]column"], [["[/]"]])
    console.side_by_side("", {"[base]": "[INST]"})
    out = capsys.readouterr().out
    for text in ("[bold]x[/bold] :smile:", "[red]column", "[/]", "[base]", "[INST]"):
        assert text in out


def test_progress_off_a_terminal_is_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().progress("training", 1000) as progress:
        for step in range(1, 1001):
            progress.update(step, loss=0.5)
    lines = capsys.readouterr().out.splitlines()
    # The first step, and every tenth of the way from there.
    assert [line.split()[1] for line in lines] == [
        "1/1000",
        *(f"{step}/1000" for step in range(101, 1000, 100)),
        "1000/1000",
    ]
