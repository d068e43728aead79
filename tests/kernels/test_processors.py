"""The vector code on processors other than this one, and where there is none at all."""

import os
import re
import subprocess
import sys

import pytest
import torch
from llvmlite import binding

from lorafit.formats import FORMATS
from lorafit.kernels import cpu, loops, threads, vectors


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_llvmlite_everything_works() -> None:
    code = """
import sys
sys.modules["llvmlite"] = None  # makes every import of it fail
import torch
from lorafit import kernels
blocks = torch.arange(120, dtype=torch.uint8).view(3, 40)
assert not kernels.fuses_linear(blocks, "Q4_1")
rows, x = torch.tensor([2, 0, 1]), torch.ones(2, 64)
weight = kernels.dequantize(blocks, "Q4_1", torch.bfloat16, rows=rows)
torch.testing.assert_close(kernels.linear(x, blocks, "Q4_1", rows=rows), x @ weight.float().T, rtol=2**-8, atol=0)
print(weight.float().sum().item())
"""
    blocks = torch.arange(120, dtype=torch.uint8).view(3, 40)
    out = torch.empty(3, 64, dtype=torch.bfloat16)
    cpu.dequantize(blocks, "Q4_1", torch.tensor([2, 0, 1]), None, None, out)
    assert float(in_a_new_process(code)) == out.float().sum().item()


@pytest.mark.skipif("avx2" not in vectors.host_features(), reason="runs code for x86-64 with AVX2")
def test_without_avx_512_the_bits_are_the_same() -> None:
    code = """
from llvmlite import binding
has = binding.get_host_cpu_features()
for name in has:
    has[name] = has[name] and not name.startswith(("avx10", "avx512"))
binding.get_host_cpu_features = lambda: has
binding.get_host_cpu_name = lambda: "haswell"
import torch
from lorafit import kernels
from lorafit.formats import FORMATS
from tests.kernels.comparing import any_blocks, assert_same_bits, by_reference
for name, block in FORMATS.items():
    blocks, constants = any_blocks(name, 3, 320 // min(block.elements, 32))
    x = torch.zeros(1, blocks.shape[1] // block.nbytes * block.elements)
    assert kernels.fuses_linear(blocks, name)
    for dtype in (torch.float32, torch.bfloat16):
        result = kernels.dequantize(blocks, name, dtype, constants=constants)
        assert_same_bits(result, by_reference(blocks, name, dtype, constants=constants))
    x[0, 7] = 1  # so that the product is one column; others add 0 · w, and may be NaN
    column, expected = kernels.linear(x, blocks, name, constants=constants)[0], result.float()[:, 7]
    torch.testing.assert_close(column[column.isfinite()], expected[column.isfinite()], rtol=2**-8, atol=0)
from lorafit.kernels import vectors
assert not vectors.host_features()["avx512f"]
"""
    in_a_new_process(code)


@pytest.mark.parametrize("triple", ["aarch64-linux-gnu", "arm64-apple-darwin"])
def test_code_for_arm_looks_up_in_one_instruction_and_calls_nothing(
    triple: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be run here. A call would be of a library that is not there; a fused product and sum, of other bits."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple(triple).create_target_machine(opt=3, jit=True)
    assembly = {}

    def emit(text: str, name: str) -> int:
        module = binding.parse_assembly(text)
        module.triple = triple
        assembly[name] = target.emit_assembly(module)
        return 0

    monkeypatch.setattr(loops, "machine_code", emit)
    monkeypatch.setattr(vectors.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(vectors, "host_features", dict)
    for name in FORMATS:
        for bfloat16 in (True, False):
            loops.dequantizer.__wrapped__(name, offsets=False, bfloat16=bfloat16)
            said = assembly[f"dequantize_{name}"]
            # No lane by lane conversions, nor look-ups by way of memory, of which a row would take hundreds.
            assert not re.search(r"\b(blr?|fmla|fmadd|umov|ld1\.[hs])\s", said), name
        loops.multiplier.__wrapped__(name, offsets=False)
        assert not re.search(r"\bblr?\s", assembly[f"linear_{name}"]), name
    assert "tbl" in assembly["dequantize_NF4"]


@pytest.mark.parametrize("machine", ["ppc64le", "riscv64", ""])
def test_other_processors_are_not_served(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors.platform, "machine", lambda: machine)
    assert not vectors.is_served()


def test_a_processor_without_half_precision_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(vectors, "host_features", lambda: {"f16c": False, "avx2": True})
    assert not vectors.is_served()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_of_python_where_openmp_has_another_name(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    blocks = torch.arange(500 * 180).to(torch.uint8).view(500, 180)
    out, expected = torch.full((500, 288), 7.0), torch.empty(500, 288)
    cpu.dequantize(blocks, "Q4_1", None, None, None, out)
    monkeypatch.undo()
    cpu.dequantize(blocks, "Q4_1", None, None, None, expected)
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    assert out.isfinite().any()
