"""What stands where a linear layer or an embedding stood."""

from lorafit.modules.adapter import AdapterModule, adapter_modules, adapters_disabled
from lorafit.modules.attach import attach
from lorafit.modules.coverage import Coverage, Promotion
from lorafit.modules.dora import DoRALinear
from lorafit.modules.experts import DenseExperts, Experts, PackedExperts
from lorafit.modules.lora import LoRALinear
from lorafit.modules.lora_embedding import LoRAEmbedding
from lorafit.modules.lora_experts import LoRAExperts
from lorafit.modules.packed import PackedEmbedding, PackedLinear, PackedWeight
from lorafit.modules.qalora import QALoRALinear
from lorafit.modules.whole import TrainedCopy, TrainedTokens, WholeModule

__all__ = [
    "AdapterModule",
    "Coverage",
    "DenseExperts",
    "DoRALinear",
    "Experts",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRALinear",
    "PackedEmbedding",
    "PackedExperts",
    "PackedLinear",
    "PackedWeight",
    "Promotion",
    "QALoRALinear",
    "TrainedCopy",
    "TrainedTokens",
    "WholeModule",
    "adapter_modules",
    "adapters_disabled",
    "attach",
]
