"""What was and was not covered by adapters, and what that costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Promotion:
    """A tensor that is trained in another format than it has in the file.

    Attributes:
        source: Its format in the file.
        target: The format with block offsets that it is trained in.
        exact: Whether its weights stay the same to the last bit.
        source_bytes: Its bytes in the file.
        target_bytes: Its bytes while it is trained, in memory, and in the merged file.
    """

    source: str
    target: str
    exact: bool
    source_bytes: int
    target_bytes: int

    def __str__(self) -> str:
        return f"promoted from {self.source} to {self.target}, {'exact' if self.exact else 'rounded'}"


@dataclass(frozen=True)
class Coverage:
    """Which layers an adapter covers.

    Attributes:
        method: ``lora``, ``qlora`` or ``qalora``.
        wrapped: Full name -> number of trained parameters.
        frozen: Full name of whatever else has matrices -> why it is left as it is.
        formats: Full name -> block format or dtype of the frozen weight, for all of them.
        total_parameters: Parameters of the base, packed ones counted as weights.
        beside: Full name of a layer that has plain LoRA although the method is ``qalora`` -> why.
        promoted: Full name of a layer whose blocks were given offsets -> how, and what it costs.
        whole: Full name of a module that is trained itself, and not by an update of low rank -> how.
    """

    method: str
    wrapped: dict[str, int]
    frozen: dict[str, str]
    formats: dict[str, str]
    total_parameters: int
    beside: dict[str, str] = field(default_factory=dict)
    promoted: dict[str, Promotion] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)

    @property
    def trainable_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(self.wrapped.values())

    @property
    def promotion_bytes(self) -> int:
        """By how much promotion makes the merged file larger than the base."""
        return sum(promotion.target_bytes - promotion.source_bytes for promotion in self.promoted.values())

    @property
    def promoted_memory_bytes(self) -> int:
        """Bytes of promoted blocks, which are held in memory while the tensors in the file are not read."""
        return sum(promotion.target_bytes for promotion in self.promoted.values())

    def fate(self, name: str) -> str:
        """What became of a layer, in a few words."""
        if name in self.frozen:
            return f"frozen: {self.frozen[name]}"
        if name in self.beside:
            return f"trained by plain LoRA: {self.beside[name]}"
        if name in self.whole:
            return self.whole[name]
        return f"trained, {self.promoted[name]}" if name in self.promoted else "trained"

    def as_dict(self) -> dict[str, object]:
        """For ``summary.json``."""
        promoted = {name: asdict(promotion) for name, promotion in self.promoted.items()}
        return {
            "wrapped": self.wrapped,
            "promoted": promoted,
            "beside": self.beside,
            "whole": self.whole,
            "frozen": self.frozen,
            "formats": self.formats,
        }
