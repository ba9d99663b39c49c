"""A torch model run in float64 with the weights of one layer at a time.

Between a layer's calls its parameters are one NaN each, seen in the parameter's shape: they take no memory, and a layer
that computed with one would show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# A parameter's value by its names in the model (a module may stand in several places); None where nobody has one.
Value = Callable[[tuple[str, ...]], Tensor | None]
Slot = tuple[nn.Module, str, tuple[str, ...]]


class Streamed:
    """``model``, whose parameters are asked for when their layer is called, and forgotten afterwards."""

    def __init__(self, model: nn.Module, value: Value) -> None:
        self._value = value
        self._slots = list(_slots(model))
        _widen_buffers(model)
        for slot in self._slots:
            _empty(slot)
        by_module: dict[int, list[Slot]] = {}
        for slot in self._slots:
            by_module.setdefault(id(slot[0]), []).append(slot)
        for unit, modules in _units(model):
            own = [slot for module in modules for slot in by_module.get(id(module), ())]
            if own:
                unit.register_forward_pre_hook(lambda *_, own=own: self._fill(own))
                unit.register_forward_hook(lambda *_, own=own: self._empty(own), always_call=True)
        self._held = False

    def run(self, call: Callable[[], Tensor]) -> Tensor:
        """What ``call`` gives, which runs the model.

        A model that reads a layer's weights without calling it is run again with all of them in memory.
        """
        with torch.no_grad():
            output = call()
            if not bool(output.isnan().any()):
                return output
            self._fill(self._slots)
            self._held = True
            try:
                return call()
            finally:
                self._held = False
                self._empty(self._slots)

    def _fill(self, slots: list[Slot]) -> None:
        if self._held:
            return
        for module, attribute, names in slots:
            value = self._value(names)
            if value is not None:
                module._parameters[attribute] = nn.Parameter(value.double(), requires_grad=False)

    def _empty(self, slots: list[Slot]) -> None:
        if not self._held:
            for slot in slots:
                _empty(slot)


def _slots(model: nn.Module) -> Iterator[Slot]:
    """Each parameter of each module, once, with all of its names."""
    names: dict[tuple[int, str], list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        modules[id(module)] = module
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault((id(module), attribute), []).append(f"{path}.{attribute}" if path else attribute)
    for (identity, attribute), found in names.items():
        yield modules[identity], attribute, tuple(found)


def _units(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Modules whose weights are in memory together, and the modules that they hold: a layer of a stack as a whole."""
    pending: list[tuple[nn.Module, bool]] = [(model, False)]
    seen: set[int] = set()
    while pending:
        module, stacked = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if stacked or isinstance(module, nn.MultiheadAttention):
            yield module, list(module.modules())
            continue
        yield module, [module]
        in_stack = isinstance(module, nn.ModuleList)
        pending.extend((child, in_stack) for child in module.children())


def _empty(slot: Slot) -> None:
    module, attribute, _ = slot
    shape: Any = module._parameters[attribute].shape  # type: ignore[union-attr]
    nothing = torch.full((1,) * len(shape) or (), torch.nan, dtype=torch.float64).expand(shape)
    module._parameters[attribute] = nn.Parameter(nothing, requires_grad=False)


def _widen_buffers(model: nn.Module) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.double()
