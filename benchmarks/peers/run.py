"""lorafit against TRL + PEFT on this machine: throughput, memory, time to the first step, and the same loss.

    python benchmarks/peers/run.py --peers-python .venv-peers/bin/python [--e2e FILE] [--rounds 2] [--steps 5]

Each measurement is a process of its own, and the tools take turns (A B C A B C), so that ratios hold on a machine
whose speed drifts. In a round all of them train on the same batches in the same order; another round has other rows.
This process does not import lorafit, which would set how long idle threads wait, and TRL would inherit that.
SmolLM2-135M, LoRA of rank 16 on all linear layers, 8 documents a step, on documents of 200 to 1,000 tokens ("long",
made up) and on rows from a file ("e2e"). ``--output`` gets everything measured (results.json), the table and a figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import report
from measuring import WARM_UP, read_plan

HERE = Path(__file__).resolve().parent
MODEL = "smollm2-135m"
PRODUCTS = HERE.parents[1] / "examples" / "products" / "train.jsonl"


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        name: What it is called in results.
        packed: Whether its base is the packed file, and not the same weights in bf16.
        method: lorafit's method; None for TRL.
        memory: lorafit's ``--memory``.
    """

    name: str
    packed: bool
    method: str | None
    memory: str = "high"


CONTENDERS = [
    Contender("TRL + PEFT", False, None),
    Contender("LoRA", False, "lora"),
    Contender("LoRA, low", False, "lora", "low"),
    Contender("LoRA, packed", True, "lora"),
    Contender("QA-LoRA", True, "qalora"),
    Contender("QA-LoRA, low", True, "qalora", "low"),
]


class Runner:
    """Starts measurements.

    Args:
        peers_python: Interpreter of the environment that has TRL.
        folder: Where plans and results of single measurements go.
        dense: The model in bf16, as a directory.
    """

    def __init__(self, peers_python: str, folder: Path, dense: Path) -> None:
        self.peers_python = peers_python
        self.folder = folder
        self.dense = dense

    def measure(self, contender: Contender, plan: Path, precision: str = "bf16") -> dict[str, Any]:
        """One measurement, in a process of its own."""
        result = self.folder / "result.json"
        model = MODEL if contender.packed else str(self.dense)
        arguments = [str(plan), str(result), model, precision]
        if contender.method:
            run([sys.executable, str(HERE / "with_lorafit.py"), *arguments, contender.method, contender.memory])
        else:
            run([self.peers_python, str(HERE / "with_trl.py"), *arguments])
        figures: dict[str, Any] = json.loads(result.read_text())
        result.unlink()
        expected = [sum(len(document["tokens"]) for document in step) for step in read_plan(plan)]
        assert figures["tokens"] == expected, f"{contender.name} did not train on the rows of the plan, step by step"
        return figures

    def plan(self, name: str, steps: int, seed: int, data: Path | None) -> Path:
        """Draw rows."""
        path = self.folder / f"{name}-{seed}.json"
        command = [sys.executable, str(HERE / "rows.py"), str(path), MODEL, str(steps), str(seed)]
        run([*command, str(data)] if data else command)
        return path

    def shortest_step(self, plan: Path) -> Path:
        """A plan of one step, the one with the fewest tokens."""
        step = min(read_plan(plan), key=lambda rows: sum(len(row["tokens"]) for row in rows))
        path = self.folder / "shortest.json"
        path.write_text(json.dumps([step]))
        return path

    def seconds_to_first_step(self, data: Path) -> float:
        """From the command to the first line in ``metrics.jsonl``, which is written when the optimiser has stepped."""
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "run"
            metrics = output / "metrics.jsonl"
            command = [sys.executable, "-m", "lorafit", "train", MODEL, str(data), "--output", str(output)]
            started = time.perf_counter()
            with subprocess.Popen([*command, "--steps", "1", "--no-eval"], stdout=subprocess.DEVNULL) as process:
                while process.poll() is None and not (metrics.exists() and '"loss"' in metrics.read_text()):
                    time.sleep(0.01)
                seconds = time.perf_counter() - started
            assert process.returncode == 0
        return seconds


def main() -> None:
    """Measure, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", required=True, help="interpreter of an environment with requirements.txt")
    parser.add_argument("--e2e", type=Path, help="rows of {'messages': ...}; without it only long rows are measured")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help=f"steps of a measurement, after {WARM_UP} for warm-up")
    parser.add_argument("--output", type=Path, default=Path("runs/peers"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for results in measure_all(options, Path(folder)):
            # After each measurement, so that what was measured is kept whatever comes.
            (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    table = report.table(results)
    (options.output / "table.md").write_text(table)
    report.figure(results, options.output / "figure.png")
    print(f"\n{table}\n{options.output}/: results.json, table.md, figure.png")


def measure_all(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """All rounds; after each measurement yields everything up to there."""
    dense = folder / "dense"
    run([sys.executable, "-m", "lorafit", "export", MODEL, str(dense), "--format", "safetensors", "--dtype", "bf16"])
    runner = Runner(options.peers_python, folder, dense)
    sets = {"e2e": options.e2e, "long": None} if options.e2e else {"long": None}
    plans = {
        (turn, name): runner.plan(name, WARM_UP + options.steps, turn, data)
        for turn in range(options.rounds)
        for name, data in sets.items()
    }
    peers = [line for line in (HERE / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {"lorafit": version("lorafit"), "peers": peers},
        "steps": options.steps,
        "warm_up": WARM_UP,
        "loss_of_first_step_in_fp32": {},
        "seconds_to_first_step": [],
        "measured": [],
    }
    shortest = runner.shortest_step(next(iter(plans.values())))
    for contender in CONTENDERS[:2]:
        loss = runner.measure(contender, shortest, "fp32")["losses"][0]
        results["loss_of_first_step_in_fp32"][contender.name] = loss
        print(f"loss of a first step in fp32, {contender.name}: {loss:.6f}", flush=True)
    for turn in range(options.rounds):
        seconds = runner.seconds_to_first_step(options.e2e or PRODUCTS)
        results["seconds_to_first_step"].append(seconds)
        print(f"{turn + 1} from the command to the first step {seconds:.1f} s", flush=True)
        for name, contender in itertools.product(sets, CONTENDERS):
            figures = runner.measure(contender, plans[turn, name])
            results["measured"].append({"round": turn, "set": name, "contender": contender.name, **figures})
            rate, peak = report.tokens_per_second([figures]), figures["peak_bytes"] / 1e9
            print(f"{turn + 1} {name:<5} {contender.name:<13} {rate:7.0f} tokens/s {peak:6.2f} GB", flush=True)
            yield results


def run(command: list[str]) -> None:
    """Run a process to its end; of one that fails, show what it said."""
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(f"{process.stdout}{process.stderr}\nfailed with {process.returncode}: {' '.join(command)}")


def processor() -> str:
    """What the machine computes with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
