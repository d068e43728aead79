"""Base and merged file in llama.cpp, the engine that the file is made for: held-out answers scored, and one written.

Its figures may only be compared with one another: it quantises activations too, and its ways of computing attention
alone move a token's figure by hundredths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from lorafit.data.chat import Document
from lorafit.data.readers import Example
from lorafit.errors import MergeError, ModelError
from lorafit.evaluation.llamacpp import LlamaCpp, available

HELD_OUT_FILE = "heldout.jsonl"
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


NO_ROWS = NotMeasured(f"the run held no rows out: it has no {HELD_OUT_FILE}")
NO_LLAMACPP = NotMeasured("llama.cpp is not installed: pip install 'lorafit[llamacpp]', then merge again")


@dataclass(frozen=True)
class Answers:
    """Held-out answers in llama.cpp.

    Attributes:
        base_loss: Mean negative log-probability of the held-out answers' tokens in the base, nats.
        merged_loss: The same in the merged file, or with the adapter beside the base.
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
class Question:
    """A held-out answer: the conversation before it, and the tokens before it and of it."""

    messages: tuple[dict[str, str], ...]
    prompt: list[int]
    answer: list[int]


def questions_of(examples: Sequence[Example], documents: Sequence[Document]) -> list[Question]:
    """The last answers of the rows with the shortest prompts.

    Args:
        examples: The held-out rows.
        documents: The same, tokenised.
    """
    questions = [_question(example, document) for example, document in zip(examples, documents, strict=True)]
    return sorted(questions, key=lambda question: len(question.prompt))[:_SCORED_ROWS]


def _question(example: Example, document: Document) -> Question:
    """The last answer of a row."""
    end = max(place for place, trained in enumerate(document.trained) if trained) + 1
    start = end
    while start and document.trained[start - 1]:
        start -= 1
    last = max(place for place, message in enumerate(example.messages) if message["role"] == "assistant")
    messages = tuple({"role": m["role"], "content": m["content"]} for m in example.messages[:last])
    return Question(messages, document.tokens[:start], document.tokens[start:end][:_SCORED_TOKENS])


def run_in_llamacpp(
    base: Path,
    written: Path,
    name: str,
    examples: Sequence[Example],
    documents: Sequence[Document],
    *,
    beside: bool = False,
) -> InLlamaCpp | NotMeasured:
    """Run base and file in llama.cpp, on the held-out answers with the shortest prompts.

    Args:
        base: The base.
        written: Where the merged file lies now.
        name: What it will be called.
        examples: The held-out rows.
        documents: The same, tokenised.
        beside: The file is no model but a GGUF-LoRA, which the base takes.

    Raises:
        MergeError: llama.cpp cannot run one of them.
    """
    if not available():
        return NO_LLAMACPP
    asked = questions_of(examples, documents)
    try:
        base_loss, base_answer = ask(base, asked)
        merged_loss, merged_answer = ask(base, asked, written) if beside else ask(written, asked)
    except ModelError as error:
        # The file at hand has a temporary name that means nothing to anyone.
        raise MergeError(f"{name} is not kept: {str(error).replace(str(written), name)}") from error
    answers: Answers | NotMeasured = NO_ROWS
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


def ask(path: Path, questions: Sequence[Question], lora: Path | None = None) -> tuple[float, str]:
    """Mean negative log-probability of all answers' tokens, and the model's own answer to the first question."""
    longest = max((len(question.prompt) for question in questions), default=0)
    with LlamaCpp(path, n_ctx=longest + _ANSWER_TOKENS + _SPARE_CONTEXT, lora=lora) as model:
        if not questions:
            return 0.0, ""
        total = sum(
            model.answer_loss(question.prompt, question.answer) * len(question.answer) for question in questions
        )
        own = model.generate(questions[0].messages, max_tokens=_ANSWER_TOKENS)
    return total / sum(len(question.answer) for question in questions), own
