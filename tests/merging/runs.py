"""Directories of runs whose adapter is random instead of trained, so that a mistake in any row or block shows."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.numpy import load_file, save_file

from lorafit.adapters import AdapterRecord, save_adapter
from lorafit.config import AdapterConfig, QALoRA, Quantize
from lorafit.containers.atomic import fingerprint
from lorafit.containers.identity import hash_tensors
from lorafit.models.load import load_base
from lorafit.modules import adapter_modules, attach

HELD_OUT = (
    ("What did the miller leave?", "A mill, a donkey and a cat."),
    ("Who took the mill?", "The eldest, and the second took the donkey."),
    ("And the cat?", "It spoke: have some boots made for me, so that I can go out and be seen among people."),
)


def write_run(
    path: Path,
    base: Path,
    config: AdapterConfig | None = None,
    *,
    size: float = 0.5,
    held_out: bool = True,
    seed: int = 1,
    quantize: Quantize | None = None,
) -> Path:
    """Write the directory of a run.

    Args:
        path: The directory.
        base: The GGUF file or directory.
        config: Method and settings; by default QA-LoRA of rank 2, which fits the two blocks in a tiny model's rows.
        size: Standard deviation of the elements of B.
        held_out: Whether it has held-out rows.
        seed: Seed of A and B.
        quantize: What the base is quantised to while it is loaded.
    """
    config = config or QALoRA(rank=2, alpha=4.0)
    loaded = load_base(base, quantize=quantize)
    torch.manual_seed(seed)
    attach(loaded.model, config)
    for module in adapter_modules(loaded.model).values():
        b = next(parameter for name, parameter in module.adapter_parameters().items() if name.endswith("B"))
        b.data.normal_(std=size)
    record = AdapterRecord(config, str(base), fingerprint(base), quantize, base_tensors_sha256=hash_tensors(base))
    save_adapter(loaded.model, path / "adapter", record)
    settings = {"model": str(base), "data": "rows.jsonl", "method": config.method, "no_eval": not held_out}
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    if held_out:
        turns = ([{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in HELD_OUT)
        (path / "heldout.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return path


def claim_to_be_a_part(path: Path) -> None:
    """Add metadata by which llama.cpp asks for a second file; lorafit goes by the tensors, which are all there."""

    def entry(key: bytes, kind: int, value: bytes) -> bytes:
        return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value

    data = path.read_bytes()
    entries = entry(b"split.count", 2, struct.pack("<H", 2))
    filler = 64 - len(entries) - len(entry(b"x", 8, struct.pack("<Q", 0)))
    entries += entry(b"x", 8, struct.pack("<Q", filler) + b"." * filler)
    assert len(entries) == 64  # a multiple of the alignment, so that the data stay aligned
    (count,) = struct.unpack("<Q", data[16:24])
    path.write_bytes(data[:16] + struct.pack("<Q", count + 2) + entries + data[24:])


def spoil(run: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the stored offsets of a run."""
    path = run / "adapter/qalora_offsets.safetensors"
    offsets = {name: value.copy() for name, value in load_file(path).items()}
    change(offsets)
    save_file(offsets, path)


def to_neighbours(offsets: np.ndarray, places: np.ndarray, units: int) -> None:
    """Move some numbers away from zero, by so many units in the last place."""
    offsets.reshape(-1).view(np.uint16)[places] += np.uint16(units)
