"""How much memory training may use, and how much this process has used at most.

A backward pass needs what the forward pass computed. ``high`` keeps it. ``lowest`` keeps the input of each decoder
layer only and computes the layer once more when its turn comes in the backward pass (arXiv 1604.06174): memory for the
activations of one layer instead of all, for about a third more work.
"""

from __future__ import annotations

import sys
from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lorafit.config import Memory


def peak_rss_bytes() -> int | None:
    """Peak resident memory of this process, mapped files included; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return int(peak if sys.platform == "darwin" else peak * 1024)


def keep_activations(model: PreTrainedModel, memory: Memory) -> None:
    """Set what a training step keeps for its backward pass; the gradients are the same, to the bit.

    Args:
        model: The model, whose decoder layers are those of transformers.
        memory: ``high`` keeps everything, ``lowest`` each layer's input.
    """
    again = partial(checkpoint, use_reentrant=False)
    # Not by the model's own switch, which also asks for the gradient of the embeddings that nothing needs.
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = memory == "lowest"
            layer._gradient_checkpointing_func = again  # type: ignore[assignment]  # mypy takes it for a module
