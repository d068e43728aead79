"""Whether an adapter belongs to a base.

An adapter that lorafit wrote holds a hash of its base's tensors, and goes with no other. One of PEFT's only names it,
and the name of a file in another format says little: then shapes are all that can be compared, and the user is told.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from lorafit.adapters.peft import AdapterRecord
from lorafit.config import Quantize
from lorafit.errors import AdapterError, ConfigError, LorafitWarning

# What the names of files say beside that of the model.
_FORMAT = re.compile(r"[-_.](?:i?q\d\w*|b?f16|f32|fp16|fp32|nf4|gguf)$", re.IGNORECASE)


def check_base(record: AdapterRecord, base: Path, directory: str | Path) -> None:
    """Refuse another base than the one that an adapter was trained on.

    Args:
        record: What the adapter says.
        base: The file or directory of the base.
        directory: Where the adapter lies, for messages.

    Raises:
        AdapterError: It was trained on another base.

    Warns:
        LorafitWarning: That cannot be told.
    """
    if record.base_sha256:
        if not record.fits(base):
            raise AdapterError(
                f"{base} is not what {directory} was trained on (its tensors have another hash): it was changed "
                "or replaced; put the original back, or train anew"
            )
    else:
        check_name(record, base, directory)


def check_name(record: AdapterRecord, base: Path, directory: str | Path) -> None:
    """Tell the user if there is no hash to go by, and the name that an adapter gives its base is not that of the base.

    Warns:
        LorafitWarning: So it is.
    """
    if not _same_name(record.base, base):
        named = f"names {record.base} as its base" if record.base else "does not name its base"
        warnings.warn(
            f"{directory} {named} and holds no hash of it, so only the shapes of its tensors say that it belongs to "
            f"{base}",
            LorafitWarning,
            stacklevel=4,
        )


def quantization_of(record: AdapterRecord, asked: Quantize | None, directory: str | Path) -> Quantize | None:
    """What a base is to be quantised to for an adapter: as the adapter says, or where that is silent as the user does.

    Raises:
        ConfigError: They differ.
    """
    if not record.base_sha256:
        return asked
    if asked not in (None, record.quantize):
        was = f"quantised to {record.quantize}" if record.quantize else "not quantised while it was loaded"
        raise ConfigError(f"--quantize {asked}: {directory} was trained on a base that was {was}; leave it out")
    return record.quantize


def _same_name(name: str, path: Path) -> bool:
    """Whether the last part of a base's name is that of the directory or file."""
    return bool(name) and _plain(name.rstrip("/").rpartition("/")[2]) == _plain(path.resolve().name)


def _plain(name: str) -> str:
    while (shorter := _FORMAT.sub("", name)) != name:
        name = shorter
    return re.sub(r"[^a-z0-9]", "", name.lower())
