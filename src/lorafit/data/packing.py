"""Documents laid end to end, and which of them belong to which step.

A batch is one row of tokens without padding: positions restart at every document, and attention is kept within
documents by their lengths. Only where the next token is a target does the output head run, so a batch carries those
places and the tokens expected there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorafit.data.chat import Document
from lorafit.data.readers import Example
from lorafit.errors import DataError

_HELD_OUT_SHARE = 0.05
_HELD_OUT_LEAST = 16


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        tokens: int64 [T], the documents end to end.
        positions: int64 [T], place of each token in its document.
        lengths: Tokens in each document; they sum to T.
        predictors: int64 [N], places whose next token is a target.
        targets: int64 [N], the tokens expected there.
        sources: Where each document comes from, for error messages.
    """

    tokens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    predictors: Tensor
    targets: Tensor
    sources: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("tokens", "positions", "predictors", "targets")}
        return replace(self, **moved)


def pack(documents: Sequence[Document]) -> Batch:
    """Lay documents end to end."""
    tokens = torch.tensor([token for document in documents for token in document.tokens])
    lengths = tuple(len(document.tokens) for document in documents)
    positions = torch.cat([torch.arange(length) for length in lengths])
    trained = torch.tensor([flag for document in documents for flag in document.trained])
    # Nothing comes before a document's first token, so nothing can predict it.
    trained &= positions > 0
    places = trained.nonzero().squeeze(-1)
    sources = tuple(document.source for document in documents)
    return Batch(tokens, positions, lengths, places - 1, tokens[places], sources)


def split_passes(documents: Iterable[Document], pass_tokens: int) -> list[Batch]:
    """Pack documents, in order, into batches of at most ``pass_tokens`` tokens; a longer one is alone in its batch."""
    return [pack(each) for each in group_passes(documents, pass_tokens)]


def group_passes(documents: Iterable[Document], pass_tokens: int) -> list[list[Document]]:
    """The documents of each of these batches."""
    passes: list[list[Document]] = []
    waiting: list[Document] = []
    total = 0
    for document in documents:
        if waiting and total + len(document.tokens) > pass_tokens:
            passes.append(waiting)
            waiting, total = [], 0
        waiting.append(document)
        total += len(document.tokens)
    if waiting:
        passes.append(waiting)
    return passes


def hold_out(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Split off 5% of the rows, at least 16, by a hash of the prompt: (training rows, held-out rows).

    Rows with the same prompt stay together, so that several answers to one question do not leak; prompts that many rows
    share are held out last. The split depends on neither seed nor the order of the rows.

    Raises:
        DataError: There are too few rows, or too few prompts, to split.
    """
    wanted = max(_HELD_OUT_LEAST, round(len(examples) * _HELD_OUT_SHARE))
    if len(examples) < 2 * wanted:
        raise DataError(
            f"{len(examples)} rows are too few to hold {wanted} out; give --eval-data FILE, or --no-eval to measure "
            "nothing"
        )
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        prompt = json.dumps(example.messages[:-1])
        groups.setdefault(hashlib.sha256(prompt.encode()).hexdigest(), []).append(index)
    held: set[int] = set()
    for key in sorted(groups, key=lambda key: (len(groups[key]) > wanted, key)):
        if len(held) >= wanted:
            break
        held.update(groups[key])
    if 2 * len(held) > len(examples):
        raise DataError(
            f"{len(examples)} rows share {len(groups)} prompts, too few to hold some out; give --eval-data FILE, or "
            "--no-eval to measure nothing"
        )
    rows = list(enumerate(examples))
    return [row for i, row in rows if i not in held], [row for i, row in rows if i in held]
