"""What a data set will teach, before anything is trained: coloured rows, lengths, what is too long.

Everything here is a pure function of documents; how it is printed is the command's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

from transformers import PreTrainedTokenizerBase

from lorafit.data.chat import Document


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a document that is trained as a whole or not at all.

    Attributes:
        text: Its text, special tokens written out.
        trained: Whether the model learns to predict it.
    """

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens in a data set; the quantiles are lengths of rows that exist (nearest rank).

    Attributes:
        rows: Number of documents.
        min: The shortest.
        median: Half of them are no longer.
        p95: 95 of 100 are no longer.
        max: The longest.
        total: All tokens.
        trained: The tokens that are trained.
    """

    rows: int
    min: int
    median: int
    p95: int
    max: int
    total: int
    trained: int


def pieces(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The text of a document, cut where training starts and stops."""
    found, end, written = [], 0, ""
    for trained, flags in groupby(document.trained):
        end += len(list(flags))
        # Decoded from the start each time: a decoder may drop the space before the first word that it sees.
        text = cast(str, tokenizer.decode(document.tokens[:end]))
        found.append(Piece(text[len(written) :], trained))
        written = text
    return found


def lengths(documents: Sequence[Document]) -> Lengths:
    """The table of lengths; ``documents`` are not empty."""
    ordered = sorted(len(document.tokens) for document in documents)

    def quantile(share: float) -> int:
        return ordered[math.ceil(share * len(ordered)) - 1]

    return Lengths(
        rows=len(ordered),
        min=ordered[0],
        median=quantile(0.5),
        p95=quantile(0.95),
        max=ordered[-1],
        total=sum(ordered),
        trained=sum(sum(document.trained) for document in documents),
    )


def too_long(documents: Sequence[Document], max_length: int) -> list[Document]:
    """The documents of more than ``max_length`` tokens, in order."""
    return [document for document in documents if len(document.tokens) > max_length]
