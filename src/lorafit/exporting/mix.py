"""Which tensor gets which block format: the rules of llama.cpp's quantiser for the types that lorafit writes.

Vectors, the routers of experts and the factors of rotary embeddings stay float32. In a quantised type other than Q8_0,
the output head (the embedding, where that is the head as well) is Q6_K. The mixes Q4_K_M and Q5_K_M give more bits to
where they are worth most: to the values (with queries and keys, where these are one matrix) and the second matrix of
the MLP, in the first and the last eighth of the layers and in every third between.

A row is a whole number of blocks. Where rows are too short for 256 weights, a format of blocks of 32 with as many bits
or more takes the place: Q5_0 for Q4_K, Q5_1 for Q5_K, Q8_0 for Q6_K; and where even 32 do not fit, F16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from lorafit.config import GGUFType
from lorafit.formats import block_format

_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_EXPERTS_OF_MIXTRAL = 8
_LAYERS_OF_70B = 80
_ALWAYS_FLOAT = ("ffn_gate_inp.weight", "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Numbers of llama.cpp's file types. Those of Q4_K and Q5_K without a mix it calls small.
_FILE_TYPES: dict[GGUFType, int] = {
    **{"f32": 0, "f16": 1, "bf16": 32, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q8_0": 7},
    **{"q4_k": 14, "q4_k_m": 15, "q5_k": 16, "q5_k_m": 17, "q6_k": 18},
}
assert _FILE_TYPES.keys() == set(get_args(GGUFType))


@dataclass(frozen=True)
class Mix:
    """The rules for one model.

    Attributes:
        type: What was asked for.
        layers: How many layers the model has.
        head: Name of the tensor that is the output head.
        experts: How many experts it has; 0 for a model without.
        shares_keys: Whether it has fewer key heads than heads.
    """

    type: GGUFType
    layers: int
    head: str
    experts: int
    shares_keys: bool

    @property
    def file_type(self) -> int:
        """What ``general.file_type`` says."""
        return _FILE_TYPES[self.type]

    def format_of(self, name: str, shape: tuple[int, ...]) -> tuple[str, str]:
        """The format of a tensor, and the one that it would have if its rows were long enough."""
        if len(shape) == 1 or name.endswith(_ALWAYS_FLOAT):
            return "F32", "F32"
        wanted = self._wanted(name)
        found = wanted
        if shape[-1] % block_format(found).elements:
            found = _FALLBACKS.get(found, found)
        if shape[-1] % block_format(found).elements:
            found = "F16"
        return found, wanted

    def _wanted(self, name: str) -> str:
        usual = self.type.removesuffix("_m").upper()
        if block_format(usual).elements == 1:
            return usual
        if name == self.head:
            return "Q8_0" if usual == "Q8_0" else "Q6_K"
        part = name.split(".")[2] if name.startswith("blk.") else ""
        is_mix = self.type.endswith("_m")
        if part in ("attn_v", "attn_qkv"):
            if self.experts == _EXPERTS_OF_MIXTRAL:
                return "Q8_0"
            if is_mix and self._matters(int(name.split(".")[1])):
                return "Q6_K"
            is_70b = self.layers == _LAYERS_OF_70B and self.shares_keys
            return "Q5_K" if usual == "Q4_K" and is_70b else usual
        if part == "attn_k" and self.experts == _EXPERTS_OF_MIXTRAL:
            return "Q8_0"
        if part.startswith("ffn_down") and is_mix and self._matters(int(name.split(".")[1])):
            return "Q6_K"
        if part == "attn_output" and self.experts == _EXPERTS_OF_MIXTRAL and usual == "Q4_K":
            return "Q5_K"
        return usual

    def _matters(self, layer: int) -> bool:
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2
