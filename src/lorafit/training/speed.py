"""How fast a machine trains a model, and how fast it could.

The limit is the rate at which the machine multiplies matrices. A frozen weight is multiplied twice with each token,
forward for the result and backward for the gradient of the input; there is no gradient of the weight. A product with
one weight is a multiplication and an addition, so a step costs at least 4 FLOP for each frozen weight and token. The
vocabulary is projected only where a token is trained. Attention, norms and adapters are left out of the count, so that
the share of the limit that a step reaches is what is left after all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafit.config import LoRA, Memory, Method, QALoRA, TrainConfig
from lorafit.data.chat import Document
from lorafit.data.packing import split_passes
from lorafit.data.readers import Message
from lorafit.evaluation.generate import generate
from lorafit.formats import PROMOTED, block_format
from lorafit.modules import PackedLinear, attach
from lorafit.modules.experts import ExpertStack
from lorafit.modules.qalora import has_offsets
from lorafit.objectives.sft import sft_loss
from lorafit.training.loop import Step, Trainer

_RANK = 16
_SQUARE = 2048  # large enough for the highest rate, and three of them still fit a server's caches


@dataclass(frozen=True)
class FrozenWork:
    """Weights that take part in matrix products.

    Attributes:
        decoder: Weights that each token is multiplied with.
        head: Weights of the output head.
    """

    decoder: int
    head: int

    def flops(self, tokens: int, trained_tokens: int) -> int:
        """The least that a step costs."""
        return 4 * (self.decoder * tokens + self.head * trained_tokens)


def frozen_work(model: PreTrainedModel) -> FrozenWork:
    """Count the weights of a base; of experts only those that a token is sent to."""
    head = model.get_output_embeddings()
    decoder = 0
    for module in model.modules():
        if isinstance(module, nn.Linear | PackedLinear) and module is not head:
            decoder += module.in_features * module.out_features
        elif isinstance(module, ExpertStack):
            decoder += module.in_features * module.out_features * model.config.num_experts_per_tok
        else:
            # Experts that nothing is attached to are one tensor [experts, out_dim, in_dim].
            stacks = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
            decoder += sum(stack[0].numel() * model.config.num_experts_per_tok for stack in stacks)
    return FrozenWork(decoder, model.config.vocab_size * model.config.hidden_size)


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the product of two square matrices."""
    a, b = (torch.randn(_SQUARE, _SQUARE).to(dtype) for _ in range(2))
    return 2 * _SQUARE**3 / median_seconds(lambda: a @ b)


def unpacking_seconds(model: PreTrainedModel, dtype: torch.dtype) -> float | None:
    """Seconds to unpack a million weights, layer by layer over the decoder; None if nothing is packed."""
    head = model.get_output_embeddings()
    layers = [module.packed for module in model.modules() if isinstance(module, PackedLinear) and module is not head]
    if not layers:
        return None
    weights = sum(packed.shape[0] * packed.shape[1] for packed in layers)
    return median_seconds(lambda: [packed.dense(dtype) for packed in layers]) / (weights / 1e6)


def decoding_rate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Tokens per second of a greedy answer, prompt included."""
    question = Message(role="user", content="Tell me a long story about a lighthouse.")
    pieces: list[str] = []

    def answer() -> None:
        pieces[:] = generate(model, tokenizer, [question], max_tokens=64)

    seconds = median_seconds(answer, repeats=3)
    return len(pieces) / seconds


def made_up_rows(vocabulary: int, count: int, length: int) -> list[Document]:
    """Rows of random tokens, the same each time, the last third of each trained."""
    random = torch.Generator().manual_seed(0)
    trained = [place >= length * 2 // 3 for place in range(length)]
    ids = torch.randint(vocabulary, (count, length), generator=random).tolist()
    return [Document(tokens, trained, f"made-up row {i + 1}") for i, tokens in enumerate(ids)]


def steps_in_turn(trainers: dict[Method, Trainer], rows: list[Document], rounds: int) -> Iterator[dict[Method, Step]]:
    """Steps of several trainers on the same rows, one of each at a time (A B A B), after a round for warm-up.

    A machine whose speed drifts is then equally fast for all of them.
    """
    for number in range(rounds + 1):
        taken = {name: this.step(split_passes(rows, this.config.pass_tokens)) for name, this in trainers.items()}
        # The first step compiles kernels and touches memory for the first time.
        if number:
            yield taken


def usual_rank(model: PreTrainedModel) -> int:
    """16, or as many blocks as the shortest row of a layer has where those are fewer, the most that QA-LoRA takes."""
    head = model.get_output_embeddings()
    packed = [module.packed for module in model.modules() if isinstance(module, PackedLinear) and module is not head]
    trained = [(each.shape[1], PROMOTED.get(each.format_name, each.format_name)) for each in packed]
    return min([_RANK, *(width // block_format(name).elements for width, name in trained if has_offsets(name))])


def make_trainer(model: PreTrainedModel, method: Method, rank: int = _RANK, memory: Memory = "auto") -> Trainer:
    """Attach a fresh adapter to all linear layers of a base, with everything else as by default."""
    torch.manual_seed(0)
    attach(model, QALoRA(rank=rank) if method == "qalora" else LoRA(rank=rank))
    return Trainer(model, sft_loss, TrainConfig("", "", learning_rate=1e-4, steps=10**6, memory=memory))


def median_seconds(work: Callable[[], object], repeats: int = 10) -> float:
    """Median time of some work, after one round for warm-up."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
