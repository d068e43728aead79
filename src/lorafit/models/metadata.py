"""The metadata of a GGUF file, read with care.

Every key of the file's architecture is either read, known to be of no effect, or refused by its name: a number that
llama.cpp computes with and lorafit does not know of would make another model, and nobody would see it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lorafit.errors import ModelError

# Keys that say something about a file and change nothing.
_WITHOUT_EFFECT = frozenset(
    {
        "vocab_size",  # the embedding's shape says it
        "tensor_data_layout",
        "attention.layer_norm_epsilon",  # for norms that no supported family has
        "rope.scaling.finetuned",
    }
)


class Metadata:
    """The keys of a file's architecture, read with checks, and remembered as read.

    Attributes:
        where: What messages start with.
        prefix: The architecture's, with its dot.
    """

    def __init__(self, values: Mapping[str, Any], architecture: str, where: str) -> None:
        self.where = where
        self.prefix = f"{architecture}."
        self._values = values
        self._read: set[str] = set()

    def get(self, key: str, kind: type, default: Any = None, *, zero: bool = False, optional: bool = False) -> Any:
        """A positive number.

        Args:
            key: Without the architecture's prefix.
            kind: int or float.
            default: For a key that is absent; None if it must not be.
            zero: Whether zero means absent.
            optional: Whether to give None if there is neither a value nor a default.

        Raises:
            ModelError: The key is missing or has a value that no model has.
        """
        self._read.add(key)
        value = self._values.get(self.prefix + key)
        if value is None or (zero and isinstance(value, int | float) and value == 0):
            value = default
        if value is None and optional:
            return None
        if value is None:
            raise ModelError(f"{self.where}: the metadata lack {self.prefix}{key}")
        possible = isinstance(value, int | kind) and not isinstance(value, bool)
        if not possible or not 0 < value < (2**31 if kind is int else math.inf):
            shown = value if possible else f"a {type(value).__name__}"
            raise ModelError(f"{self.where}: {self.prefix}{key} is {shown}, which no model has")
        return kind(value)

    def text(self, key: str, default: str) -> str:
        """A string, or whatever else stands there as one."""
        self._read.add(key)
        return str(self._values.get(self.prefix + key, default))

    def raw(self, key: str) -> Any:
        """Whatever stands there, or None."""
        self._read.add(key)
        return self._values.get(self.prefix + key)

    def check_rest(self, switches: Mapping[str, bool]) -> None:
        """Refuse what was not read and may have an effect.

        Args:
            switches: Keys of which one value has none.

        Raises:
            ModelError: There is such a key.
        """
        switches = {"attention.causal": True, **switches}
        for name, value in self._values.items():
            key = name.removeprefix(self.prefix)
            if name == key or key in self._read:
                continue
            if key in switches:
                harmless = value is switches[key]
            else:  # what is zero, false or empty is switched off
                harmless = key in _WITHOUT_EFFECT or (isinstance(value, int | float | str) and not value)
            if not harmless:
                shown = value if isinstance(value, int | float) else f"a {type(value).__name__}"
                raise ModelError(
                    f"{self.where}: {name} ({shown}) is not supported; it may change what the model computes"
                )
