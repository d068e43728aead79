"""The main job in one go: fine-tune a 4-bit GGUF, get a 4-bit GGUF back, and see what it learnt.

    python examples/demo.py

Every step is a command that you could type, and is shown as such. Takes a few minutes on two cores and writes to
runs/demo.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
PRODUCTS = Path("examples/products")
RUN = Path("runs/demo")
MERGED = RUN / "products.gguf"
STEPS = 80
DESCRIBED = 20

sys.path.insert(0, str(ROOT / PRODUCTS))
from measure import attribute_coverage, content, ngram_overlap, read_rows  # noqa: E402

console = Console(highlight=False)


def main() -> None:
    """Train, compare with prompting, merge, and let llama.cpp describe products that training never saw."""
    started = time.monotonic()
    train, held_out = PRODUCTS / "train.jsonl", PRODUCTS / "heldout.jsonl"
    step("Train the packed 4-bit model to describe products")
    options = f"--eval-data {held_out} --method qalora --steps {STEPS} --samples 1 --output {RUN} --overwrite"
    lorafit(f"train smollm2-135m {train} {options}")

    step("Would a prompt with three examples have done?")
    lorafit(f"evaluate {RUN} {held_out} --shots 3 --shots-from {train}")

    step("Fold what was learnt into the file, and prove that nothing was lost")
    lorafit(f"merge {RUN} {MERGED} --overwrite")

    step(f"{DESCRIBED} products that training never saw, described by the merged file in llama.cpp")
    describe(ROOT / held_out, ROOT / train)

    step("Files")
    for what, path in (("run", RUN), ("report", RUN / "report.md"), ("figure", RUN / "loss.png"), ("model", MERGED)):
        console.print(f"  {what:<8}{path}")
    step("Next")
    if shutil.which("lorafit") is None:
        console.print(f"  {'. .venv/bin/activate':<44}make `lorafit` a command")
    for command, what in (
        (f"lorafit chat {RUN}", "talk with the tuned model"),
        ("lorafit preview smollm2-135m YOUR.jsonl", "see what your own data would teach"),
        ("lorafit train YOUR.gguf YOUR.jsonl", "tune the model that you run"),
    ):
        console.print(f"  {command:<44}{what}")
    console.print(f"\nDone in {time.monotonic() - started:.0f} s.")


def step(title: str) -> None:
    """Say what comes next."""
    console.print()
    console.rule(Text(title, "bold"), align="left")


def lorafit(command: str) -> None:
    """Show a command and run it."""
    console.print(f"$ lorafit {command}", style="cyan", soft_wrap=True)
    result = subprocess.run([sys.executable, "-m", "lorafit", *shlex.split(command)], cwd=ROOT)
    if result.returncode:
        sys.exit(result.returncode)


def describe(held_out: Path, train: Path) -> None:
    """Describe held-out products with base and tuned model, show one, and measure the tuned model's descriptions."""
    from lorafit.evaluation.llamacpp import LlamaCpp
    from lorafit.models.pull import pull

    rows = read_rows(held_out)[:DESCRIBED]
    prompts = [content(row, "user") for row in rows]
    with LlamaCpp(pull("smollm2-135m")) as base:
        before = base.generate([{"role": "user", "content": prompts[0]}], max_tokens=160)
    with LlamaCpp(ROOT / MERGED) as tuned:
        after = [tuned.generate([{"role": "user", "content": prompt}], max_tokens=160) for prompt in prompts]
    console.print(Panel(Text(prompts[0]), title="a held-out product", title_align="left"))
    console.print(Panel(Text(before.strip()), title="base", title_align="left"))
    console.print(Panel(Text(after[0].strip()), title="tuned", title_align="left"))
    answers = ROOT / RUN / "described.jsonl"
    with answers.open("w", encoding="utf-8") as file:
        for prompt, answer in zip(prompts, after, strict=True):
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    coverage = sum(map(attribute_coverage, prompts, after)) / len(after)
    overlap = ngram_overlap(after, read_rows(train))
    console.print(f"{coverage:.0%} of the attribute values appear in the {len(after)} descriptions,")
    console.print(f"{overlap:.0%} of their phrases of eight words stand in the training data.")


if __name__ == "__main__":
    main()
