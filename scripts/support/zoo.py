"""Many small models with adapters of the kinds that fit them, each merged and held against PEFT's unmerged forward.

The merged folder is loaded by plain ``from_pretrained``: what is not in it, or is called otherwise, shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from lora.formats.read import ReadOptions
from lora.merging.checkpoint import Storing
from lora.merging.several import Blending
from lora.merging.to_folder import Sources, merge_folder
from lora.modules.base_structure import ask_transformers

BOUND = 2e-5  # of the largest output, in float32
LABELS, VOCABULARY = 3, 96
Inputs = Callable[[Any], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """A base of class ``saved`` and an adapter trained in the class ``trained``.

    ``peft_type`` and ``settings`` make the adapter's configuration. ``peft_is_wrong`` says in words where PEFT's own
    merge differs from its unmerged forward.
    """

    name: str
    config: Callable[[], Any]
    saved: str
    trained: str
    inputs: Inputs
    settings: Mapping[str, Any]
    peft_type: str = "LoraConfig"
    labels: bool = False
    peft_is_wrong: str = ""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Outcome:
    """Of the largest output: how far the merged model is from the unmerged one, and how far the adapter moved it.

    ``equal`` of ``tensors`` are bit for bit as in PEFT's merge; ``theirs`` is how far that one is from the unmerged.
    """

    difference: float
    moved: float
    theirs: float
    equal: int
    tensors: int
    unequal: tuple[str, ...] = field(default=(), repr=False)


def check(case: Case, folder: Path, only_written_down: bool = False) -> Outcome:
    """Make the base and the adapter in ``folder``, merge, load, and compare."""
    base, adapter, merged = folder / "base", folder / "adapter", folder / "merged"
    save_base(case, base)
    wrapped, plain = save_adapter(case, base, adapter)
    sources = Sources(base, ((adapter, 1.0),), ReadOptions())
    ask = None if only_written_down else ask_transformers
    merge_folder(sources, merged, Storing(), Blending(), ask=ask)
    return compare(case, plain, wrapped, merged)


def save_base(case: Case, folder: Path) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, case.saved)(case.config())
    disturb(model.parameters(), 0.05)
    quietly(lambda: model.save_pretrained(folder))


def save_adapter(case: Case, base: Path, folder: Path) -> tuple[Any, Any]:
    """The unmerged model and the base's outputs; the adapter is written, none of its tensors zero."""
    torch.manual_seed(1)
    model = load(case, base, **({"num_labels": LABELS} if case.labels else {}))
    inputs = case.inputs(model)
    plain = output(model, inputs)
    config = getattr(peft, case.peft_type)(**case.settings)
    wrapped = quietly(lambda: peft.get_peft_model(model, config)).eval()
    disturb((parameter for parameter in wrapped.parameters() if parameter.requires_grad), 0.1)
    quietly(lambda: wrapped.save_pretrained(str(folder)))
    return wrapped, plain


def compare(case: Case, plain: torch.Tensor, wrapped: Any, merged: Path) -> Outcome:
    inputs = case.inputs(wrapped.base_model.model)
    expected = output(wrapped, inputs)
    ours = load(case, merged)
    theirs = quietly(wrapped.merge_and_unload).eval()
    scale = float(expected.abs().max())
    mine, other = dict(ours.state_dict()), dict(theirs.state_dict())
    unequal = tuple(name for name in other if name not in mine or not torch.equal(mine[name], other[name]))
    return Outcome(
        difference=float((output(ours, inputs) - expected).abs().max()) / scale,
        moved=float((plain - expected).abs().max()) / scale,
        theirs=float((output(theirs, inputs) - expected).abs().max()) / scale,
        equal=len(other) - len(unequal),
        tensors=len(other),
        unequal=unequal,
    )


def load(case: Case, folder: Path, **settings: Any) -> Any:
    """As a user loads it; float32, so that only the merge's own rounding shows."""
    return quietly(lambda: getattr(transformers, case.trained).from_pretrained(folder, **settings)).eval()


def output(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The first tensor that the model gives: logits, or hidden states."""
    with torch.no_grad():
        answer = model(**inputs)
    for name in ("logits", "start_logits", "last_hidden_state", "image_embeds", "text_embeds"):
        value = getattr(answer, name, None)
        if value is not None:
            return value  # type: ignore[no-any-return]
    return answer if isinstance(answer, torch.Tensor) else answer[0]


def disturb(parameters: Any, scale: float) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter += scale * torch.randn_like(parameter)


def quietly(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()
