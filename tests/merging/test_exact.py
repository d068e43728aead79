"""The exact merge, against an update computed in numpy from the adapter's file, gguf-py, and llama.cpp."""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lorafit.config import QALoRA
from lorafit.errors import MergeError, MissingFileError
from lorafit.merging import apply, plan, verify
from lorafit.models.load import load
from tests.merging.runs import spoil, to_neighbours, write_run
from tests.oracles.llamacpp import LlamaCppOracle
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

SCALE = 2.0  # alpha 4, rank 2
BLOCK = np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])  # of Q4_1
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
HEADS = {"q_proj": 4, "k_proj": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("base") / "tiny.gguf")


@pytest.fixture(scope="module")
def run(tiny: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", tiny.path)


@pytest.fixture(scope="module")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(run, tmp_path_factory.mktemp("merged") / "tuned.gguf")


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A run that may be spoiled."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def merge(run: Path, output: Path) -> Path:
    planned = plan(run)
    apply(planned, output)
    verify(planned, output)
    return output


def updates(run: Path) -> dict[str, np.ndarray]:
    """Name of a layer's weight -> s·B A, float64 [out, in], in Hugging Face's order, from the file that PEFT reads."""
    factors = load_file(run / "adapter/adapter_model.safetensors")
    result = {}
    for key, b in factors.items():
        if key.endswith("lora_B.weight"):
            a = factors[key.replace("lora_B", "lora_A")]
            name = key.removeprefix("base_model.model.").replace(".lora_B", "")
            result[name] = SCALE * (b.astype(np.float64) @ a.astype(np.float64))
    return result


def in_file(name: str, weight: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and rows of a weight as a llama-family GGUF file has them."""
    layer, kind = re.fullmatch(r"model\.layers\.(\d+)\.\w+\.(\w+)\.weight", name).groups()
    if kind in HEADS:
        heads = weight.reshape(HEADS[kind], 2, -1, weight.shape[1])
        weight = heads.swapaxes(1, 2).reshape(weight.shape)
    return f"blk.{layer}.{NAMES[kind]}.weight", weight


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def blocks(tensor: gguf.ReaderTensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.data).reshape(tensor.data.shape[0], -1).view(BLOCK)


def test_weights_are_base_plus_update(tiny: TinyLlama, run: Path, merged: Path) -> None:
    before, after = tensors(tiny.path), tensors(merged)
    assert len(updates(run)) == 14
    for name, update in updates(run).items():
        assert np.abs(np.diff(update, axis=0)).min() > 0, "equal rows would not show a wrong order"
        file_name, update = in_file(name, update)
        old, new = before[file_name], after[file_name]
        # Half precision rounds m' by 2^-11 of its size at most; what else rounds does so in float32.
        offsets = np.repeat(blocks(new)["m"].astype(np.float64), 32, axis=1)
        tolerance = np.abs(offsets) * 2.0**-11 + 1e-6
        expected = gguf.quants.dequantize(old.data, old.tensor_type) + update
        difference = np.abs(gguf.quants.dequantize(new.data, new.tensor_type) - expected)
        assert (difference <= tolerance).all(), file_name
        assert np.abs(update).mean() > 100 * tolerance.mean(), "an update this small would not show"


def test_only_offsets_change(tiny: TinyLlama, merged: Path) -> None:
    before, after = (bytearray(path.read_bytes()) for path in (tiny.path, merged))
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    offsets = 0
    for tensor in tensors(tiny.path).values():
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1:
            for at in range(tensor.data_offset, tensor.data_offset + tensor.n_bytes, 20):
                offsets += sum(before[at + 2 + i] != after[at + 2 + i] for i in range(2))
                before[at + 2 : at + 4] = after[at + 2 : at + 4] = b"\0\0"
    assert before == after
    assert changed == offsets > 0


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("length", [1, 40])  # one token takes the fused kernel
def test_logits_are_those_of_the_run_to_the_last_bit(run: Path, merged: Path, compute: str, length: int) -> None:
    tokens = torch.arange(40, 40 + length).unsqueeze(0)
    with torch.no_grad():
        logits = [load(path, compute=compute)[0](tokens).logits for path in (run, merged)]
    assert torch.equal(*logits)


def test_llamacpp_computes_the_tuned_model(tiny: TinyLlama, run: Path, merged: Path) -> None:
    tokens = list(range(40, 80))
    change = updates(run)
    tuned = dataclasses.replace(
        tiny, weights={k: (w + change.get(k, 0)).astype(np.float32) for k, w in tiny.weights.items()}
    )
    with torch.no_grad():
        before, after = (model.dense()(torch.tensor([tokens])).logits[0].numpy() for model in (tiny, tuned))
    base, found = LlamaCppOracle(tiny.path).logits(tokens), LlamaCppOracle(merged).logits(tokens)
    # llama.cpp quantises activations to 8 bits, which moves the base's logits by 0.03. It may be off the tuned model by
    # little more (measured 0.05), and that model's logits are 2 away from the base's.
    own_error = np.abs(base - before).mean()
    assert np.abs(found - after).mean() < 2 * own_error < 0.1 < 0.5 < np.abs(after - before).mean()


@pytest.mark.parametrize(
    ("targets", "kinds"),
    [("q_proj,down_proj", {"blk.0.attn_q", "blk.1.attn_q", "blk.0.ffn_down", "blk.1.ffn_down"}),
     (r".*layers\.1\.self_attn\.[kv]_proj", {"blk.1.attn_k", "blk.1.attn_v"})],
)  # fmt: skip
def test_an_adapter_on_some_layers(tiny: TinyLlama, tmp_path: Path, targets: str, kinds: set[str]) -> None:
    run = write_run(tmp_path / "run", tiny.path, QALoRA(rank=2, alpha=4.0, targets=targets))
    before, after = tensors(tiny.path), tensors(merge(run, tmp_path / "tuned.gguf"))
    changed = {name for name in before if not np.array_equal(before[name].data, after[name].data)}
    assert changed == {f"{kind}.weight" for kind in kinds}


def test_a_head_of_its_own_merges_and_leaves_the_embedding(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base.gguf", layers=1, embedding_format="Q4_1", tied=False)
    run = write_run(tmp_path / "run", base.path, QALoRA(rank=2, targets="lm_head"))
    before, after = tensors(base.path), tensors(merge(run, tmp_path / "tuned.gguf"))
    changed = {name for name in before if not np.array_equal(before[name].data, after[name].data)}
    assert changed == {"output.weight"}


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="is not a run"):
        plan(tmp_path)


def test_merging_twice_and_another_base_are_refused(tiny: TinyLlama, tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    shutil.copy(tiny.path, base)
    run = write_run(tmp_path / "run", base)
    merge(run, tmp_path / "tuned.gguf")
    shutil.copy(tmp_path / "tuned.gguf", base)
    with pytest.raises(MergeError, match=r"base\.gguf is not what .*run was trained on .* merged already"):
        plan(run)
    write_tiny_llama(base, seed=5)
    with pytest.raises(MergeError, match="another model"):
        plan(run)
    base.unlink()
    with pytest.raises(MissingFileError, match=r"base\.gguf"):
        plan(run)
    shutil.copy(tiny.path, base)
    plan(run)


LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda offsets: offsets.pop(LAYER), f"{LAYER} is missing"),
        (lambda offsets: offsets.update(other=offsets[LAYER]), "other is no layer of the adapter"),
        (
            lambda offsets: offsets.update({LAYER: offsets[LAYER][:-1].copy()}),
            r"\[63, 2\], not torch.float16 \[64, 2\]",
        ),
        (lambda offsets: offsets.update({LAYER: offsets[LAYER].astype(np.float32)}), "is torch.float32"),
        (lambda offsets: offsets[LAYER].__setitem__((3, 1), np.inf), "not finite"),
        (lambda offsets: offsets[LAYER].__setitem__((3, 1), np.nan), "not finite"),
        (lambda offsets: offsets.update({LAYER: offsets[LAYER][::-1].copy()}), "not those of its adapter"),
    ],
)
def test_offsets_that_do_not_fit_are_refused(copied: Path, change: Callable, complaint: str) -> None:
    spoil(copied, change)
    with pytest.raises(MergeError, match=complaint):
        plan(copied)


def test_offsets_may_round_otherwise_but_seldom(run: Path, copied: Path) -> None:
    total = sum(value.size for value in load_file(run / "adapter/qalora_offsets.safetensors").values())
    few = np.arange(total // 101)
    assert plan(run).rounded_otherwise == 0  # on the machine that wrote them
    spoil(copied, lambda offsets: to_neighbours(offsets[LAYER], few, 1))
    assert plan(copied).rounded_otherwise == len(few)
    spoil(copied, lambda offsets: to_neighbours(offsets["model.layers.1.mlp.up_proj"], few, 1))
    with pytest.raises(MergeError, match="stored offsets are not those of the adapter"):
        plan(copied)


def test_an_offset_two_units_off_is_refused(copied: Path) -> None:
    # The largest, for which a unit in its own last place is what counts; elsewhere m may be larger than m'.
    spoil(copied, lambda offsets: to_neighbours(offsets[LAYER], np.abs(offsets[LAYER]).argmax(), 2))
    with pytest.raises(MergeError, match=f"stored offsets of {LAYER} are not those of its adapter"):
        plan(copied)


# What verify sees, on a file that was merged rightly and then spoilt.


@pytest.mark.parametrize("place", ["head", "scale", "integer", "offset", "frozen", "last"])
def test_a_single_wrong_bit_is_seen(run: Path, merged: Path, tmp_path: Path, place: str) -> None:
    planned = plan(run)
    tensor, frozen = (tensors(merged)[name].data_offset for name in ("blk.1.attn_k.weight", "token_embd.weight"))
    data = bytearray(merged.read_bytes())
    at = {"head": 30, "scale": tensor + 20, "integer": tensor + 24, "offset": tensor + 22, "frozen": frozen}
    data[at.get(place, len(data) - 1)] ^= 1
    spoilt = tmp_path / "spoilt.gguf"
    spoilt.write_bytes(data)
    what = "1 bytes of offsets and 0 others" if place == "offset" else "0 bytes of offsets and 1 others"
    with pytest.raises(MergeError, match=what):
        verify(planned, spoilt)


def test_a_wrong_offset_far_into_a_tensor_is_seen(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base.gguf", layers=1, hidden=256, intermediate=512)
    planned = plan(write_run(tmp_path / "run", base.path, QALoRA(rank=2, alpha=4.0, targets="up_proj")))
    apply(planned, tmp_path / "tuned.gguf")
    verify(planned, tmp_path / "tuned.gguf")
    tensor = tensors(base.path)["blk.0.ffn_up.weight"]
    assert tensor.n_bytes > 1 << 16, "read in more than one piece"
    with (tmp_path / "tuned.gguf").open("rb+") as file:
        file.seek(tensor.data_offset + tensor.n_bytes - 18)
        first = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([first[0] ^ 1]))
    with pytest.raises(MergeError, match="1 bytes of offsets and 0 others"):
        verify(planned, tmp_path / "tuned.gguf")


def test_a_file_of_another_length_is_seen(run: Path, merged: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt.gguf"
    for data in (merged.read_bytes()[:-1], merged.read_bytes() + b"\0"):
        spoilt.write_bytes(data)
        with pytest.raises(MergeError, match=r"are wrong|ends within"):
            verify(plan(run), spoilt)


def test_a_base_that_changes_meanwhile_is_seen_even_where_its_time_does_not_tell(
    tiny: TinyLlama, tmp_path: Path
) -> None:
    base, output = tmp_path / "base.gguf", tmp_path / "tuned.gguf"
    shutil.copy(tiny.path, base)
    planned = plan(write_run(tmp_path / "run", base))
    with base.open("rb+") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    os.utime(base, ns=(planned.base.stamp[str(base)][1],) * 2)
    apply(planned, output)
    with pytest.raises(MergeError, match="nothing else writes to"):
        verify(planned, output)


def test_verify_counts_what_differs(tiny: TinyLlama, run: Path, merged: Path) -> None:
    before, after = (np.fromfile(path, np.uint8) for path in (tiny.path, merged))
    comparison = verify(plan(run), merged)
    assert comparison.bytes_changed == np.count_nonzero(before != after)
    assert comparison.size == tiny.path.stat().st_size
