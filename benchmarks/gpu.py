"""lorafit against PEFT with bitsandbytes on a GPU: step time, tokens/s, share of the matrix rate, and peak memory.

    python benchmarks/gpu.py [--shape 8b] [--device cuda] [--rounds 3] [--steps 5] [--output runs/gpu]
    python benchmarks/gpu.py --shape tiny --device cpu --rounds 1 --steps 2

A model of Llama-3.1-8B's shape with random weights, which nothing has to be downloaded for; rank 16 on all linear
layers, in bf16 (LoRA) and over NF4 with doubly quantised scales (QLoRA). Each measurement is a process of its own, and
the tools take turns. Rows are of one length, so that neither tool pads; the last third of each is trained. The limit is
that of ``lorafit bench``: 4 FLOP for each frozen weight and token, at the rate of a product of large matrices in bf16
that every process measures after its steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# isort: off
import lorafit  # noqa: F401  first, because it sets how OpenMP waits before torch is loaded
import torch

# isort: on
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lorafit.data.chat import Document
from lorafit.data.packing import pack
from lorafit.models.fuse import fuse
from lorafit.models.quantizing import quantized
from lorafit.models.skeleton import empty_model
from lorafit.modules import PackedLinear
from lorafit.training.memory import keep_activations, peak_rss_bytes
from lorafit.training.speed import FrozenWork, frozen_work, made_up_rows, make_trainer

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5, "max_position_embeddings": 8192,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 8192,
    },
}  # fmt: skip
CONTENDERS = [(tool, method) for method in ("lora", "qlora") for tool in ("peft", "lorafit")]
WARM_UP = 2  # steps that are not counted
SQUARE = {"cuda": 8192, "cpu": 1024}


def main() -> None:
    """Measure everything in turn, or with ``--measure`` one thing in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--device", choices=list(SQUARE), default="cuda")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--memory", choices=["high", "lowest"], default="high", help="lowest checkpoints every layer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help=f"steps of a measurement, after {WARM_UP} for warm-up")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--measure", nargs=3, metavar=("TOOL", "METHOD", "RESULT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use; --shape tiny --device cpu tries the script without one")
    if options.measure:
        tool, method, result = options.measure
        Path(result).write_text(json.dumps(measure(tool, method, options)))
        return
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        for turn in range(options.rounds):
            for tool, method in CONTENDERS:
                command = [sys.executable, *sys.argv, "--measure", tool, method, str(result)]
                subprocess.run(command, check=True)
                measured.append({"round": turn, "tool": tool, "method": method, **json.loads(result.read_text())})
    options.output.mkdir(parents=True, exist_ok=True)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "the processor"
    settings = {name: str(value) for name, value in vars(options).items() if name != "measure"}
    results = {"date": time.strftime("%Y-%m-%d"), "device": where, "settings": settings, "measured": measured}
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    shown = table(measured)
    (options.output / "table.md").write_text(shown)
    print(shown)


def measure(tool: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Some steps of one tool; the figures of those after warm-up."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    config = LlamaConfig(**SHAPES[options.shape], tie_word_embeddings=False, dtype=torch.bfloat16)
    rows = made_up_rows(config.vocab_size, options.rows, options.length)
    build = with_lorafit if tool == "lorafit" else with_peft
    step, work = build(config, method, rows, device, options.memory)
    seconds, losses = [], []
    for _ in range(WARM_UP + options.steps):
        started = time.perf_counter()
        losses.append(step())
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss_bytes()
    tokens = options.rows * options.length
    trained = sum(sum(row.trained) for row in rows)
    return {
        "seconds": seconds[WARM_UP:],
        "losses": losses,
        "tokens": tokens,
        "flops": work.flops(tokens, trained),
        "peak_bytes": peak,
        "matrix_flops_per_second": matrix_rate(device),
    }


Built = tuple[Callable[[], float], FrozenWork]


def with_lorafit(config: LlamaConfig, method: str, rows: list[Document], device: torch.device, memory: Any) -> Built:
    """A step of lorafit's own loop."""
    model = empty_model(config, torch.bfloat16)
    fill(model, device)
    if method == "qlora":
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
                weights = quantized(layer.weight.detach(), "nf4", name, "random weights")
                model.set_submodule(name, PackedLinear(weights.to(device)))
    fuse(model.requires_grad_(False).eval())
    work = frozen_work(model)
    trainer = make_trainer(model, "qlora" if method == "qlora" else "lora")
    keep_activations(model, memory)
    batch = pack(rows)
    return lambda: trainer.step([batch]).loss, work


def with_peft(config: LlamaConfig, method: str, rows: list[Document], device: torch.device, memory: Any) -> Built:
    """A step of PEFT on transformers, with torch's fused attention and the mean loss over the trained tokens."""
    from peft import LoraConfig, get_peft_model

    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    work = frozen_work(model)
    model = empty_model(config, torch.bfloat16)
    fill(model, device)
    if method == "qlora":
        import bitsandbytes as bnb

        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
                packed = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
                    compress_statistics=True, quant_type="nf4", device="meta",
                )  # fmt: skip
                packed.weight = bnb.nn.Params4bit(
                    layer.weight.detach().cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
                )
                model.set_submodule(name, packed.to(device))
    model.requires_grad_(False)
    if memory == "lowest":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    model.train()
    ids = torch.tensor([row.tokens for row in rows], device=device)
    labels = torch.where(torch.tensor([row.trained for row in rows], device=device), ids, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step, work


def fill(model: PreTrainedModel, device: torch.device) -> None:
    """Give a model that has no weights random ones, where it will compute."""
    for name, parameter in list(model.named_parameters()):
        owner, _, kind = name.rpartition(".")
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        values = values.fill_(1.0) if values.dim() == 1 else values.normal_(std=0.02)
        setattr(model.get_submodule(owner), kind, nn.Parameter(values, requires_grad=False))
    model.to(device)


def synchronize(device: torch.device) -> None:
    """Wait for what was started."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of the product of two large matrices in bf16, the median of ten."""
    size = SQUARE[device.type]
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    times = []
    for _ in range(11):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times[1:])


def table(measured: list[dict[str, Any]]) -> str:
    """Medians over all steps of all rounds."""
    rate = statistics.median(each["matrix_flops_per_second"] for each in measured)
    lines = [f"bf16 matrix products: {rate / 1e12:.3g} TFLOP/s", ""]
    lines += [
        "| tool | method | step, ms | tokens/s | share of the limit | peak memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    for tool, method in CONTENDERS:
        own = [each for each in measured if (each["tool"], each["method"]) == (tool, method)]
        seconds = statistics.median(second for each in own for second in each["seconds"])
        peak = max(each["peak_bytes"] or 0 for each in own) / 1e9
        first = own[0]
        lines.append(
            f"| {tool} | {method} | {1e3 * seconds:.1f} | {first['tokens'] / seconds:,.0f} "
            f"| {first['flops'] / seconds / rate:.1%} | {peak:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
