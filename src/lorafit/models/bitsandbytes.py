"""Checkpoints that bitsandbytes quantised, read without it.

A matrix in 4 bits lies in the file as ``NAME.weight`` (codes, two to a byte, in an integer or other type of any size),
``.absmax``, ``.quant_map`` (the table) and ``.quant_state.bitsandbytes__nf4`` or ``__fp4`` (JSON as bytes: block size,
shape and so on). With double quantisation ``.absmax`` holds codes of 8 bits, and ``.nested_absmax``,
``.nested_quant_map`` and two entries of the JSON say what they mean. lorafit's blocks hold the same numbers in another
order: codes and scale of a block beside each other (`lorafit.formats.nf4`).

bitsandbytes cuts the whole matrix into blocks, lorafit each row. Where a row is a multiple of 64, these are the same
blocks; a larger block is several of 64 with one scale. What remains (odd widths, blocks of 32), and matrices in 8 bits
(``.weight`` and ``.SCB``, the scale of each row), is unpacked once and kept in the compute dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import ModelError
from lorafit.formats import block_format, finite
from lorafit.formats.nf4 import DYNAMIC
from lorafit.modules import PackedWeight

_STATE = ".quant_state.bitsandbytes__"
_COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_BLOCK, _SHARED = 64, 256


@dataclass(frozen=True)
class BitsAndBytes:
    """The quantised matrices of a checkpoint.

    Attributes:
        where: The checkpoint, for errors.
        names: All names in it.
        read: Reads the tensor of a name.
    """

    where: object
    names: Collection[str]
    read: Callable[[str], Tensor]

    def holds(self, name: str) -> bool:
        """Whether the matrix called ``name`` is quantised."""
        return bool(self.companions(name))

    def companions(self, name: str) -> list[str]:
        """Names of the tensors that belong to the matrix ``name`` besides itself."""
        owner = name.removesuffix("weight")
        mine = [f"{name}{_STATE}{kind}" for kind in ("nf4", "fp4")] + [f"{name}.{part}" for part in _COMPANIONS]
        return [key for key in (*mine, f"{owner}SCB", f"{owner}weight_format") if key in self.names]

    def load(self, name: str, shape: tuple[int, ...]) -> PackedWeight | Tensor:
        """A matrix in blocks, or, where its layout fits none, its weights in float32.

        Raises:
            ModelError: The checkpoint is not in the layout that this module describes.
        """
        states = [key for key in self.companions(name) if _STATE in key]
        loaded = self._load_4bit(name, states[0], shape) if states else self._load_8bit(name, shape)
        if isinstance(loaded, Tensor):
            sound = bool(loaded.isfinite().all())
        else:
            sound = finite(loaded.blocks, loaded.format_name, loaded.constants)
        if not sound:
            raise ModelError(f"{self.where}: {name} has scales that are not finite; fetch the model again")
        return loaded

    def _load_8bit(self, name: str, shape: tuple[int, ...]) -> Tensor:
        owner = name.removesuffix("weight")
        weight, scale = self._get(name), self._get(f"{owner}SCB")
        layout = self._get(f"{owner}weight_format") if f"{owner}weight_format" in self.names else torch.zeros(())
        if weight.dtype != torch.int8 or tuple(weight.shape) != shape or scale.shape != shape[:1] or layout != 0:
            raise self._broken(name)
        return weight.float() * scale.float().unsqueeze(1) * (1 / 127)

    def _load_4bit(self, name: str, state_name: str, shape: tuple[int, ...]) -> PackedWeight | Tensor:
        state = self._state(state_name)
        kind = {"nf4": "NF4", "fp4": "FP4"}.get(state.get("quant_type", ""))
        block = state.get("blocksize")
        codes = self._get(name).reshape(-1).view(torch.uint8)
        weights = shape[0] * shape[1]
        sound = kind is not None and isinstance(block, int) and block > 0 and list(shape) == state.get("shape")
        if not sound or len(codes) != -(-weights // 2):
            raise self._broken(name)
        assert kind is not None and isinstance(block, int)
        table = _table(kind)
        self._check_map(f"{name}.quant_map", table)
        absmax = self._get(f"{name}.absmax").reshape(-1)
        if len(absmax) != -(-weights // block):
            raise self._broken(name)
        whole = shape[1] % _BLOCK == 0
        if f"{name}.nested_absmax" in self.names:
            constants = self._constants(name, state, len(absmax))
            if whole and block == _BLOCK:
                blocks = torch.cat((absmax.unsqueeze(1), codes.view(-1, _BLOCK // 2)), dim=1)
                return PackedWeight(blocks.view(shape[0], -1), f"{kind}_DQ", constants=constants, name=name)
            shared = constants[1:].repeat_interleave(_SHARED)[: len(absmax)]
            absmax = DYNAMIC[absmax.int()] * shared + constants[0]
        absmax = absmax.float()
        if whole and block % _BLOCK == 0:
            scales = absmax.repeat_interleave(block // _BLOCK)[: weights // _BLOCK].unsqueeze(1).contiguous()
            blocks = torch.cat((scales.view(torch.uint8), codes.view(-1, _BLOCK // 2)), dim=1)
            return PackedWeight(blocks.view(shape[0], -1), kind, name=name)
        nibbles = torch.stack((codes >> 4, codes & 15), dim=1).flatten()[:weights]
        return (table[nibbles.int()] * absmax.repeat_interleave(block)[:weights]).view(shape)

    def _constants(self, name: str, state: dict[str, Any], blocks: int) -> Tensor:
        """The mean of the absmax and the scales of their codes, as lorafit's double-quantised formats have them."""
        self._check_map(f"{name}.nested_quant_map", DYNAMIC)
        scales = self._get(f"{name}.nested_absmax").float().reshape(-1)
        mean = state.get("nested_offset")
        if (
            state.get("nested_blocksize") != _SHARED
            or len(scales) != -(-blocks // _SHARED)
            or not isinstance(mean, int | float)
        ):
            raise self._broken(name)
        return torch.cat((torch.tensor([mean]), scales))

    def _state(self, name: str) -> dict[str, Any]:
        try:
            state = json.loads(bytes(self._get(name).tolist()))
        except (ValueError, TypeError):
            state = None
        if not isinstance(state, dict):
            raise self._broken(name)
        return state

    def _check_map(self, name: str, table: Tensor) -> None:
        if not torch.equal(self._get(name).float().reshape(-1), table):
            raise ModelError(f"{self.where}: {name} is not bitsandbytes' own table, and lorafit reads no other")

    def _get(self, name: str) -> Tensor:
        if name not in self.names:
            raise ModelError(f"{self.where}: {name} is missing from a matrix that bitsandbytes quantised")
        return self.read(name)

    def _broken(self, name: str) -> ModelError:
        return ModelError(f"{self.where}: {name} is not in a layout of bitsandbytes that lorafit reads")


def _table(kind: str) -> Tensor:
    """The 16 values that a code means: what a block of scale 1 with the codes 0 to 15 unpacks to."""
    absmax = torch.ones(1).view(torch.uint8)
    pairs = torch.arange(0, 16, 2, dtype=torch.uint8)
    block = torch.cat((absmax, pairs << 4 | pairs + 1, torch.zeros(24, dtype=torch.uint8)))
    return block_format(kind).unpack(block.unsqueeze(0))[0, :16]
