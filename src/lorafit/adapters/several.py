"""Many adapters on one base.

Each adapter is a set of modules that stand in for layers of the base. Those of all adapters are made once, around the
same layers, and kept; using an adapter puts its modules into the model and takes those of the last one out. So there is
one base, however many adapters there are, ranks and methods and adapted layers may differ, nothing is computed or
copied at a switch, and what is not in use is not among the model's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from lorafit.adapters.belonging import check_name
from lorafit.adapters.combine import base_difference
from lorafit.adapters.load import load_adapter
from lorafit.adapters.peft import AdapterRecord, read_record
from lorafit.adapters.pretrained import attach, origin_of, record_of
from lorafit.adapters.updates import adapter_directory
from lorafit.config import AdapterConfig, LoRA
from lorafit.errors import AdapterError, ConfigError
from lorafit.modules import AdapterModule, Coverage, LoRALinear, adapter_modules
from lorafit.modules.lora_rows import LoRARows


@dataclass(frozen=True)
class _Placed:
    """What stands in the model.

    Attributes:
        modules: Full name -> adapter.
        saves: What ``model.save_pretrained`` is with it, where that writes the adapter.
        name: What it is called, if it has a name.
    """

    modules: Mapping[str, AdapterModule]
    saves: Callable[..., None] | None = None
    name: str | None = None


class Adapters:
    """The adapters of a model, by name.

    Args:
        model: A base, or a model with an adapter.
        name: What an adapter that the model has already is called.
    """

    def __init__(self, model: nn.Module, name: str = "default") -> None:
        self.model = model
        self._named: dict[str, _Placed] = {}
        self._now = _Placed({})
        if modules := adapter_modules(model):
            self._now = self._named[name] = _Placed(modules, model.__dict__.get("save_pretrained"), name)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, in the order in which they came."""
        return tuple(self._named)

    @property
    def active(self) -> str | None:
        """The name of the adapter in use; None for the base, and where rows have adapters of their own."""
        return self._now.name

    def add(self, name: str, source: str | Path | AdapterConfig) -> Coverage:
        """Put an adapter beside the others; the one in use stays in use.

        Args:
            name: What to call it.
            source: Directory of an adapter that lorafit or PEFT wrote, or of a run; or the settings of a new one, which
                is to be trained and starts as the base.

        Returns:
            What it covers.

        Raises:
            AdapterError: The name is taken, or the adapter was trained on another base or does not fit.
            ConfigError: The source is neither a directory nor settings.
            MissingFileError: It is not there.

        Warns:
            LorafitWarning: Nothing but the shapes of its tensors says that it was trained on this base.
        """
        if name in self._named:
            raise AdapterError(f"there is an adapter {name!r} already; remove it, or choose another name")
        if not isinstance(source, str | Path | AdapterConfig):
            raise ConfigError(
                f"the adapter {name!r} is to come from a directory or from settings such as lorafit.LoRA(rank=16), but "
                f"was given as {type(source).__name__}"
            )
        if isinstance(source, str | Path):
            source = adapter_directory(source)
            self._check_base(read_record(source), source)
        before = self._current()
        self._place(_Placed({}))
        try:
            coverage = load_adapter(self.model, source)[1] if isinstance(source, Path) else attach(self.model, source)
            self._named[name] = _Placed(adapter_modules(self.model), self.model.__dict__.get("save_pretrained"), name)
        finally:
            self._place(before)
        return coverage

    def use(self, name: str | None) -> None:
        """Let the model compute with an adapter, or with None as the base does.

        Raises:
            AdapterError: There is no adapter of this name.
        """
        self._current()
        self._place(_Placed({}) if name is None else self._find(name))

    def remove(self, name: str) -> None:
        """Forget an adapter; if it is in use, the base is used from here on.

        Raises:
            AdapterError: There is no adapter of this name.
        """
        self._find(name)
        if name == self.active:
            self.use(None)
        del self._named[name]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes what the base computes, unless an adapter is put to use there.

        Afterwards it computes what it did before, whatever that was; if that adapter was removed, what the base does.
        """
        with self._instead(_Placed({})):
            yield

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, each row of a batch is computed with an adapter of its own; afterwards all is as it was before.

        Batches have the shape [rows, tokens], padded as ever. Beams and several sequences for one prompt are rows too.

        Args:
            names: For each row the name of its adapter, or None for the base.

        Raises:
            AdapterError: There is no adapter of a name, or it is not plain LoRA, or has dropout and the model is in
                training mode.
            ConfigError: There are no names.
        """
        if not names:
            raise ConfigError("rows takes the name of an adapter for each row of the batches, but was given none")
        used = {name: self._plain(name) for name in dict.fromkeys(names) if name is not None}
        modules: dict[str, AdapterModule] = {}
        for layer in dict.fromkeys(layer for placed in used.values() for layer in placed):
            those = [name for name, placed in used.items() if layer in placed]
            picked = [those.index(name) if name in those else None for name in names]
            adapters = [used[name][layer] for name in those]
            modules[layer] = LoRARows(adapters[0].base, adapters, picked)
        with self._instead(_Placed(modules, _refuse_to_save)):
            yield

    @contextmanager
    def _instead(self, placed: _Placed) -> Iterator[None]:
        """Inside, something else stands in the model; afterwards what did before, unless it was removed."""
        before = self._current()
        self._place(placed)
        try:
            yield
        finally:
            is_there = before.name is None or self._named.get(before.name) is before
            self._place(before if is_there else _Placed({}))

    def _find(self, name: str) -> _Placed:
        if name not in self._named:
            known = f"there are {', '.join(self._named)}" if self._named else "none was added"
            raise AdapterError(f"there is no adapter {name!r}; {known}")
        return self._named[name]

    def _plain(self, name: str) -> dict[str, LoRALinear]:
        """The modules of an adapter that rows can have."""
        result = {}
        for layer, module in self._find(name).modules.items():
            if not isinstance(module, LoRALinear):
                kind = type(module).__name__
                raise AdapterError(
                    f"rows of one batch can have different adapters of plain LoRA only, but {name!r} has a {kind} at "
                    f"{layer}; compute its rows as a batch of their own"
                )
            if module.dropout and self.model.training:
                raise AdapterError(
                    f"{name!r} was trained with dropout, which rows of their own do not have; call model.eval()"
                )
            result[layer] = module
        return result

    def _current(self) -> _Placed:
        """What stands in the model, if it is what was put there from here."""
        if adapter_modules(self.model) != self._now.modules:
            raise AdapterError(
                "the model has adapters that were attached or taken off elsewhere, and would be lost; to train a new "
                "one beside others, add it by its settings"
            )
        return self._now

    def _place(self, placed: _Placed) -> None:
        """Put modules into the model in place of those that are there."""
        for layer, module in adapter_modules(self.model).items():
            self.model.set_submodule(layer, module.base)
        for layer, module in placed.modules.items():
            # The mode may have changed while it was out. (Setting it anew would release offsets that are held.)
            if module.training != module.base.training:
                module.train(module.base.training)
            self.model.set_submodule(layer, module)
        self.model.__dict__.pop("save_pretrained", None)
        if placed.saves is not None:
            object.__setattr__(self.model, "save_pretrained", placed.saves)
        self._now = placed

    @cached_property
    def _base(self) -> AdapterRecord:
        """What an adapter of this base would say of it."""
        return record_of(self.model, LoRA())

    def _check_base(self, record: AdapterRecord, directory: Path) -> None:
        if record.base_sha256 and self._base.base_sha256:
            if difference := base_difference(self._base, record):
                raise AdapterError(f"{directory} was not trained on the base of this model: {difference}")
        else:
            origin = origin_of(self.model)
            check_name(record, Path(origin.path if origin else self._base.base), directory)


def _refuse_to_save(*_: object, **__: object) -> None:
    raise AdapterError(
        "rows have different adapters here; leave the context in which they do, use one of them, and save that"
    )
