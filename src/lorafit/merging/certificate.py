"""The certificate: what is known about a merged file, and how.

Everything is proved on the written file, opened again:

* *Bytes.* Both files are read side by side. They have the same length; where they differ is inside offsets; and every
  offset of an adapted layer is the stored m'.
* *Weights.* The file is loaded as any other, and each adapted layer unpacks to the very bits that the run computes
  with. This sees what bytes alone cannot: whether each row went to its place.
* *Loss.* lorafit's loss on the held-out rows is the same float64 for the run and for the file.
* *llama.cpp.* The engine that the file is made for loads it, and says how likely it finds held-out answers and what it
  answers itself, before and after. Its figures may only be compared with one another: it quantises activations too, and
  its ways of computing attention alone move a token's figure by hundredths.

A claim that turns out false is an error, and then neither file nor certificate appears. A measurement that could not be
made is in the certificate as well, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lorafit import __version__
from lorafit.data.chat import Document, encode_all
from lorafit.data.packing import split_passes
from lorafit.data.readers import Example, read_examples
from lorafit.errors import MergeError, ModelError
from lorafit.evaluation.llamacpp import LlamaCpp, available
from lorafit.evaluation.loss import evaluate
from lorafit.merging.plan import Plan
from lorafit.merging.verify import verify
from lorafit.models.load import load_base
from lorafit.modules import PackedLinear, QALoRALinear
from lorafit.training.setup import fit_length

_HELD_OUT_FILE = "heldout.jsonl"
# llama.cpp scores token by token, so a few hundred tokens are what a few seconds allow.
_SCORED_ROWS = 8
_SCORED_TOKENS = 48
_ANSWER_TOKENS = 96
_SPARE_CONTEXT = 64


@dataclass(frozen=True)
class NotMeasured:
    """What stands where a measurement could not be made.

    Attributes:
        not_measured: Why.
    """

    not_measured: str


_NO_ROWS = NotMeasured(f"the run held no rows out: it has no {_HELD_OUT_FILE}")
_NO_LLAMACPP = NotMeasured("llama.cpp is not installed: pip install 'lorafit[llamacpp]', then merge again")


@dataclass(frozen=True)
class FileRecord:
    """Which file is meant.

    Attributes:
        name: Its name when the certificate was made.
        sha256: Hash of its content.
        size: Bytes.
    """

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Weights:
    """The packed weights, against those trained.

    Attributes:
        bit_identical: Integers and scales are the base's, offsets the run's, all other bytes the base's.
        tensors: Tensors with new offsets.
        offsets: Offsets that were written.
        bytes_changed: Bytes that differ from the base; all lie in offsets.
        rounded_otherwise: Offsets that this machine, computing them anew from A and B, rounds to a neighbour. The
            stored ones were written, so this only says how far another merge would be off.
    """

    bit_identical: bool
    tensors: int
    offsets: int
    bytes_changed: int
    rounded_otherwise: int


@dataclass(frozen=True)
class HeldOut:
    """Loss on the run's held-out rows, in lorafit.

    Attributes:
        run_loss: Of base and adapter, nats per answer token.
        merged_loss: Of the merged file; the same number.
        rows: How many rows.
        tokens: How many answer tokens.
        compute: Arithmetic type, the same for both.
    """

    run_loss: float
    merged_loss: float
    rows: int
    tokens: int
    compute: str


@dataclass(frozen=True)
class Answers:
    """Held-out answers in llama.cpp.

    Attributes:
        base_loss: Mean negative log-probability of the held-out answers' tokens in the base, nats.
        merged_loss: The same in the merged file.
        rows: How many answers: those with the shortest prompts.
        tokens: How many of their tokens, at most 48 of each answer.
        prompt: The conversation up to the answer that both were asked for.
        base_answer: The base's, greedy, at most 96 tokens.
        merged_answer: The merged file's.
        answers_differ: Whether these are different texts.
    """

    base_loss: float
    merged_loss: float
    rows: int
    tokens: int
    prompt: list[dict[str, str]]
    base_answer: str
    merged_answer: str
    answers_differ: bool


@dataclass(frozen=True)
class InLlamaCpp:
    """The merged file in llama.cpp.

    Attributes:
        loads: It loads and computes.
        version: Of the package ``xllamacpp``.
        answers: Base against merged file.
    """

    loads: bool
    version: str
    answers: Answers | NotMeasured


@dataclass(frozen=True)
class Certificate:
    """What is known about a merged file.

    Attributes:
        lorafit: Version that merged.
        run: Name of the run's directory.
        method: The method that it was trained with.
        base: The file that it was trained on.
        merged: The file that was written.
        weights: Proof of the packed weights.
        held_out: Loss in lorafit.
        llamacpp: The file as its users run it.
    """

    lorafit: str
    run: str
    method: str
    base: FileRecord
    merged: FileRecord
    weights: Weights
    held_out: HeldOut | NotMeasured
    llamacpp: InLlamaCpp | NotMeasured

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def as_json(self) -> str:
        """The document that lies beside the merged file."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


def certify(
    plan: Plan, written: str | Path, name: str, *, say: Callable[[str], None] = lambda text: None
) -> Certificate:
    """Prove that a written file is the model that was trained, and measure it.

    Args:
        plan: What should have been written.
        written: Where the file lies now.
        name: What it will be called.
        say: Is told what is going on.

    Raises:
        MergeError: The file is not what it should be, or llama.cpp cannot run it.
    """
    written = Path(written)
    say("comparing every byte with the base")
    comparison = verify(plan, written)
    path = plan.run / _HELD_OUT_FILE
    examples = read_examples(path) if path.is_file() else []
    documents = encode_all(examples, plan.base.tokenizer)
    if examples:
        say(f"measuring run and merged file on {len(examples)} held-out rows")
    held_out = _compare_models(plan, written, documents, name)
    if available():
        say("running base and merged file in llama.cpp")
    questions = [_question(example, document) for example, document in zip(examples, documents, strict=True)]
    return Certificate(
        lorafit=__version__,
        run=plan.run.resolve().name,
        method="qalora",
        base=FileRecord(plan.base.path.name, plan.base_sha256, comparison.base_size),
        merged=FileRecord(name, comparison.sha256, comparison.size),
        weights=Weights(
            bit_identical=True,
            tensors=len(plan.changes),
            offsets=sum(change.offsets.numel() for change in plan.changes),
            bytes_changed=comparison.bytes_changed,
            rounded_otherwise=plan.rounded_otherwise,
        ),
        held_out=held_out,
        llamacpp=_run_in_llamacpp(plan, written, questions, name) if available() else _NO_LLAMACPP,
    )


def _compare_models(plan: Plan, written: Path, documents: Sequence[Document], name: str) -> HeldOut | NotMeasured:
    """Load the file: its weights are the run's, and so is its loss, to the last bit; anything else is an error."""
    merged = load_base(written, compute=plan.config.compute).model
    for change in plan.changes:
        trained, loaded = plan.base.model.get_submodule(change.module), merged.get_submodule(change.module)
        assert isinstance(trained, QALoRALinear) and isinstance(loaded, PackedLinear)
        expected = trained.base.packed.dense(torch.float32, trained.merged_offsets()).clone()
        found = loaded.packed.dense(torch.float32)
        if not torch.equal(expected.view(torch.int32), found.view(torch.int32)):
            raise MergeError(f"{name} is not kept: the weights of {change.module} are not those that were trained")
    if not documents:
        return _NO_ROWS
    config, context = plan.config, merged.config.max_position_embeddings
    documents = fit_length(documents, min(config.max_length or context, context), config.truncate)
    batches = split_passes(documents, config.pass_tokens)
    of_run, of_file = evaluate(plan.base.model, batches), evaluate(merged, batches)
    if of_run.loss != of_file.loss:
        raise MergeError(f"{name} is not kept: its held-out loss is {of_file.loss!r}, that of the run {of_run.loss!r}")
    compute = str(plan.base.compute).removeprefix("torch.")
    return HeldOut(of_run.loss, of_file.loss, len(documents), of_run.tokens, compute)


@dataclass(frozen=True)
class _Question:
    """A held-out answer: the conversation before it, and the tokens before it and of it."""

    messages: tuple[dict[str, str], ...]
    prompt: list[int]
    answer: list[int]


def _question(example: Example, document: Document) -> _Question:
    """The last answer of a row."""
    end = max(place for place, trained in enumerate(document.trained) if trained) + 1
    start = end
    while start and document.trained[start - 1]:
        start -= 1
    last = max(place for place, message in enumerate(example.messages) if message["role"] == "assistant")
    messages = tuple({"role": m["role"], "content": m["content"]} for m in example.messages[:last])
    return _Question(messages, document.tokens[:start], document.tokens[start:end][:_SCORED_TOKENS])


def _run_in_llamacpp(plan: Plan, written: Path, questions: Sequence[_Question], name: str) -> InLlamaCpp:
    """Base and file in llama.cpp, on the held-out answers with the shortest prompts."""
    asked = sorted(questions, key=lambda question: len(question.prompt))[:_SCORED_ROWS]
    try:
        base_loss, base_answer = _ask(plan.base.path, asked)
        merged_loss, merged_answer = _ask(written, asked)
    except ModelError as error:
        # The file at hand has a temporary name that means nothing to anyone.
        raise MergeError(f"{name} is not kept: {str(error).replace(str(written), name)}") from error
    answers: Answers | NotMeasured = _NO_ROWS
    if asked:
        answers = Answers(
            base_loss=base_loss,
            merged_loss=merged_loss,
            rows=len(asked),
            tokens=sum(len(question.answer) for question in asked),
            prompt=list(asked[0].messages),
            base_answer=base_answer,
            merged_answer=merged_answer,
            answers_differ=base_answer != merged_answer,
        )
    return InLlamaCpp(True, version("xllamacpp"), answers)


def _ask(path: Path, questions: Sequence[_Question]) -> tuple[float, str]:
    """Mean negative log-probability of all answers' tokens, and the model's own answer to the first question."""
    longest = max((len(question.prompt) for question in questions), default=0)
    with LlamaCpp(path, n_ctx=longest + _ANSWER_TOKENS + _SPARE_CONTEXT) as model:
        if not questions:
            return 0.0, ""
        total = sum(
            model.answer_loss(question.prompt, question.answer) * len(question.answer) for question in questions
        )
        own = model.generate(questions[0].messages, max_tokens=_ANSWER_TOKENS)
    return total / sum(len(question.answer) for question in questions), own
