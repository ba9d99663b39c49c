"""LoRA in torch (Hu et al. 2021, arXiv 2106.09685, section 4.1): ``h = W0 · x + (α/r) · B · A · x``, with W0 frozen.

The factors are a module of their own below the layer they change, and join it by a forward hook: the model's other
parameters keep their names. Of fused projections (queries, keys and values in one matrix) the parts can be chosen, each
with an A and a B of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora.adapter import LowRank
from lora.errors import AdapterError
from lora.merging.delta import changed

CHILD = "lora"
SCALE = "embed_scale"  # by which transformers' scaled embeddings multiply what they look up


@dataclass(frozen=True)
class Injection:
    """Where LoRA goes, and how large it is.

    ``targets`` are names that module paths end in, such as ``query``, or one regular expression that a whole path
    matches. ``parts`` chooses the parts of a fused projection, such as (True, False, True) for queries and values.
    ``heads`` are modules that are trained whole. ``alpha`` divided by ``rank`` scales the update.
    """

    targets: tuple[str, ...] | str
    rank: int
    alpha: float
    dropout: float = 0.0
    parts: tuple[bool, ...] = (True,)
    heads: tuple[str, ...] = ()


class Lora(nn.Module):
    """The factors of one layer: A (parts · rank, in) and B (parts · out, rank).

    A starts random, as in the paper's code, and B at zero.

    In float32 whatever the layer's dtype. ``kept`` holds the layer's W0 while a merged weight stands in its place: in a
    tuple, so that torch does not take it for a parameter of this module.
    """

    def __init__(
        self, layer: nn.Module, rank: int, scaling: float, dropout: float = 0.0, parts: Sequence[bool] = (True,)
    ) -> None:
        super().__init__()
        out_features, in_features = _features(layer)
        self.rank, self.scaling, self.parts = rank, scaling, tuple(parts)
        self.transposed = not isinstance(layer, nn.Linear)  # an embedding and transformers' Conv1D store (in, out)
        self.drop = nn.Dropout(dropout)
        self.A = nn.Parameter(torch.empty(rank * sum(parts), in_features))
        self.B = nn.Parameter(torch.empty(out_features // len(parts) * sum(parts), rank))
        self.kept: tuple[nn.Parameter] | None = None
        self.reset(isinstance(layer, nn.Embedding))

    def reset(self, embedding: bool) -> None:
        """Start anew: the update is zero. Of an embedding the paper's code has A zero and B normal."""
        if embedding:
            nn.init.zeros_(self.A)
            nn.init.normal_(self.B)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
            nn.init.zeros_(self.B)

    def whole(self) -> Tensor:
        """B for the layer's whole output, of shape (out, parts · rank): each part's block, and zeros elsewhere."""
        if self.parts == (True,):
            return self.B
        blocks = iter(self.B.chunk(sum(self.parts)))
        size = self.B.shape[0] // sum(self.parts)
        rows, column = [], 0
        for chosen in self.parts:
            row = self.B.new_zeros(size, self.A.shape[0])
            if chosen:
                row = functional.pad(next(blocks), (column, self.A.shape[0] - column - self.rank))
                column += self.rank
            rows.append(row)
        return torch.cat(rows)

    def forward(self, layer: nn.Module, inputs: Tensor) -> Tensor:
        """``scaling · B · A`` of the layer's inputs."""
        low = (
            functional.embedding(inputs, self.A.T)
            if isinstance(layer, nn.Embedding)
            else functional.linear(self.drop(inputs.to(self.A.dtype)), self.A)
        )
        return functional.linear(low, self.whole()) * self.scaling

    def update(self, module: str) -> LowRank:
        """The change that a merge makes, as an adapter file would bring it."""
        a, b = (factor.detach().float().cpu().numpy() for factor in (self.A, self.whole()))
        return LowRank(module, a, b, a.shape[0], self.scaling, "transposed" if self.transposed else "linear")


def inject(model: nn.Module, injection: Injection) -> dict[str, Lora]:
    """Put LoRA into ``model`` and freeze all else but the heads; the new modules by their layers' paths.

    Raises AdapterError when the rank is not positive, a target or head is none of the model's modules, a target is no
    regular expression, a layer is of a kind that has no LoRA here, or the parts do not divide its output.
    """
    if injection.rank < 1:
        raise AdapterError(f"rank {injection.rank}: expected at least 1")
    heads = _heads(model, injection.heads)
    scaling = injection.alpha / injection.rank
    layers = {
        path: _checked(path, layer, injection.parts)
        for path, layer in chosen_layers(model, injection.targets).items()
        if not _is_in(path, heads)
    }
    if not layers:
        raise AdapterError(
            f"all that the targets name is trained whole, as part of {', '.join(heads)}; choose other targets"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad = _is_in(name, heads)
    return {
        path: attach(layer, Lora(layer, injection.rank, scaling, injection.dropout, injection.parts))
        for path, layer in layers.items()
    }


def attach(layer: nn.Module, factors: Lora) -> Lora:
    """Make ``factors`` part of the layer, which has none yet."""
    layer.add_module(CHILD, factors.to(next(layer.parameters()).device))
    layer.register_forward_hook(_add_update)
    return factors


def merge(model: nn.Module) -> None:
    """Put ``W0 + scaling · B · A`` in W0's place, computed in float32 and rounded once, and keep W0 aside."""
    for path, layer, factors in adapted(model):
        if factors.kept is None:
            weight = layer.weight
            exact = changed(factors.update(path), np.asarray(weight.detach().float().cpu()))
            # A parameter of the layer's own: what is tied to W0 is not to change with it.
            factors.kept, layer.weight = (
                (weight,),
                nn.Parameter(torch.from_numpy(exact).to(weight), requires_grad=False),
            )


def unmerge(model: nn.Module) -> None:
    """Put W0 back, bit for bit: it was kept. Subtracting the update would leave what two roundings cost."""
    for _, layer, factors in adapted(model):
        if factors.kept is not None:
            (layer.weight,), factors.kept = factors.kept, None


def adapted(model: nn.Module) -> Iterator[tuple[str, Any, Lora]]:
    """Each layer with LoRA: its path, the layer, its factors."""
    for path, layer in model.named_modules():
        factors = layer._modules.get(CHILD)
        if isinstance(factors, Lora):
            yield path, layer, factors


def chosen_layers(model: nn.Module, targets: tuple[str, ...] | str) -> dict[str, nn.Module]:
    """The modules that ``targets`` name, by path. Raises AdapterError for a target that names none."""
    paths = {path: module for path, module in model.named_modules() if path}
    wanted = (targets,) if isinstance(targets, str) else targets
    found: dict[str, nn.Module] = {}
    for target in wanted:
        pattern = _compiled(target if isinstance(targets, str) else rf"(.*\.)?{re.escape(target)}")
        hit = {path: module for path, module in paths.items() if pattern.fullmatch(path)}
        if not hit:
            known = ", ".join(sorted({path.rpartition(".")[2] for path, module in paths.items() if has_lora(module)}))
            raise AdapterError(
                f"target '{target}': {type(model).__name__} has no such module; its layers are called {known}"
            )
        found |= hit
    return found


def _compiled(target: str) -> re.Pattern[str]:
    try:
        return re.compile(target)
    except re.error as error:
        raise AdapterError(
            f"target '{target}': not a regular expression ({error}); give one that matches whole module paths"
        ) from error


def _heads(model: nn.Module, heads: Sequence[str]) -> list[str]:
    for head in heads:
        if not any(f".{path}".endswith(f".{head}") for path, _ in model.named_modules()):
            raise AdapterError(
                f"head '{head}': {type(model).__name__} has no such module; give the module that is to be trained whole"
            )
    return list(heads)


def _is_in(path: str, modules: Sequence[str]) -> bool:
    """Whether it is the path of one of the modules, or of what is in it."""
    return any(f".{module}." in f".{path}." for module in modules)


def _checked(path: str, layer: nn.Module, parts: Sequence[bool]) -> nn.Module:
    if CHILD in layer._modules:
        raise AdapterError(f"'{path}' has LoRA already; take a model that has none")
    check_kind(path, layer)
    if not any(parts) or _features(layer)[0] % len(parts):
        raise AdapterError(
            f"'{path}' has {_features(layer)[0]} outputs, which are not {len(parts)} parts with one chosen; give other"
            " parts"
        )
    return layer


def check_kind(path: str, layer: nn.Module) -> None:
    """Raises AdapterError unless the layer is of a kind that LoRA is for here."""
    if not has_lora(layer):
        raise AdapterError(
            f"'{path}' is a {type(layer).__name__}; LoRA here is for Linear, Conv1D and Embedding layers, choose other"
            " targets"
        )


def has_lora(layer: nn.Module) -> bool:
    """Whether the layer's forward is what its weight says; that of torch's own attention is never called."""
    if isinstance(layer, nn.Embedding):
        return type(layer) is nn.Embedding or hasattr(layer, SCALE)
    return (isinstance(layer, nn.Linear) and not isinstance(layer, NonDynamicallyQuantizableLinear)) or type(
        layer
    ).__name__ == "Conv1D"


def _features(layer: Any) -> tuple[int, int]:
    """(outputs, inputs) of a layer; an embedding's inputs are its rows."""
    rows, columns = layer.weight.shape
    return (rows, columns) if isinstance(layer, nn.Linear) else (columns, rows)


def _add_update(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    factors = cast("Lora", layer.get_submodule(CHILD))
    if factors.kept is not None:
        return output
    update: Tensor = factors(layer, inputs[0]) * getattr(layer, SCALE, 1.0)
    return (output + update).to(output.dtype)
