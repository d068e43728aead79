"""Training, from a file and rows to a lower loss on rows held out, in families that are unlike one another."""

import json
from pathlib import Path

import pytest

from lorafit.cli import main
from tests.oracles.family_gguf import random_model, write_family

WORDS = ("mill", "boots", "sack", "fur", "king", "door", "cat", "corn")


@pytest.mark.parametrize(
    ("family", "method", "format"),
    [
        ("qwen2", "qalora", "Q4_1"),
        ("gemma2", "lora", "Q8_0"),
        ("phi3", "qalora", "Q4_0"),
        ("granite", "qlora", "Q5_0"),
    ],
)
def test_training_lowers_the_loss(
    tmp_path: Path, family: str, method: str, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_family(tmp_path / "base.gguf", family, random_model(family, intermediate_size=128), format=format)
    chats = [(("user", f"say {word}"), ("assistant", f"the {word} and the cat")) for word in WORDS * 5]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--method", method, "--rank", "2", "--learning-rate", "0.01", "--steps", "12"]
    assert main(["train", str(base), str(data), "--output", str(tmp_path / "run"), *options]) == 0, capsys.readouterr()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # A random model knows nothing, a loss of 5.6 or more; a few steps teach it the words that all answers share.
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 1.0
