"""Conversations as tokens, and which of them are trained.

The model's own chat template writes the text. What belongs to an answer is found by rendering the conversation twice:
up to the question with the generation prompt, and up to the answer. The first text must begin the second; the rest of
the second is the answer. So no template has to be known, and a template for which that is not so (one that rewrites
earlier turns, or that writes an answer otherwise than it asks for one) is refused instead of trained wrongly.

The text is cut before each answer and behind its end-of-turn token, and the pieces are tokenised one by one. When the
model generates, the prompt is tokenised alone and the answer follows token by token; cut in the same place, training
shows the model what it will see. (In one go, the line break that ends a prompt and one that begins the answer could
share a token that generation never makes.) The answer and its end-of-turn token are trained, everything else is not:
neither the questions nor what the template adds behind an answer.

Tokenisers of SentencePiece's kind put a space before a text. A piece that continues a text must not get one, so it is
tokenised behind an anchor whose tokens are then taken off: the special token before the cut if there is one, otherwise
a private-use character, with which nothing merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from lorafit.data.readers import Example, Message
from lorafit.errors import DataError, ModelError
from lorafit.models.tokenizer import end_of_turn_ids

_ANCHOR = "\ue000"


@dataclass(frozen=True, slots=True)
class Document:
    """A tokenised conversation.

    Attributes:
        tokens: Its T token ids.
        trained: T flags: whether the token is one that the model learns to predict.
        source: Where the row stands, as ``file.jsonl:12``.
    """

    tokens: list[int]
    trained: list[bool]
    source: str


def render_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that asks the model for the next answer, as its chat template writes it.

    Raises:
        ModelError: The tokenizer has no chat template, or a broken one.
        DataError: The template refuses these messages.
    """
    return _render(messages, tokenizer, asking=True)


def encode_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of :func:`render_prompt`, with a bos token where the model wants one, and never with two.

    Raises:
        ModelError: The tokenizer has no chat template, or a broken one.
        DataError: The template refuses these messages.
    """
    return _Encoder(tokenizer).tokenize([[render_prompt(messages, tokenizer)]])[0][0]


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> Document:
    """One conversation of :func:`encode_all`."""
    return encode_all([example], tokenizer)[0]


def encode_all(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Tokenise conversations up to their last answer, each answer trained.

    Args:
        examples: Checked conversations.
        tokenizer: The model's, with its chat template.

    Returns:
        A document for each example, in order.

    Raises:
        ModelError: The tokenizer has no chat template, or one that cannot be trained turn by turn, or that ends an
            answer without an end-of-turn token.
        DataError: The template refuses a conversation, or an answer contains an end-of-turn token.
    """
    encoder = _Encoder(tokenizer)
    texts = [encoder.cut(example) for example in examples]
    documents = []
    for example, pieces in zip(examples, encoder.tokenize(texts), strict=True):
        document = Document([], [], example.source)
        for i, tokens in enumerate(pieces):
            trained = i % 2 == 1
            if trained and tokens[-1] not in encoder.ending_ids:
                raise ModelError(f"{example.source}: the tokenizer does not read the end of an answer as one token")
            document.tokens.extend(tokens)
            document.trained.extend([trained] * len(tokens))
        documents.append(document)
    return documents


def _render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, asking: bool, source: str | None = None
) -> str:
    if not tokenizer.chat_template:
        raise ModelError(
            "the model has no chat template, so conversations cannot be written as text; use the instruction-tuned "
            "version of the model, or add tokenizer.chat_template to the file"
        )
    where = f"{source}: " if source else ""
    conversation = cast(list[dict[str, str]], list(messages))
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=asking)
    except TemplateSyntaxError as error:
        raise ModelError(f"the model's chat template is broken in line {error.lineno}: {error.message}") from None
    except (TemplateError, TypeError) as error:
        raise DataError(f"{where}the model's chat template refuses the conversation: {error}") from None
    return cast(str, text)


class _Encoder:
    """A tokenizer with what has to be known of it once for all rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ending_ids = end_of_turn_ids(tokenizer)
        self.endings = tokenizer.convert_ids_to_tokens(sorted(self.ending_ids))
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        self.added = tuple(sorted(added, key=len, reverse=True))
        self.swallowing = tuple(content for content, token in added.items() if token.rstrip)
        wants_bos = tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        self.bos: str = tokenizer.bos_token if wants_bos else ""
        # A digit: no pre-tokeniser joins one to the character before it.
        anchor, anchored, bare = self.ids([_ANCHOR, _ANCHOR + "0", "0"])
        self.adds_space = anchored[len(anchor) :] != bare
        self._asked: tuple[Sequence[Message], str] = (), ""

    def ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        distinct = list(dict.fromkeys(texts))  # rows have questions and endings in common
        options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        found = dict(zip(distinct, self.tokenizer(distinct, **options).input_ids, strict=True))
        return [found[text] for text in texts]

    def cut(self, example: Example) -> list[str]:
        """The text in pieces, in turn what is not trained and what is."""
        pieces: list[str] = []
        rest, done = "", ""  # what stands behind the last answer; the text up to there
        for i, message in enumerate(example.messages):
            if message["role"] != "assistant":
                continue
            for ending in self.endings:
                if ending in message["content"]:
                    raise DataError(
                        f"{example.source}: message {i + 1} contains {ending}, at which every answer ends; remove it, "
                        "the chat template writes it"
                    )
            prompt = self.prompt(example.messages[:i], example.source)
            whole = _render(example.messages[: i + 1], self.tokenizer, asking=False, source=example.source)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                remedy = "put each answer in a row of its own" if done else "use another model or template"
                raise ModelError(
                    f"{example.source}: the chat template writes the text before message {i + 1} otherwise once it is "
                    f"answered, so it cannot be trained turn by turn; {remedy}"
                )
            answer = whole[len(prompt) :]
            ends = [answer.find(ending) + len(ending) for ending in self.endings if ending in answer]
            if not ends:
                raise ModelError(
                    f"{example.source}: the chat template writes no end-of-turn token behind an answer, so the model "
                    "would not learn to stop; use another model or template"
                )
            pieces += [rest + prompt[len(done) :], answer[: min(ends)]]
            rest, done = answer[min(ends) :], whole
        return [*pieces, rest]

    def prompt(self, messages: Sequence[Message], source: str) -> str:
        """The text that asks for an answer; rows with several answers to one question tend to follow one another."""
        if messages != self._asked[0]:
            self._asked = messages, _render(messages, self.tokenizer, asking=True, source=source)
        return self._asked[1]

    def tokenize(self, texts: list[list[str]]) -> list[list[list[int]]]:
        """Token ids of the pieces of each text, those of the first with its bos token."""
        anchors: list[str] = []
        behind: list[str] = []
        for pieces in texts:
            before = ""
            for i, piece in enumerate(pieces):
                anchors.append(self.anchor(before) if i else "")
                behind.append(self.bos + piece if i == 0 and not piece.startswith(self.bos) else piece)
                before = piece or before
        used = sorted({*anchors})
        lengths = {anchor: len(ids) for anchor, ids in zip(used, self.ids(used), strict=True)}
        tokens = self.ids([anchor + piece for anchor, piece in zip(anchors, behind, strict=True)])
        found = iter([ids[lengths[anchor] :] for anchor, ids in zip(anchors, tokens, strict=True)])
        return [[next(found) for _ in pieces] for pieces in texts]

    def anchor(self, before: str) -> str:
        """What to tokenise a piece behind, so that it comes out as it does behind the text ``before``."""
        if before.rstrip().endswith(self.swallowing):  # white space there counts for nothing
            before = before.rstrip()
        if before.endswith(self.added):
            return next(token for token in self.added if before.endswith(token))
        return _ANCHOR if self.adds_space else ""
