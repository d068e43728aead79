"""What stands where a linear layer or an embedding stood."""

from lorafit.modules.adapter import AdapterModule, adapter_modules, adapters_disabled
from lorafit.modules.attach import Coverage, attach
from lorafit.modules.lora import LoRALinear
from lorafit.modules.packed import PackedEmbedding, PackedLinear, PackedWeight
from lorafit.modules.qalora import QALoRALinear

__all__ = [
    "AdapterModule",
    "Coverage",
    "LoRALinear",
    "PackedEmbedding",
    "PackedLinear",
    "PackedWeight",
    "QALoRALinear",
    "adapter_modules",
    "adapters_disabled",
    "attach",
]
