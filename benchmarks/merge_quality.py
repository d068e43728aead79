"""What is lost between training an adapter and shipping it, by how it is shipped; the table in docs/merge-quality.md.

    python benchmarks/merge_quality.py FOLDER [--steps 100] [--seeds 0 1 2] [--meanings 100] [--output DIR] [--page F]

FOLDER holds train.jsonl and test.jsonl of the E2E challenge, or other rows of which several share a prompt. The base is
SmolLM2-135M in Q4_1. LoRA and QA-LoRA train that file; QLoRA trains its weights quantised once more, to NF4. What is
shipped is either the adapter beside its base, or one file of the base's size:

* LoRA and QLoRA: the update is added to the weights that were trained and each linear layer packed as Q4_1 anew, by
  rounding (as gguf-py does) and by lorafit's error-minimising search;
* LoRA: `lorafit merge --requantize keep`, which leaves each block its grid and rounds at random;
* QA-LoRA: `lorafit merge`, which writes offsets and rounds nothing.

Each is measured in lorafit on the test rows of the same meanings: loss over all their answers, and BLEU and chrF
(sacrebleu) of one greedy answer to each meaning against all its references. Every finished piece is kept in --output,
and the command goes on from there; when all is measured, `--page` gets the table between its two markers.

What llama.cpp can run writes 128 tokens, each file in turn, the kept LoRA as GGUF beside the base. These speeds are
printed and not put on the page: they can be compared only if the machine did nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# isort: off
import lorafit  # first, because it sets how OpenMP waits before torch is loaded

# isort: on
import sacrebleu
import torch
import xllamacpp
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafit.config import TrainConfig
from lorafit.containers.atomic import replacing, write_text
from lorafit.containers.gguf import GGUFFile, TensorInfo
from lorafit.containers.gguf_writer import rewrite
from lorafit.data.chat import encode_all, encode_prompt
from lorafit.data.packing import split_passes
from lorafit.data.readers import Example, read_examples
from lorafit.evaluation.loss import evaluate
from lorafit.formats import Packed, quantize
from lorafit.kernels import search
from lorafit.models.load import load_base
from lorafit.models.pull import pull
from lorafit.models.tokenizer import end_of_turn_ids
from lorafit.modules import PackedLinear, adapter_modules
from lorafit.modules.qalora import offsets_held

METHODS: dict[str, str | None] = {"lora": None, "qlora": "nf4", "qalora": None}  # method -> how the base is quantised
PACKERS: dict[str, Callable[[Tensor, str], Packed]] = {"rounding": quantize, "search": search.quantize}
ANSWER_TOKENS = 96
AT_ONCE = 25  # answers
WRITTEN_TOKENS, SPEED_ROUNDS = 128, 5
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Way:
    """One way to ship a model.

    Attributes:
        key: Short name, part of file names.
        label: What the table calls it.
        method: Method that it was trained with; None for the base.
        merged: How the file was made; None where the adapter stays beside its base.
    """

    key: str
    label: str
    method: str | None = None
    merged: str | None = None


WAYS = [
    Way("base", "base, not tuned"),
    Way("lora", "LoRA, kept beside the base", "lora"),
    Way("lora-rounding", "LoRA, merged to Q4_1 by rounding", "lora", "rounding"),
    Way("lora-search", "LoRA, merged to Q4_1 by search", "lora", "search"),
    Way("lora-keep", "LoRA, merged by `--requantize keep`: rounded at random on the file's own grid", "lora", "keep"),
    Way("qlora", "QLoRA on NF4 (a second quantisation), kept beside that", "qlora"),
    Way("qlora-rounding", "QLoRA, merged to Q4_1 by rounding", "qlora", "rounding"),
    Way("qlora-search", "QLoRA, merged to Q4_1 by search", "qlora", "search"),
    Way("qalora", "QA-LoRA, merged exactly", "qalora", "exact"),
]


@dataclass(frozen=True)
class Questions:
    """What is measured on.

    Attributes:
        examples: Rows of the test file.
        references: Prompt -> all answers to it.
    """

    examples: list[Example]
    references: dict[str, list[str]]

    @classmethod
    def read(cls, path: Path, meanings: int) -> Questions:
        """All rows of the first so many different prompts."""
        examples: list[Example] = []
        references: dict[str, list[str]] = {}
        for example in read_examples(path):
            prompt, answer = (message["content"] for message in example.messages)
            if prompt not in references and len(references) == meanings:
                continue
            references.setdefault(prompt, []).append(answer)
            examples.append(example)
        return cls(examples, references)


@dataclass(frozen=True)
class Merged:
    """A tensor of the base file, replaced by a linear layer's weights packed anew.

    Attributes:
        tensor: The tensor in the file.
        format: The format that it gets, which is its own.
        weights: Makes the weights, float32 [rows, width], rows as the file has them.
        pack: How they are packed.
    """

    tensor: TensorInfo
    format: str
    weights: Callable[[], Tensor]
    pack: Callable[[Tensor, str], Packed]

    def convert(self, start: int, blocks: Tensor) -> Tensor:
        """Some rows of the merged tensor."""
        return self.pack(self.weights()[start : start + len(blocks)], self.format).blocks


def main() -> None:
    """Train, merge, measure what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where train.jsonl and test.jsonl are")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--meanings", type=int, default=100, help="different prompts of test.jsonl to measure on")
    parser.add_argument("--output", type=Path, default=Path("runs/merge-quality"))
    parser.add_argument("--page", type=Path, help="the page to put the table into")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    keep_settings(options)
    questions = Questions.read(options.folder / "test.jsonl", options.meanings)
    results: dict[str, list[dict[str, Any]]] = {}
    for way in WAYS:
        for seed in options.seeds if way.method else [0]:
            kept = options.output / f"{way.key}-{seed}.json"
            if not kept.exists():
                print(f"{way.label}, seed {seed}", flush=True)
                write_text(kept, json.dumps(measure(way, seed, questions, options), indent=2) + "\n")
            results.setdefault(way.key, []).append(json.loads(kept.read_text()))
    speeds = options.output / "speeds.json"
    if not speeds.exists():
        write_text(speeds, json.dumps(measure_speeds(options), indent=2) + "\n")
    text = table(results)
    print(f"{text}\n\n{speed_table(json.loads(speeds.read_text()))}")
    if options.page:
        before, rest = options.page.read_text().split(BEGIN)
        write_text(options.page, f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def keep_settings(options: argparse.Namespace) -> None:
    """Refuse to mix results of different settings in one folder."""
    settings = json.dumps({"steps": options.steps, "meanings": options.meanings})
    path = options.output / "settings.json"
    if path.exists() and path.read_text() != settings:
        raise SystemExit(f"{options.output} holds results of {path.read_text()}; give another --output")
    write_text(path, settings)


def measure(way: Way, seed: int, questions: Questions, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the table says of one way to ship and one seed."""
    base = pull("smollm2-135m")
    if way.method is None:
        return score(base, questions) | {"bytes": base.stat().st_size}
    run = train(way.method, seed, options)
    if way.merged is None:
        beside = base.stat().st_size if way.method == "lora" else packed_bytes(run)
        adapter = (run / "adapter" / "adapter_model.safetensors").stat().st_size
        return score(run, questions) | {"bytes": beside + adapter}
    target = options.output / f"{way.key}-{seed}.gguf"
    if not target.exists():
        if way.merged == "exact":
            lorafit.merge(str(run), str(target))
        elif way.merged == "keep":
            lorafit.merge(str(run), str(target), requantize="keep")
        else:
            merge(run, base, target, PACKERS[way.merged])
    return score(target, questions) | {"bytes": target.stat().st_size}


def train(method: str, seed: int, options: argparse.Namespace) -> Path:
    """The run of a method and a seed, trained unless it is there."""
    run: Path = options.output / f"run-{method}-{seed}"
    if (run / "summary.json").exists():
        return run
    model = "smollm2-135m"
    if METHODS[method]:
        dense = options.output / "dense"
        if not dense.exists():
            lorafit.export(model, str(dense), format="safetensors", dtype="fp32")
        model = str(dense)
    config = TrainConfig(
        model, str(options.folder / "train.jsonl"), method=method, quantize=METHODS[method], steps=options.steps,
        seed=seed, no_eval=True, output=str(run), overwrite=True,
    )  # fmt: skip
    lorafit.train(config)
    return run


def packed_bytes(run: Path) -> int:
    """What the base of a run takes as it was trained."""
    model, _ = lorafit.load(run)
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()] if tensor.requires_grad is False)


def merge(run: Path, base: Path, target: Path, pack: Callable[[Tensor, str], Packed]) -> None:
    """Add a run's update to the weights that it was trained beside, and pack each linear layer as the file does."""
    tuned, _ = lorafit.load(run)
    layers, file = load_base(base, compute="fp32").model, GGUFFile.open(base)
    replaced = {}
    for name, module in adapter_modules(tuned).items():
        layer = layers.get_submodule(name)
        assert isinstance(layer, PackedLinear) and isinstance(module.base, PackedLinear)

        def weights(
            frozen: Any = module.base.packed, update: Any = module.delta_weight, rows: Any = layer.packed.rows
        ) -> Tensor:
            sum_ = frozen.dense(torch.float32) + update()
            return sum_ if rows is None else torch.empty_like(sum_).index_copy_(0, rows, sum_)

        info = file.tensors[layer.packed.name]
        replaced[info.name] = Merged(info, info.format, weights, pack)
    with replacing(target) as written:
        rewrite(file, written, replaced)


def score(model: Path, questions: Questions) -> dict[str, float]:
    """Held-out loss, BLEU and chrF."""
    loaded, tokenizer = lorafit.load(model)
    documents = encode_all(questions.examples, tokenizer)
    documents.sort(key=lambda document: len(document.tokens))
    loss = evaluate(loaded, split_passes(documents, 2048)).loss
    answers = list(answer(loaded, tokenizer, list(questions.references)))
    most = max(map(len, questions.references.values()))
    streams = [
        [texts[place] if place < len(texts) else None for texts in questions.references.values()]
        for place in range(most)
    ]
    return {
        "loss": loss,
        "bleu": sacrebleu.corpus_bleu(answers, streams).score,
        "chrf": sacrebleu.corpus_chrf(answers, streams).score,
    }


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> Iterator[str]:
    """A greedy answer to each prompt, many at once."""
    endings = sorted(end_of_turn_ids(tokenizer))
    for start in range(0, len(prompts), AT_ONCE):
        asked = [
            encode_prompt([{"role": "user", "content": text}], tokenizer) for text in prompts[start : start + AT_ONCE]
        ]
        width = max(map(len, asked))
        inputs = torch.tensor([[endings[0]] * (width - len(tokens)) + tokens for tokens in asked])
        mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in asked])
        with offsets_held(model):
            found = model.generate(
                inputs, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=endings,
                pad_token_id=endings[0],
            )  # fmt: skip
        yield from tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)


def measure_speeds(options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second that llama.cpp writes, median of some rounds: every way that it can run, of the first seed."""
    seed, base = options.seeds[0], str(pull("smollm2-135m"))
    adapter = options.output / f"lora-{seed}.gguf"
    if not adapter.exists():
        lorafit.export(str(options.output / f"run-lora-{seed}"), str(adapter), format="gguf-lora")
    servers = {"base": server(base), "lora": server(base, adapter)}
    for way in WAYS:
        if way.merged:
            servers[way.key] = server(str(options.output / f"{way.key}-{seed}.gguf"))
    request = {"prompt": "The", "n_predict": WRITTEN_TOKENS, "temperature": 0.0, "ignore_eos": True}
    measured: dict[str, list[float]] = {key: [] for key in servers}
    for _ in range(SPEED_ROUNDS + 1):
        for key, each in servers.items():
            measured[key].append(each.handle_completions(request)["timings"]["predicted_per_second"])
    return {key: statistics.median(values[1:]) for key, values in measured.items()}


def server(path: str, adapter: Path | None = None) -> Any:
    """A file in llama.cpp, with an adapter beside it if there is one."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    params.n_ctx, params.n_parallel, params.verbosity = 512, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = max((os.cpu_count() or 1) - 1, 1)
    return xllamacpp.Server(params)


def speed_table(speeds: dict[str, float]) -> str:
    """How fast llama.cpp writes, in Markdown."""
    lines = ["| what is shipped | tokens/s in llama.cpp |", "| --- | --- |"]
    return "\n".join(lines + [f"| {way.label} | {speeds[way.key]:.0f} |" for way in WAYS if way.key in speeds])


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The table in Markdown: mean over seeds, and the standard deviation behind it."""
    lines = ["| what is shipped | held-out loss | BLEU | chrF | MB |", "| --- | --- | --- | --- | --- |"]
    for way in WAYS:
        of_seeds = results[way.key]
        cells = [
            spread([each[key] for each in of_seeds], digits) for key, digits in (("loss", 4), ("bleu", 1), ("chrf", 1))
        ]
        lines.append(f"| {way.label} | {' | '.join(cells)} | {of_seeds[0]['bytes'] / 1e6:.0f} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """Mean and, of several, standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
