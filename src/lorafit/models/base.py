"""A base model with what is known about where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafit.config import Quantize
from lorafit.containers.stamp import Stamp, changed_file
from lorafit.errors import ModelError


@dataclass(frozen=True)
class Base:
    """A loaded base model.

    Attributes:
        model: A transformers model in evaluation mode, frozen.
        tokenizer: Its tokenizer, with the chat template.
        path: The GGUF file or the directory that it came from.
        compute: Arithmetic type.
        stamp: What its files looked like when they were opened.
        licence: Its licence, as the file says.
        quantize: What its linear layers were quantised to while it was loaded; None if they are as in its files.
        kept: Linear layers that this left as they were -> why.
        origin: The quantised file that its weights were computed from, where they were; None for an original.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: Path
    compute: torch.dtype
    stamp: Stamp
    licence: str = "not stated"
    quantize: Quantize | None = None
    kept: Mapping[str, str] = field(default_factory=dict)
    origin: str | None = None

    def check_unchanged(self) -> None:
        """Refuse to go on with a base that somebody wrote to; looks at sizes and times only.

        Raises:
            ModelError: A file is not as it was when it was opened.
        """
        file = changed_file(self.path, self.stamp)
        if file is not None:
            raise ModelError(
                f"{file} changed after it was loaded (its size or its time), so what was computed with it is not to be "
                "trusted; put the original back and run this again (a run goes on from its last checkpoint by --resume)"
            )

    @property
    def second_quantization(self) -> str | None:
        """The file whose quantised weights were quantised once more, if that was done."""
        return self.origin if self.quantize else None
