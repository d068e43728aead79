"""Fine-tune a 4-bit GGUF as it lies in the file, and get a 4-bit GGUF back.

The names below are the whole public interface. Each is imported when it is first used (PEP 562), so that ``import
lorafit`` costs milliseconds and the command line starts at once, although most of them need torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafit import formats as formats
    from lorafit import nn as nn
    from lorafit.adapters.pretrained import attach as attach
    from lorafit.adapters.several import Adapters as Adapters
    from lorafit.commands.adapters import combine as combine
    from lorafit.commands.export import export as export
    from lorafit.commands.merge import merge as merge
    from lorafit.commands.train import train as train
    from lorafit.config import Combination as Combination
    from lorafit.config import LoRA as LoRA
    from lorafit.config import QALoRA as QALoRA
    from lorafit.config import QLoRA as QLoRA
    from lorafit.config import TrainConfig as TrainConfig
    from lorafit.models.load import load as load

# GNU's OpenMP, which torch loads, lets idle threads spin for milliseconds by default. On a machine that does anything
# else, each of the thousands of small parallel regions in a step then waits for a thread that lost its core: with one
# other busy process on two cores a training step took 20 times as long. This many spins last about 30 microseconds,
# more than the gap between two regions. It is read when torch is loaded, and whoever has set it keeps their value.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# oneDNN, which multiplies bfloat16 for torch, compiles code for every shape and by default keeps the last 1,024, and
# torch keeps as many descriptions of them. A pass with another number of tokens brings 25 to 40 new ones, of 0.9 MB and
# 0.3 MB. This many serve one layer after the other.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "48")
os.environ.setdefault("LRU_CACHE_CAPACITY", "48")

__version__ = "0.1.0.dev0"

# Name -> the module that defines it; a module that is public itself maps to None.
_HOME = {
    "Adapters": "lorafit.adapters.several",
    "Combination": "lorafit.config",
    "LoRA": "lorafit.config",
    "QALoRA": "lorafit.config",
    "QLoRA": "lorafit.config",
    "TrainConfig": "lorafit.config",
    "attach": "lorafit.adapters.pretrained",
    "combine": "lorafit.commands.adapters",
    "export": "lorafit.commands.export",
    "formats": None,
    "load": "lorafit.models.load",
    "merge": "lorafit.commands.merge",
    "nn": None,
    "train": "lorafit.commands.train",
}

__all__ = [
    "Adapters",
    "Combination",
    "LoRA",
    "QALoRA",
    "QLoRA",
    "TrainConfig",
    "__version__",
    "attach",
    "combine",
    "export",
    "formats",
    "load",
    "merge",
    "nn",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lorafit' has no attribute {name!r}")
    home = _HOME[name]
    value = getattr(import_module(home), name) if home else import_module(f"lorafit.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
