"""What a model does to its head's output: a step between the last product and the softmax that some families have.

Granite divides logits by a constant, and Gemma caps them: cap·tanh(logits/cap). transformers does it inside a whole
model's forward pass. Whoever runs the head alone, as the chunked loss does, must do it too, or trains another model.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel


def finish_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """Logits as the model gives them, from its head's output: [..., vocabulary], same shape and type."""
    scaling = getattr(model.config, "logits_scaling", None)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if scaling is not None:
        logits = logits / scaling
    return logits if cap is None else (logits / cap).tanh() * cap
