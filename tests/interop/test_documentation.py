"""The example in docs/trainers.md runs as it stands there."""

import json
import re
from pathlib import Path

import pytest

from tests.oracles.tiny_gguf import write_tiny_llama

DOCUMENT = Path(__file__).parents[2] / "docs" / "trainers.md"


@pytest.mark.filterwarnings("ignore")
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tiny_llama(tmp_path / "model.gguf")
    rows = [("Who took the mill?", "The eldest."), ("And the cat?", "It spoke.")]
    messages = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages))
    names: dict[str, object] = {}
    # Rank 16 needs 16 blocks in a row, and the tiny model has two.
    changed = example.replace("max_steps=20", "max_steps=3")
    exec(changed.replace("rank=16", "rank=2").replace('"out",', '"out", use_cpu=True,'), names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    history = names["trainer"].state.log_history  # type: ignore[attr-defined]
    assert history[-1]["train_loss"] < 9
