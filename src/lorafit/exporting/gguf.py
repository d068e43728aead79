"""A model as a GGUF file: for every family that lorafit reads, in every type that it writes.

Tensors come one at a time and some rows at a time, so that the memory of a few of the largest is enough. A tensor that
lies in a GGUF file in the format that it is to have is copied; one that an adapter updates keeps its grid there, so
that the update is not rounded away (``kernels.dither``); everything else goes through float32 and is packed as well as
lorafit can (``kernels.search``).

Where the weights came from is written into the file: name and hash of the source, of a run's base, and, if they were
computed from quantised weights, what those were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from lorafit import __version__
from lorafit.config import GGUFType
from lorafit.containers.atomic import fingerprint
from lorafit.containers.gguf_new import NewTensor, Value, write_gguf
from lorafit.containers.mapped import release
from lorafit.data.readers import Example
from lorafit.errors import FormatError, MergeError
from lorafit.exporting.gguf_certificate import (
    GGUFCertificate,
    Weights,
    compare_losses,
    compare_weights,
    run_in_engine,
)
from lorafit.exporting.mix import Mix
from lorafit.exporting.source import Model, Source, SourceTensor, parameters, source_of
from lorafit.formats import block_format
from lorafit.kernels import search
from lorafit.kernels.dither import DITHERED, dither
from lorafit.merging.certificate import FileRecord
from lorafit.merging.run import DEFAULT_TOLERANCE
from lorafit.models.base import Base
from lorafit.models.load import load_base

_QUANTIZATION_VERSION = 2  # ggml's


def export_gguf(
    model: Model,
    written: Path,
    type: GGUFType,
    *,
    name: str,
    examples: Sequence[Example] = (),
    tolerance: float = DEFAULT_TOLERANCE,
    say: Callable[[str], None] = lambda text: None,
) -> GGUFCertificate:
    """Write a model, then load what was written and hold it against the model.

    Args:
        model: The model, from `open_model`.
        written: The file to write; the caller makes it appear whole.
        type: Type of the file.
        name: What the file will be called.
        examples: Rows to measure the loss on.
        tolerance: By how much the file's may be larger, in nats per token.
        say: Is told what is going on.

    Raises:
        ModelError: GGUF or llama.cpp has no such model or tokenizer, or the model's files were written to meanwhile.
        MergeError: A weight is too large for the type, the file is not what it should be, llama.cpp cannot run it, or
            its loss is too large.
    """
    base, source = model.base, source_of(model)
    mix = _mix(base, source, type)
    chosen = {key: mix.format_of(key, tensor.shape) for key, tensor in source.tensors.items()}
    formats = {key: found for key, (found, _) in chosen.items()}
    # A float32 of a file's own numbers is no less exact than a copy.
    kept = {key for key, tensor in source.tensors.items() if tensor.blocks and formats[key] in (tensor.format, "F32")}
    say(f"hashing {model.path}")
    origin = FileRecord(model.path.resolve().name, fingerprint(_weights(model)), _size(_weights(model)))
    of_run = FileRecord(base.path.name, fingerprint(base.path), _size(base.path)) if model.run else None
    second = _second_quantization(base, source, formats)
    metadata = {
        **source.metadata,
        "general.file_type": mix.file_type,
        "general.quantization_version": _QUANTIZATION_VERSION,
        **_provenance(origin, of_run, second),
    }
    if second:
        say(f"this quantises a second time what comes from {second}; the original would lose less")
    say(f"writing {len(formats)} tensors as {_counted(formats)}")
    digest = write_gguf(written, metadata, {key: _new(key, source.tensors[key], formats[key]) for key in formats})
    say("loading what was written, and comparing it with the model")
    if fingerprint(written) != digest:
        raise MergeError(f"{name} is not kept: it is not what was written; check the disk")
    again = load_base(written, compute="fp32")
    identical, errors = compare_weights(model.tensors, again, formats, kept, name)
    if examples:
        say(f"measuring model and file on {len(examples)} rows")
    losses = compare_losses(base, again, examples, tolerance, name, of=origin.name)
    engine = run_in_engine(model.path, written, examples, again.tokenizer, name)
    base.check_unchanged()
    fallbacks = {key: f"{found} instead of {wanted}" for key, (found, wanted) in chosen.items() if found != wanted}
    return GGUFCertificate(
        lorafit=__version__,
        source=origin,
        base=of_run,
        output=FileRecord(name, digest, written.stat().st_size),
        type=type,
        weights=Weights(
            len(model.tensors), parameters(source), dict(Counter(formats.values())), fallbacks, identical, errors
        ),
        second_quantization=second,
        tokenizer_differences=list(source.differences),
        held_out=losses,
        llamacpp=engine,
    )


def _provenance(origin: FileRecord, base: FileRecord | None, second: str | None) -> dict[str, Value]:
    """Where a file comes from, for whoever has nothing but the file."""
    found: dict[str, Value] = {
        "lorafit.version": __version__,
        "lorafit.source.name": origin.name,
        "lorafit.source.sha256": origin.sha256,
    }
    if base:
        found |= {"lorafit.base.name": base.name, "lorafit.base.sha256": base.sha256}
    return found | ({"lorafit.source.quantized": second} if second else {})


def _mix(base: Base, source: Source, type: GGUFType) -> Mix:
    config = base.model.config
    return Mix(
        type,
        config.num_hidden_layers,
        "output.weight" if "output.weight" in source.tensors else "token_embd.weight",
        getattr(config, "num_experts", 0),
        config.num_key_value_heads < config.num_attention_heads,
    )


def _new(name: str, tensor: SourceTensor, format: str) -> NewTensor:
    def packed() -> Iterator[Tensor]:
        start = 0
        for rows in tensor.values():
            try:
                if tensor.before is not None and tensor.format == format and format in DITHERED:
                    before = tensor.before[start : start + len(rows)]
                    yield dither(rows, before, format, start)
                    release(before)
                else:
                    yield search.quantize(rows, format).blocks
            except FormatError as error:
                raise MergeError(f"{name}: {error}; choose another --dtype") from None
            start += len(rows)

    copied = tensor.blocks if tensor.format == format else None
    return NewTensor(format, tensor.shape, copied or packed)


def _second_quantization(base: Base, source: Source, formats: dict[str, str]) -> str | None:
    """What the weights that are rounded to blocks were computed from, if those were rounded to blocks before."""
    rounded = [(tensor, formats[key]) for key, tensor in source.tensors.items() if _is_quantised(formats[key])]
    again = {tensor.format for tensor, name in rounded if not (tensor.blocks and tensor.format == name)}
    twice = sorted(name for name in again if name and _is_quantised(name))
    return f"{base.path.name} ({', '.join(twice)})" if twice else base.origin if again else None


def _is_quantised(name: str) -> bool:
    return block_format(name).elements > 1


def _counted(formats: dict[str, str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(formats.values()).most_common())


def _weights(model: Model) -> Path:
    """What is a model's own: of a run, its adapter."""
    return model.run.adapter if model.run else model.path


def _size(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
