"""The certificate of an exported GGUF file: what is known about it, and how.

Everything is told by the written file, opened again as lorafit opens any other:

* *Bytes.* The file has the hash of what was written.
* *Weights.* Each tensor of the model that it loads as is held against the model that was exported, by the names and in
  the row order of transformers, which the reading of the file brings about and its writing had to foresee. Formats of
  plain numbers must be the model's numbers, rounded once, to the last bit; a quantised tensor that was copied must be
  what it was; of the others it is said how far rounding moved them.
* *Loss.* With rows to measure on: the loss of the model and of the file in lorafit, both in float32, and what llama.cpp
  says of the file, and of the model if that is a GGUF file, too.

What was not measured is in the certificate, with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.data.chat import Document, encode_all
from lorafit.data.packing import split_passes
from lorafit.data.readers import Example
from lorafit.errors import MergeError, ModelError
from lorafit.evaluation.llamacpp import available
from lorafit.evaluation.loss import evaluate
from lorafit.merging.certificate import FileRecord
from lorafit.merging.engine import NO_LLAMACPP, NotMeasured, ask, questions_of
from lorafit.models.base import Base
from lorafit.models.keymap import family_of_model, gguf_name, norm_shift
from lorafit.models.unpacked import Unpacked, unpacked_tensors
from lorafit.training.setup import fit_length

NO_DATA = NotMeasured("no rows were given to measure on: export again with --eval-data FILE")
_PASS_TOKENS = 2048
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WEIGHTS_AT_ONCE = 1 << 19


@dataclass(frozen=True)
class Weights:
    """The weights of the file, against those of the model.

    Attributes:
        tensors: How many tensors the model has.
        parameters: How many numbers they have.
        formats: Block format -> how many of the file's tensors are in it.
        fallbacks: Tensor of the file -> what it is instead of what, because its rows are not whole blocks of that.
        bit_identical: How many tensors are the model's to the last bit, rounded once where the format is F16 or BF16.
        relative_errors: Tensor of the model -> how far rounding moved its weights: root mean square, relative to that
            of the weights. Tensors that are bit-identical are not here.
    """

    tensors: int
    parameters: int
    formats: dict[str, int]
    fallbacks: dict[str, str]
    bit_identical: int
    relative_errors: dict[str, float]


@dataclass(frozen=True)
class Losses:
    """Loss on the given rows, in lorafit, in float32.

    Attributes:
        source_loss: Of the model that was exported, nats per answer token.
        written_loss: Of the file.
        rows: How many rows.
        tokens: How many answer tokens.
        tokenised_otherwise: Rows that the file's tokenizer, which is llama.cpp's, cuts into other tokens.
    """

    source_loss: float
    written_loss: float
    rows: int
    tokens: int
    tokenised_otherwise: int


@dataclass(frozen=True)
class InEngine:
    """The file in llama.cpp, which loads it and computes.

    Attributes:
        version: Of the package ``xllamacpp``.
        source_loss: Mean negative log-probability of some of the answers, in the model that was exported; None if that
            is no GGUF file.
        written_loss: The same in the file; None if there are no rows.
        rows: How many answers.
        tokens: How many of their tokens.
    """

    version: str
    source_loss: float | None
    written_loss: float | None
    rows: int
    tokens: int


@dataclass(frozen=True)
class GGUFCertificate:
    """What is known about an exported GGUF file.

    Attributes:
        lorafit: Version that exported.
        source: The model: name, hash (of a directory's files of weights; of a run's adapter) and size.
        base: The base of a run, onto which its adapter was merged in float32; None for a model without an adapter.
        output: The file.
        type: What was asked for.
        weights: The weights.
        second_quantization: The quantised file that the rounded weights were computed from: rounding them once more
            loses more than rounding the original. None if this is the first time.
        tokenizer_differences: Texts, of those that were tried, that llama.cpp cuts into other tokens than transformers
            does with the model's own tokenizer; each for a reason in how llama.cpp works.
        held_out: Loss in lorafit.
        llamacpp: The file in llama.cpp.
    """

    lorafit: str
    source: FileRecord
    base: FileRecord | None
    output: FileRecord
    type: str
    weights: Weights
    second_quantization: str | None
    tokenizer_differences: list[str]
    held_out: Losses | NotMeasured
    llamacpp: InEngine | NotMeasured

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def as_json(self) -> str:
        """The document that lies beside the file."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


def compare_weights(
    tensors: Mapping[str, Unpacked], written: Base, formats: dict[str, str], kept: set[str], name: str
) -> tuple[int, dict[str, float]]:
    """Hold the file against the model.

    Args:
        tensors: The model's, by transformers' names.
        written: The file, loaded.
        formats: Tensor of the file -> its block format.
        kept: Tensors of the file that hold the very numbers of a source that is a GGUF file.
        name: What the file will be called.

    Returns:
        How many tensors are equal to the last bit, and how far off the others are.

    Raises:
        MergeError: A tensor is missing or is not what it should be.
    """
    family = family_of_model(written.model.config.model_type, name)
    found = unpacked_tensors(written.model)
    if {key: each.shape for key, each in found.items()} != {key: each.shape for key, each in tensors.items()}:
        raise MergeError(f"{name} is not kept: its tensors are not those of the model; check the disk")
    identical, errors = 0, {}
    for key, tensor in tensors.items():
        file_name = gguf_name(_joined(key), family) or ""
        # Both may unpack into the same buffer.
        exact = tensor.values(torch.float32).clone()
        result = found[key].values(torch.float32)
        pairs = zip(result.split(_rows(result)), exact.split(_rows(exact)), strict=True)
        if file_name in kept:
            same = all(torch.equal(_bits(one), _bits(other)) for one, other in pairs)
        elif formats[file_name] in _DTYPES:
            shift, dtype = norm_shift(file_name, family), _DTYPES[formats[file_name]]
            same = all(torch.equal(_bits(one), _bits(_rounded(other, dtype, shift))) for one, other in pairs)
        else:
            errors[key] = _relative_error(pairs)
            continue
        if not same:
            raise MergeError(f"{name} is not kept: {key} is not what the model has there; check the disk")
        identical += 1
    return identical, errors


def _joined(name: str) -> str:
    """The stack that an expert's matrix lies in."""
    before, dot, after = name.partition(".experts.")
    return f"{before}.experts.{after.partition('.')[2]}" if dot else name


def _rounded(values: Tensor, dtype: torch.dtype, shift: float) -> Tensor:
    """Values once they were in a file, where Gemma's norms have one added and lose what has no place beside it."""
    return (values + shift).to(dtype).float() - shift if shift else values.to(dtype).float()


def _rows(values: Tensor) -> int:
    """How many rows are compared at once."""
    return max(_WEIGHTS_AT_ONCE // values.shape[-1], 1)


def _relative_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    error = size = 0.0
    for one, other in pairs:
        error += float((one - other).double().square().sum())
        size += float(other.double().square().sum())
    return math.sqrt(error / size) if size else 0.0


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


def compare_losses(
    source: Base, written: Base, examples: Sequence[Example], tolerance: float, name: str, *, of: str
) -> Losses | NotMeasured:
    """The loss of the file against that of the model.

    Args:
        source: The model, with its adapter if it has one.
        written: The file, loaded.
        examples: Rows to measure on.
        tolerance: By how much the file's may be larger.
        name: What the file will be called.
        of: What the model is called.

    Raises:
        DataError: A row is longer than the model's context.
        MergeError: The file's is larger by more than the tolerance.
    """
    if not examples:
        return NO_DATA
    documents, again = encode_all(examples, source.tokenizer), encode_all(examples, written.tokenizer)
    otherwise = sum(one.tokens != other.tokens for one, other in zip(documents, again, strict=True))
    of_source, of_file = _loss(source, documents), _loss(written, again)
    if not of_file <= of_source + tolerance:
        raise MergeError(
            f"{name} is not kept: its held-out loss is {of_file:.4f}, that of {of} {of_source:.4f}: more "
            f"than --certificate-tolerance {tolerance:g} above it; choose a finer --dtype"
        )
    tokens = sum(sum(document.trained) for document in documents)
    return Losses(of_source, of_file, len(documents), tokens, otherwise)


def _loss(base: Base, documents: Sequence[Document]) -> float:
    documents = fit_length(documents, base.model.config.max_position_embeddings, truncate=False)
    return evaluate(base.model, split_passes(documents, _PASS_TOKENS)).loss


def run_in_engine(
    source: Path, written: Path, examples: Sequence[Example], tokenizer: Any, name: str
) -> InEngine | NotMeasured:
    """The file in llama.cpp, and the model, too, if that is a GGUF file.

    Raises:
        MergeError: llama.cpp cannot run the file.
    """
    if not available():
        return NO_LLAMACPP
    asked = questions_of(examples, encode_all(examples, tokenizer))
    try:
        of_file = ask(written, asked)[0]
        of_source = ask(source, asked)[0] if asked and source.is_file() else None
    except ModelError as error:
        raise MergeError(f"{name} is not kept: {str(error).replace(str(written), name)}") from error
    tokens = sum(len(question.answer) for question in asked)
    return InEngine(version("xllamacpp"), of_source, of_file if asked else None, len(asked), tokens)
