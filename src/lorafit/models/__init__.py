"""From a name or a file to a model and its tokenizer.

Whoever imports models of transformers imports torch's compiler with them, and that imports Triton where it is installed
beside torch: 70 MB and half a second for kernels of a GPU. Where there is none, the compiler is imported as if Triton
were missing. That is undone at once: whoever asks for Triton afterwards gets it.
"""

import sys
from importlib import import_module

import torch


def _import_compiler() -> None:
    if torch.accelerator.is_available() or {"triton", "torch._dynamo"} & set(sys.modules):
        return
    sys.modules["triton"] = None  # type: ignore[assignment]  # Python's mark for what cannot be imported
    try:
        import_module("torch._dynamo")
        from torch.utils._triton import has_triton_package
    except ImportError:  # a torch whose parts have other names
        return
    finally:
        del sys.modules["triton"]
    has_triton_package.cache_clear()  # it remembers


_import_compiler()
