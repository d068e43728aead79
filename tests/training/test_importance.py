"""The search for blocks weighs inputs by how strongly the training rows use them, and a run remembers by how much."""

import json
from pathlib import Path

import pytest
import torch

from lorafit.config import TrainConfig
from lorafit.data.packing import split_passes
from lorafit.errors import AdapterError, ConfigError
from lorafit.models.load import load, load_base
from lorafit.modules import PackedWeight
from lorafit.training.importance import input_importance
from lorafit.training.run import Run
from tests.oracles.adapted import documents
from tests.oracles.tiny_directory import write_tiny_directory

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("importance") / "base"
    write_tiny_directory(path, max_position_embeddings=512)
    return path


def test_it_is_the_mean_square_of_each_input(base: Path) -> None:
    model = load_base(base, compute="fp32").model
    rows = documents([20, 7, 31])
    found = input_importance(model, split_passes(rows, 40))  # more passes than one
    # What the first layer sees is its norm of the embeddings, and no document is told from another there.
    tokens = torch.tensor([token for row in rows for token in row.tokens])
    table, weight = model.model.embed_tokens.weight.double(), model.model.layers[0].input_layernorm.weight.double()
    x = table[tokens]
    x = x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt() * weight
    torch.testing.assert_close(found[LAYER].double(), x.square().mean(0), rtol=1e-5, atol=0)
    assert found.keys() >= {f"{LAYER[:-6]}{name}" for name in ("k_proj", "v_proj", "o_proj")}
    assert found["model.layers.1.mlp.down_proj"].shape == (192,)


def test_a_run_finds_the_base_again_that_it_was_trained_on(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    # Few letters, so that some inputs are used much more than others.
    data.write_text("".join(json.dumps({"prompt": "a" * n, "completion": "b" * n}) + "\n" for n in range(1, 60)))
    settings = {"method": "qalora", "quantize": "q4_1", "rank": 2, "steps": 4, "batch_size": 2, "samples": 0}
    config = TrainConfig(
        str(base), str(data), output=str(tmp_path / "run"), importance_rows=8, checkpoint_every=2, **settings
    )
    said: list[str] = []
    run = Run.prepare(config, resume=False, say=said.append)
    assert any("8 training rows" in line for line in said)
    blocks = {n: m.blocks.clone() for n, m in run.base.model.named_modules() if isinstance(m, PackedWeight)}
    plain = load_base(base, quantize="q4_1").model
    unlike = [n for n, m in plain.named_modules() if isinstance(m, PackedWeight)]
    assert len(unlike) == len(blocks)
    assert not torch.equal(blocks[f"{LAYER}.base.packed"], plain.get_submodule(f"{LAYER}.packed").blocks)

    run.begin()
    steps = run.steps()
    for _ in range(2):
        next(steps)
    resumed = Run.prepare(run.config, resume=True, say=lambda _: None)
    resumed.go_on()
    list(resumed.steps())
    resumed.finish()
    # Rows that were measured are not needed any more: what they said lies beside the adapter.
    data.unlink()
    again = load(tmp_path / "run")[0]
    found = {n: m.blocks for n, m in again.named_modules() if isinstance(m, PackedWeight)}
    assert found.keys() == blocks.keys()
    assert all(torch.equal(found[name], blocks[name]) for name in blocks)
    (tmp_path / "run/adapter/importance.safetensors").unlink()
    with pytest.raises(
        AdapterError, match=r"adapter: importance\.safetensors is missing, by which its base was quanti"
    ):
        load(tmp_path / "run")


def test_what_it_has_no_effect_on_is_refused(base: Path) -> None:
    for quantize in (None, "nf4", "q8_0"):
        config = TrainConfig(str(base), "rows.jsonl", quantize=quantize, importance_rows=8)
        with pytest.raises(ConfigError, match="--importance-rows 8 has no effect without --quantize q4_1 or q5_1"):
            Run.prepare(config, resume=False, say=lambda _: None)
