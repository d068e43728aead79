"""The group of commands about adapters: what they say, what they write, what they refuse."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafit
from lorafit.adapters.updates import read_adapter
from lorafit.cli import main
from lorafit.config import LoRA, QALoRA
from lorafit.containers.atomic import fingerprint
from tests.adapters.several import saved
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture
def folder(tiny: TinyLlama, tmp_path: Path) -> Path:
    """A run, an adapter alone, one that PEFT might have written, and one that is broken."""
    digest = fingerprint(tiny.path)
    saved(tiny, tmp_path / "run" / "adapter", LoRA(rank=4, alpha=6.0), seed=1, base=str(tiny.path), base_sha256=digest)
    rslora = LoRA(rank=2, alpha=3.0, scaling="rslora", targets="q_proj,down_proj")
    saved(tiny, tmp_path / "alone", rslora, seed=2, base=str(tiny.path), base_sha256=digest)
    saved(tiny, tmp_path / "foreign", rslora, seed=3, base="hub/tiny")
    weights = tmp_path / "foreign" / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # without lorafit's note
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    return tmp_path


def document(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["adapters", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["adapters", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_list_finds_runs_and_adapters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "list", str(folder))
    assert [each["name"] for each in found["adapters"]] == ["alone", "foreign", "run"]
    assert list(found["broken"]) == ["broken"]
    alone, foreign, run = found["adapters"]
    assert (run["method"], run["ranks"], run["scales"], run["layers"]) == ("lora", [4], [1.5], 14)
    assert alone["scales"] == [pytest.approx(3 / math.sqrt(2))]
    # Two blocks of q (64 × 64) and down (64 × 128) at rank 2.
    assert alone["parameters"] == 2 * 2 * ((64 + 64) + (64 + 128))
    assert alone["bytes"] == sum(file.stat().st_size for file in (folder / "alone").iterdir())
    assert (alone["written_by"], foreign["written_by"]) == ("lorafit", "PEFT")
    assert (foreign["base"], foreign["base_sha256"]) == ("hub/tiny", "")
    # Each of these is a folder to look into, too.
    for place in ("run", "run/adapter"):
        (only,) = document(capsys, "list", str(folder / place))["adapters"]
        assert only["parameters"] == run["parameters"]
    assert main(["adapters", "list", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "broken cannot be used" in said
    assert f"tiny.gguf ({run['base_sha256'][:12]})" in said
    assert main(["adapters", "list", str(folder / "notes")]) == 0
    assert "There are no adapters in" in capsys.readouterr().out
    assert "no such folder" in refused(capsys, "list", str(folder / "gone"))


def test_show_has_the_norm_of_every_update(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = document(capsys, "show", str(folder / "run"))
    updates = read_adapter(folder / "run").updates
    assert [each["layer"] for each in shown["updates"]] == list(updates)
    total = 0.0
    for each in shown["updates"]:
        dense = updates[each["layer"]].dense().double()
        # Formed in float32, which rounds each of its numbers by 1e-7.
        assert each["norm"] == pytest.approx(float(dense.norm()), rel=1e-6)
        assert each["largest"] == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=1e-6)
        assert tuple(each["shape"]) == tuple(dense.shape)
        total += float(dense.norm()) ** 2
    assert shown["norm"] == pytest.approx(math.sqrt(total), rel=1e-6)
    assert main(["adapters", "show", str(folder / "run")]) == 0
    said = capsys.readouterr().out
    assert shown["base_sha256"] in said
    assert "model.layers.1.mlp.down_proj" in said
    assert "no such file; is" in refused(capsys, "show", str(folder / "notes"))


def test_what_is_no_update_is_named_in_groups(
    tiny: TinyLlama, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LoRA(rank=2, dora=True, modules_to_save=("lm_head",))
    saved(tiny, folder / "dora", config, seed=4, base=str(tiny.path), base_sha256=fingerprint(tiny.path))
    assert len(document(capsys, "show", str(folder / "dora"))["others"]) == 2 * 7 + 1
    for words in (["show", str(folder / "dora")], ["diff", str(folder / "dora"), str(folder / "run")]):
        assert main(["adapters", *words]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "others base_model.model.lm_head.weight, 2 × mlp.down_proj.lora_magnitude_vector, 2 × mlp.gate" in said
        assert said.count("lora_magnitude_vector") == 7


def test_diff_is_that_of_the_matrices(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "diff", str(folder / "alone"), str(folder / "run"))
    assert found["settings"]["scaling"] == ["rslora", "standard"]
    assert found["settings"]["rank"] == [2, 4]
    assert "base_sha256" not in found["settings"]
    one, two = (read_adapter(folder / name).updates for name in ("alone", "run"))
    assert {each["layer"] for each in found["layers"]} == two.keys()
    vectors = []
    for each in found["layers"]:
        b = two[each["layer"]].dense().double()
        a = one[each["layer"]].dense().double() if each["layer"] in one else torch.zeros_like(b)
        vectors.append((a.flatten(), b.flatten()))
        assert each["norms"] == [pytest.approx(float(a.norm()), rel=1e-6), pytest.approx(float(b.norm()), rel=1e-6)]
        if each["layer"] not in one:
            assert (each["distance"], each["cosine"]) == (None, None)
            continue
        assert each["distance"] == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-6)
        assert each["cosine"] == pytest.approx(float(a.flatten() @ b.flatten() / a.norm() / b.norm()), abs=1e-6)
    a, b = (torch.cat(parts) for parts in zip(*vectors, strict=True))
    assert found["overall"]["distance"] == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-6)
    assert found["overall"]["cosine"] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)
    # What is alike is found to be alike: no digits are lost in squares.
    same = document(capsys, "diff", str(folder / "run"), str(folder / "run"))
    assert same["settings"] == {}
    assert same["overall"]["distance"] < 1e-12
    assert same["overall"]["cosine"] == pytest.approx(1.0)
    assert main(["adapters", "diff", str(folder / "alone"), str(folder / "run")]) == 0
    assert "Settings that differ" in capsys.readouterr().out


def test_diff_names_the_settings_that_one_method_lacks(
    tiny: TinyLlama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, config in (("lora", lorafit.LoRA(rank=2)), ("qalora", lorafit.QALoRA(rank=2))):
        model, _ = lorafit.load(tiny.path)
        lorafit.attach(model, config)
        model.save_pretrained(tmp_path / name)
    both = str(tmp_path / "lora"), str(tmp_path / "qalora")
    expected = {"method": ["lora", "qalora"], "scaling": ["standard", None], "frozen_tensors": [None, "frozen"]}
    assert document(capsys, "diff", *both)["settings"] == expected
    turned = document(capsys, "diff", *reversed(both))["settings"]
    assert turned == {name: values[::-1] for name, values in expected.items()}


def test_combine_writes_an_adapter(folder: Path, tiny: TinyLlama, capsys: pytest.CaptureFixture[str]) -> None:
    run, alone, both = str(folder / "run"), str(folder / "alone"), str(folder / "both")
    said = document(capsys, "combine", run, alone, "--output", both, "--weights", "0.5", "-2")
    assert [part["weight"] for part in said["of"]] == [0.5, -2]
    assert (said["method"], said["rank"], said["layers"]) == ("linear", 6, 14)
    assert said["distance"] < 1e-6
    shown = document(capsys, "show", both)
    assert shown["combined"]["of"] == said["of"]
    assert shown["base_sha256"] == fingerprint(tiny.path)
    name = "model.layers.0.self_attn.q_proj"
    one, two, sum_ = (read_adapter(path).updates[name].dense() for path in (run, alone, both))
    torch.testing.assert_close(sum_, 0.5 * one - 2 * two, rtol=0, atol=1e-6)
    # Loading checks that it fits its base, and that the base is the one.
    model, _ = lorafit.load(tiny.path)
    from lorafit.adapters import load_adapter

    load_adapter(model, both)

    assert "both exists; choose another --output" in refused(capsys, "combine", run, alone, "--output", both)
    words = ["combine", run, alone, "--output", both, "--overwrite", "--method", "ties_svd", "--density", "0.3"]
    assert main(["adapters", *words]) == 0
    out = capsys.readouterr().out
    assert "by ties_svd" in out
    assert "off the weighted sum of updates by" in out
    assert document(capsys, "show", both)["rank"] == 4


def test_what_combine_refuses(folder: Path, tiny: TinyLlama, capsys: pytest.CaptureFixture[str]) -> None:
    run, alone, foreign = (str(folder / name) for name in ("run", "alone", "foreign"))
    out = str(folder / "out")

    def says(*words: str) -> str:
        error = refused(capsys, "combine", *words)
        assert not (folder / "out").exists()
        return error

    assert "there is nothing to combine" in says("--output", out)
    assert "must be 2 numbers" in says(run, alone, "--output", out, "--weights", "1")
    assert "not trained on the same base: SHA-256 is" in says(run, foreign, "--output", out)
    assert "density has no effect" in says(run, alone, "--output", out, "--density", "0.5")
    assert "--base has no effect" in says(run, alone, "--output", out, "--base", str(tiny.path))
    assert "run exists and is no adapter" in says(run, alone, "--output", run, "--overwrite")
    assert "holds" in says(run, alone, "--output", alone, "--overwrite")
    other = write_tiny_llama(folder / "other.gguf", seed=1)
    assert "was not trained on" in says(run, foreign, "--output", out, "--base", str(other.path))


def test_a_base_that_the_user_vouches_for(folder: Path, tiny: TinyLlama, capsys: pytest.CaptureFixture[str]) -> None:
    run, foreign, out = (str(folder / name) for name in ("run", "foreign", "out"))
    document(capsys, "combine", run, foreign, "--output", out, "--base", str(tiny.path))
    shown = document(capsys, "show", out)
    assert (shown["base"], shown["base_sha256"]) == (str(tiny.path), fingerprint(tiny.path))


def test_combining_from_python(folder: Path, tiny: TinyLlama) -> None:
    digest = fingerprint(tiny.path)
    saved(tiny, folder / "qalora", QALoRA(rank=2), base=str(tiny.path), base_sha256=digest)
    combined = lorafit.combine(
        [folder / "run", folder / "qalora"], folder / "out", recipe=lorafit.Combination(method="svd", rank=3)
    )
    assert combined.rank == 3
    assert 0 < combined.distance < 1
    assert read_adapter(folder / "out").record.config.method == "lora"
