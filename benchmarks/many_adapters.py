"""One base with many adapters against as many merged models: disk, memory, and the time of switching.

    python benchmarks/many_adapters.py [MODEL] [--tasks 10] [--method lora] [--rank 16] [--folder runs/many]

The adapters have random factors, and a merged model is a copy of the base: merging QA-LoRA into Q4_1 keeps its size to
the byte. Each figure of memory is of a process of its own, which loads what it is about and computes once with each
task; "anonymous" is the part of it that no file backs. Needs MODEL to be a file, and Linux.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# isort: off
import lorafit
import torch

# isort: on
from lorafit.adapters import AdapterRecord, save_adapter
from lorafit.containers.atomic import fingerprint
from lorafit.models.load import load_base, resolve
from lorafit.modules import adapter_modules, attach

TOKENS = 64  # in a row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--method", default="lora", choices=["lora", "qalora"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("runs/many"))
    parser.add_argument("--part", choices=["base", "adapters", "merged"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    path, folder = resolve(options.model), options.folder / options.method
    adapters = [folder / f"task-{number}" for number in range(options.tasks)]
    merged = [folder / f"merged-{number}.gguf" for number in range(options.tasks)]
    if options.part:
        print(json.dumps({"base": base, "adapters": switched, "merged": copies}[options.part](path, adapters, merged)))
        return
    write(path, adapters, merged, options.method, options.rank)
    found = {}
    for part in ("base", "adapters", "merged"):
        words = [sys.executable, __file__, options.model, "--tasks", str(options.tasks), "--method", options.method]
        words += ["--folder", str(options.folder), "--part", part]
        found[part] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    sizes = [sum(file.stat().st_size for file in adapter.iterdir()) for adapter in adapters]
    disk = {
        "base": path.stat().st_size,
        "adapters": path.stat().st_size + sum(sizes),
        "merged": sum(file.stat().st_size for file in merged),
    }
    print(
        f"{path.name}, {options.tasks} {options.method} adapters of rank {options.rank}, {sizes[0] / 1e6:.1f} MB each"
    )
    print("| | on disk | resident memory | of it anonymous |\n| --- | --- | --- | --- |")
    names = {"base": "the base alone", "adapters": "one base, all adapters", "merged": "as many merged models"}
    for part, name in names.items():
        each = found[part]
        print(
            f"| {name} | {disk[part] / 1e6:,.0f} MB | {each['rss'] / 1e6:,.0f} MB | {each['anonymous'] / 1e6:,.0f} MB |"
        )
    for name, seconds in found["adapters"]["seconds"].items():
        print(f"{name}: {seconds * 1e3:.2f} ms of processor time")


def write(path: Path, adapters: list[Path], merged: list[Path], method: str, rank: int) -> None:
    """Adapters with random factors, and copies of the base, where they are not there yet."""
    model = load_base(path).model
    config = lorafit.LoRA(rank=rank) if method == "lora" else lorafit.QALoRA(rank=rank)
    attach(model, config)
    digest = fingerprint(path)
    for seed, (adapter, copy) in enumerate(zip(adapters, merged, strict=True)):
        torch.manual_seed(seed)
        for module in adapter_modules(model).values():
            for parameter in module.adapter_parameters().values():
                torch.nn.init.normal_(parameter, std=0.003)
        save_adapter(model, adapter, AdapterRecord(config, str(path), digest))
        if not copy.exists():
            shutil.copyfile(path, copy)


def base(path: Path, adapters: list[Path], merged: list[Path]) -> dict[str, object]:
    """The base, computed with once."""
    model, _ = lorafit.load(path)
    forward(model)
    return memory()


def copies(path: Path, adapters: list[Path], merged: list[Path]) -> dict[str, object]:
    """As many models as tasks."""
    models = [lorafit.load(file)[0] for file in merged]
    for model in models:
        forward(model)
    return memory()


def switched(path: Path, adapters: list[Path], merged: list[Path]) -> dict[str, object]:
    """One base with all adapters; also the time of switching, and of a batch with a task for each row."""
    model, _ = lorafit.load(path)
    tasks = lorafit.Adapters(model)
    for adapter in adapters:
        tasks.add(adapter.name, adapter)
    for name in tasks.names:
        tasks.use(name)
        forward(model)
    found = memory()
    order = [*tasks.names] * 20
    seconds = {"switching": statistics.median(timed(lambda name=name: tasks.use(name)) for name in order)}
    rows = len(tasks.names)
    seconds[f"{rows} rows of {TOKENS} tokens, one adapter"] = median(lambda: forward(model, rows))
    plain = all(hasattr(module, "lora_A") for module in adapter_modules(model).values())
    if plain:
        with tasks.rows(tasks.names):
            seconds[f"{rows} rows of {TOKENS} tokens, an adapter for each"] = median(lambda: forward(model, rows))

    def in_turn() -> None:
        for name in tasks.names:
            tasks.use(name)
            forward(model)

    seconds[f"{rows} times one row of {TOKENS} tokens, switching in between"] = median(in_turn)
    return {**found, "seconds": seconds}


def forward(model: torch.nn.Module, rows: int = 1) -> None:
    """One forward pass over made-up tokens."""
    with torch.inference_mode():
        model(torch.arange(100, 100 + TOKENS).repeat(rows, 1), logits_to_keep=1)


def timed(function: Callable[[], None]) -> float:
    """Seconds of processor time, which a busy machine does not lengthen much, of one call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def median(function: Callable[[], None], rounds: int = 5) -> float:
    """Median seconds of processor time of some calls, after one for warm-up."""
    function()
    return statistics.median(timed(function) for _ in range(rounds))


def memory() -> dict[str, object]:
    """Resident memory of this process in bytes, and the part of it that no file backs."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    values = {name: int(kilobytes) * 1024 for name, kilobytes in re.findall(r"(\w+):\s+(\d+) kB", text)}
    return {"rss": values["VmRSS"], "anonymous": values["RssAnon"]}


if __name__ == "__main__":
    main()
