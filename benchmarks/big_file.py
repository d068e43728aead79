"""One QA-LoRA step on a 7B-shaped model, and the memory that it takes.

    python benchmarks/big_file.py DIRECTORY [--tokens 512]

Writes a Llama-7B-shaped Q4_1 file with random weights into DIRECTORY (4.3 GB, kept for the next time), trains one step
on it in a process of its own, and prints that process's peak resident memory: pages of the mapped file count, as they
do for the kernel that decides who has to go.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np

from lorafit.containers.gguf import GGUFFile
from lorafit.models.pull import pull

LAYERS, HIDDEN, INTERMEDIATE, HEADS = 32, 4096, 11008, 32
BLOCK, BLOCK_BYTES = 32, 20


def main() -> None:
    """Write the file unless it is there, and measure a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--step-only", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step_only:
        step(options.step_only, options.tokens)
        return
    path = options.directory / "random-7b.Q4_1.gguf"
    if not path.exists():
        write(path)
    print(f"{path}: {path.stat().st_size / 1e9:.2f} GB")
    # A process of its own, so that writing the file is not counted.
    command = [sys.executable, __file__, str(options.directory), "--tokens", str(options.tokens), "--step-only", path]
    subprocess.run(command, check=True)


def write(path: Path) -> None:
    """Write the model, one tensor at a time; its tokenizer is the default model's."""
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    vocabulary = _copy_tokenizer(writer)
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    matrices = {"token_embd.weight": (vocabulary, HIDDEN), "output.weight": (vocabulary, HIDDEN)}
    for layer in range(LAYERS):
        matrices |= {f"blk.{layer}.attn_{name}.weight": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
        matrices |= {f"blk.{layer}.ffn_{name}.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        matrices[f"blk.{layer}.ffn_down.weight"] = (HIDDEN, INTERMEDIATE)
    norms = ["output_norm.weight"]
    norms += [f"blk.{layer}.{name}_norm.weight" for layer in range(LAYERS) for name in ("attn", "ffn")]
    for name, (rows, width) in matrices.items():
        row_bytes = width // BLOCK * BLOCK_BYTES
        quantized = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor_info(name, (rows, row_bytes), np.dtype(np.uint8), rows * row_bytes, raw_dtype=quantized)
    for name in norms:
        writer.add_tensor_info(name, (HIDDEN,), np.dtype(np.float32), HIDDEN * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for rows, width in matrices.values():
        writer.write_tensor_data(_random_blocks(random, rows, width))
    for _ in norms:
        writer.write_tensor_data(np.ones(HIDDEN, np.float32))
    writer.close()
    part.rename(path)


def _random_blocks(random: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Q4_1 blocks with random integers, whose weights have mean 0 and variance 1/width."""
    step = (width * (16**2 - 1) / 12) ** -0.5
    blocks = random.integers(0, 256, (rows, width // BLOCK, BLOCK_BYTES), np.uint8)
    blocks[..., :4] = np.array([step, -7.5 * step], "<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


def _copy_tokenizer(writer: gguf.GGUFWriter) -> int:
    """The tokenizer of the default model; returns its number of tokens."""
    metadata = GGUFFile.open(pull("smollm2-135m")).metadata
    for key, value in metadata.items():
        if key.startswith("tokenizer."):
            kind = {str: "string", int: "uint32", bool: "bool", float: "float32"}.get(type(value), "array")
            getattr(writer, f"add_{kind}")(key, value.tolist() if isinstance(value, np.ndarray) else value)
    return len(metadata["tokenizer.ggml.tokens"])


def step(path: Path, tokens: int) -> None:
    """Train one step and print what it took."""
    import torch

    from lorafit.config import QALoRA, TrainConfig
    from lorafit.data.chat import Document
    from lorafit.data.packing import pack
    from lorafit.models.load import load_base
    from lorafit.modules import attach
    from lorafit.objectives.sft import sft_loss
    from lorafit.training.loop import Trainer

    started = time.perf_counter()
    base = load_base(path)
    loaded = time.perf_counter()
    coverage = attach(base.model, QALoRA())
    config = TrainConfig(str(path), "", learning_rate=1e-4, steps=1, memory="lowest")
    trainer = Trainer(base.model, sft_loss, config)
    ids = torch.randint(base.model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    done = trainer.step([pack([Document(ids, [True] * tokens, "random tokens")])])
    total, trained = coverage.total_parameters, coverage.trainable_parameters
    print(f"{total / 1e9:.2f} billion weights, {trained / 1e6:.1f} million trained")
    print(
        f"loaded in {loaded - started:.0f} s; a step of {tokens} tokens in {done.seconds:.0f} s, loss {done.loss:.3f}"
    )
    status = Path("/proc/self/status")
    if status.exists():  # Linux tells what is file and what is not
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        peak, files, others = (int(fields[name].split()[0]) * 1024 / 1e9 for name in ("VmHWM", "RssFile", "RssAnon"))
        print(f"peak resident memory {peak:.2f} GB; at the end {files:.2f} of files, {others:.2f} of others")


if __name__ == "__main__":
    main()
