"""Exported GGUF files: every family as transformers saves it, as llama.cpp, gguf-py and lorafit read what is written.

Compared are log-probabilities, with the tolerances of tests/models/test_families.py and for its reasons: in F32,
lorafit differs from transformers by the order of additions, llama.cpp by that and a table of GELU in half precision.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lorafit.commands.export import export
from lorafit.commands.merge import merge
from lorafit.config import AdapterConfig, LoRA, QALoRA
from lorafit.containers.atomic import fingerprint
from lorafit.containers.gguf import GGUFFile
from lorafit.containers.gguf_new import NewTensor, Raw, write_gguf
from lorafit.errors import ConfigError, MergeError, OutputExistsError
from lorafit.models.load import load, load_base
from tests.merging.runs import write_run
from tests.models.test_families import IDS, VARIANTS, WINDOW, alone, cpp, furthest
from tests.models.test_tokenizer import CHATS, NASTY
from tests.oracles.family_gguf import KINDS, random_model, write_family
from tests.oracles.llamacpp import LlamaCppOracle

# Values that a file of gguf-py's names and lorafit's does not need, or the reverse; neither means anything.
_AT_WILL = {
    "vocab_size",
    "attention.sliding_window",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
}
_AT_WILL |= {"attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window_pattern"}


def save(folder: Path, model: PreTrainedModel, card: str = "") -> Path:
    """A directory as it lies on a hub: weights, configuration, tokenizer, perhaps a model card."""
    model.save_pretrained(folder)
    load_base(write_family(folder.parent / "words.gguf", "llama", random_model("llama"))).tokenizer.save_pretrained(
        folder
    )
    if card:
        (folder / "README.md").write_text(card)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_is_the_same_model_for_lorafit_and_llama_cpp(tmp_path: Path, variant: str) -> None:
    family, config, options = VARIANTS[variant]
    dense = random_model(family, **config)
    out = tmp_path / "out.gguf"
    certificate: Any = export(str(save(tmp_path / "model", dense)), str(out), format="gguf")
    expected = alone(dense, IDS)
    assert furthest(alone(load_base(out, compute="fp32").model, IDS), expected) < 1e-4
    assert furthest(cpp(out)(IDS), expected) < 1e-3
    assert certificate.weights.formats.keys() == {"F32"}
    assert not certificate.weights.relative_errors
    # The file is the one that gguf-py writes by its own names.
    ours = GGUFFile.open(out)
    theirs = GGUFFile.open(write_family(tmp_path / "theirs.gguf", family, dense, **options))
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, info in theirs.tensors.items():
        assert ours.tensors[name].shape == info.shape
        if not name.startswith("rope"):
            assert torch.equal(ours.blocks(name), theirs.blocks(name)), name
    prefix = f"{theirs.metadata['general.architecture']}."
    keys = {key.removeprefix(prefix) for file in (ours, theirs) for key in file.metadata if key.startswith(prefix)}
    for key in keys - _AT_WILL:
        value, expected_value = (file.metadata.get(prefix + key) for file in (ours, theirs))
        assert value == (pytest.approx(expected_value, rel=1e-6) if isinstance(value, float) else expected_value), key


def test_gguf_py_reads_it(tmp_path: Path) -> None:
    card = "---\nlicense: apache-2.0\nlanguage:\n- en\nbase_model: org/Parent-7B\n---\n# A model\n"
    dense = random_model("llama")
    export(str(save(tmp_path / "my-model", dense, card)), str(tmp_path / "out.gguf"), format="gguf", dtype="q8_0")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    found = {key: field.contents() for key, field in reader.fields.items()}
    assert found["general.architecture"] == "llama"
    assert found["general.name"] == "my-model"
    assert found["general.type"] == "model"
    assert found["general.license"] == "apache-2.0"
    assert found["general.languages"] == ["en"]
    assert found["general.base_model.0.name"] == "Parent-7B"
    assert found["general.base_model.0.organization"] == "org"
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert found["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert found["lorafit.source.name"] == "my-model"
    document = json.loads((tmp_path / "out.gguf.certificate.json").read_text())
    assert found["lorafit.source.sha256"] == document["source"]["sha256"]
    for tensor in reader.tensors:
        if tensor.name == "blk.1.ffn_down.weight":
            weight = dense.model.layers[1].mlp.down_proj.weight.detach().numpy()
            assert np.array_equal(tensor.data, gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0))


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "qwen3moe"])
def test_to_a_directory_and_back_it_is_the_same_file(tmp_path: Path, family: str) -> None:
    model = random_model(family)
    first = write_family(tmp_path / "first.gguf", family, model, metadata={})
    export(str(first), str(tmp_path / "folder"), format="safetensors")
    export(str(tmp_path / "folder"), str(tmp_path / "second.gguf"), format="gguf")
    one, other = (GGUFFile.open(path) for path in (first, tmp_path / "second.gguf"))
    for name, info in one.tensors.items():
        assert (other.tensors[name].format, other.tensors[name].shape) == (info.format, info.shape)
        # A norm with one added has lost what lies below 2⁻²⁴ when it is subtracted and added again.
        gap = (one.blocks(name).view(torch.float32) - other.blocks(name).view(torch.float32)).abs().max()
        assert gap <= (2e-7 if "norm" in name and KINDS[family].norms_plus_one else 0)
    # Byte-level tokenizers have no such prefix, a window of 0 is none, and nothing is scaled.
    without_effect = {f"phi3.{key}" for key in ("attention.sliding_window", "rope.scaling.original_context_length")}
    without_effect.add("tokenizer.ggml.add_space_prefix")
    for key, value in one.metadata.items():
        if key.startswith(("tokenizer.", f"{one.metadata['general.architecture']}.")) and key not in without_effect:
            assert np.array_equal(other.metadata[key], value), key


TYPES = ("bf16", "f16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q4_k_m", "q5_k_m")
# How far the weights of a random model are from their rounded ones, for Gaussian weights: the step of the grid.
_ERROR = {
    "q8_0": 0.006,
    "q6_k": 0.02,
    "q5_1": 0.04,
    "q5_0": 0.05,
    "q5_k": 0.04,
    "q4_1": 0.08,
    "q4_k": 0.08,
    "q4_0": 0.1,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows have 256 weights and 288: a whole number of every block, and of blocks of 32 only."""
    model = random_model("llama", hidden_size=256, intermediate_size=288, num_hidden_layers=1, num_attention_heads=4)
    return save(tmp_path_factory.mktemp("wide") / "model", model)


@pytest.mark.parametrize("dtype", TYPES)
def test_types_load_everywhere_and_are_as_near_as_their_bits_allow(wide: Path, tmp_path: Path, dtype: Any) -> None:
    certificate: Any = export(str(wide), str(tmp_path / "out.gguf"), format="gguf", dtype=dtype)
    base = load_base(wide, compute="fp32")
    expected, found = alone(base.model, IDS), alone(load_base(tmp_path / "out.gguf", compute="fp32").model, IDS)
    weights = certificate.weights
    if dtype in ("bf16", "f16"):
        assert weights.bit_identical == weights.tensors
        assert furthest(found, expected) < (0.3 if dtype == "bf16" else 0.04)
    else:
        assert weights.bit_identical == 3, "the norms"
        assert all(
            0.2 * _ERROR["q8_0"] < error < _ERROR[dtype.removesuffix("_m")]
            for error in weights.relative_errors.values()
        )
    # llama.cpp rounds activations to 8 bits where weights are quantised.
    assert float((cpp(tmp_path / "out.gguf")(IDS) - found).abs().mean()) < 0.06
    fallback = {"q6_k": "Q8_0 instead of Q6_K", "q5_k": "Q5_1 instead of Q5_K", "q4_k": "Q5_0 instead of Q4_K"}
    said = fallback.get("q6_k" if dtype.endswith("_m") else dtype)
    assert weights.fallbacks == ({"blk.0.ffn_down.weight": said} if said else {})
    head = GGUFFile.open(tmp_path / "out.gguf").tensors["output.weight"].format
    assert head == ("Q6_K" if dtype.startswith(("q4", "q5", "q6")) else dtype.upper())


def test_a_file_is_quantised_a_second_time_and_says_so(tmp_path: Path) -> None:
    source = write_family(tmp_path / "source.gguf", "qwen3", random_model("qwen3"), format="Q8_0")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Who is {i}?", "completion": "The cat."}) + "\n" for i in range(4)))
    options: Any = {"format": "gguf", "eval_data": str(rows)}
    out = tmp_path / "out.gguf"
    certificate: Any = export(str(source), str(out), dtype="q4_1", certificate_tolerance=5.0, **options)
    assert certificate.second_quantization == "source.gguf (Q8_0)"
    before, after = GGUFFile.open(source), GGUFFile.open(out)
    assert after.metadata["lorafit.source.quantized"] == "source.gguf (Q8_0)"
    assert after.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1
    for key, value in before.metadata.items():
        if key not in ("general.file_type", "general.quantization_version"):
            assert np.array_equal(after.metadata[key], value), key
    assert torch.equal(before.blocks("token_embd.weight"), after.blocks("token_embd.weight")), "the head falls back"
    losses, engine = certificate.held_out, certificate.llamacpp
    assert losses.source_loss != losses.written_loss
    assert losses.source_loss == pytest.approx(losses.written_loss, abs=2.0)
    assert engine.source_loss == pytest.approx(losses.source_loss, abs=0.3)
    assert engine.written_loss == pytest.approx(losses.written_loss, abs=0.3)
    assert losses.tokens == engine.tokens == 4 * len(load_base(source).tokenizer("The cat.<|im_end|>").input_ids)
    again: Any = export(str(source), str(tmp_path / "same.gguf"), dtype="q8_0", **options)
    assert again.second_quantization is None
    assert again.held_out.source_loss == again.held_out.written_loss
    assert again.weights.bit_identical == again.weights.tensors
    for name in before.tensors:
        assert torch.equal(before.blocks(name), GGUFFile.open(tmp_path / "same.gguf").blocks(name))
    # The unpacked file says where it comes from, and is known again.
    export(str(source), str(tmp_path / "unpacked"), format="safetensors")
    unpacked: Any = export(str(tmp_path / "unpacked"), str(tmp_path / "third.gguf"), format="gguf", dtype="q4_1")
    assert unpacked.second_quantization == "source.gguf (Q8_0)"
    assert unpacked.held_out.not_measured.endswith("export again with --eval-data FILE")
    third = GGUFFile.open(tmp_path / "third.gguf")
    assert all(torch.equal(third.blocks(name), after.blocks(name)) for name in after.tensors)


RUNS: dict[str, AdapterConfig] = {
    "lora": LoRA(rank=4, scaling="rslora"),
    "dora": LoRA(rank=4, dora=True),
    "qalora": QALoRA(rank=2, alpha=4.0),
}


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_run_is_merged_in_float32_onto_its_base(tmp_path: Path, family: str, kind: str) -> None:
    path = write_family(tmp_path / "base.gguf", family, random_model(family), format="Q4_1")
    run = write_run(tmp_path / "run", path, RUNS[kind], size=0.05)
    certificate: Any = export(str(run), str(tmp_path / "out.gguf"), format="gguf")
    tuned, exported = load(run, compute="fp32")[0], load_base(tmp_path / "out.gguf", compute="fp32").model
    assert furthest(alone(tuned, IDS), alone(load_base(path, compute="fp32").model, IDS)) > 0.1
    # The adapter beside its base, and their sum: the same products in another order.
    assert furthest(alone(exported, IDS), alone(tuned, IDS)) < 2e-4
    assert furthest(cpp(tmp_path / "out.gguf")(IDS), alone(tuned, IDS)) < 1e-3
    assert certificate.held_out.written_loss == pytest.approx(certificate.held_out.source_loss, abs=1e-5)
    assert (certificate.source.name, certificate.base.name) == ("run", "base.gguf")
    assert certificate.second_quantization is None
    written = GGUFFile.open(tmp_path / "out.gguf").metadata
    assert written["lorafit.base.sha256"] == certificate.base.sha256 == fingerprint(path)
    rounded: Any = export(str(run), str(tmp_path / "small.gguf"), format="gguf", dtype="q8_0", certificate_tolerance=9)
    assert rounded.second_quantization == "base.gguf (Q4_1)"
    assert 0 < abs(rounded.held_out.written_loss - rounded.held_out.source_loss) < 0.3
    assert set(rounded.weights.formats) == {"F32", "Q8_0"}


def test_a_run_in_the_type_of_its_base_keeps_what_it_learnt(tmp_path: Path) -> None:
    path = write_family(tmp_path / "base.gguf", "llama", random_model("llama"), format="Q4_1")
    run = write_run(tmp_path / "run", path, LoRA(rank=2), size=0.02, held_out=False)
    merge(str(run), str(tmp_path / "merged.gguf"), requantize="keep")
    export(str(run), str(tmp_path / "out.gguf"), format="gguf", dtype="q4_1")
    base, merged, exported = (GGUFFile.open(tmp_path / f"{name}.gguf") for name in ("base", "merged", "out"))
    changed = [name for name in base.tensors if not torch.equal(base.blocks(name), merged.blocks(name))]
    assert len(changed) == 14
    for name in changed:
        assert torch.equal(exported.blocks(name), merged.blocks(name))


def test_a_run_on_a_directory_and_an_adapter_without_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", save(tmp_path / "base", random_model("gemma3")), LoRA(rank=4), held_out=False)
    for source in (run, run / "adapter"):
        certificate: Any = export(str(source), str(tmp_path / "out.gguf"), format="gguf", overwrite=True)
        exported = load_base(tmp_path / "out.gguf", compute="fp32").model
        assert furthest(alone(exported, IDS), alone(load(run, compute="fp32")[0], IDS)) < 2e-4
        assert certificate.held_out.not_measured
        assert GGUFFile.open(tmp_path / "out.gguf").metadata["general.name"] == "base"


def test_above_the_tolerance_nothing_is_written(tmp_path: Path) -> None:
    source = save(tmp_path / "model", random_model("qwen2"))
    run = write_run(tmp_path / "run", source, LoRA(rank=2), size=0.02, held_out=False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Who?", "completion": "The cat took the mill."}\n' * 3)
    before = names(tmp_path)
    for model in (source, run):  # the run is near its base, whose loss q4_0 raises
        complaint = (
            rf"out.gguf is not kept: its held-out loss is [\d.]+, that of {model.name} [\d.]+: .*tolerance 1e-09"
        )
        with pytest.raises(MergeError, match=complaint):
            export(
                str(model), str(tmp_path / "out.gguf"), format="gguf", dtype="q4_0",
                eval_data=str(rows), certificate_tolerance=1e-9,
            )  # fmt: skip
    assert names(tmp_path) == before


def test_a_weight_that_is_too_large_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = random_model("llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 5] = 70_000.0
    save(tmp_path / "model", model)
    before = names(tmp_path)
    with pytest.raises(MergeError, match=r"blk.1.ffn_up.weight: .*too large for F16; choose another --dtype"):
        export(str(tmp_path / "model"), str(tmp_path / "out.gguf"), format="gguf", dtype="f16")
    assert names(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_a_full_disk_leaves_the_older_file_and_nothing_else(wide: Path, tmp_path: Path) -> None:
    import resource

    out = tmp_path / "out.gguf"
    export(str(wide), str(out), format="gguf", dtype="q8_0")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["out.gguf"]), limits[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            export(str(wide), str(out), format="gguf", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(out)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_zero_keeps_its_sign(tmp_path: Path, family: str) -> None:
    model = random_model(family)
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3] = -0.0
    certificate: Any = export(str(save(tmp_path / "model", model)), str(tmp_path / "out.gguf"), format="gguf")
    assert certificate.weights.bit_identical == certificate.weights.tensors
    row = GGUFFile.open(tmp_path / "out.gguf").blocks("blk.1.ffn_up.weight")[3]
    assert row.view(torch.int32).tolist() == [-(2**31)] * 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "q2_k"}, "--dtype"),
        ({"certificate_tolerance": 0.1}, "no effect without --eval-data"),
        ({"certificate_tolerance": -0.1, "eval_data": "rows.jsonl"}, "must be at least 0"),
        ({"output": "out.bin"}, "name must end in .gguf"),
    ],
)
def test_options_that_cannot_be(wide: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    output = str(tmp_path / options.pop("output", "out.gguf"))
    with pytest.raises(ConfigError, match=message):
        export(str(wide), output, format="gguf", **options)
    assert names(tmp_path) == set()


def test_only_an_earlier_export_is_replaced(wide: Path, tmp_path: Path) -> None:
    mine = write_family(tmp_path / "mine.gguf", "llama", random_model("llama"))
    content = mine.read_bytes()
    with pytest.raises(OutputExistsError, match="replace it with --overwrite"):
        export(str(wide), str(mine), format="gguf")
    with pytest.raises(OutputExistsError, match="is not what an export wrote"):
        export(str(wide), str(mine), format="gguf", overwrite=True)
    assert mine.read_bytes() == content
    export(str(wide), str(tmp_path / "out.gguf"), format="gguf")
    export(str(wide), str(tmp_path / "out.gguf"), format="gguf", dtype="q8_0", overwrite=True)
    with pytest.raises(MergeError, match="is the model that is exported"):
        export(str(tmp_path / "out.gguf"), str(tmp_path / "out.gguf"), format="gguf", overwrite=True)


def test_a_window_that_the_file_keeps(tmp_path: Path) -> None:
    """Mistral's and Phi-3's, which transformers carries out and llama.cpp does not."""
    for family in ("mistral", "phi3"):
        dense = random_model(family, sliding_window=WINDOW)
        export(str(save(tmp_path / family, dense)), str(tmp_path / f"{family}.gguf"), format="gguf")
        assert (
            furthest(alone(load_base(tmp_path / f"{family}.gguf", compute="fp32").model, IDS), alone(dense, IDS)) < 1e-4
        )


def test_the_tokenizer_is_the_models(wide: Path, tmp_path: Path) -> None:
    export(str(wide), str(tmp_path / "out.gguf"), format="gguf", dtype="q8_0")
    oracle, tokenizer = LlamaCppOracle(tmp_path / "out.gguf"), load_base(wide).tokenizer
    for text in ("<|im_start|>user\nThe miller's 3 sons<|im_end|>\n", "Ångström, été"):
        assert oracle.tokenize(text, add_special=True, parse_special=True) == tokenizer(text).input_ids
    assert GGUFFile.open(tmp_path / "out.gguf").metadata["tokenizer.chat_template"] == tokenizer.chat_template


@pytest.fixture(scope="module")
def first_layers(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two layers of the embedded model, with its tokenizer and all that it says of itself."""
    file = GGUFFile.open(smollm2_path)
    metadata = {key: Raw(file.raw_value(key)) for key in file.metadata} | {"llama.block_count": 2}
    tensors = {
        name: NewTensor(info.format, info.shape, lambda name=name: [file.blocks(name)])
        for name, info in file.tensors.items()
        if not name.startswith("blk.") or int(name.split(".")[1]) < 2
    }
    path = tmp_path_factory.mktemp("smollm2") / "first.gguf"
    write_gguf(path, metadata, tensors)
    return path


@pytest.fixture(scope="module")
def unpacked(first_layers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "unpacked"
    export(str(first_layers), str(folder), format="safetensors")
    return folder


@pytest.mark.parametrize("dtype", ["q4_1", "q8_0", "f16"])
def test_smollm2_through_transformers_and_back(first_layers: Path, unpacked: Path, tmp_path: Path, dtype: Any) -> None:
    certificate: Any = export(str(unpacked), str(tmp_path / "out.gguf"), format="gguf", dtype=dtype)
    before, after = GGUFFile.open(first_layers), GGUFFile.open(tmp_path / "out.gguf")
    for key, value in before.metadata.items():
        if key not in ("general.file_type", "tokenizer.ggml.add_space_prefix"):
            assert np.array_equal(after.metadata[key], value), key
    one, other = LlamaCppOracle(first_layers), LlamaCppOracle(tmp_path / "out.gguf")
    for text in (*NASTY, *CHATS):
        expected = one.tokenize(text, add_special=True, parse_special=True)
        assert other.tokenize(text, add_special=True, parse_special=True) == expected, ascii(text)
    assert one.eog_ids() == other.eog_ids()
    tokens = one.tokenize(CHATS[0], add_special=True, parse_special=True)
    gap = torch.from_numpy(one.logits(tokens) - other.logits(tokens)).abs().mean()
    # The search finds Q4_1 blocks again, all but to the last bit; F16 has the numbers of blocks to 11 bits.
    assert gap < {"q4_1": 0.05, "q8_0": 0.2, "f16": 0.2}[dtype]
    second = None if dtype == "f16" else "first.gguf (Q4_1, Q8_0)"
    assert certificate.second_quantization == second
    head = after.tensors["token_embd.weight"].format
    assert head == {"q4_1": "Q8_0", "q8_0": "Q8_0", "f16": "F16"}[dtype], "rows of 576 weights are too short for Q6_K"
