"""What SmolLM2-135M learns in a few steps, by the format of its base and the method.

    python benchmarks/every_base.py TRAIN.jsonl HELD_OUT.jsonl [--steps 20]

The Q4_1 file is the embedded model; Q4_0 and Q8_0 are made of it by rounding each linear layer anew; what `--quantize`
makes starts from the same weights unpacked into a directory, so it is a second quantisation. Prints a table of the
held-out loss before and after.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

# isort: off
import lorafit  # first, because it sets how OpenMP waits before torch is loaded

# isort: on
from torch import Tensor

from lorafit.commands.export import export
from lorafit.config import TrainConfig
from lorafit.containers.gguf import GGUFFile, TensorInfo
from lorafit.containers.gguf_writer import rewrite
from lorafit.formats import block_format, dequantize, quantize
from lorafit.models.pull import pull

METHODS = ("lora", "qlora", "qalora")


def main() -> None:
    """Train every combination and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("held_out")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    source = pull("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        bases: dict[str, tuple[Path, str | None]] = {"Q4_1": (source, None)}
        for name in ("Q4_0", "Q8_0"):
            bases[name] = (Path(folder) / f"{name}.gguf", None)
            convert(source, bases[name][0], name)
        dense = Path(folder) / "dense"
        export(str(source), str(dense), format="safetensors", dtype="bf16")
        bases |= {f"--quantize {how}": (dense, how) for how in ("nf4", "fp4", "q4_1", "q8_0")}
        print("| base | before | " + " | ".join(METHODS) + " |")
        print("| --- " * (2 + len(METHODS)) + "|")
        for label, (path, how) in bases.items():
            print(row(label, path, how, options, Path(folder) / "run"), flush=True)


def row(label: str, path: Path, how: str | None, options: argparse.Namespace, output: Path) -> str:
    """A line of the table: the held-out loss of the base, and after training with each method that can train it."""
    before, cells = "", []
    for method in METHODS:
        if method == "qalora" and label not in ("Q4_1", "Q4_0", "--quantize q4_1"):
            cells.append("has no offsets")
            continue
        config = TrainConfig(
            str(path), options.train, eval_data=options.held_out, method=method, quantize=how, steps=options.steps,
            samples=0, output=str(output), overwrite=True,
        )  # fmt: skip
        summary = lorafit.train(config)
        before = f"{summary.eval_before.loss:.3f}"
        cells.append(f"{summary.eval_after.loss:.3f}")
    return f"| {label} | {before} | {' | '.join(cells)} |"


@dataclass(frozen=True)
class Rounded:
    """A tensor rounded to another format.

    Attributes:
        tensor: What it was.
        format: What it becomes.
    """

    tensor: TensorInfo
    format: str

    def convert(self, start: int, blocks: Tensor) -> Tensor:
        """Some rows in the new format."""
        shape = len(blocks), self.tensor.shape[1]
        return quantize(dequantize(blocks, self.tensor.format, shape), self.format).blocks


def convert(source: Path, target: Path, name: str) -> None:
    """Write a GGUF file whose quantised linear layers are rounded to another format."""
    file = GGUFFile.open(source)
    layers = [info for info in file.tensors.values() if info.name.startswith("blk.")]
    quantized = [info for info in layers if block_format(info.format).elements > 1]
    rewrite(file, target, {info.name: Rounded(info, name) for info in quantized})


if __name__ == "__main__":
    main()
