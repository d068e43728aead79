"""A model as a GGUF file: for every family that lorafit reads, in every type that it writes.

Tensors come one at a time and some rows at a time, so that the memory of a few of the largest is enough. A tensor that
lies in a GGUF file in the format that it is to have is copied; everything else goes through float32 and is packed as
well as lorafit can (``kernels.search``).

Where the weights came from is written into the file: the name and hash of the source and, if that was computed from
quantised weights itself, of its origin.
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
from lorafit.exporting.source import Source, SourceTensor, from_checkpoint, from_gguf, parameters
from lorafit.formats import block_format
from lorafit.kernels import search
from lorafit.merging.certificate import FileRecord
from lorafit.models.base import Base
from lorafit.models.load import load_base
from lorafit.models.unpacked import unpacked_tensors

DEFAULT_TOLERANCE = 0.05  # nats per token of held-out loss
_QUANTIZATION_VERSION = 2  # ggml's


def export_gguf(
    base: Base,
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
        base: The model, loaded in float32.
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
    tensors = unpacked_tensors(base.model)
    source = from_gguf(base.path) if base.path.is_file() else from_checkpoint(base, tensors, _title(base.path))
    mix = _mix(base, source, type)
    chosen = {key: mix.format_of(key, tensor.shape) for key, tensor in source.tensors.items()}
    formats = {key: found for key, (found, _) in chosen.items()}
    # A float32 of the source's own numbers is no less exact than a copy.
    kept = {key for key, tensor in source.tensors.items() if tensor.format and formats[key] in (tensor.format, "F32")}
    say(f"hashing {base.path}")
    origin = FileRecord(base.path.name, fingerprint(base.path), _size(base.path))
    metadata: dict[str, Value] = {
        **source.metadata,
        "general.file_type": mix.file_type,
        "general.quantization_version": _QUANTIZATION_VERSION,
        "lorafit.version": __version__,
        "lorafit.source.name": origin.name,
        "lorafit.source.sha256": origin.sha256,
    }
    second = _second_quantization(base, source, formats)
    if second:
        metadata["lorafit.source.quantized"] = second
        say(f"this quantises a second time what comes from {second}; the original would lose less")
    say(f"writing {len(formats)} tensors as {_counted(formats)}")
    digest = write_gguf(written, metadata, {key: _new(key, source.tensors[key], formats[key]) for key in formats})
    say("loading what was written, and comparing it with the model")
    if fingerprint(written) != digest:
        raise MergeError(f"{name} is not kept: it is not what was written; check the disk")
    again = load_base(written, compute="fp32")
    identical, errors = compare_weights(tensors, again, formats, kept, name)
    if examples:
        say(f"measuring model and file on {len(examples)} rows")
    losses = compare_losses(base, again, examples, tolerance, name)
    engine = run_in_engine(base, written, examples, again.tokenizer, name)
    base.check_unchanged()
    fallbacks = {key: f"{found} instead of {wanted}" for key, (found, wanted) in chosen.items() if found != wanted}
    return GGUFCertificate(
        lorafit=__version__,
        source=origin,
        output=FileRecord(name, digest, written.stat().st_size),
        type=type,
        weights=Weights(
            len(tensors), parameters(source), dict(Counter(formats.values())), fallbacks, identical, errors
        ),
        second_quantization=second,
        tokenizer_differences=list(source.differences),
        held_out=losses,
        llamacpp=engine,
    )


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
        for rows in tensor.values():
            try:
                yield search.quantize(rows, format).blocks
            except FormatError as error:
                raise MergeError(f"{name}: {error}; choose another --dtype") from None

    copied = tensor.blocks if tensor.format == format else None
    return NewTensor(format, tensor.shape, copied or packed)


def _second_quantization(base: Base, source: Source, formats: dict[str, str]) -> str | None:
    """What the weights that are rounded to blocks were computed from, if those were rounded to blocks before."""
    rounded = {key for key, name in formats.items() if block_format(name).elements > 1}
    if base.path.is_dir():
        return base.origin if rounded else None
    before = {key: tensor.format for key, tensor in source.tensors.items() if key in rounded}
    twice = {name for key, name in before.items() if name not in (None, formats[key]) and _is_quantised(name)}
    return f"{base.path.name} ({', '.join(sorted(twice))})" if twice else None


def _is_quantised(name: str | None) -> bool:
    return name is not None and block_format(name).elements > 1


def _counted(formats: dict[str, str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(formats.values()).most_common())


def _title(path: Path) -> str:
    return path.resolve().name


def _size(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
