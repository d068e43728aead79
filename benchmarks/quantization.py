"""What the search for a 4-bit start is worth: against plain rounding, in squared error and in held-out loss.

    python benchmarks/quantization.py TRAIN.jsonl HELD_OUT.jsonl [--steps 100]

Three comparisons of Q4_1 and Q5_1 by plain rounding (gguf-py's), by the search, and by the search weighted with the
activations of training rows:

* squared error on Gaussian and on heavy-tailed weights (Student's t with 4 degrees of freedom, Laplace);
* held-out loss of a tiny byte-level model trained here from nothing, on nine tenths of the training texts;
* held-out loss of SmolLM2 after full fine-tuning on the training rows. The file that it starts from holds Q4_1 weights,
  which lie on a grid that any quantiser finds again, so the fine-tuning has to move them: how far is printed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence

# isort: off
import lorafit  # noqa: F401  first, because it sets how OpenMP waits before torch is loaded
import torch

# isort: on
import gguf
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lorafit.config import TrainConfig
from lorafit.data.chat import Document, encode_all
from lorafit.data.packing import Batch, split_passes
from lorafit.data.readers import read_examples
from lorafit.evaluation.loss import evaluate
from lorafit.formats import dequantize
from lorafit.kernels import search
from lorafit.models.attention import document_attention
from lorafit.models.load import load_base
from lorafit.modules import PackedLinear, PackedWeight
from lorafit.objectives.sft import hidden_states, sft_loss
from lorafit.training.importance import input_importance
from lorafit.training.loop import Trainer

FORMATS = ("Q4_1", "Q5_1")
Pack = Callable[[str, Tensor], Tensor]  # a layer's name and its weight -> blocks


def main() -> None:
    """Make the three comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("held_out")
    parser.add_argument("--steps", type=int, default=100, help="steps of full fine-tuning of SmolLM2")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="its peak learning rate")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("medium")  # products in bf16 where the processor has it, all else in fp32
    squared_errors()
    rows = read_examples(options.train), read_examples(options.held_out)
    texts = [_as_bytes(row.messages[-1]["content"], row.source) for row in rows[0]]
    # Every tenth text is held out, not the other file: so small a model learns no words but those that it sees.
    training = [text for place, text in enumerate(texts) if place % 10]
    compare("a tiny model of bytes", tiny_model(training), training, texts[::10])
    base = load_base("smollm2-135m")
    training, held_out = (encode_all(part, base.tokenizer) for part in rows)
    tuned = fully_tuned(base.model, training, options.steps, options.learning_rate)
    compare("SmolLM2 after full fine-tuning", tuned, training, held_out[::48])


def squared_errors() -> None:
    """Print the search's squared error as a share of rounding's."""
    print("squared error of the search, rounding's is 1")
    shape = torch.zeros(512, 1024)
    distributions = {
        "Gaussian": torch.randn_like(shape),
        "Laplace": torch.distributions.Laplace(0.0, 1.0).sample(shape.shape),
        "Student t, 4": torch.distributions.StudentT(4.0).sample(shape.shape),
    }
    for label, weights in distributions.items():
        shares = []
        for name in FORMATS:
            errors = [
                float((dequantize(blocks, name, weights.shape) - weights).square().sum())
                for blocks in (rounded(name)("", weights), searched(name)("", weights))
            ]
            shares.append(f"{name} {errors[1] / errors[0]:.3f}")
        print(f"  {label:<14}{'   '.join(shares)}")


def rounded(name: str) -> Pack:
    """gguf-py's quantiser."""
    kind = gguf.GGMLQuantizationType[name]
    return lambda _, weights: torch.from_numpy(gguf.quants.quantize(weights.numpy(), kind))


def searched(name: str, importance: Mapping[str, Tensor] | None = None) -> Pack:
    """lorafit's, weighted if importance is given."""
    return lambda layer, weights: search.quantize(weights, name, importance and importance[layer]).blocks


def compare(label: str, model: PreTrainedModel, training: list[Document], held_out: list[Document]) -> None:
    """Print what each quantiser does to a dense model's held-out loss and predictions."""
    held = split_passes(held_out, 2048)
    dense = evaluate(model, held).loss
    print(f"{label}: held-out loss {dense:.5f}; change of the loss, and divergence of the predictions (KL)", flush=True)
    importance = input_importance(model, split_passes(training[:256], 2048))
    for name in FORMATS:
        ways = {"rounding": rounded(name), "search": searched(name), "weighted": searched(name, importance)}
        results = []
        for way, pack in ways.items():
            quantized = packed(model, name, pack)
            change, apart = evaluate(quantized, held).loss - dense, divergence(model, quantized, held)
            results.append(f"{way} {change:+.5f} {apart:.5f}")
        print(f"  {name}  {'   '.join(results)}", flush=True)


@torch.no_grad()
def divergence(model: PreTrainedModel, other: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Mean over all targets of KL(model || other), in nats: unlike the loss, it can only be hurt by an error."""
    total = count = 0.0
    for batch in batches:
        logs = []
        for each in (model, other):
            with document_attention(each):
                logs.append(each.get_output_embeddings()(hidden_states(each, batch)).float().log_softmax(-1))
        total += float((logs[0].exp() * (logs[0] - logs[1])).sum().double())
        count += len(batch.targets)
    return total / count


def packed(model: PreTrainedModel, name: str, pack: Pack) -> PreTrainedModel:
    """A copy of a model whose linear layers, but for the head, are packed."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    for layer, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            model.set_submodule(layer, PackedLinear(PackedWeight(pack(layer, module.weight.detach().float()), name)))
    return model


def _as_bytes(text: str, source: str) -> Document:
    tokens = list(text.encode()[:400])
    return Document(tokens, [True] * len(tokens), source)


def tiny_model(documents: list[Document]) -> PreTrainedModel:
    """A model of bytes, trained from nothing."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    return tuned(LlamaForCausalLM(config), documents, 400, 3e-3, batch_size=16)


def fully_tuned(model: PreTrainedModel, documents: list[Document], steps: int, learning_rate: float) -> PreTrainedModel:
    """A packed model made dense, with every weight trained."""
    embedding = model.get_input_embeddings().packed
    table = nn.Embedding.from_pretrained(embedding.dense(torch.float32).clone(), freeze=False)
    before = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = nn.Parameter(module.packed.dense(torch.float32).clone())
            model.set_submodule(name, linear)
            if module.packed is embedding:
                linear.weight = table.weight
            else:
                before[name] = linear.weight.detach().clone()
    model.set_input_embeddings(table)
    tuned(model.float(), documents, steps, learning_rate, batch_size=8)
    ratios = []
    for name, weight in before.items():
        blocks = weight.unflatten(1, (-1, 32))
        step = (blocks.amax(2) - blocks.amin(2)).mean() / 15
        ratios.append((model.get_submodule(name).weight - weight).square().mean().sqrt() / step)
    print(f"full fine-tuning moved weights by {float(torch.stack(ratios).mean()):.2f} steps of Q4_1")
    return model


def tuned(
    model: PreTrainedModel, documents: list[Document], steps: int, learning_rate: float, batch_size: int
) -> PreTrainedModel:
    """The model after training all its weights."""
    config = TrainConfig("", "", steps=steps, learning_rate=learning_rate, batch_size=batch_size)
    trainer = Trainer(model.requires_grad_(True), sft_loss, config)
    for step in trainer.steps(documents):
        if step.step % 100 == 1 or step.step == steps:
            print(f"  step {step.step}: loss {step.loss:.3f}", flush=True)
    return model.requires_grad_(False).eval()


if __name__ == "__main__":
    main()
