"""The GPU's kernels where there is no GPU: run by Triton's interpreter, and compiled for one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorafit.formats import FORMATS
from tests.kernels.comparing import any_blocks, assert_same_bits, by_reference
from tests.oracles.blocks import random_blocks

triton = pytest.importorskip("triton", reason="Triton is not installed for this platform")

NAMES = [name for name in FORMATS if name not in ("F32", "F16", "BF16")]
ROWS = {"all": None, "some, repeated": torch.tensor([2, 0, 0, 1])}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEIGHT, GROUPS = 3, 5

# Whether Triton interprets is settled when it is first imported, so all of it happens in one process of its own.
INTERPRET = """
import sys, warnings
warnings.simplefilter("ignore")  # numpy's, of overflows, and random scales are infinite too
import torch
from lorafit.kernels import cuda
done = {}
for key, (name, dtype, blocks, rows, offsets, constants, shape) in torch.load(sys.argv[1]).items():
    out = torch.full(shape, 7, dtype=dtype)
    cuda.dequantize(blocks, name, rows, offsets, constants, out)
    done[key] = out
torch.save(done, sys.argv[2])
"""


def arguments(name: str, choice: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    # Where it makes bfloat16, the interpreter is wrong about numbers that are not normal.
    make = random_blocks if dtype == torch.bfloat16 else any_blocks
    blocks, constants = make(name, HEIGHT, GROUPS)
    rows, offsets = ROWS[choice], None
    if FORMATS[name].offset_at is not None and choice != "all":
        offsets = torch.arange(len(rows) * GROUPS).view(-1, GROUPS).half() / 7  # type: ignore[arg-type]
    return blocks, rows, offsets, constants


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, torch.dtype], Tensor]:
    folder = tmp_path_factory.mktemp("triton")
    tasks = {}
    for name in NAMES:
        for choice, rows in ROWS.items():
            shape = (HEIGHT if rows is None else len(rows), GROUPS * FORMATS[name].elements)
            for dtype in DTYPES:
                tasks[name, choice, dtype] = (name, dtype, *arguments(name, choice, dtype), shape)
    # A row that is not there.
    blocks = arguments("Q4_1", "all", torch.float32)[0]
    for wrong in (-1, HEIGHT):
        rows = torch.tensor([0, wrong])
        tasks["Q4_1", str(wrong), torch.float32] = ("Q4_1", torch.float32, blocks, rows, None, None, (2, GROUPS * 32))
    torch.save(tasks, folder / "tasks.pt")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRET, folder / "tasks.pt", folder / "done.pt"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "done.pt")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_interpreted_it_equals_the_reference(
    interpreted: dict[tuple[str, str, torch.dtype], Tensor], name: str, choice: str, dtype: torch.dtype
) -> None:
    result = interpreted[name, choice, dtype]
    blocks, *others = arguments(name, choice, dtype)
    if dtype == torch.bfloat16:
        # The interpreter cuts off what a GPU rounds: this is the place and the size, tests/gpu the rounding.
        exact = by_reference(blocks, name, torch.float32, *others)
        assert_same_bits(result, (exact.view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16())
    else:
        assert_same_bits(result, by_reference(blocks, name, dtype, *others))


@pytest.mark.parametrize("wrong", [-1, HEIGHT])
def test_a_row_that_is_not_there_is_nan(interpreted: dict[tuple[str, str, torch.dtype], Tensor], wrong: int) -> None:
    """A GPU would have to be waited for to refuse it."""
    result = interpreted["Q4_1", str(wrong), torch.float32]
    assert result[1].isnan().all()
    assert_same_bits(result[:1], by_reference(arguments("Q4_1", "all", torch.float32)[0][:1], "Q4_1", torch.float32))


@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_for_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to the code of an A100: rounding to nearest, and no product fused with a sum."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lorafit.kernels.cuda import COMPILED, unpack_tile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    block = FORMATS[name]
    constants = {
        "format_name": name,
        "elements": block.elements,
        "nbytes": block.nbytes,
        "has_rows": True,
        "has_offsets": block.offset_at is not None,
        "tile": 1024 // block.elements,
    }
    pointers = {"blocks": "u8", "rows": "i64", "offsets": "fp16", "out": "bf16"}
    types = {name: "constexpr" if name in constants else "i32" for name in unpack_tile.arg_names}
    types |= dict.fromkeys(("constants", "table", "dynamic"), "*fp32")
    types |= {name: f"*{kind}" for name, kind in pointers.items()}
    places = {(unpack_tile.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=unpack_tile, signature=types, constexprs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=COMPILED)
    assert len(compiled.asm["cubin"]) > 1000
    assert "cvt.rn.bf16" in compiled.asm["ptx"]
    assert "fma." not in compiled.asm["ptx"]
    assert ".ftz" not in compiled.asm["ptx"]
