"""Bad input: one line that says what, where and what to do; exit code 2; no traceback; nothing written."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafit.cli import main
from tests.oracles.tiny_gguf import write_tiny_llama
from tests.training.rows import rows, write_rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, tiny.gguf, and rows for it, rows.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_tiny_llama(tmp_path / "tiny.gguf", layers=1, context=128)
    write_rows(tmp_path / "rows.jsonl", 60)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail for the user's mistake, and returns its one line."""

    def run(*words: str) -> str:
        before = contents(here)
        code = main(words)
        captured = capsys.readouterr()
        assert captured.err.startswith("error: "), captured.err
        assert (code, captured.err.count("\n"), captured.out) == (2, 1, "")
        assert contents(here) == before
        return captured.err

    return run


ON_MODELS = (("train", "{}", "rows.jsonl"), ("preview", "{}", "rows.jsonl"), ("generate", "{}", "Hello"))


def on_models(refused: Callable[..., str], model: str) -> set[str]:
    """What commands that take a model say of this one; it names the model."""
    found = {refused(*(word.format(model) for word in words)) for words in ON_MODELS}
    assert all(model in error for error in found)
    return found


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (
            "nothing.gguf",
            "no such model; give a .gguf file, a directory of safetensors, a run, or one of: smollm2-135m",
        ),
        ("smollm3-135m", "no such model; give"),
        ("rows.jsonl", "is not a GGUF file: it does not start with 'GGUF'"),
        (".", "is neither a model nor a run"),
    ],
)
def test_no_such_model(refused: Callable[..., str], model: str, complaint: str) -> None:
    (error,) = on_models(refused, model)
    assert complaint in error


def cut(data: bytes) -> bytes:
    return data[:-1]


def cut_in_the_header(data: bytes) -> bytes:
    return data[:1000]


def many_tensors(data: bytes) -> bytes:
    return data[:8] + struct.pack("<Q", 2**60) + data[16:]


def many_entries(data: bytes) -> bytes:
    return data[:16] + struct.pack("<Q", 2**60) + data[24:]


def in_table(data: bytes, at: int, code: str, number: int) -> bytes:
    """Another number in the entry of blk.0.attn_v.weight: behind its name stand 20 bytes of shape, type and offset."""
    name = b"blk.0.attn_v.weight"
    place = data.index(name) + len(name) + at
    return data[:place] + struct.pack(code, number) + data[place + struct.calcsize(code) :]


def unknown_type(data: bytes) -> bytes:
    return in_table(data, 20, "<I", 4711)


def offset_past_the_end(data: bytes) -> bytes:
    return in_table(data, 24, "<Q", 2**40)


def absurd_shape(data: bytes) -> bytes:
    return in_table(data, 4, "<Q", 2**50)


def other_architecture(data: bytes) -> bytes:
    value = b"general.architecture" + struct.pack("<IQ", 8, 5)
    return data.replace(value + b"llama", value + b"gizmo")


def no_chat_template(data: bytes) -> bytes:
    return data.replace(b"tokenizer.chat_template", b"tokenizer.chat_templatx")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (cut, "but the file ends at"),
        (cut_in_the_header, "strings in 'tokenizer.ggml.tokens', more than fit into its 1000 bytes"),
        (many_tensors, f"it claims {2**60} tensors, more than fit"),
        (many_entries, f"it claims {2**60} metadata entries, more than fit"),
        (unknown_type, "tensor 'blk.0.attn_v.weight' "),
        (offset_past_the_end, "tensor 'blk.0.attn_v.weight' "),
        (absurd_shape, "tensor 'blk.0.attn_v.weight' needs"),
        (other_architecture, "gizmo"),
        (no_chat_template, "has no chat template"),
    ],
)
def test_damaged_models(
    refused: Callable[..., str], here: Path, damage: Callable[[bytes], bytes], complaint: str
) -> None:
    whole = Path("tiny.gguf").read_bytes()
    Path("broken.gguf").write_bytes(damage(whole))
    assert Path("broken.gguf").read_bytes() != whole
    for words in ON_MODELS:
        error = refused(*(word.format("broken.gguf") for word in words))
        assert complaint in error


GOOD = json.dumps(rows(1)[0])
TURNS = '{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "{}", "content": "{}"}}]}}'


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"prompt": "a", "completion": "b"', "broken JSON"),
        (b'{"prompt": "a", "output": "b"}', '"output" should be "completion"'),
        (TURNS.format("bot", "b").encode(), "unknown role 'bot'"),
        (TURNS.format("user", "b").encode(), "no assistant turn"),
        (TURNS.format("assistant", " ").encode(), "is empty"),
        (b'{"prompt": "a", "completion": "caf\xe9"}', "is not UTF-8 text"),
        (b'["a", "b"]', "must be an object"),
    ],
)
def test_faults_of_rows_are_named_by_file_and_line(refused: Callable[..., str], line: bytes, complaint: str) -> None:
    Path("bad.jsonl").write_bytes(GOOD.encode() + b"\n\n" + line + b"\n")
    for words in (
        ["train", "tiny.gguf", "bad.jsonl"],
        ["train", "tiny.gguf", "rows.jsonl", "--eval-data", "bad.jsonl"],
    ):
        error = refused(*words)
        assert error.startswith("error: bad.jsonl:3: ")
        assert complaint in error
    for command in ("preview", "evaluate"):
        assert refused(command, "tiny.gguf", "bad.jsonl") == error


def test_files_that_are_no_data(refused: Callable[..., str]) -> None:
    Path("empty.jsonl").touch()
    Path("folder").mkdir()
    for data, complaint in (
        ("row.jsonl", "no data file row.jsonl; did you mean rows.jsonl?"),
        ("folder", "folder is a directory; give a .jsonl file"),
        (".", "name a file in it: empty.jsonl, rows.jsonl"),
        ("empty.jsonl", "empty.jsonl has no rows"),
    ):
        for command in ("train", "preview", "evaluate"):
            assert complaint in refused(command, "tiny.gguf", data)
    assert "tiny.gguf is a model, but DATA is wanted there" in refused("train", "tiny.gguf", "tiny.gguf")
    assert "tiny.gguf is a model, but DATA is wanted there" in refused("train", "rows.jsonl", "tiny.gguf")


def test_outputs_that_exist(refused: Callable[..., str]) -> None:
    words = ("train", "tiny.gguf", "rows.jsonl", "--rank", "2", "--output")
    Path("folder").mkdir()
    Path("folder/thesis.txt").write_text("ten years of work")
    for output in ("folder", "rows.jsonl", "tiny.gguf", "."):
        for overwrite in ([], ["--overwrite"]):
            error = refused(*words, output, *overwrite)
            assert error == f"error: {output} exists and is not a run, so it is not replaced; choose another --output\n"
    assert "no directory can be made in" in refused(*words, "rows.jsonl/run")


def test_methods_that_do_not_fit(refused: Callable[..., str], here: Path) -> None:
    write_tiny_llama(here / "eight.gguf", layers=1, format="Q8_0")
    error = refused("train", "eight.gguf", "rows.jsonl", "--method", "qalora")
    assert "no target layer can take qalora (Q8_0 has no block offsets)" in error
    assert "use --method lora here" in error
    assert "rank is 0, but must be at least 1" in refused("train", "tiny.gguf", "rows.jsonl", "--rank", "0")
    assert "use --rank 2 or less" in refused("train", "tiny.gguf", "rows.jsonl", "--rank", "3")
    assert "no linear layer matches qproj" in refused("train", "tiny.gguf", "rows.jsonl", "--targets", "qproj")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--rnak", "8"], "Unknown option: --rnak. Did you mean --rank?"),
        (["--rank", "many"], 'unable to convert "many" into int'),
        (["--method", "dora"], "Choose from"),
        (["--learning-rate", "0"], "--learning-rate is 0.0, but must be above 0"),
        (["--batch-size", "1000"], "--batch-size is 1000, but rows to train on number 44; give that or less"),
        (["--method", "qalora", "--dropout", "0.1"], "--dropout 0.1 has no effect with --method qalora"),
        (["--no-eval", "--eval-every", "2"], "--eval-every 2 has no effect with --no-eval"),
        (["--eval-every", "6", "--rank", "2"], "--eval-every 6 has no effect in a run of 6 steps"),
        (["--truncate"], "--truncate needs --max-length"),
        (["--max-length", "129"], "--max-length is 129, but the model's context is 128"),
        (["--max-length", "40"], "rows.jsonl:2: 48 tokens, but at most 40 fit (44 rows are too long)"),
        (["more.jsonl"], "unexpected argument 'more.jsonl'"),
    ],
)
def test_options_that_cannot_be_taken(refused: Callable[..., str], words: list[str], complaint: str) -> None:
    assert complaint in refused("train", "tiny.gguf", "rows.jsonl", *words)


# Root may read everything, so it becomes nobody, once the code is loaded that nobody may be unable to read.
_UNREADABLE = """
import os, sys
from lorafit.cli import main

main(["preview", "tiny.gguf", "rows.jsonl"])
root = os.geteuid() == 0
os.chmod(os.curdir, 0o755)
for name in ("tiny.gguf", "rows.jsonl"):
    os.chmod(name, 0)
    if root:
        os.seteuid(65534)
    print(main(["preview", "tiny.gguf", "rows.jsonl"]), file=sys.stderr)
    if root:
        os.seteuid(0)
    os.chmod(name, 0o644)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs Unix permissions")
def test_files_that_may_not_be_read(here: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", _UNREADABLE], capture_output=True, text=True, timeout=60, check=False)
    lines = [line for name in ("tiny.gguf", "rows.jsonl") for line in (f"error: {name}: Permission denied", "2")]
    assert ended.stderr.splitlines() == lines
