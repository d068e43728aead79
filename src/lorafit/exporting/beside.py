"""What is known about a GGUF-LoRA: the adapter as llama.cpp will compute it, beside the run that it was taken from.

The written file is opened again. Its numbers are the adapter's, to the last bit of the type that they were written in;
with them in place of the run's own adapter, and with llama.cpp's scaling, lorafit's loss on the run's held-out rows is
measured next to the run's. llama.cpp does the same with base and file.

Three things can lie between the two losses, and the certificate names those that do: rounding to F16; for QA-LoRA, the
rounding of m' to half precision, which is part of the trained model and not of a plain LoRA; and for QA-LoRA on
promoted tensors, that the base's file has the tensors as they were before.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafit import __version__
from lorafit.adapters.peft import CONFIG_FILE
from lorafit.config import TrainConfig, read_settings
from lorafit.containers.atomic import fingerprint
from lorafit.containers.gguf import GGUFFile
from lorafit.containers.gguf_new import Value
from lorafit.data.chat import Document, encode_all
from lorafit.data.packing import split_passes
from lorafit.data.readers import Example, read_examples
from lorafit.errors import AdapterError, ConfigError, MergeError
from lorafit.evaluation.llamacpp import available
from lorafit.evaluation.loss import evaluate
from lorafit.exporting import gguf_lora
from lorafit.merging.certificate import FileRecord
from lorafit.merging.engine import HELD_OUT_FILE, NO_ROWS, InLlamaCpp, NotMeasured, run_in_llamacpp
from lorafit.merging.run import DEFAULT_TOLERANCE
from lorafit.models.base import Base
from lorafit.models.families import Family
from lorafit.models.keymap import family_of_file, family_of_model
from lorafit.models.load import load_adapted
from lorafit.modules import QALoRALinear, adapter_modules
from lorafit.training.setup import fit_length

# What PEFT's configuration can ask for beside low-rank updates.
_NOT_LORA = ("modules_to_save", "trainable_token_indices", "use_dora", "lora_bias")


@dataclass(frozen=True)
class BesideLoss:
    """Loss on the run's held-out rows, in lorafit.

    Attributes:
        run_loss: Of base and adapter as trained, nats per answer token.
        file_loss: Of the base with what the file holds.
        rows: How many rows.
        tokens: How many answer tokens.
        compute: Arithmetic type, the same for both.
    """

    run_loss: float
    file_loss: float
    rows: int
    tokens: int
    compute: str


@dataclass(frozen=True)
class BesideCertificate:
    """What is known about a GGUF-LoRA.

    Attributes:
        lorafit: Version that wrote it.
        source: Name of the run or adapter.
        method: The method that it was trained with.
        base: The file, or the name and hash of the directory, that it was trained on.
        output: The file that was written.
        architecture: What llama.cpp holds against the base's.
        alpha: The file's, by which llama.cpp scales every tensor with its rank.
        ranks: Rank -> how many matrices have it.
        folded: Matrices whose B was multiplied by what this scaling lacks.
        dtype: Type of the numbers.
        largest_difference: How far the update of a matrix is from the trained one, at most, relative to its norm.
        differs_by: What else lies between the trained model and this file beside its base; empty if nothing does.
        held_out: Loss in lorafit.
        llamacpp: Base and file as their users run them.
    """

    lorafit: str
    source: str
    method: str
    base: FileRecord
    output: FileRecord
    architecture: str
    alpha: float
    ranks: dict[int, int]
    folded: int
    dtype: str
    largest_difference: float
    differs_by: list[str]
    held_out: BesideLoss | NotMeasured
    llamacpp: InLlamaCpp | NotMeasured

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def as_json(self) -> str:
        """The document that lies beside the file."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


def export_gguf_lora(
    source: str | Path,
    written: Path,
    dtype: str,
    *,
    name: str,
    base_model: str | None = None,
    tolerance: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> BesideCertificate:
    """Write an adapter for llama.cpp and prove that it is the one that was trained.

    Args:
        source: A run, or the directory of an adapter.
        written: The file to write; the caller makes it appear whole.
        dtype: F32 or F16.
        name: What the file will be called.
        base_model: The base; by default where the adapter says.
        tolerance: By how much base and file may have a larger held-out loss than the run, in nats per token; 0.05 if
            missing.
        say: Is told what is going on.

    Raises:
        ConfigError: There are no held-out rows for ``tolerance``.
        AdapterError: llama.cpp cannot represent the adapter.
        MergeError: What was written is not what should have been, or llama.cpp cannot run it.
        LorafitError: The adapter or its base cannot be loaded.
    """
    source = Path(source)
    run = source if (source / "adapter").is_dir() else None
    _check_kind((source / "adapter" if run else source) / CONFIG_FILE)
    config = TrainConfig(**read_settings(run / "config.yaml")) if run else None
    base, record = load_adapted(source, base_model, compute=config.compute if config else "auto")
    architecture, family = _family(base)
    pieces = gguf_lora.pieces_of(base.model, family)
    origin = FileRecord(base.path.name, record.base_sha256 or fingerprint(base.path), _size(base.path))
    say(f"writing {len(pieces)} pairs of matrices")
    notes: dict[str, Value] = {
        "general.name": source.resolve().name,
        "general.base_model.count": 1,
        "general.base_model.0.name": base.path.stem,
        "lorafit.base.sha256": origin.sha256,
    }
    gguf_lora.write_gguf_lora(written, pieces, architecture, dtype, notes)
    found = gguf_lora.read_gguf_lora(written, pieces)
    alpha, differs_by = gguf_lora.common_alpha(pieces), differences(base, dtype)
    rows = source / HELD_OUT_FILE
    examples = read_examples(rows) if run and rows.is_file() else []
    documents = encode_all(examples, base.tokenizer)
    if config and examples:
        say(f"measuring run and file on {len(examples)} held-out rows")
    elif tolerance is not None:
        raise ConfigError(
            f"--certificate-tolerance has no effect: {source} has no held-out rows to measure the loss on"
        )
    held_out = _compare_losses(base, config, found, documents) if config and examples else NO_ROWS
    if isinstance(held_out, BesideLoss):
        _check_loss(held_out, DEFAULT_TOLERANCE if tolerance is None else tolerance, name)
    base.check_unchanged()
    return BesideCertificate(
        lorafit=__version__,
        source=source.resolve().name,
        method=record.config.method,
        base=origin,
        output=FileRecord(name, fingerprint(written), _size(written)),
        architecture=architecture,
        alpha=alpha,
        ranks=dict(sorted(Counter(piece.rank for piece in pieces).items())),
        folded=sum(piece.missing_factor(alpha) != 1.0 for piece in pieces),
        dtype=dtype,
        largest_difference=gguf_lora.largest_difference(pieces, found),
        differs_by=differs_by,
        held_out=held_out,
        llamacpp=_run_in_llamacpp(base, written, name, examples, documents, say),
    )


def _check_kind(path: Path) -> None:
    """What is not a low-rank update of matrices is refused before anything is loaded."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # whoever loads the adapter says what is wrong with it
    for name in _NOT_LORA:
        if isinstance(fields, dict) and fields.get(name):
            raise AdapterError(
                f"{path}: {name} is set, and a GGUF-LoRA holds low-rank updates of matrices only; merge the adapter"
            )


def _family(base: Base) -> tuple[str, Family]:
    if base.path.is_dir():
        family = family_of_model(base.model.config.model_type, str(base.path))
    else:
        family = family_of_file(GGUFFile.open(base.path).metadata, str(base.path))
    return family.architecture, family


def _size(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def differences(base: Base, dtype: str) -> list[str]:
    """What lies between a trained model and its adapter as plain LoRA in a type beside the base's file."""
    found = [f"rounding of the adapter to {dtype}"] if dtype != "F32" else []
    offsets = [module for module in adapter_modules(base.model).values() if isinstance(module, QALoRALinear)]
    if offsets:
        found.append(
            f"rounding of the trained offsets of {len(offsets)} tensors to half precision, which a merged model has "
            "and an adapter has not"
        )
    promoted = sum(module.promoted is not None for module in offsets)
    if promoted:
        found.append(f"promotion of {promoted} tensors, which were trained in another format than the base has")
    if base.quantize:
        found.append(f"the base: it was quantised to {base.quantize} for training")
    return found


def _compare_losses(
    base: Base, config: TrainConfig, found: Sequence[gguf_lora.Piece], documents: Sequence[Document]
) -> BesideLoss:
    """The loss of the run, then, with the adapter replaced for good, that of the file."""
    context = base.model.config.max_position_embeddings
    documents = fit_length(documents, min(config.max_length or context, context), config.truncate)
    batches = split_passes(documents, config.pass_tokens)
    of_run = evaluate(base.model, batches)
    gguf_lora.place(base.model, found)
    of_file = evaluate(base.model, batches)
    compute = str(base.compute).removeprefix("torch.")
    return BesideLoss(of_run.loss, of_file.loss, len(documents), of_run.tokens, compute)


def _check_loss(measured: BesideLoss, tolerance: float, name: str) -> None:
    if not measured.file_loss <= measured.run_loss + tolerance:
        raise MergeError(
            f"{name} is not kept: beside its base it has a held-out loss of {measured.file_loss:.4f}, the run one of "
            f"{measured.run_loss:.4f}, which is more than --certificate-tolerance {tolerance:g} apart; merge the run"
        )


def _run_in_llamacpp(
    base: Base,
    written: Path,
    name: str,
    examples: Sequence[Example],
    documents: Sequence[Document],
    say: Callable[[str], None],
) -> InLlamaCpp | NotMeasured:
    if base.path.is_dir():
        return NotMeasured(f"{base.path.name} is no GGUF file, and llama.cpp runs nothing else")
    if available():
        say("running the base in llama.cpp, alone and with the adapter")
    return run_in_llamacpp(base.path, written, name, examples, documents, beside=True)
